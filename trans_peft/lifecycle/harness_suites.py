"""Write the items of suites that are tasks of lm-evaluation-harness, once for all workers."""

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

from trans_peft.artifacts import child_uri
from trans_peft.data import write_examples
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.errors import InvalidSpecError
from trans_peft.ports import Platform

__all__ = ["with_harness_items"]


def with_harness_items(
    suite: Suite, platform: Platform, *, tasks_folder: str | None = None
) -> Suite:
    """Return the suite with the items of its task, pinned and stored below `suites_uri`.

    A suite without such a task, or with items, is returned as it is. `tasks_folder` contains
    additional tasks (YAML), whose Python functions are run.

    Raises InvalidSpecError without a `suites_uri`, and what
    `trans_peft.validation.harness_rows.harness_items` raises.
    """
    from trans_peft.validation.harness_rows import harness_items

    if suite.harness is None or not suite.needs_items:
        return suite
    if not platform.suites_uri:
        raise InvalidSpecError(
            f"suite {suite.name!r}: there is no place for the items of a task of "
            "lm-evaluation-harness",
            expected="a prefix that all workers read",
            do="set TRANS_PEFT_SUITES_URI of the workers, or suites_uri of trans_peft.connect",
        )
    items = harness_items(
        suite.harness, limit=suite.limit, places=platform.store.places, folder=tasks_folder
    )
    with tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch:
        path = write_examples(items.examples, Path(scratch) / "items.jsonl")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        # Suites with equal items share a file, which is never changed.
        uri = child_uri(platform.suites_uri, f"{suite.name}-{sha256[:16]}.jsonl")
        with path.open("rb") as file:
            platform.store.write(uri, file)
    fields = dict(items.fields)
    if suite.chance_points is not None:
        del fields["chance_points"]
    return replace(suite, data=DataSource(uri, sha256), harness=items.task, **fields)
