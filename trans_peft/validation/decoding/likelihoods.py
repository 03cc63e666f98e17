"""Compute the log-likelihoods of choices and select the likeliest, without decoding.

The log-likelihood of a choice is the sum of log p(token | previous tokens) over the tokens of the
choice, as in lm-evaluation-harness. `rules.multiple_choice.Measure` lists the measures that can be
compared. A prompt is processed once for all of its choices, and a prefix that all prompts share
once for all items. Prompts of similar length share a batch, and logits are computed only for the
tokens of the choices.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from trans_peft.data import Example
from trans_peft.errors import EvaluationError
from trans_peft.ports import TokenScore
from trans_peft.validation.decoding.batching import (
    DEFAULT_BATCH_SIZE,
    Progress,
    evaluating,
    in_batches,
)
from trans_peft.validation.decoding.cache_support import cache_support
from trans_peft.validation.decoding.prefixes import PrefixReader, PromptPart
from trans_peft.validation.decoding.sampling import NEAR_TIE
from trans_peft.validation.rules.multiple_choice import Measure

__all__ = ["Choices", "choose", "log_likelihoods", "token_scores"]

_ROWS = 4  # most continuations per question of a batch; they are shorter than the prompts
_MAX_LOGITS = 2**27  # half a gigabyte in fp32


class Choices(NamedTuple):
    """The chosen texts, and whether another choice was within rounding of each."""

    texts: list[str]
    near_ties: list[bool]


def choose(
    examples: Sequence[Example],
    choices: Sequence[Sequence[Sequence[int]]],
    found: Sequence[Sequence[float]],
    measure: Measure,
) -> Choices:
    """Return each example's likeliest choice, the first one of equally likely choices.

    `choices` are the examples' choices as token ids, and `found` their log-likelihoods.
    """
    best, ties = [], []
    for example, ids, sums in zip(examples, choices, found, strict=True):
        lengths = {
            Measure.SUM: [1] * len(sums),
            Measure.PER_TOKEN: [len(choice) for choice in ids],
            Measure.PER_CHARACTER: [max(len(choice.strip()), 1) for choice in example.choices],
        }[measure]
        likelihoods = [total / length for total, length in zip(sums, lengths, strict=True)]
        most = max(likelihoods)
        best.append(example.choices[likelihoods.index(most)])
        # The log-likelihood of each token moves by up to NEAR_TIE, in both of two compared choices.
        within = 2 * NEAR_TIE * max(len(i) / n for i, n in zip(ids, lengths, strict=True))
        ties.append(sum(most - one <= within for one in likelihoods) > 1)
    return Choices(best, ties)


def log_likelihoods(
    model: nn.Module,
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    adapters: Sequence[str | None] | None = None,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[list[float]]:
    """Return the log-likelihood, in nats, of each continuation of each prompt.

    `questions` are pairs of a prompt and its continuations, as token ids; none may be empty. A
    batch has `batch_size` questions, or fewer if they have many or long continuations. `adapters`
    is as in `generate`. The model's training modes are restored. Raises EvaluationError if logits
    are not finite or a single question does not fit into memory.
    """

    def tokens(i: int) -> int:
        prompt, continuations = questions[i]
        return len(prompt) + max(map(len, continuations))

    order = sorted(range(len(questions)), key=tokens, reverse=True)
    names = [None] * len(questions) if adapters is None else adapters

    def answer(batch: Sequence[int]) -> list[list[float]]:
        # Rows of one adapter side by side, so that a layer takes them as one slice.
        rows = sorted(batch, key=lambda i: names[i] or "")
        found = _log_likelihoods(reader, [questions[i] for i in rows], [names[i] for i in rows])
        of = dict(zip(rows, found, strict=True))
        return [of[i] for i in batch]

    with evaluating(model), torch.no_grad():
        prompts = [prompt for prompt, _ in questions]
        reader = PrefixReader(model, cache_support(model), prompts, adapters)
        if not reader.support.batched:
            batch_size = 1
        found = in_batches(
            order,
            answer,
            size=_batch_size(model, questions, batch_size or DEFAULT_BATCH_SIZE),
            describe=lambda i: f"a prompt of {len(questions[i][0])} tokens and its choices",
            on_progress=on_progress,
        )
    of = dict(zip(order, found, strict=True))
    return [of[i] for i in range(len(questions))]


def token_scores(
    model: nn.Module,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int | None = None,
) -> list[list[TokenScore]]:
    """Return the log-probability, in nats, of each given token of each (context, tokens).

    Contexts may not be empty. Raises what `log_likelihoods` raises.
    """
    order = sorted(
        (i for i, (_, tokens) in enumerate(texts) if tokens),
        key=lambda i: -sum(map(len, texts[i])),
    )
    with evaluating(model), torch.no_grad():
        reader = PrefixReader(model, cache_support(model))

        def read(batch: Sequence[int]) -> list[list[TokenScore]]:
            parts = [PromptPart(0, texts[i][0], texts[i][1][:-1]) for i in batch]
            logits = reader.read(parts, None, 0).logits
            return [_scores(logits[row], texts[i][1]) for row, i in enumerate(batch)]

        vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1)
        longest = max((len(texts[i][1]) for i in order), default=1)
        size = min(batch_size or DEFAULT_BATCH_SIZE, max(1, _MAX_LOGITS // (vocabulary * longest)))
        found = in_batches(
            order,
            read,
            size=size if reader.support.batched else 1,
            describe=lambda i: f"a text of {sum(map(len, texts[i]))} tokens",
        )
    of = dict(zip(order, found, strict=True))
    return [of.get(i, []) for i in range(len(texts))]


def _scores(logits: torch.Tensor, tokens: Sequence[int]) -> list[TokenScore]:
    """Return the scores of tokens under the first of these logits (tokens, vocabulary)."""
    log_p = logits[: len(tokens)].float().log_softmax(-1)
    own = log_p.gather(-1, torch.tensor(tokens, device=log_p.device)[:, None])[:, 0]
    if not torch.isfinite(own).all():
        raise _not_finite(own[~torch.isfinite(own)][0].item())
    best = log_p.argmax(-1).tolist()
    return [
        TokenScore(value, token == likeliest)
        for value, token, likeliest in zip(own.tolist(), tokens, best, strict=True)
    ]


def _not_finite(value: float) -> EvaluationError:
    return EvaluationError(
        "the model's logits are not finite",
        found=f"{value} as a log-likelihood",
        do="check the weights of base and adapter, and whether the dtype overflows",
    )


def _batch_size(
    model: nn.Module,
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    max_size: int,
) -> int:
    """Return the number of questions in a batch, which bounds its rows and its logits."""
    rows = max((len(continuations) for _, continuations in questions), default=1)
    longest = max((len(c) for _, continuations in questions for c in continuations), default=1)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1)
    by_logits = _MAX_LOGITS // (vocabulary * rows * longest)
    return max(1, min(max_size, _ROWS * max_size // rows, by_logits))


def _log_likelihoods(
    reader: PrefixReader,
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    adapters: Sequence[str | None],
) -> list[list[float]]:
    read = _behind_prompts if reader.support.continues else _in_one_pass
    sums = read(reader, questions, adapters)
    broken = next((total for found in sums for total in found if not -math.inf < total <= 0), None)
    if broken is not None:
        raise _not_finite(broken)
    return sums


def _behind_prompts(
    reader: PrefixReader,
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    adapters: Sequence[str | None],
) -> list[list[float]]:
    """Read each prompt once, and its continuations behind it."""
    cache, columns, cached = reader.begin([prompt for prompt, _ in questions], adapters)
    parts = [
        PromptPart(cached_tokens, prompt[cached_tokens:], adapter=adapter)
        for (prompt, _), cached_tokens, adapter in zip(questions, cached, adapters, strict=True)
    ]
    out = reader.read(parts, cache, columns)
    columns += max(len(part.certain) for part in parts)
    log_p = out.logits[:, -1].float().log_softmax(-1)
    sums = [
        [log_p[i, c[0]].item() for c in continuations]
        for i, (_, continuations) in enumerate(questions)
    ]
    # Continuations with more than one token, a row each, as (question, continuation).
    longer = [
        (i, j)
        for i, (_, continuations) in enumerate(questions)
        for j, continuation in enumerate(continuations)
        if len(continuation) > 1
    ]
    if longer:
        owners = torch.tensor([i for i, _ in longer], device=reader.device)
        out.past_key_values.reorder_cache(owners)
        parts = [
            PromptPart(len(questions[i][0]), (), questions[i][1][j][:-1], adapters[i])
            for i, j in longer
        ]
        logits = reader.read(parts, out.past_key_values, columns).logits
        for row, (i, j) in enumerate(longer):
            sums[i][j] += _sum(logits[row], questions[i][1][j][1:])
    return sums


def _in_one_pass(
    reader: PrefixReader,
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    adapters: Sequence[str | None],
) -> list[list[float]]:
    """Read each prompt again with every continuation."""
    sums = []
    for (prompt, continuations), adapter in zip(questions, adapters, strict=True):
        parts = [PromptPart(0, prompt, choice[:-1], adapter) for choice in continuations]
        logits = reader.read(parts, None, 0).logits
        sums.append([_sum(row, c) for row, c in zip(logits, continuations, strict=True)])
    return sums


def _sum(logits: torch.Tensor, ids: Sequence[int]) -> float:
    """Return the log-likelihood of `ids` under the first of these logits (tokens, vocabulary)."""
    log_p = logits[: len(ids)].float().log_softmax(-1)
    return log_p.gather(-1, torch.tensor(ids, device=logits.device)[:, None]).sum().item()
