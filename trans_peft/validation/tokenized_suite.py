"""Check a suite's items and tokenize them, once for any number of adapters on a base."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trans_peft.data import Example, end_of_turn, prompt_ids, token_ids
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import DataError, listed_lines
from trans_peft.text.answers import decode_ids
from trans_peft.validation.scoring import RULES, make_scorer

__all__ = ["TokenizedSuite", "prepare", "with_answers"]

_SHOWN = 20
_CUT = (
    "the prompt is tokenized differently at its end: move the white space from the end of the "
    "prompt to the start of the answer"
)


@dataclass(frozen=True)
class TokenizedSuite:
    """The items of a suite as token ids, in a fixed order.

    Attributes:
        prompts: token ids of each item's prompt.
        expected: token ids of each item's right answer; empty for a `choice` suite.
        choices: token ids of each item's choices; empty for all other suites.
        is_right: `is_right(answer, reference)` of the suite's scoring rule, True or False; in a
            suite with degrees the degree from 0.0 to 1.0.
        exact: the decoded text of `expected` where it differs from the right answer's text (by a
            normalizer, or a space after a special token), else None.
        end_tokens: tokens that end an answer, in addition to those of the model and the tokenizer.
    """

    suite: Suite
    tokenizer: Any
    examples: tuple[Example, ...]
    prompts: tuple[list[int], ...]
    expected: tuple[list[int], ...]
    choices: tuple[list[list[int]], ...]
    is_right: Callable[[str, str], bool | float]
    exact: tuple[str | None, ...]
    end_tokens: frozenset[int]

    def only(self, ids: Sequence[str]) -> "TokenizedSuite":
        """Return the items with these ids, in this order. KeyError for an unknown id."""
        number = {example.id: i for i, example in enumerate(self.examples)}
        chosen = [number[id_] for id_ in ids]
        return replace(
            self,
            examples=tuple(self.examples[i] for i in chosen),
            prompts=tuple(self.prompts[i] for i in chosen),
            expected=tuple(self.expected[i] for i in chosen),
            choices=tuple(self.choices[i] for i in chosen),
            exact=tuple(self.exact[i] for i in chosen),
        )

    def is_correct(self, number: int, answer: str) -> bool | float:
        """Whether an answer to the item at a position is right by the suite's rule, or its degree.

        An answer with exactly the tokens of the right answer is right, also if the tokenizer
        decodes them to another text.
        """
        example, exact = self.examples[number], self.exact[number]
        found = self.is_right(answer, example.reference or example.completion)
        if exact is None or found >= 1:
            return found
        return max(found, self.is_right(answer, exact))

    def drafts(self, answers: Mapping[str, str]) -> list[list[int]]:
        """Return the token ids of each expected answer: that in `answers`, else the right one.

        `answers` are texts by item id. A suite with several answers to an item has as many drafts
        of it, one after the other; the texts are JSON lists of them.
        """
        samples = self.suite.samples
        drafts = [list(ids) for ids in self.expected for _ in range(samples)]
        known = [i for i, example in enumerate(self.examples) if example.id in answers]
        pairs = []
        for i in known:
            text = answers[self.examples[i].id]
            texts = json.loads(text) if samples > 1 else [text]
            pairs += [(self.examples[i], self.prompts[i], one) for one in texts]
        places = [i * samples + number for i in known for number in range(samples)]
        for place, whole in zip(places, with_answers(self.tokenizer, pairs), strict=True):
            drafts[place] = whole[len(self.prompts[place // samples]) :]
        return drafts


def prepare(
    tokenizer: Any,
    suite: Suite,
    examples: Sequence[Example],
    *,
    context: int | None,
    template: str | None = None,
    may_lack: Collection[str] = (),
) -> TokenizedSuite:
    """Check and tokenize a suite's items.

    `context` is the model's context length in tokens (None: unlimited). Chats are rendered with
    `template`, the adapter's, or by default with the tokenizer's. `may_lack` are the sandbox guards
    that may be missing on this worker.

    Raises InvalidSpecError for a suite that is not pinned or has an invalid scoring rule. Raises
    DataError with every invalid item: a repeated id, more tokens than the context, a prompt that is
    tokenized differently before the answer, missing choices, or a reference that no answer can
    match. A suite without items is a DataError too.
    """
    is_right = make_scorer(suite, may_lack)
    _ = suite.suite_sha256  # raises InvalidSpecError for a suite that is not pinned
    examples = tuple(examples[: suite.limit])
    prompts = tuple(prompt_ids(examples, tokenizer, template))
    answers = [e.choices if suite.is_choice else (e.completion,) for e in examples]
    pairs = [
        (example, prompt, answer)
        for example, prompt, item_answers in zip(examples, prompts, answers, strict=True)
        for answer in item_answers
    ]
    flat = iter(with_answers(tokenizer, pairs))
    wholes = [[next(flat) for _ in item_answers] for item_answers in answers]
    problems = [*_repeated_ids(examples)]
    for example, prompt, item_answers in zip(examples, prompts, wholes, strict=True):
        if problem := _problem(suite, example, prompt, item_answers, context):
            problems.append(f"{example.location}: {problem}")
        try:
            is_right("", example.reference or example.completion)
        except DataError as error:
            problems.append(f"{example.location}: {error}")
    behind = [
        [whole[len(prompt) :] for whole in item_answers]
        for prompt, item_answers in zip(prompts, wholes, strict=True)
    ]
    expected = tuple([] if suite.is_choice else ids[0] for ids in behind)
    if RULES[suite.scoring.partition(":")[0]].is_literal:
        problems += _unreachable_references(tokenizer, suite, examples, prompts, expected)
    _refuse(suite, examples, problems)
    return TokenizedSuite(
        suite=suite,
        tokenizer=tokenizer,
        examples=examples,
        prompts=prompts,
        expected=expected,
        choices=tuple(ids if suite.is_choice else [] for ids in behind),
        is_right=is_right,
        exact=tuple(
            _exact(tokenizer, example, ids, is_right)
            for example, ids in zip(examples, expected, strict=True)
        ),
        end_tokens=_end_tokens(tokenizer, suite, examples, template),
    )


def with_answers(
    tokenizer: Any, pairs: Sequence[tuple[Example, Sequence[int], str]]
) -> list[list[int]]:
    """Return the token ids of prompt and answer of each (example, prompt ids, answer).

    A text is tokenized together with its answer, so the tokens of the prompt may differ from
    `prompt ids`. The answer of a chat is tokenized separately.
    """
    texts = [answer if e.messages is not None else e.prompt + answer for e, _, answer in pairs]
    wholes: list[list[int]] = [[] for _ in pairs]
    for chat in (False, True):
        chosen = [i for i, (e, _, _) in enumerate(pairs) if (e.messages is not None) == chat]
        if chosen:
            cut = token_ids([texts[i] for i in chosen], tokenizer, add_special_tokens=not chat)
            for i, ids in zip(chosen, cut, strict=True):
                wholes[i] = [*pairs[i][1], *ids] if chat else list(ids)
    return wholes


def _exact(
    tokenizer: Any, example: Example, ids: list[int], is_right: Callable[[str, str], bool | float]
) -> str | None:
    """Return the decoded text of the right answer if it differs and is a valid reference."""
    if not ids or example.reference or tokenizer.unk_token_id in ids:
        return None
    text = decode_ids(tokenizer, ids)
    try:
        is_right("", text)
    except DataError:
        return None
    return None if text == example.completion else text


def _end_tokens(
    tokenizer: Any, suite: Suite, examples: Sequence[Example], template: str | None
) -> frozenset[int]:
    chat = next((example for example in examples if example.messages is not None), None)
    if chat is None or suite.is_choice:
        return frozenset()
    end = end_of_turn(chat, tokenizer, template)
    return frozenset() if end is None else frozenset({end})


def _repeated_ids(examples: Sequence[Example]) -> Iterator[str]:
    for id_, count in Counter(example.id for example in examples).items():
        if count > 1:
            yield f"id {excerpt(id_, 60)}: {count} items have this id"


def _problem(
    suite: Suite,
    example: Example,
    prompt: Sequence[int],
    wholes: Sequence[Sequence[int]],
    context: int | None,
) -> str | None:
    """Return why an item is invalid, None if it is not.

    `wholes` are the token ids of the prompt with each of the answers.
    """
    if not prompt:
        return "its prompt has no tokens"
    if suite.is_choice:
        return _choice_problem(example, prompt, wholes, context)
    most = len(prompt) + suite.max_new_tokens
    if context is not None and most > context:
        return (
            f"its prompt of {len(prompt)} tokens and max_new_tokens={suite.max_new_tokens} are "
            f"{most} tokens, but the context is {context}"
        )
    # With a separate reference, the completion is only one of many right answers.
    if not example.reference and wholes[0][: len(prompt)] != prompt:
        return f"with its answer {_CUT}"
    return None


def _choice_problem(
    example: Example, prompt: Sequence[int], wholes: Sequence[Sequence[int]], context: int | None
) -> str | None:
    if not example.choices:
        return "it has no choices, which the scoring rule needs"
    for choice, whole in zip(example.choices, wholes, strict=True):
        shown = excerpt(choice, 60)
        if whole[: len(prompt)] != prompt:
            return f"with the choice {shown} {_CUT}"
        if len(whole) == len(prompt):
            return f"the choice {shown} has no tokens"
        if context is not None and len(whole) > context:
            return (
                f"with the choice {shown} it has {len(whole)} tokens, but the context is {context}"
            )
    return None


def _unreachable_references(
    tokenizer: Any,
    suite: Suite,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
) -> Iterator[str]:
    """Yield a problem for each reference that contains a stop string or has too many tokens.

    White space around a reference does not count, as in `exact_match`.
    """
    texts = [(example.reference or example.completion).strip() for example in examples]
    long = [
        i
        for i, example in enumerate(examples)
        if (example.reference or len(expected[i]) > suite.max_new_tokens)
        and "\ufffd" not in texts[i]  # a decoder writes it for any part of a character
    ]
    alone = token_ids([texts[i] for i in long], tokenizer, add_special_tokens=False)
    pairs = [(examples[i], prompts[i], f" {texts[i]}") for i in long]
    behind = with_answers(tokenizer, pairs)
    counts = {
        i: min(len(ids), len(whole) - len(prompts[i]))
        for i, ids, whole in zip(long, alone, behind, strict=True)
    }
    for i, example in enumerate(examples):
        written = texts[i] if example.reference else decode_ids(tokenizer, expected[i])
        stop = next((s for s in suite.stop if s in texts[i] and s in written.strip()), None)
        if stop is not None:
            yield (
                f"{example.location}: its reference contains the stop string {excerpt(stop)}, "
                "which ends every answer"
            )
        if tokenizer.eos_token_id in expected[i] and not example.reference:
            yield f"{example.location}: its reference contains the token that ends an answer"
        if counts.get(i, 0) > suite.max_new_tokens:
            yield (
                f"{example.location}: its reference has {counts[i]} tokens, and an answer at most "
                f"{suite.max_new_tokens} (max_new_tokens)"
            )


def _refuse(suite: Suite, examples: Sequence[Example], problems: Sequence[str]) -> None:
    if not examples:
        raise DataError(f"suite {suite.name!r} has no items", expected="at least one")
    if problems:
        raise DataError(
            f"suite {suite.name!r} has {len(problems)} problems in its items:\n    "
            + "\n    ".join(listed_lines(problems, _SHOWN))
        )
