"""Mark answers with a judge model: by the likelihoods of its choices, without decoding.

A judge model that puts hardly any probability on its choices does not answer the question, and the
ratio of two tiny probabilities is no mark. That is an error instead of a mark.
"""

from collections.abc import Sequence
from math import exp
from statistics import median
from typing import Any

from trans_peft.data import Example
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.judge_model import JudgeModel
from trans_peft.errors import InvalidSpecError
from trans_peft.ports import Engine
from trans_peft.validation.decoding.batching import Progress
from trans_peft.validation.tokenized_suite import prepare

__all__ = ["mark_answers"]

_LEAST_PROBABILITY = 0.01


def mark_answers(
    engine: Engine,
    tokenizer: Any,
    judge: JudgeModel,
    answers: Sequence[tuple[Example, str]],
    *,
    context: int | None,
    on_progress: Progress | None = None,
) -> list[float]:
    """Return the judge model's mark of each answer, from 0 to 1.

    `engine` runs the judge model. `answers` are pairs of an item and the answer to it. `context` is
    the model's context length in tokens.

    Raises what `prepare` and `Engine.likelihoods` raise, and InvalidSpecError if the choices have
    less than 1 % of the probability after half of the texts.
    """
    texts = [
        judge.text(item.prompt_text(), answer, item.reference or item.completion)
        for item, answer in answers
    ]
    examples = [
        Example(str(number), text, judge.choices[0], choices=judge.choices, place=item.location)
        for number, (text, (item, _)) in enumerate(zip(texts, answers, strict=True))
    ]
    suite = Suite("judge-model", judge.labeled, scoring="choice", dtype=judge.dtype)
    questions = prepare(tokenizer, suite, examples, context=context)
    found = engine.likelihoods(
        list(zip(questions.prompts, questions.choices, strict=True)), on_progress=on_progress
    )
    share = median(sum(map(exp, likelihoods)) for likelihoods in found)
    if share < _LEAST_PROBABILITY:
        raise InvalidSpecError(
            f"the judge model {judge.uri} does not answer with one of its choices",
            expected=f"at least {_LEAST_PROBABILITY:.0%} of the probability on "
            f"{', '.join(map(repr, judge.choices))}, after half of the texts",
            found=f"{share:.2g}",
            do="change `prompt` so that a choice follows it, white space included, or use another "
            "model",
        )
    return [_mark(likelihoods, judge.marks) for likelihoods in found]


def _mark(likelihoods: Sequence[float], marks: Sequence[float]) -> float:
    most = max(likelihoods)
    weights = [exp(likelihood - most) for likelihood in likelihoods]
    mean = sum(w * mark for w, mark in zip(weights, marks, strict=True)) / sum(weights)
    return min(max(mean, 0.0), 1.0)
