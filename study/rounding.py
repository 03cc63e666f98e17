"""Derive and measure how much the shape of a batch can change a logit.

Two shapes add the same products in different orders. In fp32 one addition rounds by at most
u = 2^-24 of its result, up or down with equal probability. The partial sums of n products a_i b_i
grow like sqrt(k), so the rounding errors add up to a standard deviation of

    u sqrt(n / 6) sqrt(sum of (a_i b_i)^2)

(N. Higham, T. Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput.
41 (2019) A2815-A2835). The effect of these errors on the logits depends on the model: a sharp
softmax increases the error of a score, a norm reduces others. It is therefore measured. Normal
errors of that size are added to every matrix product of the model, enlarged by a factor of 1024 so
that its own rounding is negligible, and the change of the logits is divided by the factor
(D. Parker, "Monte Carlo arithmetic", 1997). Both shapes round, hence a factor of sqrt(2). Six
standard deviations cover a thousand million logits.

    python -m study.rounding [--folder .study] [--base v1] [--adapter lora-16-1]

compares prompts alone with batches of 2, 8, 16 and 48 on the study's model.
"""

import argparse
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trans_peft.data import parse_examples
from trans_peft.models import load_base
from trans_peft.transfer.load_adapter import attached
from trans_peft.validation.decoding.cache_support import cache_support
from trans_peft.validation.decoding.prefixes import PrefixReader, PromptPart

__all__ = ["derived", "logits", "measured"]

_PRODUCTS = {  # operator -> the same product without a bias
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.addmm.default: torch.mm,
    torch.ops.aten.bmm.default: torch.bmm,
}
_SIZES = (2, 8, 16, 48)


class _Rounding(TorchDispatchMode):
    """Adds the rounding errors of its sums to each matrix product, enlarged by the factor `by`."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self._unit = by * 2**-24

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        if operator in _PRODUCTS:
            a, b = args[-2:]
            size = _PRODUCTS[operator](a * a, b * b).sqrt()
            out += torch.randn_like(out) * size * (self._unit * math.sqrt(a.shape[-1] / 6))
        return out


@torch.no_grad()
def logits(model: Any, asked: Sequence[list[int]], shared: Sequence[list[int]] = ()) -> Tensor:
    """Return the logits after each prompt, computed as in an evaluation: (prompts, tokens).

    The common prefix of `shared` is processed once, as that of a suite.
    """
    reader = PrefixReader(model, cache_support(model), shared)
    cache, columns, cached = reader.begin(asked)
    parts = [PromptPart(there, prompt[there:]) for prompt, there in zip(asked, cached, strict=True)]
    return reader.read(parts, cache, columns).logits[:, -1]


def derived(model: Any, prompts: Sequence[list[int]], *, by: int = 1024, draws: int = 16) -> float:
    """Return the bound for a model in fp32: the largest over all prompts and tokens.

    The model computes attention with `eager` meanwhile, because its products can be intercepted.
    """
    torch.manual_seed(5)
    own, largest = model.config._attn_implementation, 0.0
    model.set_attn_implementation("eager")
    for prompt in prompts:
        exact = logits(model, [prompt])
        with _Rounding(by):
            moved = logits(model, [prompt] * draws)
        largest = max(largest, ((moved - exact) / by).pow(2).mean(0).max().item())
    model.set_attn_implementation(own)
    return 6 * math.sqrt(2) * math.sqrt(largest)


def measured(
    model: Any, prompts: Sequence[list[int]], sizes: Sequence[int], *, share: bool
) -> float:
    """Return the largest change of a logit between a prompt alone and in batches of `sizes`.

    With `share`, the common prefix of all prompts is processed once in each batch.
    """
    alone, largest = torch.cat([logits(model, [prompt]) for prompt in prompts]), 0.0
    for size in sizes:
        batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        found = torch.cat([logits(model, b, prompts if share else ()) for b in batches])
        largest = max(largest, (found - alone).abs().max().item())
    return largest


def main() -> None:
    """Print both for the study's model, bare or with an adapter of the fleet."""
    parser = argparse.ArgumentParser(prog="python -m study.rounding")
    parser.add_argument("--folder", type=Path, default=Path(".study"))
    parser.add_argument("--base", default="v1")
    parser.add_argument("--adapter", help="an adapter of the fleet; without it, the bare base")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(options.folder / "bases" / options.base, "float32")
    rows = (options.folder / "rows" / "exceptions" / "eval.jsonl").read_bytes()
    examples = list(parse_examples(rows, "eval.jsonl"))[: max(_SIZES)]
    prompts = [example.prompt_ids(base.tokenizer) for example in examples]
    bare = base.model.eval()
    folder = options.folder / "fleet" / str(options.adapter) / "adapter"
    with attached(bare, folder) if options.adapter else nullcontext(bare) as model:
        moved = measured(model, prompts, _SIZES, share=False)
        lengths = sorted(map(len, prompts))
        print(
            f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, batches of {_SIZES}: "
            f"largest change {moved:.1e}; derived bound: {derived(model, prompts):.1e}"
        )


if __name__ == "__main__":
    main()
