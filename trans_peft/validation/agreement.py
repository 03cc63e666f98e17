"""Whether an adapter still says what it said, told from prompts alone: no label is read.

Two figures between an old base and a new one. Agreement: on how many prompts the greedy answer is
the same text (the hashes in two evaluations tell; no text has to be kept). KL: how far the
distribution of the next token moved along the answer that was given on the old base, in nats a
token, mean over tokens. Both say how much changed, never whether for better or worse
(docs/label-free.md has what that is worth, measured).

Of each distribution the `k` likeliest tokens on the old base are told apart and the others taken
together. That gives a lower bound of the divergence over the whole vocabulary (data processing: to
merge outcomes never raises it), and one base can be let go before the next is loaded.
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

_MOST_LOGITS = 2**27  # of one forward pass: half a gigabyte in fp32
_MOST_ROWS = 32


@dataclass(frozen=True)
class Agreement:
    """What one model (an adapter, or the bare base) said on two bases.

    `equal` of `prompts` greedy answers are the same text. `kl`: nats a token, over the `positions`
    of all answers on the old base.
    """

    prompts: int
    equal: int
    kl: float
    positions: int

    @property
    def points(self) -> float:
        """Equal answers in a hundred."""
        return 100 * self.equal / self.prompts


@dataclass(frozen=True)
class NextTokens:
    """What a model expects at each position along some answers.

    `tokens` (positions, k) are token ids, `log_p` (positions, k) their log-probabilities, `rest`
    (positions,) that of all other tokens together (-inf where there are none).
    """

    tokens: Tensor
    log_p: Tensor
    rest: Tensor


def equal_answers(old: Evaluation, new: Evaluation) -> int:
    """Return how many items got the same answer, letter by letter, in two evaluations.

    InvalidSpecError unless both asked the same items and decoded them in the same way.
    """
    check_same_questions(old, new)
    said = {item.id: item.answer_sha256 for item in old.items}
    if not all(said.values()) or not all(item.answer_sha256 for item in new.items):
        raise InvalidSpecError(f"suite {old.suite!r}: an evaluation without hashes of its answers")
    return sum(said[item.id] == item.answer_sha256 for item in new.items)


def next_tokens(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    like: NextTokens | None = None,
    k: int = 64,
) -> NextTokens:
    """Return what a model expects before each token of an answer, and after its last one.

    `pairs` are (prompt, answer) token ids; a prompt has at least one, an answer may be empty. The
    `k` likeliest tokens are told apart, or those that are in `like`, which was made of the same
    pairs. One forward pass a batch; the model is left as it was found. EvaluationError where logits
    are not finite.
    """
    starts = [0]
    for _, answer in pairs:
        starts.append(starts[-1] + len(answer) + 1)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    longest = max(len(answer) for _, answer in pairs) + 1

    def read(batch: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        chosen = [None if like is None else like.tokens[starts[i] : starts[i + 1]] for i in batch]
        logits = _logits(model, [pairs[i] for i in batch])
        return [_told_apart(*row, k) for row in zip(logits, chosen, strict=True)]

    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    with evaluating(model), torch.no_grad():
        found = in_batches(
            order,
            read,
            size=max(1, min(_MOST_ROWS, _MOST_LOGITS // (vocabulary * longest))),
            describe=lambda i: f"a prompt and its answer, {sum(map(len, pairs[i]))} tokens",
        )
    by_pair = dict(zip(order, found, strict=True))
    tokens, log_p, rest = (
        torch.cat([by_pair[i][part] for i in range(len(pairs))]) for part in range(3)
    )
    return NextTokens(tokens, log_p, rest)


def mean_kl(old: NextTokens, new: NextTokens) -> float:
    """Return KL(old || new) in nats, mean over positions: at most that over whole vocabularies.

    `new` was made `like` the old one. InvalidSpecError otherwise.
    """
    if old.tokens.shape != new.tokens.shape or not torch.equal(old.tokens, new.tokens):
        raise InvalidSpecError(
            "two distributions over different tokens cannot be compared",
            do="pass the old ones as `like` when the new ones are made",
        )
    before = torch.cat([old.log_p, old.rest[:, None]], dim=1).double()
    after = torch.cat([new.log_p, new.rest[:, None]], dim=1).double()
    terms = torch.where(before.isinf(), 0.0, before.exp() * (before - after))
    return max(0.0, float(terms.sum(dim=1).mean()))


def _logits(model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """Return, row by row, the logits (answer + 1, vocabulary) about an answer and what follows."""
    device = next(model.parameters()).device
    rows = [[*prompt, *answer] for prompt, answer in pairs]
    width = max(map(len, rows))
    # Padded on the left, so that every answer ends in the last column. Any token will do.
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


def _told_apart(logits: Tensor, tokens: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.isfinite(logits).all():
        raise EvaluationError(
            "the model's logits are not finite",
            do="look for broken weights (base and adapter) or a dtype that overflows",
        )
    log_p = logits.log_softmax(-1)
    if tokens is None:
        tokens = log_p.topk(min(k, log_p.shape[-1]), dim=-1).indices
    tokens = tokens.to(log_p.device)
    apart = log_p.gather(-1, tokens)
    rest = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return tokens.cpu(), apart.cpu(), rest.cpu()
