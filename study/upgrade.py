"""Run sixteen adapters of eight kinds through the study's updates: `python -m study.upgrade`.

It works on the stack of `make up` as a platform team does: it uploads bases with an S3 client,
adopts adapters and sets `champion`. The policies of prefect.yaml apply, and the file of unlabeled
prompts is named in them; their margin was fixed before any of these adapters was trained. Each step
is skipped if its result exists, so an interrupted run resumes. The table of docs/fleet.md and the
figure in benchmarks/results.json are written from the registry.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from demo.programs import become_client_of, run_module
from demo.screen import DemoError, Screen
from demo.upload import upload
from infra.stack.settings import StackSettings
from study.fleet import bases_and_rows, class_suite, classes, fleet, statements
from study.pages import with_blocks
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import CHAMPION_ALIAS, SERVING_ALIAS, Deployment
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.domain.recovery import CompensationPolicy, RecoveryPolicy, RecoveryStrategy
from trans_peft.errors import NotFoundError
from trans_peft.lifecycle.evaluation import evaluate_on, pin_suites
from trans_peft.lifecycle.report import FleetReport, FleetRow, report
from trans_peft.lifecycle.resolve import find_base
from trans_peft.ports import Platform

__all__ = ["OLD", "UPDATES", "counted", "serving_share", "table"]

FAMILY, OLD = "fleet", "v1"
UPDATES = ("all", "ffn")
ADAPTERS = 16
_DATA = "s3://data/fleet"
_ROOT = Path(__file__).parent.parent
_PAGE, _RESULTS = _ROOT / "docs" / "fleet.md", _ROOT / "benchmarks" / "results.json"
ITEMS = 640
_SUITE = replace(class_suite(Path()), data=DataSource(f"{_DATA}/classes.jsonl"), limit=ITEMS)
POLICY = GatePolicy(
    recovery=RecoveryPolicy(compensation=CompensationPolicy(prompts_uri=f"{_DATA}/prompts.jsonl"))
)
"""The policy of prefect.yaml, with the prompts of this fleet."""


def main() -> None:
    """Run the steps that the registry lacks, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m study.upgrade", description=__doc__)
    parser.add_argument("--study", type=Path, default=Path(".study"), help="folder for all files")
    parser.add_argument("--updates", type=int, default=len(UPDATES), help="updates to run")
    options = parser.parse_args()
    updates = UPDATES[: options.updates]
    screen = Screen()
    screen.section("The fleet", f"{ADAPTERS} adapters of eight kinds, trained on {OLD}")
    for update in updates:
        bases_and_rows(options.study, update)
    folders = fleet(options.study, statements(options.study), ADAPTERS)
    items = classes(options.study)
    screen.success(f"{len(folders)} adapters")

    screen.section("The platform", "MLflow, Prefect, S3, a worker and the bridge")
    run_module(["infra.stack", "up"], screen)
    become_client_of(StackSettings())
    # Prefect reads the environment when it is imported, so it is imported here.
    from demo.deployments import run, set_parameters
    from tasks.composition import platform

    steps = Steps(screen, options.study, platform(), partial(run, screen=screen))
    set_parameters(Deployment.RECONCILE, {"policy": POLICY})
    steps.old_base()
    steps.adopted(items, folders)
    bare_on_old = steps.bare_on_old()
    for update in updates:
        steps.updated(update)
    seen = report(FAMILY, platform())
    _PAGE.write_text(with_blocks(_PAGE.read_text(), {"verdicts": table(seen, bare_on_old)}))
    results = json.loads(_RESULTS.read_text()) | {
        "survive.fleet_serving_share": serving_share(seen)
    }
    _RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    screen.success(f"{counted(seen)}; written: {_PAGE}")


class Steps:
    """The steps in their order. Each can be repeated.

    `run` starts a deployment under a key, and waits for its end.
    """

    def __init__(
        self, screen: Screen, study: Path, platform: Platform, run: Callable[..., None]
    ) -> None:
        self._screen, self._study, self._platform, self._run = screen, study, platform, run

    def old_base(self) -> None:
        """Upload v1 and promote it."""
        self._screen.section(f"Base {OLD}", "uploaded, ingested, promoted")
        self._upload(OLD, parent=None)
        if self._platform.catalog.alias(FAMILY, SERVING_ALIAS) is None:
            self._promote(OLD)

    def adopted(self, items: Path, folders: Mapping[str, Path]) -> None:
        """Register every adapter on v1, with its evaluation there."""
        self._screen.section("Adapters", f"adopted: evaluated on {OLD}, registered")
        store = self._platform.store
        prompts = self._study / "rows" / "exceptions" / "prompts.jsonl"
        for source, uri in ((items, _SUITE.data.uri), (prompts, f"{_DATA}/prompts.jsonl")):
            with source.open("rb") as file:
                store.write(uri, file)
        known = self._platform.registry.adapters(FAMILY)
        for name, folder in folders.items():
            if name in known:
                continue
            for path in sorted(folder.iterdir()):
                with path.open("rb") as file:
                    store.write(f"{_DATA}/{name}/{path.name}", file)
            self._run(Deployment.ADOPT_ADAPTER, self._adoption(name), key=name)

    def bare_on_old(self) -> float:
        """Return the score of the bare v1, which no verdict needs."""
        base = find_base(FAMILY, OLD, self._platform)
        suites = pin_suites([_SUITE], self._platform)
        (found,) = evaluate_on(base, suites, self._platform).values()
        return found.score

    def updated(self, update: str) -> None:
        """Upload an update, wait for the verdicts, and set `champion` to it."""
        self._screen.section(
            f"Base {update}", "uploaded; every adapter is judged on it; then `champion` moves there"
        )
        self._upload(update, parent=OLD)
        self._reconcile(f"judge {update}")
        self._promote(update)

    def _adoption(self, name: str) -> dict[str, object]:
        return {
            "adapter": name,
            "folder_uri": f"{_DATA}/{name}",
            "family": FAMILY,
            "suites": [_SUITE],
            "base_version": OLD,
        }

    def _upload(self, version: str, parent: str | None) -> None:
        if self._found(version) is not None:
            return
        progress_reporter = self._screen.progress_reporter("uploaded with boto3", "MB", 1e6)
        key, folder = f"{FAMILY}/{version}", self._study / "bases" / version
        upload(
            folder,
            "bases",
            key,
            version=version,
            family=FAMILY,
            parent=parent,
            on_progress=progress_reporter,
        )
        uri = f"s3://bases/{key}"
        self._run(Deployment.INGEST_BASE, {"uri": uri}, key=f"ingest/{uri}")

    def _found(self, version: str) -> BaseVersion | None:
        try:
            return find_base(FAMILY, version, self._platform)
        except NotFoundError:
            return None

    def _promote(self, version: str) -> None:
        """Set `champion` with MLflow's client, as a user does on MLflow's page."""
        base = find_base(FAMILY, version, self._platform)
        if report(FAMILY, self._platform).champion != version:
            MlflowClient().set_registered_model_alias(FAMILY, CHAMPION_ALIAS, str(base.number))
        self._reconcile(f"champion {version}")
        seen = report(FAMILY, self._platform)
        self._screen.success(f"champion: {seen.champion}, serving: {seen.serving}. {seen.note}")

    def _reconcile(self, reason: str) -> None:
        """Run reconcile with the deployment's policies, and wait for its end.

        A refused promotion fails the run, which is an accepted result here.
        """
        parameters = {"family": FAMILY, "wait": True}
        try:
            self._run(Deployment.RECONCILE, parameters, key=f"{FAMILY}/{reason}")
        except DemoError:
            if not report(FAMILY, self._platform).note:
                raise


def table(seen: FleetReport, bare_on_old: float) -> str:
    """Return a Markdown table with a row per adapter. NotFoundError if one was not judged."""
    cells = {(row.adapter, row.base): row for row in seen.rows}
    updates = [base for base in UPDATES if base in seen.bases]
    columns = [f"{base}: score, change (bounds), verdict" for base in updates]
    lines = [f"| adapter | {OLD} | {' | '.join(columns)} |", "| -- | -: |" + " -- |" * len(updates)]
    for name in dict.fromkeys(row.adapter for row in seen.rows):
        (_, score), *_ = cells[name, OLD].scores
        judged = " | ".join(_cell(cells[name, base]) for base in updates)
        lines.append(f"| {name} | {score:.1f} | {judged} |")
    compared = [cells[name, base].suites[0].versus_bare_base for base in updates]
    bare = [f"{found.reference_score:.1f}" if found else "-" for found in compared]
    lines.append(f"| no adapter | {bare_on_old:.1f} | {' | '.join(bare)} |")
    return "\n".join([*lines, "", f"{counted(seen)}."])


def counted(seen: FleetReport) -> str:
    """Return the number of adapters with each verdict on each base, as text."""
    parts = []
    for base in UPDATES:
        if base not in seen.bases:
            continue
        verdicts = Counter(str(row.verdict) for row in seen.rows if row.base == base)
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        parts.append(f"on {base}: {counts}")
    return "; ".join(parts)


def serving_share(seen: FleetReport) -> dict[str, Any]:
    """Return the share of the adapters that serve on the first update, with its exact interval."""
    from scipy.stats import binomtest

    verdicts = [row.verdict for row in seen.rows if row.base == UPDATES[0]]
    found = binomtest(verdicts.count(Verdict.PASSED), len(verdicts))
    interval = found.proportion_ci()
    values = {"value": found.statistic, "low": interval.low, "high": interval.high}
    shape = f"SmolLM2-135M, {len(verdicts)} adapters of eight kinds, update {UPDATES[0]}"
    return {name: round(value, 4) for name, value in values.items()} | {"shape": shape}


def _cell(row: FleetRow) -> str:
    if row.verdict is None or not row.suites:
        raise NotFoundError(f"{row.adapter} has no figures on {row.base}", found=row.reason)
    found = row.suites[0]
    change = found.versus_old_base
    bounds = f"({change.lower:+.1f}, {change.upper:+.1f})"
    made = "" if row.strategy == RecoveryStrategy.DIRECT else f" ({row.strategy})"
    return f"{found.score:.1f}, {change.difference:+.1f} {bounds}, {row.verdict}{made}"


if __name__ == "__main__":
    main()
