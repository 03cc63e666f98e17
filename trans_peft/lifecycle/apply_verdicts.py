"""Apply verdicts: set each adapter's alias on each base version, then move `serving`.

Every write is idempotent, so a process that dies between two writes loses nothing. Manual overrides
have priority: they are recorded and kept, and `serving` only follows `champion`. MLflow has no
compare-and-set. Both aliases of the family are therefore read again before and after `serving`
moves; if they changed, the result is marked as outdated and the caller applies the verdicts again.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NamedTuple

from trans_peft.domain.adapter import AliasState, ManualOverride
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import CHAMPION_ALIAS, SERVING_ALIAS
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.domain.fleet import (
    AliasChange,
    ChampionNotReady,
    Fleet,
    FleetChanges,
    ObservedOverride,
    PromotionObstacle,
    RegisteredAdapter,
    VerdictsMissing,
)
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.errors import NotFoundError, StoreError, TransPeftError
from trans_peft.lifecycle.fleet_claim import check_fdr, within_fdr
from trans_peft.lifecycle.parallel import in_parallel
from trans_peft.lifecycle.promotion import check_policy, describe_obstacle
from trans_peft.lifecycle.reconcile import plan
from trans_peft.ports import Platform

__all__ = ["apply_verdicts"]

_MAX_NOTE_CHARACTERS = 5000  # the longest tag value that MLflow shows in full


def apply_verdicts(
    fleet: Fleet,
    policy: GatePolicy,
    promotion: PromotionPolicy,
    platform: Platform,
    *,
    now: datetime | None = None,
) -> tuple[Fleet, FleetChanges]:
    """Set each adapter's alias on each base by its verdict, then move `serving` to `champion`.

    `serving` moves when every live adapter has a verdict on the champion and the promotion policy
    is met. Otherwise the reason is returned and noted on the version with `champion`. `now` is the
    time that is recorded for a new manual override.

    Returns the fleet as it is after the changes, which need not be read again, and the changes.
    """
    check_fdr(policy, promotion)
    selected = None if promotion.fdr is None else within_fdr(fleet, promotion.fdr)
    seen_at = (now or datetime.now(UTC)).isoformat(timespec="seconds")

    def applied(adapter: RegisteredAdapter) -> _Applied:
        try:
            if _has_changes(adapter, fleet, selected):
                # A fleet takes long to read: an older verdict must not undo what another run set.
                adapter = platform.registry.adapter(adapter.name)
            return _apply(adapter, fleet, platform, seen_at, selected)
        except StoreError:
            raise  # the registry did not respond, so the adapter did not fail
        except TransPeftError as error:
            return _Applied(unreadable=(f"{adapter.name}: {error}",))

    results = in_parallel(applied, fleet.adapters)
    unreadable = (*fleet.unreadable, *(text for one in results for text in one.unreadable))
    adapters = tuple(one.adapter for one in results if one.adapter is not None)
    updated = replace(fleet, adapters=adapters, unreadable=unreadable)
    promoted, found = _promote(updated, policy, promotion, platform)
    return promoted, replace(
        found,
        aliases=tuple(change for one in results for change in one.aliases),
        manual_overrides=tuple(seen for one in results for seen in one.manual_overrides),
        unreadable=(*unreadable, *fleet.set_aside),
    )


class _Applied(NamedTuple):
    """An adapter as it is after its verdicts were applied, None if it is not live, and changes."""

    adapter: RegisteredAdapter | None = None
    aliases: tuple[AliasChange, ...] = ()
    manual_overrides: tuple[ObservedOverride, ...] = ()
    unreadable: tuple[str, ...] = ()


_Selected = Mapping[str, frozenset[str]] | None
"""Names of the adapters that may serve by verdict, by the base's alias. None: all that passed."""


def _has_changes(adapter: RegisteredAdapter, fleet: Fleet, selected: _Selected) -> bool:
    """Return whether the verdicts require a change of one of the adapter's aliases."""
    return any(
        _differs(adapter.alias_on(base), _decide(adapter, base, selected)) for base in fleet.bases
    )


def _apply(
    adapter: RegisteredAdapter,
    fleet: Fleet,
    platform: Platform,
    seen_at: str,
    selected: _Selected,
) -> _Applied:
    """Set one adapter's alias on each base; return the adapter with its aliases as they are now."""
    if not adapter.is_live:
        return _Applied()
    aliases: list[AliasChange] = []
    overrides: list[ObservedOverride] = []
    states = dict(adapter.aliases)
    for base in {base.alias: base for base in fleet.bases}.values():
        decision, state = _decide(adapter, base, selected), adapter.alias_on(base)
        if _differs(state, decision):
            if platform.registry.set_alias(adapter.name, base.alias, decision.number):
                state = AliasState(decision.number, recorded=state.recorded)
                aliases.append(AliasChange(adapter.name, base.alias, decision.number))
            else:  # a person changed the alias after it was read
                state = platform.registry.aliases(adapter.name)[base.alias]
        override = _override(state, decision, seen_at) if state.is_manual else None
        if override != state.recorded:
            platform.registry.record_manual_override(adapter.name, base.alias, override)
        if override is not None:
            overrides.append(ObservedOverride(adapter.name, base.ref, override))
        states[base.alias] = state
    return _Applied(replace(adapter, aliases=states), tuple(aliases), tuple(overrides))


@dataclass(frozen=True)
class _Decision:
    """The version that serves on a base by verdict (None: no version), and the verdict.

    `is_open`: there is no verdict yet, so the alias stays as it is.
    """

    number: int | None
    reason: str
    is_open: bool = False


_OUTSIDE = "passed, but not within the FDR target of the fleet"


def _decide(adapter: RegisteredAdapter, base: BaseVersion, selected: _Selected) -> _Decision:
    is_outside = selected is not None and adapter.name not in selected[base.alias]
    trained_here = adapter.trained_on(base)
    if trained_here is not None:  # even if a newer version was trained on another base
        if is_outside and adapter.retrained_on(base) is not None:
            return _Decision(None, _OUTSIDE)
        return _Decision(trained_here.number, "trained here")
    outcome = adapter.outcome_on(base)
    if outcome is None or outcome.verdict is Verdict.FAILED:  # an error is not a verdict
        return _Decision(None, str(outcome.verdict) if outcome else "no verdict", is_open=True)
    passed = outcome.verdict is Verdict.PASSED
    if passed and is_outside:
        return _Decision(None, _OUTSIDE)
    return _Decision(outcome.new_number if passed else None, str(outcome.verdict))


def _differs(state: AliasState, decision: _Decision) -> bool:
    if state.is_manual or decision.is_open:
        return False
    return state.is_unfinished or state.number != decision.number


def _override(state: AliasState, decision: _Decision, seen_at: str) -> ManualOverride:
    """Return the record of a manual override; the time stays that of the first observation."""
    known = state.recorded
    first_seen = known.first_seen if known and known.number == state.number else seen_at
    return ManualOverride(state.number, decision.number, decision.reason, first_seen)


def _promote(
    fleet: Fleet, policy: GatePolicy, promotion: PromotionPolicy, platform: Platform
) -> tuple[Fleet, FleetChanges]:
    obstacle = _obstacle(fleet, policy, promotion, platform)
    changes = FleetChanges(obstacle=obstacle)
    notes: dict[int, str] = {}
    if obstacle is not None and fleet.champion is not None:
        kind = "refused" if changes.is_refused else "waits"
        text = f"{kind}: {describe_obstacle(obstacle)}"[:_MAX_NOTE_CHARACTERS]
        notes[fleet.champion] = text
        changes = replace(changes, already_reported=fleet.notes.get(fleet.champion) == text)
    for number in sorted({*fleet.notes, *notes}):
        if fleet.notes.get(number) != notes.get(number):
            with suppress(NotFoundError):  # the version was deleted, but its alias remains
                platform.catalog.note_promotion(fleet.family, number, notes.get(number, ""))
    champion = fleet.base(fleet.champion)
    moves = obstacle is None and champion is not None and champion.number != fleet.serving
    if champion is not None and moves and not _aliases_changed(fleet, platform):
        platform.catalog.set_serving(champion)
        changes = replace(changes, promoted=champion)
        fleet = replace(fleet, serving=champion.number)
    if moves or notes != fleet.notes:
        changes = replace(changes, is_outdated=_aliases_changed(fleet, platform))
    return replace(fleet, notes=notes), changes


def _aliases_changed(fleet: Fleet, platform: Platform) -> bool:
    """Return whether `champion` or `serving` moved after the fleet was read."""
    aliases = (
        platform.catalog.alias(fleet.family, name) for name in (CHAMPION_ALIAS, SERVING_ALIAS)
    )
    return tuple(aliases) != (fleet.champion, fleet.serving)


def _obstacle(
    fleet: Fleet, policy: GatePolicy, promotion: PromotionPolicy, platform: Platform
) -> PromotionObstacle | None:
    """Return what prevents `serving` from moving to `champion`; None if nothing does."""
    champion = fleet.base(fleet.champion)
    if fleet.champion is None or fleet.champion == fleet.serving:
        return None
    if champion is None:
        return ChampionNotReady(fleet.family, fleet.champion)
    if champion.served and promotion.free_rollback:
        return None
    missing = [task.adapter for task in plan(fleet, policy).tasks if task.base == champion.ref]
    if missing:
        return VerdictsMissing(champion, tuple(missing))
    return check_policy(fleet, champion, promotion, platform)
