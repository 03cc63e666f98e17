"""A suite's items as one tokenizer cuts them: checked and made once, for any number of adapters."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trans_peft.data import Example, end_of_turn, prompt_ids, token_ids
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import DataError, listed_lines
from trans_peft.text.answers import spoken
from trans_peft.validation.scoring import RULES, make_scorer

__all__ = ["TokenizedSuite", "prepare", "with_answers"]

_SHOWN = 20
_CUT = (
    "the end of the prompt becomes other tokens: move the white space from the prompt's end to the "
    "answer's start"
)


@dataclass(frozen=True)
class TokenizedSuite:
    """Items of a suite, in an order, as token ids.

    Of each item `prompts` has the question and `expected` the right answer; `choices` has all
    answers to choose from where the suite is answered so, and nothing elsewhere.
    `is_right(answer, reference)` marks by the suite's rule. `exact` has the text of `expected`
    where the tokenizer writes the right answer in another way, and None elsewhere. `end_tokens` end
    an answer beside those of the model and the tokenizer.
    """

    suite: Suite
    tokenizer: Any
    examples: tuple[Example, ...]
    prompts: tuple[list[int], ...]
    expected: tuple[list[int], ...]
    choices: tuple[list[list[int]], ...]
    is_right: Callable[[str, str], bool]
    exact: tuple[str | None, ...]
    end_tokens: frozenset[int]

    def only(self, ids: Sequence[str]) -> "TokenizedSuite":
        """Return the items with these ids, in this order. KeyError for one that is not there."""
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

    def mark(self, number: int, answer: str) -> bool:
        """Whether an answer to the item at a position is right, by the suite's rule.

        The very tokens of the right answer are right, even where the tokenizer does not give its
        text back letter by letter (a space after a special token, a normaliser).
        """
        example, exact = self.examples[number], self.exact[number]
        if self.is_right(answer, example.reference or example.completion):
            return True
        return exact is not None and self.is_right(answer, exact)

    def drafts(self, answers: Mapping[str, str]) -> list[list[int]]:
        """Return the answer that each item will probably get, by id in `answers` or else right."""
        drafts = list(self.expected)
        known = [i for i, example in enumerate(self.examples) if example.id in answers]
        asked = [(self.examples[i], self.prompts[i], answers[self.examples[i].id]) for i in known]
        for i, whole in zip(known, with_answers(self.tokenizer, asked), strict=True):
            drafts[i] = whole[len(self.prompts[i]) :]
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
    """Return a suite's items; `context` is how many tokens a text may have in all (None: any).

    Chats are rendered with `template` (an adapter's own), or with the tokenizer's where it is None.
    `may_lack` names the guards of the sandbox for programs that this worker may lack.
    InvalidSpecError: the suite is not pinned, or has no such scoring. DataError, with every item:
    no items, ids that are not unique, items that do not fit the context, prompts that the tokenizer
    cuts differently when the answer follows, items without choices, references that no answer could
    equal.
    """
    is_right = make_scorer(suite, may_lack)
    _ = suite.suite_sha256  # pinned, or else what is made here would be kept under no name
    examples = tuple(examples[: suite.limit])
    prompts = tuple(prompt_ids(examples, tokenizer, template))
    answers = [e.choices if suite.is_choice else (e.completion,) for e in examples]
    asked = [
        (example, prompt, answer)
        for example, prompt, of_item in zip(examples, prompts, answers, strict=True)
        for answer in of_item
    ]
    flat = iter(with_answers(tokenizer, asked))
    wholes = [[next(flat) for _ in of_item] for of_item in answers]
    problems = [*_doubled(examples)]
    for example, prompt, of_item in zip(examples, prompts, wholes, strict=True):
        if told := _problem(suite, example, prompt, of_item, context):
            problems.append(f"{example.location}: {told}")
        try:
            is_right("", example.reference or example.completion)
        except DataError as error:
            problems.append(f"{example.location}: {error}")
    behind = [
        [whole[len(prompt) :] for whole in of_item]
        for prompt, of_item in zip(prompts, wholes, strict=True)
    ]
    expected = tuple([] if suite.is_choice else ids[0] for ids in behind)
    if RULES[suite.scoring.partition(":")[0]].literal:
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
    tokenizer: Any, asked: Sequence[tuple[Example, Sequence[int], str]]
) -> list[list[int]]:
    """Return the token ids of each (example, its prompt's ids, answer): prompt and answer as one.

    What follows a text is cut together with it, so that the prompt's own tokens may come out
    otherwise; a chat's answer stands by itself in its template.
    """
    texts = [answer if e.messages is not None else e.prompt + answer for e, _, answer in asked]
    wholes: list[list[int]] = [[] for _ in asked]
    for chat in (False, True):
        chosen = [i for i, (e, _, _) in enumerate(asked) if (e.messages is not None) == chat]
        if chosen:
            cut = token_ids([texts[i] for i in chosen], tokenizer, add_special_tokens=not chat)
            for i, ids in zip(chosen, cut, strict=True):
                wholes[i] = [*asked[i][1], *ids] if chat else list(ids)
    return wholes


def _exact(
    tokenizer: Any, example: Example, ids: list[int], is_right: Callable[[str, str], bool]
) -> str | None:
    """Return how the tokenizer writes the right answer, where that differs and is a reference."""
    if not ids or example.reference or tokenizer.unk_token_id in ids:
        return None
    text = spoken(tokenizer, ids)
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


def _doubled(examples: Sequence[Example]) -> Iterator[str]:
    for id_, count in Counter(example.id for example in examples).items():
        if count > 1:
            yield f"item {id_}: {count} items have this id"


def _problem(
    suite: Suite,
    example: Example,
    prompt: Sequence[int],
    wholes: Sequence[Sequence[int]],
    context: int | None,
) -> str | None:
    """Return what is wrong with an item, given its prompt and its answers behind it."""
    if not prompt:
        return "its prompt has no tokens"
    if suite.is_choice:
        return _choice_problem(example, prompt, wholes, context)
    most = len(prompt) + suite.max_new_tokens
    if context is not None and most > context:
        return (
            f"{len(prompt)} tokens and {suite.max_new_tokens} new ones are {most}, "
            f"the context is {context}"
        )
    # Where answers are marked by something else, the completion is one of many right ones.
    if not example.reference and wholes[0][: len(prompt)] != prompt:
        return f"with its answer {_CUT}"
    return None


def _choice_problem(
    example: Example, prompt: Sequence[int], wholes: Sequence[Sequence[int]], context: int | None
) -> str | None:
    if not example.choices:
        return "it has no choices, and is to be answered by one of them"
    for choice, whole in zip(example.choices, wholes, strict=True):
        shown = excerpt(choice, 60)
        if whole[: len(prompt)] != prompt:
            return f"with the choice {shown} {_CUT}"
        if len(whole) == len(prompt):
            return f"the choice {shown} has no tokens"
        if context is not None and len(whole) > context:
            return f"with the choice {shown} it has {len(whole)} tokens, the context is {context}"
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
    asked = [(examples[i], prompts[i], f" {texts[i]}") for i in long]
    behind = with_answers(tokenizer, asked)
    counts = {
        i: min(len(ids), len(whole) - len(prompts[i]))
        for i, ids, whole in zip(long, alone, behind, strict=True)
    }
    for i, example in enumerate(examples):
        written = texts[i] if example.reference else spoken(tokenizer, expected[i])
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
            f"suite {suite.name!r} has {len(problems)} items that cannot be evaluated:\n    "
            + "\n    ".join(listed_lines(problems, _SHOWN))
        )
