"""Evaluate one undecided adapter again with recovery strategies: `python -m study.recovery`.

By the same command as anybody's: `trans-peft transfer`, with a suite, the recipe that the adapter
was trained by and a policy, each written as a file into the study's folder. The table of
docs/fleet.md says what came of it.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from study.fleet import ITEMS, adapter, bases_and_rows, recipe, statements, suite
from trans_peft.cli.app import app
from trans_peft.domain.data import DataSource

__all__ = ["files"]

KIND, SEED, UPDATE = "lora-32-all", 1, "all"
POLICY = {"recovery": {"scales": [0.5, 0.7, 1.4, 2.0], "retune_steps": 20}}


def main() -> None:
    """Make what is missing, ask, and end with the command's exit code."""
    parser = argparse.ArgumentParser(prog="python -m study.recovery", description=__doc__)
    parser.add_argument("--study", type=Path, default=Path(".study"), help="for all that is made")
    study = parser.parse_args().study.resolve()
    bases_and_rows(study, UPDATE)
    rows = statements(study)
    trained = adapter(study, rows, KIND, SEED)

    folder = study / "ladder"
    folder.mkdir(exist_ok=True)
    given = {}
    for name, value in files(rows).items():
        given[name] = folder / f"{name}.json"
        given[name].write_text(json.dumps(value, indent=1))
    app(
        [
            *("transfer", str(trained), "--out", str(folder / "out")),
            *("--old", str(study / "bases" / "v1"), "--new", str(study / "bases" / UPDATE)),
            *(word for name, file in given.items() for word in (f"--{name}", str(file))),
            *("--state", str(folder / "state")),
        ]
    )


def files(rows: Mapping[str, Path]) -> dict[str, Mapping[str, object]]:
    """Return suite, recipe and policy as they are written; `rows` are those of `statements`."""
    asked = replace(suite(rows["eval"]), limit=ITEMS)
    trained_by = replace(recipe(KIND, SEED), data=DataSource(str(rows["train"])), suites=(asked,))
    return {"suite": asdict(asked), "recipe": asdict(trained_by), "policy": POLICY}


if __name__ == "__main__":
    main()
