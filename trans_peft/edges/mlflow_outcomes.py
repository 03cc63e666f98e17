"""Transfer outcomes in MLflow: the full outcome as a run, a summary as a tag of the version.

The run (experiment `trans-peft/transfers`) has `outcome.json` with every item, the main figures as
metrics of the registered model, the suites as data sets, and a table of the flipped items. The tag
`outcome.on-<base>` of the version has the fields that reconcile needs, so that reading a fleet
downloads no files. The tag is written last. After a crash before that, the transfer is repeated,
and a finished run with the same verdict is used again.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trans_peft.domain.conventions import ADAPTER_ALIAS_PREFIX, OUTCOME_TAG_PREFIX
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.identity import json_value
from trans_peft.domain.names import quoted
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.edges.json_codec import from_json, to_json
from trans_peft.edges.mlflow_client import Tracking, logged_model_id, own_tags, tag
from trans_peft.edges.mlflow_lineage import log_flipped_items, log_scores
from trans_peft.edges.mlflow_tags import adapter_version
from trans_peft.errors import IntegrityError, listed_lines

__all__ = ["MlflowOutcomes", "newest_outcomes"]

_FILE = "outcome.json"
_TAG = re.compile(rf"{re.escape(OUTCOME_TAG_PREFIX)}{ADAPTER_ALIAS_PREFIX}[0-9a-f]+")
_MAX_REASON, _MAX_LINE, _MAX_LINES = 2000, 300, 20
"""Characters and lines. All texts together stay below MLflow's limit of 100,000 characters."""


@dataclass(frozen=True)
class _OutcomeTag:
    """The content of a tag: a summary of the outcome, its time in ms, and the run's id."""

    time_ms: int
    run_id: str
    outcome: TransferOutcome


class MlflowOutcomes:
    """Writes outcomes. `found` are MLflow's versions of one adapter."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    def record(self, outcome: TransferOutcome, number: int, found: list[Any]) -> None:
        """Write an outcome to the version with this number, and count its attempts.

        An outcome with a new version replaces earlier failures, which are tags of the source
        version, so that there is one verdict for each base. These tags are removed first: after a
        crash in between, the adapter has no verdict there and is evaluated again from stored
        results.
        """
        stored = _stored(found)
        base = outcome.base.alias
        previous = max((s for s in stored if s[0] == base), key=lambda s: s[1], default=None)
        outcome = outcome.counted_after(previous[2] if previous else None)
        time_ms = max(int(time.time() * 1000), previous[1] + 1 if previous else 0)
        tags = {
            "adapter": outcome.adapter,
            **outcome.base.labels,
            "weights_sha256": outcome.weights_sha256,
            "verdict": outcome.verdict.value,
            "verdict_key": outcome.verdict_key,
        }
        # A failed attempt gets a run of its own; any other verdict reuses a finished run.
        reusable = outcome.verdict is not Verdict.FAILED
        run_id = self._tracking.oldest_run("transfers", tags) if reusable else None
        if run_id is None:
            name = f"{outcome.adapter} on {outcome.base}"
            with self._tracking.run("transfers", name, tags) as run_id:
                self._tracking.write_text(run_id, _FILE, to_json(outcome))
                self._tracking.log_metrics(run_id, _figures(outcome), step=0, time_ms=time_ms)
                self._log_lineage(run_id, outcome, number, found)
        verdict = {"verdict": outcome.verdict.value}
        if outcome.new_number is None:
            verdict = {f"verdict.{base}": outcome.verdict.value}
        else:
            verdict["verdict_key"] = outcome.verdict_key
            verdict["verdict_reason"] = outcome.judgment.reason[:_MAX_REASON]
            self._remove_tags(base, (v for v in found if int(v.version) != number))
        summary = {"time_ms": time_ms, "run_id": run_id, "outcome": _short(outcome)}
        self._tracking.tag_version(
            outcome.adapter, number, {**verdict, f"{OUTCOME_TAG_PREFIX}{base}": json.dumps(summary)}
        )

    def _log_lineage(
        self, run_id: str, outcome: TransferOutcome, number: int, found: list[Any]
    ) -> None:
        """Link the run to the suites and to the model that it judged, and list flipped items."""
        version = next(version for version in found if int(version.version) == number)
        registered = adapter_version(version)
        log_scores(
            self._tracking,
            run_id,
            logged_model_id(version) if outcome.new_number is not None else None,
            registered.suites,
            {suite.suite: dict(_numbers(asdict(suite))) for suite in outcome.judgment.suites},
        )
        old = {
            evaluation.suite: evaluation
            for evaluation in outcome.evaluations
            if evaluation.weights_sha256 == outcome.weights_sha256
            and evaluation.base_fingerprint_sha256 == registered.trained_on.fingerprint_sha256
        }
        new = [
            evaluation
            for evaluation in outcome.evaluations
            if evaluation.weights_sha256 == registered.weights_sha256
            and evaluation.base_fingerprint_sha256 == outcome.base.fingerprint_sha256
        ]
        log_flipped_items(
            self._tracking,
            run_id,
            [(old[found.suite], found) for found in new if found.suite in old],
        )

    def _remove_tags(self, base: str, versions: Iterable[Any]) -> None:
        for version in versions:
            for name in (f"{OUTCOME_TAG_PREFIX}{base}", f"verdict.{base}"):
                if name in own_tags(version.tags):
                    self._tracking.untag_version(version.name, int(version.version), name)


def newest_outcomes(found: Iterable[Any]) -> tuple[TransferOutcome, ...]:
    """Return the newest outcome for each base, without evaluations, by base fingerprint.

    `found` are MLflow's versions of one adapter.
    """
    newest: dict[str, tuple[int, TransferOutcome]] = {}
    for base, time_ms, outcome in _stored(found):
        if base not in newest or time_ms > newest[base][0]:
            newest[base] = (time_ms, outcome)
    return tuple(
        sorted(
            (outcome for _, outcome in newest.values()),
            key=lambda outcome: outcome.base.fingerprint_sha256,
        )
    )


def _stored(found: Iterable[Any]) -> list[tuple[str, int, TransferOutcome]]:
    """Return (base alias, time in ms, outcome) for all versions of one adapter."""
    outcomes = []
    for version in found:
        for name, text in own_tags(version.tags).items():
            if _TAG.fullmatch(name):
                where = f"the tag {tag(name)} of version {version.version} of {version.name}"
                parsed: _OutcomeTag = from_json(_OutcomeTag, text, where=where)
                _check(parsed.outcome, name, version.name, where)
                outcomes.append(
                    (name.removeprefix(OUTCOME_TAG_PREFIX), parsed.time_ms, parsed.outcome)
                )
    return outcomes


def _check(outcome: TransferOutcome, name: str, adapter: str, where: str) -> None:
    """Raise IntegrityError unless the outcome and its recipe belong to this adapter and base."""
    about = (outcome.adapter, f"{OUTCOME_TAG_PREFIX}{outcome.base.alias}")
    training = outcome.training
    if about != (adapter, name) or (
        training and (training.adapter, training.family) != (adapter, outcome.base.family)
    ):
        raise IntegrityError(
            f"{where} belongs to another adapter or base",
            expected=f"an outcome of {adapter} on the base in the name of the tag",
            found=quoted(f"{outcome.adapter} on {outcome.base.fingerprint_sha256[:12]}"),
            do="remove the tag in MLflow; the adapter is then evaluated again from stored results",
        )


def _short(outcome: TransferOutcome) -> Any:
    """Return the outcome without evaluations and with long texts cut, to fit into a tag."""
    compatibility = outcome.compatibility
    short = replace(
        outcome,
        evaluations=(),
        compatibility=replace(
            compatibility,
            mismatches=_first(compatibility.mismatches),
            notes=_first(compatibility.notes),
        ),
        judgment=replace(outcome.judgment, reason=outcome.judgment.reason[:_MAX_REASON]),
        tried=tuple(replace(item, reason=item.reason[:_MAX_LINE]) for item in outcome.tried),
    )
    return json_value(short)


def _first(lines: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(line[:_MAX_LINE] for line in listed_lines(lines, _MAX_LINES))


def _figures(outcome: TransferOutcome) -> dict[str, float]:
    figures = {"seconds": outcome.seconds, "attempts": float(outcome.attempts)}
    if outcome.effect is not None:
        figures["max_logit_change"] = outcome.effect.max_logit_change
    for item in outcome.tried:
        figures[f"strategy/{item.strategy.value}/seconds"] = item.seconds
    return figures


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield every number in nested mappings, with the path to it. Booleans are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)
