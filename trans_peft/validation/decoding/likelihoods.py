"""Which of its choices a model finds likeliest, item by item: no answer is decoded.

The log-likelihood of a choice is the sum of log p(token | all before it) over the choice's tokens
after the prompt, as lm-evaluation-harness computes it for multiple choice; what may be compared
instead of the sum is in `rules.choice.Measure`. A prompt is read once for all of its choices, and
what all prompts begin with once for all of them; prompts of like length share a batch, and logits
are computed for the positions of the choices only.
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
from trans_peft.validation.decoding.prefixes import PrefixReader, PromptPart
from trans_peft.validation.rules.multiple_choice import Measure

__all__ = ["choose", "log_likelihoods"]

_ROWS = 4  # of continuations for each question of a batch: they are short beside their prompt
_MOST_LOGITS = 2**27  # half a gigabyte in fp32


def choose(
    model: nn.Module,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    measure: Measure,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[str]:
    """Return each example's likeliest choice, the first of those that are equally likely.

    `prompts` and `choices` are the examples' as token ids. The model is left as
    it was found. Raises EvaluationError where logits are not finite or one question alone does not
    fit into memory.
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

    `questions` are prompts with their continuations, all of them token ids and none empty. A batch
    has `batch_size` questions, fewer where their continuations are many or long; what does not fit
    into memory is halved and tried again. Errors as `choose`.
    """

    def tokens(i: int) -> int:
        prompt, continuations = questions[i]
        return len(prompt) + max(map(len, continuations))

    order = sorted(range(len(questions)), key=tokens, reverse=True)
    with evaluating(model), torch.no_grad():
        reader = PrefixReader(model, [prompt for prompt, _ in questions])
        found = in_batches(
            order,
            lambda batch: _log_likelihoods(reader, [questions[i] for i in batch]),
            size=_questions(model, questions, batch_size or DEFAULT_BATCH_SIZE),
            told_as=lambda i: f"a prompt of {len(questions[i][0])} tokens and its choices",
            on_progress=on_progress,
        )
    of = dict(zip(order, found, strict=True))
    return [of[i] for i in range(len(questions))]


def _questions(
    model: nn.Module,
    questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    most: int,
) -> int:
    """Return how many questions share a batch: not too many rows, nor too many logits."""
    rows = max((len(continuations) for _, continuations in questions), default=1)
    longest = max((len(c) for _, continuations in questions for c in continuations), default=1)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1)
    return max(1, min(most, _ROWS * most // rows, _MOST_LOGITS // (vocabulary * rows * longest)))


def _log_likelihoods(
    reader: PrefixReader, questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
) -> list[list[float]]:
    cache, columns, cached = reader.begin([prompt for prompt, _ in questions])
    parts = [
        PromptPart(there, prompt[there:])
        for (prompt, _), there in zip(questions, cached, strict=True)
    ]
    out = reader.read(parts, cache, columns)
    columns += max(len(part.certain) for part in parts)
    log_p = out.logits[:, -1].float().log_softmax(-1)
    sums = [
        [log_p[i, c[0]].item() for c in continuations]
        for i, (_, continuations) in enumerate(questions)
    ]
    # What follows a continuation's first token: (question, continuation), a row each.
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
            rest = torch.tensor(questions[i][1][j][1:], device=reader.device)
            log_p = logits[row, : len(rest)].float().log_softmax(-1)
            sums[i][j] += log_p.gather(-1, rest[:, None]).sum().item()
    broken = next((total for found in sums for total in found if not -math.inf < total <= 0), None)
    if broken is not None:
        raise EvaluationError(
            "the model's logits are not finite",
            found=f"{broken} as a choice's log-likelihood",
            do="look for broken weights (base and adapter) or a dtype that overflows",
        )
    return sums
