"""The life of an adapter, and a base version, as the registry records them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trans_peft.domain.adapter import AdapterVersion, ManualOverride
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.domain.fleet import Fleet, RegisteredAdapter
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.ui.figures import finite
from trans_peft.ui.index import Cell, cell_of
from trans_peft.ui.links import Links

__all__ = ["AdapterView", "BaseView", "Station", "VersionView", "adapter_view", "base_view"]


@dataclass(frozen=True)
class VersionView:
    """One version of an adapter: where its weights come from, and the base that it is bound to."""

    number: int
    base: str
    origin: str
    recipe: str
    weights_sha256: str
    superseded: bool
    page_url: str
    run_url: str


@dataclass(frozen=True)
class Station:
    """An adapter on one base version.

    Attributes:
        cell: Verdict, alias and override there.
        reason: The reason of the verdict; empty without one.
        number: Number of the version that the outcome registered, or that was trained there.
        attempts: Number of failed attempts in a row.
        seconds: Duration of the transfer. None: unknown.
        tried: The recovery strategies that were tried.
        notes: Differences of the bases that allow a transfer.
        mismatches: Differences that prevent it.
        override: The recorded manual override.
        has_outcome: Whether there is a verdict page.
    """

    cell: Cell
    reason: str = ""
    number: int | None = None
    attempts: int = 0
    seconds: float | None = None
    tried: tuple[StrategyAttempt, ...] = ()
    notes: tuple[str, ...] = ()
    mismatches: tuple[str, ...] = ()
    override: ManualOverride | None = None
    has_outcome: bool = False


@dataclass(frozen=True)
class AdapterView:
    """One adapter: its versions, and what happened to it on each base version, oldest first."""

    name: str
    family: str
    is_live: bool
    owner: str
    method: str
    trained_on: str
    suites: tuple[str, ...]
    versions: tuple[VersionView, ...]
    stations: tuple[Station, ...]
    recipe: Mapping[str, Any] | None
    page_url: str


@dataclass(frozen=True)
class BaseView:
    """One base version as the catalog and its fingerprint describe it.

    `fingerprint` is None if it cannot be read; `fingerprint_problem` then has the reason.
    """

    family: str
    version: str
    number: int
    uri: str
    parent: str | None
    ready: bool
    served: bool
    is_champion: bool
    is_serving: bool
    alias: str
    fingerprint_sha256: str
    manifest_sha256: str
    drift: str
    note: str
    page_url: str
    fingerprint: Mapping[str, str | int] | None
    fingerprint_problem: str


def adapter_view(adapter: RegisteredAdapter, fleet: Fleet, links: Links) -> AdapterView:
    """Return the life of an adapter. NotFoundError if no version of it was trained."""
    source = adapter.source
    return AdapterView(
        name=adapter.name,
        family=adapter.family,
        is_live=adapter.is_live,
        owner=adapter.owner,
        method=source.method,
        trained_on=source.trained_on.version,
        suites=tuple(suite.name for suite in source.suites),
        versions=tuple(_version_view(version, links) for version in adapter.versions),
        stations=tuple(_station(adapter, base) for base in fleet.bases),
        recipe=asdict(source.recipe) if source.recipe else None,
        page_url=links.model(adapter.name),
    )


def _station(adapter: RegisteredAdapter, base: BaseVersion) -> Station:
    outcome, trained = adapter.outcome_on(base), adapter.trained_on(base)
    cell = cell_of(adapter, base, outcome, is_trained=trained is not None)
    override = adapter.alias_on(base).recorded
    if trained is not None:
        return Station(cell, number=trained.number, override=override)
    if outcome is None:
        return Station(cell, override=override)
    return Station(
        cell,
        reason=outcome.judgment.reason,
        number=outcome.new_number,
        attempts=outcome.attempts if cell.state == "failed" else 0,
        seconds=finite(outcome.seconds),
        tried=outcome.tried,
        notes=outcome.compatibility.notes,
        mismatches=outcome.compatibility.mismatches,
        override=override,
        has_outcome=True,
    )


def _version_view(version: AdapterVersion, links: Links) -> VersionView:
    return VersionView(
        number=version.number,
        base=version.base.version,
        origin=_origin(version),
        recipe=_recipe(version.recipe) if version.is_trained else "",
        weights_sha256=version.weights_sha256,
        superseded=version.state.superseded,
        page_url=links.version(version.adapter, version.number),
        run_url=links.run(version.run_id),
    )


def _origin(version: AdapterVersion) -> str:
    if version.is_trained:
        if version.made_by is RecoveryStrategy.RETRAINED:
            return "retrained after an update"
        return "trained" if version.recipe_sha256 else "adopted"
    direct = version.made_by is RecoveryStrategy.DIRECT
    how = "transferred" if direct else version.made_by.value
    return f"{how} from version {version.transferred_from}"


def _recipe(recipe: TrainingRecipe | None) -> str:
    """Return the main settings of a training as one line."""
    if recipe is None:
        return ""
    perturbation, optimizer = recipe.perturbation, recipe.optimizer
    how = (
        "no perturbation"
        if perturbation.is_off
        else f"masking {perturbation.masking_p:g}, dropping {perturbation.dropping_p:g}"
    )
    return (
        f"{recipe.spec.peft_type}, {how}, {optimizer.duration}, "
        f"learning rate {optimizer.learning_rate:g}"
    )


def base_view(
    base: BaseVersion,
    fleet: Fleet,
    links: Links,
    fingerprint: Fingerprint | None,
    fingerprint_problem: str = "",
) -> BaseView:
    """Return the page of a base version. `fingerprint` is None if it was not read."""
    return BaseView(
        family=base.family,
        version=base.version,
        number=base.number,
        uri=base.uri,
        parent=base.parent,
        ready=base.ready,
        served=base.served,
        is_champion=base.number == fleet.champion,
        is_serving=base.number == fleet.serving,
        alias=base.alias if base.ready else "",
        fingerprint_sha256=base.fingerprint_sha256,
        manifest_sha256=base.manifest_sha256,
        drift=base.drift,
        note=fleet.notes.get(base.number, ""),
        page_url=links.version(base.family, base.number),
        fingerprint=None if fingerprint is None else _summary(fingerprint),
        fingerprint_problem=fingerprint_problem,
    )


def _summary(fingerprint: Fingerprint) -> dict[str, str | int]:
    parameters = 0
    for tensor in fingerprint.tensors.values():
        size = 1
        for length in tensor.shape:
            size *= length
        parameters += size
    return {
        "architecture": fingerprint.architecture,
        "layers": fingerprint.layer_count,
        "tensors": len(fingerprint.tensors),
        "parameters": parameters,
        "data types": ", ".join(sorted({t.dtype for t in fingerprint.tensors.values()})),
        "config sha256": fingerprint.config_sha256,
        "vocabulary sha256": fingerprint.vocabulary_sha256,
        "tokenizer sha256": fingerprint.tokenizer_sha256,
        "chat template sha256": fingerprint.chat_template_sha256,
    }
