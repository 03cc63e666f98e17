"""How a model can be read through a key-value cache, found by running it on a few tokens.

Most causal language models of transformers give the same logits for a text whether they read it
at once, in two passes through a cache, or beside longer texts with padding in front. Some do not:
models that count positions themselves ignore `position_ids`, state-space models continue by single
tokens, others have no cache at all. A few short passes show which it is, once for each loaded base.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trans_peft.errors import UnsupportedModelError
from trans_peft.rounding import difference_beyond_rounding
from trans_peft.validation.decoding.batching import is_out_of_memory
from trans_peft.validation.decoding.prefixes import CacheSupport, PrefixReader, PromptPart

__all__ = ["cache_support"]

_SHORT, _LONG, _CONTINUATION = 5, 12, 3
"""Lengths in tokens of the probe's prompts and of what follows them."""

_ROUNDINGS = 8  # padding changes how the kernels of a whole model group their sums

_FASTEST_FIRST = tuple(
    CacheSupport(batched, positions, continues)
    for continues in (True, False)
    for batched, positions in ((True, True), (False, True), (False, False))
)
_found: "WeakKeyDictionary[nn.Module, CacheSupport]" = WeakKeyDictionary()


def cache_support(model: nn.Module) -> CacheSupport:
    """Return the fastest way to read a model that gives the logits of its own forward pass.

    The model must be in evaluation mode. The result belongs to the base: adapters share it.
    Raises UnsupportedModelError for a model that cannot be read through a cache in any way.
    """
    base = _base_of(model)
    if base not in _found:
        with torch.no_grad():
            support = _probed(base)
        if (
            support is None
        ):  # weights of the base or of this adapter are broken: decoding reports it
            return CacheSupport()
        _found[base] = support
    return _found[base]


def _base_of(model: nn.Module) -> nn.Module:
    """Return the model under PEFT's wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def _probed(model: nn.Module) -> CacheSupport | None:
    """Return the first support that gives the model's own logits; None if these are not finite."""
    try:
        short, long = _texts(model)
        expected = [_logits(model, text) for text in (short, long)]
    except Exception as error:  # whatever a model raises on token ids alone
        if is_out_of_memory(error):
            raise
        raise _unsupported(model, f"{type(error).__name__}: {error}") from error
    if not all(torch.isfinite(logits).all() for logits in expected):
        return None
    reasons = []
    for support in _FASTEST_FIRST:
        try:
            found = _through_cache(model, short, long, support)
        except Exception as error:  # a model without a cache, or with one of another kind
            if is_out_of_memory(error):
                raise
            reasons.append(f"{type(error).__name__}: {error}")
        else:
            if all(
                difference_beyond_rounding(logits, own, _ROUNDINGS) is None
                for logits, own in zip(found, expected, strict=True)
            ):
                return support
            reasons.append("its logits differ from those of one pass over the whole text")
    raise _unsupported(model, reasons[-1])


def _texts(model: nn.Module) -> tuple[list[int], list[int]]:
    """Return two texts from the middle of the vocabulary, where no special tokens are."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    size = embeddings.weight.shape[0]
    ids = [size // 4 + i * 7 % max(size // 2, 1) for i in range(_SHORT + _LONG + 2 * _CONTINUATION)]
    return ids[: _SHORT + _CONTINUATION], ids[_SHORT + _CONTINUATION :]


def _logits(model: nn.Module, text: list[int]) -> torch.Tensor:
    """Return the logits of the last prompt token and of the continuation, from one plain pass."""
    ids = torch.tensor([text], device=next(model.parameters()).device)
    return model(input_ids=ids, return_dict=True).logits[0, -_CONTINUATION - 1 :]


def _through_cache(
    model: nn.Module, short: list[int], long: list[int], support: CacheSupport
) -> list[torch.Tensor]:
    """Return the same logits from two passes: the prompts, then their continuations."""
    found: list[torch.Tensor] = []
    reader = PrefixReader(model, support)
    for texts in [[short, long]] if support.batched else [[short], [long]]:
        prompts = [text[:-_CONTINUATION] for text in texts]
        out = reader.read([PromptPart(0, prompt) for prompt in prompts], None, 0)
        logits = [out.logits[:, -1:]]
        columns, width = max(map(len, prompts)), _CONTINUATION if support.continues else 1
        for start in range(0, _CONTINUATION, width):
            parts = [
                PromptPart(len(prompt) + start, (), text[len(prompt) + start :][:width])
                for prompt, text in zip(prompts, texts, strict=True)
            ]
            out = reader.read(parts, out.past_key_values, columns + start)
            logits.append(out.logits)
        found += torch.cat(logits, 1)
    return found


def _unsupported(model: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be evaluated",
        expected="a causal language model that continues a text from a key-value cache",
        found=reason,
        do="use a decoder-only model with a cache (Llama, Qwen, GPT-2, OPT, ...)",
    )
