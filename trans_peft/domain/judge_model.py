"""A judge model: a base that marks the answers to a suite, and answers that people marked."""

from dataclasses import dataclass
from string import Formatter
from typing import ClassVar, Literal

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.data import DataSource
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.names import quoted
from trans_peft.domain.numbers import is_finite_number
from trans_peft.errors import InvalidSpecError

__all__ = ["JudgeModel"]

_REVISION = 1
"""Part of the hash. Increased when the same model, texts and settings give other marks."""

_PARTS = {"prompt", "answer", "reference"}


@dataclass(frozen=True)
class JudgeModel:
    """A base that marks answers by the likelihoods of a few texts.

    The mark of an answer is the mean of `marks`, weighted by the likelihoods of `choices`.

    Attributes:
        uri: folder or `s3://` prefix of the base.
        prompt: the text that the base continues. `{prompt}` and `{answer}` stand for the texts of
            the item and of the answer, `{reference}` for the item's reference.
        choices: the continuations that are compared. At least two.
        marks: the mark of each choice, from 0 to 1. Both 0 (wrong) and 1 (right) are among them.
        labeled: answers of any model that people marked. Each row has `prompt`, `completion` (the
            answer), optionally `reference`, and `label`, one of the choices with the mark 0 or 1.
        fingerprint_sha256: digest of the base's fingerprint; empty: not pinned yet.
        dtype: data type of the base's weights.

    Raises:
        InvalidSpecError: fields are invalid. The message lists all problems.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    uri: str
    prompt: str
    choices: tuple[str, ...]
    marks: tuple[float, ...]
    labeled: DataSource
    fingerprint_sha256: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        problems = [] if self.uri else ["uri must name a folder or an s3:// prefix"]
        problems += _prompt_problems(self.prompt)
        names = [choice.strip() for choice in self.choices]
        if len(names) < 2 or not all(names) or len(set(names)) < len(names):
            problems.append(f"choices must be at least two different texts, not {self.choices!r}")
        if len(self.marks) != len(names):
            problems.append(f"marks must have one number for each choice, not {self.marks!r}")
        elif not (
            all(is_finite_number(mark) and 0 <= mark <= 1 for mark in self.marks)
            and {0, 1} <= {*self.marks}
        ):
            problems.append(f"marks must lie in [0, 1], with 0 and 1 among them: {self.marks!r}")
        if self.labeled.cluster or self.labeled.slice:
            problems.append("labeled rows have neither cluster nor slice")
        if problems:
            raise InvalidSpecError(f"the judge model is invalid: {'; '.join(problems)}")
        object.__setattr__(self, "marks", tuple(map(float, self.marks)))  # 1 and 1.0: one hash

    @property
    def sha256(self) -> str:
        """Hash of everything that marks and their correction depend on. Locations do not count.

        Raises:
            InvalidSpecError: the base or the labeled rows are not pinned.
        """
        pins = [self.fingerprint_sha256, self.labeled.sha256]
        if not all(pins):
            raise InvalidSpecError(
                f"the judge model {self.uri} has no hash: it is not pinned",
                do="pin the suite with trans_peft.lifecycle.evaluation.pin_suites",
            )
        settings = [self.prompt, self.choices, self.marks, self.labeled.template, self.dtype]
        return content_sha256([_REVISION, *pins, *settings])

    def text(self, prompt: str, answer: str, reference: str) -> str:
        """Return the text that the base continues for one answer."""
        return self.prompt.format(prompt=prompt, answer=answer, reference=reference)

    def is_right(self, label: str) -> bool | None:
        """Return whether a label means a right answer; None if it means neither right nor wrong."""
        found = dict(zip(map(str.strip, self.choices), self.marks, strict=True)).get(label)
        return bool(found) if found in (0, 1) else None


def _prompt_problems(prompt: str) -> list[str]:
    try:
        parts = [part for part in Formatter().parse(prompt) if part[1] is not None]
    except ValueError as error:
        return [f"prompt must be a text with fields in braces, with double braces as text: {error}"]
    names = {name for _, name, _, _ in parts}
    problems = []
    if not {"prompt", "answer"} <= names <= _PARTS:
        problems.append(
            "prompt must have the fields {prompt} and {answer}, and may have {reference}, found "
            + (", ".join(map(quoted, sorted(map(str, names)))) or "none")
        )
    if any(form or conversion for _, _, form, conversion in parts):
        problems.append("fields of prompt have neither a format nor a conversion")
    return problems
