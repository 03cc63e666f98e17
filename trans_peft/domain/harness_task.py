"""A task of lm-evaluation-harness as the source of a suite's items."""

import re
from dataclasses import dataclass
from typing import ClassVar

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.field_checks import is_whole
from trans_peft.domain.names import quoted
from trans_peft.errors import InvalidSpecError

__all__ = ["HarnessTask"]

_METRIC = re.compile(r"[^\s,]+(,[^\s,]+)?")
_MAX_FEWSHOT = 1000


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-evaluation-harness (EleutherAI) and one of its metrics.

    Example: `HarnessTask("gsm8k", "exact_match,strict-match", num_fewshot=5)`.

    Attributes:
        task: name of the task in the harness.
        metric: name of a metric of the task, followed by its filter unless that is "none".
        num_fewshot: number of answered questions before each question. None: the task's own number.
        version: version of the harness that wrote the items; empty: not pinned yet.
        config_sha256: hash of the task's configuration; empty: not pinned yet.

    Raises:
        InvalidSpecError: fields are invalid. The message lists all problems.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    task: str
    metric: str
    num_fewshot: int | None = None
    version: str = ""
    config_sha256: str = ""

    def __post_init__(self) -> None:
        problems = []
        if not self.task or any(sign.isspace() for sign in self.task):
            problems.append(f"task must be the name of a task, not {quoted(self.task)}")
        if not _METRIC.fullmatch(self.metric):
            problems.append(f"metric must be METRIC or METRIC,FILTER, not {quoted(self.metric)}")
        shots = self.num_fewshot
        if shots is not None and not (is_whole(shots) and 0 <= shots <= _MAX_FEWSHOT):
            problems.append(f"num_fewshot must lie in [0, {_MAX_FEWSHOT}], not {shots!r}")
        if bool(self.version) != bool(self.config_sha256):
            problems.append("version and config_sha256 belong together: pinning sets both")
        if problems:
            raise InvalidSpecError(
                f"the task of lm-evaluation-harness is invalid: {'; '.join(problems)}"
            )

    @property
    def is_pinned(self) -> bool:
        """Whether the items of the task are written."""
        return bool(self.version)
