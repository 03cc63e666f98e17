"""Training rows that are items of an adapter's own suites, exactly or nearly."""

from dataclasses import dataclass

__all__ = ["SuiteLeakage"]


@dataclass(frozen=True)
class SuiteLeakage:
    """How many training rows are (nearly) items of one suite.

    Attributes:
        suite: name of the suite.
        rows: number of training rows whose prompt is nearly that of an item.
        training_rows: number of training rows that were compared, with validation rows.
        items: number of items of the suite that are nearly training rows.
        suite_items: number of items of the suite.
    """

    suite: str
    rows: int
    training_rows: int
    items: int
    suite_items: int

    @property
    def points(self) -> float:
        """Share of the suite's items that are nearly training rows, in points."""
        return 100 * self.items / self.suite_items

    def __str__(self) -> str:
        return (
            f"{self.suite}: {self.items} of {self.suite_items} items ({self.points:.1f} points) "
            f"are nearly {self.rows} of {self.training_rows} training rows"
        )
