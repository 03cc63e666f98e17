"""The data sources of recipes and suites."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.field_checks import is_whole
from trans_peft.domain.identity import ADDED_LATER
from trans_peft.domain.numbers import is_finite_number
from trans_peft.errors import InvalidSpecError

__all__ = ["DataSource", "TrainingSource"]


@dataclass(frozen=True)
class DataSource:
    """A file or a hub data set with rows of training or evaluation data.

    `uri` is a local path or `s3://...` ending in `.jsonl`, `.json` (one JSON value a line, or one
    list of them), either of them with `.gz` after it, or `.parquet`; or
    `hub:OWNER/NAME[:CONFIG[:SPLIT]]` for a hub data set, where SPLIT may have slices in the syntax
    of the package datasets (`hub:meta-math/MetaMathQA::train[:100000]`). `sha256` is the hash of
    the bytes; empty means "not pinned yet". A pinned source whose bytes differ is an error, never a
    warning.
    `template` names how the rows of a public data set become questions and answers
    (`trans_peft.data.templates`); empty: the rows are questions and answers already.

    `cluster` and `slice` name columns of a suite's rows (docs/statistics.md). Rows with the same
    value of `cluster` are not independent: the tests count clusters instead of items. Rows with the
    same value of `slice` are reported as a group. Empty: the suite has no clusters or no slices.
    Every row must then have a value. Training ignores both.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    uri: str
    sha256: str = ""
    template: str = field(default="", metadata=ADDED_LATER)
    cluster: str = field(default="", metadata=ADDED_LATER)
    slice: str = field(default="", metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        if not self.uri:
            raise InvalidSpecError(
                "a data source without a uri", do="give a path, s3://... or hub:..."
            )

    def pinned(self, sha256: str) -> Self:
        """Return this source bound to the bytes with that hash."""
        return replace(self, sha256=sha256)


@dataclass(frozen=True)
class TrainingSource(DataSource):
    """One of several data sources of a recipe.

    Attributes:
        weight: how often a row of this source is trained on for each time that a row of a source
            with the weight 1 is. Above 0, at most 1,000. It must be 1 if there is no other source.
        limit: number of rows to use, the first in the order of the source; None for all of them.
    """

    weight: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if not (is_finite_number(self.weight) and 0 < self.weight <= 1000):
            problems.append(f"weight must be above 0 and at most 1,000, not {self.weight!r}")
        if self.limit is not None and not (is_whole(self.limit) and self.limit > 0):
            problems.append(f"limit must be a whole number from 1, or null, not {self.limit!r}")
        if problems:
            raise InvalidSpecError(f"the data source {self.uri} is invalid: {'; '.join(problems)}")
