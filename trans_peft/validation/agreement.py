"""Compare an adapter's outputs on two bases without labels.

There are two figures. Agreement is the share of prompts whose greedy answers are the same text on
both bases; it is computed from answer hashes, so no text has to be stored. KL is the divergence of
the next-token distribution on the new base from that on the old base, along the answer that was
given on the old base, in nats per token. Both measure how much the outputs change, not whether they
improve. docs/label-free.md contains measurements of their value.

KL is computed over the `k` most likely tokens on the old base; all other tokens are merged into one
outcome. The result is a lower bound of KL over the whole vocabulary, because merging outcomes never
increases a divergence (data processing inequality). Only `k` values per position are kept, so the
old base can be unloaded before the new one is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trans_peft.domain.evaluation import Evaluation
from trans_peft.errors import EvaluationError, InvalidSpecError
from trans_peft.validation.decoding.batching import evaluating, in_batches
from trans_peft.validation.decoding.prefixes import last_columns
from trans_peft.validation.statistics.pairing import check_same_questions

__all__ = ["Agreement", "NextTokens", "equal_answers", "mean_kl", "next_tokens"]

_MAX_LOGITS = 2**27  # in one forward pass: half a gigabyte in fp32
_MAX_ROWS = 32


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of an adapter, or of the bare base, agree on two bases.

    Attributes:
        prompts: number of prompts.
        equal: number of prompts whose greedy answers are the same text.
        kl: mean KL of the next-token distributions, in nats per token.
        positions: number of token positions in `kl`.
    """

    prompts: int
    equal: int
    kl: float
    positions: int

    @property
    def points(self) -> float:
        """Share of equal answers, in percent."""
        return 100 * self.equal / self.prompts


@dataclass(frozen=True)
class NextTokens:
    """Next-token distributions of a model at each position of some answers.

    Attributes:
        tokens: token ids, of shape (positions, k).
        log_p: log-probabilities of `tokens`, of shape (positions, k).
        rest: log-probability of all other tokens together, of shape (positions,); -inf if there are
            no others.
    """

    tokens: Tensor
    log_p: Tensor
    rest: Tensor


def equal_answers(old: Evaluation, new: Evaluation) -> int:
    """Return the number of items with exactly the same answer in two evaluations.

    Raises:
        InvalidSpecError: the evaluations differ in items or decoding, or lack answer hashes.
    """
    check_same_questions(old, new)
    old_hashes = {item.id: item.answer_sha256 for item in old.items}
    if not all(old_hashes.values()) or not all(item.answer_sha256 for item in new.items):
        raise InvalidSpecError(
            f"suite {old.suite!r}: an evaluation has items without answer hashes",
            do="evaluate the suite again with this version of trans-peft",
        )
    return sum(old_hashes[item.id] == item.answer_sha256 for item in new.items)


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
    starts = [0]
    for _, answer in pairs:
        starts.append(starts[-1] + len(answer) + 1)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    longest = max(len(answer) for _, answer in pairs) + 1

    def read(batch: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        chosen = [None if like is None else like.tokens[starts[i] : starts[i + 1]] for i in batch]
        logits = _logits(model, [pairs[i] for i in batch])
        return [_distributions(*row, k) for row in zip(logits, chosen, strict=True)]

    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    with evaluating(model), torch.no_grad():
        results = in_batches(
            order,
            read,
            size=max(1, min(_MAX_ROWS, _MAX_LOGITS // (vocabulary * longest))),
            describe=lambda i: f"a prompt and its answer, {sum(map(len, pairs[i]))} tokens",
        )
    by_pair = dict(zip(order, results, strict=True))
    tokens, log_p, rest = (
        torch.cat([by_pair[i][part] for i in range(len(pairs))]) for part in range(3)
    )
    return NextTokens(tokens, log_p, rest)


def mean_kl(old: NextTokens, new: NextTokens) -> float:
    """Return KL(old || new) in nats per token, averaged over positions.

    The result is at most the KL over the whole vocabulary.

    Raises:
        InvalidSpecError: `new` was not computed with `like=old`.
    """
    if old.tokens.shape != new.tokens.shape or not torch.equal(old.tokens, new.tokens):
        raise InvalidSpecError(
            "the two distributions are over different tokens",
            do="pass the old distributions as `like` to next_tokens for the new ones",
        )
    before = torch.cat([old.log_p, old.rest[:, None]], dim=1).double()
    after = torch.cat([new.log_p, new.rest[:, None]], dim=1).double()
    terms = torch.where(before.isinf(), 0.0, before.exp() * (before - after))
    return max(0.0, float(terms.sum(dim=1).mean()))


def _logits(model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """Return for each pair the logits of its answer and of the next token.

    Each tensor has the shape (answer length + 1, vocabulary).
    """
    device = next(model.parameters()).device
    rows = [[*prompt, *answer] for prompt, answer in pairs]
    width = max(map(len, rows))
    # Left padding puts the end of every answer into the last column. The padding token is masked.
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    kept = max(len(answer) for _, answer in pairs) + 1
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=last_columns(kept, of=width, device=device),
    ).logits
    return [logits[i, -len(answer) - 1 :].float() for i, (_, answer) in enumerate(pairs)]


def _distributions(logits: Tensor, tokens: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.isfinite(logits).all():
        raise EvaluationError(
            "the model's logits are not finite",
            do="check the weights of base and adapter for NaN, and the dtype for overflow",
        )
    log_p = logits.log_softmax(-1)
    if tokens is None:
        tokens = log_p.topk(min(k, log_p.shape[-1]), dim=-1).indices
    tokens = tokens.to(log_p.device)
    top = log_p.gather(-1, tokens)
    rest = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return tokens.cpu(), top.cpu(), rest.cpu()
