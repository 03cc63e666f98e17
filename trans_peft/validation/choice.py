"""Which of its choices a model finds likeliest, item by item: no answer is decoded.

The log-likelihood of a choice is the sum of log p(token | all before it) over the choice's tokens
after the prompt, as lm-evaluation-harness computes it for multiple choice; what may be compared
instead of the sum is in `rules.choice.Measure`. Choices of like length share a batch, and logits
are computed for the positions of the choices only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trans_peft.data import Example
from trans_peft.errors import EvaluationError
from trans_peft.validation.generation import DEFAULT_BATCH_SIZE, Progress, evaluating
from trans_peft.validation.rules.choice import Measure

__all__ = ["choice_ids", "choose", "log_likelihoods"]


def choose(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    measure: Measure,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[str]:
    """Return each example's likeliest choice, the first of those that are equally likely.

    The model is left as it was found. Raises EvaluationError where logits are not finite or one
    choice alone does not fit into memory.
    """
    prompts = [example.prompt_ids(tokenizer) for example in examples]
    asked = [
        (number, choice, choice_ids(tokenizer, examples[number], choice, prompts[number]))
        for number in range(len(examples))
        for choice in examples[number].choices
    ]
    pairs = [(prompts[number], ids) for number, _, ids in asked]
    sums = log_likelihoods(model, pairs, batch_size=batch_size, on_progress=on_progress)
    best: dict[int, tuple[float, str]] = {}
    for (number, choice, ids), total in zip(asked, sums, strict=True):
        lengths = {Measure.PER_TOKEN: len(ids), Measure.PER_CHARACTER: len(choice.strip())}
        likelihood = total / max(lengths.get(measure, 1), 1)
        if number not in best or likelihood > best[number][0]:
            best[number] = (likelihood, choice)
    return [best[number][1] for number in range(len(examples))]


def choice_ids(tokenizer: Any, example: Example, choice: str, prompt: Sequence[int]) -> list[int]:
    """Return the token ids of a choice after the prompt.

    What follows a text is cut together with it; a chat's answer stands by itself in its template.
    """
    if example.messages is not None:
        return list(tokenizer(text=choice, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text=example.prompt + choice)["input_ids"])[len(prompt) :]


def log_likelihoods(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int | None = None,
    on_progress: Progress | None = None,
) -> list[float]:
    """Return the log-likelihood, in nats, of each continuation after its prompt.

    `pairs` are (prompt, continuation) token ids, neither of them empty. A batch that does not fit
    into memory is halved and tried again. Errors as `choose`.
    """
    size = batch_size or DEFAULT_BATCH_SIZE
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])), reverse=True)
    sums, done = [0.0] * len(pairs), 0
    with evaluating(model), torch.no_grad():
        while done < len(order):
            batch = order[done : done + size]
            try:
                found = _log_likelihoods(model, [pairs[i] for i in batch])
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise EvaluationError(
                        "out of memory with a single choice",
                        found=f"{sum(map(len, pairs[batch[0]]))} tokens with its prompt",
                        do="shorten the item, or use a larger device",
                    ) from None
                size = len(batch) // 2
                continue
            for i, total in zip(batch, found, strict=True):
                sums[i] = total
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(order))
    return sums


def _log_likelihoods(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[float]:
    device = next(model.parameters()).device
    rows = [[*prompt, *continuation] for prompt, continuation in pairs]
    width = max(map(len, rows))
    # Padded on the left, so that every continuation ends in the last column. Any token will do.
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    kept = max(len(continuation) for _, continuation in pairs) + 1
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=kept,
    ).logits
    # The logits of a position are about the token after it.
    log_p = logits[:, -kept:-1].float().log_softmax(-1)
    tokens = ids[:, -kept + 1 :] if kept > 1 else ids[:, :0]
    of_tokens = log_p.gather(-1, tokens[:, :, None])[:, :, 0]
    sums = [of_tokens[i, -len(c) :].sum().item() for i, (_, c) in enumerate(pairs)]
    broken = next((total for total in sums if not -float("inf") < total <= 0), None)
    if broken is not None:
        raise EvaluationError(
            "the model's logits are not finite",
            found=f"{broken} as a choice's log-likelihood",
            do="look for broken weights (base and adapter) or a dtype that overflows",
        )
    return sums
