"""Next-token distributions of a model along given answers, and their divergence.

The divergence of a distribution from another, KL(old || new), is computed over the `k` most likely
tokens of the old one; all other tokens are merged into one outcome. The result is a lower bound of
KL over the whole vocabulary, because merging outcomes never increases a divergence (data processing
inequality). Only `k` values per position are kept, so that one base can be unloaded before the
other is loaded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trans_peft.errors import EvaluationError, InvalidSpecError
from trans_peft.validation.decoding.batching import DEFAULT_BATCH_SIZE, evaluating, in_batches
from trans_peft.validation.decoding.cache_support import cache_support
from trans_peft.validation.decoding.prefixes import PrefixReader, PromptPart

__all__ = ["NextTokens", "divergences", "mean_kl", "next_tokens"]

_MAX_LOGITS = 2**27  # in one forward pass: half a gigabyte in fp32


@dataclass(frozen=True)
class NextTokens:
    """Next-token distributions of a model at some positions.

    Attributes:
        tokens: token ids, of shape (positions, k).
        log_p: log-probabilities of `tokens`, of shape (positions, k).
        rest: log-probability of all other tokens together, of shape (positions,); -inf if there are
            no others.
    """

    tokens: Tensor
    log_p: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, like: Tensor | int) -> "NextTokens":
        """Return the distributions of logits of shape (positions, vocabulary), with gradients.

        `like` are the tokens to use, of shape (positions, k), or the number of most likely ones.
        """
        log_p = logits.float().log_softmax(-1)
        if isinstance(like, int):
            like = log_p.detach().topk(min(like, log_p.shape[-1]), dim=-1).indices
        tokens = like.to(log_p.device)
        rest = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
        return cls(tokens, log_p.gather(-1, tokens), rest)

    @classmethod
    def joined(cls, parts: Sequence["NextTokens"]) -> "NextTokens":
        """Return the positions of all parts, in their order."""
        return cls(
            *(torch.cat(part) for part in zip(*(vars(p).values() for p in parts), strict=True))
        )

    def cpu(self) -> "NextTokens":
        """Return the distributions in the memory of the host."""
        return NextTokens(*(part.cpu() for part in vars(self).values()))

    def split(self, lengths: Sequence[int]) -> list["NextTokens"]:
        """Return consecutive parts with the given numbers of positions."""
        parts = zip(*(part.split(list(lengths)) for part in vars(self).values()), strict=True)
        return [NextTokens(*part) for part in parts]


def next_tokens(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    like: NextTokens | None = None,
    k: int = 64,
) -> NextTokens:
    """Return the next-token distributions before each answer token, and after the last one.

    Runs one forward pass per batch. The model's state does not change.

    Args:
        model: the model, on any device.
        pairs: token ids of (prompt, answer). Prompts must not be empty; answers may be.
        like: distributions of another model on the same pairs. Their tokens are used, so that both
            can be compared. None: the `k` most likely tokens of this model are used.
        k: number of tokens per position, if `like` is None.

    Raises:
        EvaluationError: logits are not finite.
    """
    positions = [len(answer) + 1 for _, answer in pairs]
    chosen = [k] * len(pairs) if like is None else like.tokens.split(positions)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]

    def read(batch: Sequence[int]) -> list[NextTokens]:
        parts = [PromptPart(0, *pairs[i]) for i in batch]
        logits = reader.read(parts, None, 0).logits
        return [_finite(logits[row, : positions[i]], chosen[i]) for row, i in enumerate(batch)]

    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    with evaluating(model), torch.no_grad():
        reader = PrefixReader(model, cache_support(model))
        fitting = max(1, _MAX_LOGITS // (vocabulary * max(positions)))
        found = in_batches(
            order,
            read,
            size=min(DEFAULT_BATCH_SIZE, fitting) if reader.support.batched else 1,
            describe=lambda i: f"a prompt and its answer, {sum(map(len, pairs[i]))} tokens",
        )
    by_pair = dict(zip(order, found, strict=True))
    return NextTokens.joined([by_pair[i] for i in range(len(pairs))])


def divergences(old: NextTokens, new: NextTokens) -> Tensor:
    """Return KL(old || new) at each position in nats, of shape (positions,).

    Gradients flow into `new`. Both must be over the same tokens.
    """
    kl = (old.log_p.exp() * (old.log_p - new.log_p)).sum(-1)
    has_rest = old.rest > -torch.inf
    # torch.where has gradients of both branches, so neither may compute with an infinity.
    terms = old.rest.exp() * (
        old.rest.masked_fill(~has_rest, 0.0) - new.rest.masked_fill(~has_rest, 0.0)
    )
    return kl + torch.where(has_rest, terms, 0.0)


def mean_kl(old: NextTokens, new: NextTokens) -> float:
    """Return KL(old || new) in nats per token, averaged over positions.

    The result is at most the KL over the whole vocabulary.

    Raises:
        InvalidSpecError: `new` was not computed with `like=old`.
        EvaluationError: a divergence is not a number.
    """
    if old.tokens.shape != new.tokens.shape or not torch.equal(old.tokens, new.tokens):
        raise InvalidSpecError(
            "the two distributions are over different tokens",
            do="pass the old distributions as `like` to next_tokens for the new ones",
        )
    exact = (NextTokens(p.tokens, p.log_p.double(), p.rest.double()) for p in (old, new))
    mean = divergences(*exact).mean().item()
    if math.isnan(mean):
        raise EvaluationError(
            "the divergence of two models is not a number",
            do="check the weights of base and adapter for infinite values",
        )
    return max(0.0, mean)


def _finite(logits: Tensor, like: Tensor | int) -> NextTokens:
    if not torch.isfinite(logits).all():
        raise EvaluationError(
            "the model's logits are not finite",
            do="check the weights of base and adapter for NaN, and the dtype for overflow",
        )
    return NextTokens.of(logits, like).cpu()
