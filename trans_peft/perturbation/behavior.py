"""Classify the modules of a decoder layer by running them on changed inputs.

An attention can have the same shapes as an FFN. Their behavior differs: an FFN maps each token
separately and nonlinearly; attention, convolutions and state-space models mix tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from trans_peft.perturbation.mask_site import override
from trans_peft.perturbation.side_effects import reseed
from trans_peft.rounding import difference_beyond_rounding, rounding_tolerance

__all__ = [
    "Behavior",
    "Call",
    "cloned",
    "floats_of",
    "record_calls",
    "rows_of",
    "seeded",
]


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, copied before the call."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def again(self) -> Any:
        """Repeat the call with the same random numbers."""
        args, kwargs = cloned((self.args, self.kwargs))
        return seeded(self.forward, *args, **kwargs)

    def with_noise(self, hidden: int, scale: float, *, everywhere: bool = False) -> Any:
        """Repeat the call with noise on the first row (token) of its input.

        `hidden` is the hidden size, `scale` the noise's standard deviation relative to the input's.
        With `everywhere`, the row changes in every tensor with the input's leading shape (the
        residual; keys and values of another layer).
        """

        def changed(x: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(x.shape[-1], generator=generator).to(x)
            rows = rows_of(x).clone()
            rows[0] += scale * noise * x.float().std().clamp(min=1e-3).to(x)
            return rows.view(x.shape)

        return self._with(hidden, changed, everywhere=everywhere)

    def with_equal_rows(self, hidden: int) -> Any:
        """Repeat the call with every row (token) of its tensors replaced by the first row."""

        def equal(x: torch.Tensor) -> torch.Tensor:
            return rows_of(x)[:1].expand(len(rows_of(x)), -1).reshape(x.shape)

        return self._with(hidden, equal, everywhere=True)

    def _with(
        self, hidden: int, change: Callable[[torch.Tensor], torch.Tensor], *, everywhere: bool
    ) -> Any:
        x = self.input(hidden)
        assert x is not None

        def changed(value: Any) -> Any:
            if value is x:
                return change(value)
            has_rows = isinstance(value, torch.Tensor) and value.shape[:-1] == x.shape[:-1]
            if everywhere and has_rows and value.is_floating_point():
                return change(value)
            return value

        args, kwargs = tree_map(changed, (self.args, self.kwargs))
        return Call(self.forward, args, kwargs).again()

    def input(self, hidden: int) -> torch.Tensor | None:
        """Return the first floating-point tensor of width `hidden`, else the first of any width."""
        floats = list(floats_of((self.args, self.kwargs)))
        return next((x for x in floats if x.shape[-1] == hidden), next(iter(floats), None))


@dataclass(frozen=True)
class Behavior:
    """How the output of one module depends on its input.

    Attributes:
        keeps_rows: the output has the rows of the input and the width of the hidden state. The
            other fields are meaningful only if it has.
        mixes_tokens: a change of one token changes the results of other tokens.
        is_linear: the output changes in proportion to the input.
        depends_on_input: the output changes at all; weights of zero give no change.
        is_self_contained: equal tokens give equal results, so the output depends on the tokens only
            (not on keys and values of another layer).
    """

    keeps_rows: bool
    mixes_tokens: bool = False
    is_linear: bool = False
    depends_on_input: bool = False
    is_self_contained: bool = True

    @property
    def is_per_token(self) -> bool:
        """Whether the module maps each token separately to a vector of the hidden size."""
        return self.keeps_rows and self.is_self_contained and not self.mixes_tokens

    @classmethod
    def of(cls, call: Call, hidden: int) -> "Behavior":
        """Run a module again with its recorded input, with changed and with equal tokens."""
        x = call.input(hidden)
        rows = 0 if x is None else len(rows_of(x))

        def output_rows(output: Any) -> torch.Tensor | None:
            found = (x for x in floats_of(output) if x.shape[-1] == hidden)
            return next((rows_of(x) for x in found if len(rows_of(x)) == rows), None)

        plain = output_rows(call.again())
        if plain is None:
            return cls(keeps_rows=False)
        outputs = [
            output_rows(output)
            for output in (
                call.with_noise(hidden, 1.0),
                call.with_noise(hidden, 2.0),
                call.with_noise(hidden, 1.0, everywhere=True),
                call.with_equal_rows(hidden),
            )
        ]
        once, twice, everywhere, equal = (x.float() for x in outputs if x is not None)
        first, second = once - plain.float(), twice - plain.float()
        # Rows of a matrix product differ by rounding only, depending on how kernels group them.
        rounding = (64 if plain.dtype == torch.float32 else 2) * torch.finfo(plain.dtype).eps
        others = torch.stack((first, everywhere - plain.float()))[:, 1:].flatten(1).norm(dim=1)
        bend = (second - 2 * first)[:1].norm()
        return cls(
            keeps_rows=True,
            mixes_tokens=bool((others > rounding * plain[1:].float().norm()).any()),
            is_linear=bool(0 < second[:1].norm() * rounding_tolerance(plain) > bend),
            depends_on_input=bool(second.any()),
            is_self_contained=difference_beyond_rounding(equal, equal[:1].expand_as(equal)) is None,
        )


def seeded(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with all random generators at fixed seeds."""
    reseed()
    return forward(*args, **kwargs)


def cloned(values: Any) -> Any:
    """Return a copy of nested arguments; a tensor that occurs twice is copied once."""
    copies: dict[int, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]

    return tree_map(copy, values)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Return x as (tokens, width), as a view if possible."""
    return x.reshape(-1, x.shape[-1])


def record_calls(modules: list[nn.Module], undo: ExitStack) -> dict[int, Call]:
    """Record the first call of each module by the module's id, until `undo` closes."""
    calls: dict[int, Call] = {}

    def record(module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if id(module) not in calls:
                calls[id(module)] = Call(original, *cloned((args, kwargs)))
            return original(*args, **kwargs)

        override(module, forward, undo)

    for module in modules:
        record(module)
    return calls


def floats_of(values: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors of at least two dimensions among nested values."""
    leaves, _ = tree_flatten(values)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            yield leaf
