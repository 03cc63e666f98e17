"""Compute the log-likelihoods of choices and select the likeliest, without decoding.

The log-likelihood of a choice is the sum of log p(token | previous tokens) over the tokens of the
choice, as in lm-evaluation-harness. `rules.multiple_choice.Measure` lists the measures that can be
compared. A prompt is processed once for all of its choices, and a prefix that all prompts share
once for all items. Prompts of similar length share a batch, and logits are computed only for the
tokens of the choices.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from trans_peft.data import Example
from trans_peft.errors import EvaluationError
from trans_peft.validation.decoding.batching import (
    DEFAULT_BATCH_SIZE,
    Progress,
    evaluating,
    in_batches,
)
from trans_peft.validation.decoding.cache_support import cache_support
from trans_peft.validation.decoding.prefixes import PrefixReader, PromptPart
from trans_peft.validation.rules.multiple_choice import Measure

__all__ = ["choose", "log_likelihoods"]

_ROWS = 4  # most continuations per question of a batch; they are shorter than the prompts
_MAX_LOGITS = 2**27  # half a gigabyte in fp32


def choose(  # noqa: PLR0913  the options of `generate`
    model: nn.Module,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    measure: Measure,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[str]:
    """Return each example's likeliest choice, the first one of equally likely choices.

    `prompts` and `choices` are the examples' token ids. The model's training modes are restored.
    Raises EvaluationError if logits are not finite or a single question does not fit into memory.
    """
    found = log_likelihoods(
        model,
        list(zip(prompts, choices, strict=True)),
        batch_size=batch_size,
        on_progress=on_progress,
    )
    best = []
    for example, ids, sums in zip(examples, choices, found, strict=True):
        lengths = {
            Measure.SUM: [1] * len(sums),
            Measure.PER_TOKEN: [len(choice) for choice in ids],
            Measure.PER_CHARACTER: [max(len(choice.strip()), 1) for choice in example.choices],
        }[measure]
        likelihoods = [total / length for total, length in zip(sums, lengths, strict=True)]
        best.append(example.choices[likelihoods.index(max(likelihoods))])
    return best


def log_likelihoods(
    model: nn.Module,
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[list[float]]:
    """Return the log-likelihood, in nats, of each continuation of each prompt.

    `questions` are pairs of a prompt and its continuations, as token ids; none may be empty. A
    batch has `batch_size` questions, or fewer if they have many or long continuations. Raises what
    `choose` raises.
    """

    def tokens(i: int) -> int:
        prompt, continuations = questions[i]
        return len(prompt) + max(map(len, continuations))

    order = sorted(range(len(questions)), key=tokens, reverse=True)
    with evaluating(model), torch.no_grad():
        reader = PrefixReader(model, cache_support(model), [prompt for prompt, _ in questions])
        if not reader.support.batched:
            batch_size = 1
        found = in_batches(
            order,
            lambda batch: _log_likelihoods(reader, [questions[i] for i in batch]),
            size=_batch_size(model, questions, batch_size or DEFAULT_BATCH_SIZE),
            describe=lambda i: f"a prompt of {len(questions[i][0])} tokens and its choices",
            on_progress=on_progress,
        )
    of = dict(zip(order, found, strict=True))
    return [of[i] for i in range(len(questions))]


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
    reader: PrefixReader, questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
) -> list[list[float]]:
    sums = (_behind_prompts if reader.support.continues else _in_one_pass)(reader, questions)
    broken = next((total for found in sums for total in found if not -math.inf < total <= 0), None)
    if broken is not None:
        raise EvaluationError(
            "the model's logits are not finite",
            found=f"{broken} as a choice's log-likelihood",
            do="check the weights of base and adapter, and whether the dtype overflows",
        )
    return sums


def _behind_prompts(
    reader: PrefixReader, questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
) -> list[list[float]]:
    """Read each prompt once, and its continuations behind it."""
    cache, columns, cached = reader.begin([prompt for prompt, _ in questions])
    parts = [
        PromptPart(cached_tokens, prompt[cached_tokens:])
        for (prompt, _), cached_tokens in zip(questions, cached, strict=True)
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
        parts = [PromptPart(len(questions[i][0]), (), questions[i][1][j][:-1]) for i, j in longer]
        logits = reader.read(parts, out.past_key_values, columns).logits
        for row, (i, j) in enumerate(longer):
            sums[i][j] += _sum(logits[row], questions[i][1][j][1:])
    return sums


def _in_one_pass(
    reader: PrefixReader, questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
) -> list[list[float]]:
    """Read each prompt again with every continuation."""
    sums = []
    for prompt, continuations in questions:
        parts = [PromptPart(0, prompt, continuation[:-1]) for continuation in continuations]
        logits = reader.read(parts, None, 0).logits
        sums.append([_sum(row, c) for row, c in zip(logits, continuations, strict=True)])
    return sums


def _sum(logits: torch.Tensor, ids: Sequence[int]) -> float:
    """Return the log-likelihood of `ids` under the first of these logits (tokens, vocabulary)."""
    log_p = logits[: len(ids)].float().log_softmax(-1)
    return log_p.gather(-1, torch.tensor(ids, device=logits.device)[:, None]).sum().item()
