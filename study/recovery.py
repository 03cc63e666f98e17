"""Evaluate one inconclusive adapter with recovery strategies: `python -m study.recovery`.

It writes a suite, the adapter's recipe and a gate policy into the study's folder, and runs
`trans-peft transfer` with them. docs/fleet.md has the results.
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
    """Make missing files, run the command, and end with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m study.recovery", description=__doc__)
    parser.add_argument("--study", type=Path, default=Path(".study"), help="folder for all files")
    study = parser.parse_args().study.resolve()
    bases_and_rows(study, UPDATE)
    rows = statements(study)
    trained = adapter(study, rows, KIND, SEED)

    folder = study / "recovery"
    folder.mkdir(exist_ok=True)
    given = {}
    for name, value in files(rows).items():
        given[name] = folder / f"{name}.json"
        given[name].write_text(json.dumps(value, indent=1))
    app(
        [
            *("transfer", str(trained), "--out", str(folder / "out")),
            *("--old", str(study / "bases" / "v1"), "--new", str(study / "bases" / UPDATE)),
            *(part for name, file in given.items() for part in (f"--{name}", str(file))),
            *("--state", str(folder / "state")),
        ]
    )


def files(rows: Mapping[str, Path]) -> dict[str, Mapping[str, object]]:
    """Return the contents of the three files. `rows` are those of `statements`."""
    evaluated = replace(suite(rows["eval"]), limit=ITEMS)
    trained_by = replace(
        recipe(KIND, SEED), data=DataSource(str(rows["train"])), suites=(evaluated,)
    )
    return {"suite": asdict(evaluated), "recipe": asdict(trained_by), "policy": POLICY}


if __name__ == "__main__":
    main()
