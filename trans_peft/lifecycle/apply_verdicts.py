"""What follows from the verdicts, written down: each adapter's alias on each base, then `serving`.

Every write is one that another look would make again, so a process that dies between two of them
loses nothing. A person's word stands above all of them: an alias that was set or taken away by hand
is recorded and left as it is, and `serving` only ever follows `champion`. MLflow has no
compare-and-set: both aliases are read again before `serving` moves and after, and whoever finds
that they have moved on asks for another look, so that the last one to write is right.
"""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from trans_peft.domain.adapter import AliasState, ManualOverride, version_trained_on
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import CHAMPION_ALIAS, SERVING_ALIAS
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.domain.fleet import Fleet, RegisteredAdapter
from trans_peft.domain.outcome import FleetChanges
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.errors import NotFoundError, StoreError, TransPeftError, listed
from trans_peft.lifecycle.promotion import promotion_blockers
from trans_peft.lifecycle.reconcile import plan
from trans_peft.ports import Platform

__all__ = ["apply_verdicts"]

_LONGEST_NOTE = 5000  # characters, of which MLflow's page shows each


def apply_verdicts(
    fleet: Fleet,
    policy: GatePolicy,
    promotion: PromotionPolicy,
    platform: Platform,
    *,
    now: datetime | None = None,
) -> FleetChanges:
    """Write each adapter's alias on each base by its verdict, then move `serving` to `champion`.

    `serving` moves when every live adapter has its verdict there and the promotion policy has no
    objection. Why it does not is returned, and noted on the version where `champion` stands.
    """
    seen_at = (now or datetime.now(UTC)).isoformat(timespec="seconds")
    written = _Written()
    adapters, unreadable = [], [*fleet.unreadable]
    for adapter in fleet.adapters:
        try:
            adapters.append(_settled(adapter, fleet, platform, seen_at, written))
        except StoreError:
            raise  # the registry does not answer: that says nothing about the adapter
        except TransPeftError as error:
            unreadable.append(f"{adapter.name}: {error}")
    settled = replace(fleet, adapters=tuple(adapters), unreadable=tuple(unreadable))
    return replace(
        _promote(settled, policy, promotion, platform),
        aliases=tuple(written.aliases),
        manual_overrides=tuple(written.manual_overrides),
        unreadable=(*unreadable, *fleet.set_aside),
    )


@dataclass(frozen=True)
class _Written:
    """Lines about aliases that were moved, and about those that a person moved."""

    aliases: list[str] = field(default_factory=list)
    manual_overrides: list[str] = field(default_factory=list)


def _settled(
    adapter: RegisteredAdapter, fleet: Fleet, platform: Platform, seen_at: str, written: _Written
) -> RegisteredAdapter:
    """Write one adapter's alias on each base by its verdict; return it with the aliases as set."""
    states = dict(adapter.aliases)
    for base in {base.alias: base for base in fleet.bases}.values():
        decision, state = _decide(adapter, base), adapter.alias_on(base)
        if _differs(state, decision):
            if platform.registry.set_alias(adapter.name, base.alias, decision.number):
                state = AliasState(decision.number, recorded=state.recorded)
                written.aliases.append(f"{adapter.name}: {base.alias} -> {_named(decision.number)}")
            else:  # a person was faster
                state = platform.registry.aliases(adapter.name)[base.alias]
        hand = _hand(state, decision, seen_at) if state.manual else None
        if hand != state.recorded:
            platform.registry.record_manual_override(adapter.name, base.alias, hand)
        if hand is not None:
            written.manual_overrides.append(f"{adapter.name} on {base.version}: {hand}")
        states[base.alias] = state
    return replace(adapter, aliases=states)


@dataclass(frozen=True)
class _Decision:
    """Which version the verdict puts on a base (None: none), and why; `open`: no verdict yet."""

    number: int | None
    why: str
    open: bool = False


def _decide(adapter: RegisteredAdapter, base: BaseVersion) -> _Decision:
    here = version_trained_on(base.fingerprint_sha256, adapter.versions)
    if here is not None:  # whatever was trained on another base since
        return _Decision(here.number, "trained here")
    outcome = adapter.outcome_on(base)
    if outcome is None or outcome.verdict is Verdict.FAILED:  # an error decides nothing
        return _Decision(None, str(outcome.verdict) if outcome else "not judged", open=True)
    passed = outcome.verdict is Verdict.PASSED
    return _Decision(outcome.new_number if passed else None, str(outcome.verdict))


def _differs(state: AliasState, decision: _Decision) -> bool:
    if state.manual or decision.open:
        return False
    return state.unfinished or state.number != decision.number


def _hand(state: AliasState, decision: _Decision, seen_at: str) -> ManualOverride:
    """Return the record of a person's act; the one that stands where it says the same."""
    known = state.recorded
    first_seen = known.first_seen if known and known.number == state.number else seen_at
    return ManualOverride(state.number, decision.number, decision.why, first_seen)


def _promote(
    fleet: Fleet, policy: GatePolicy, promotion: PromotionPolicy, platform: Platform
) -> FleetChanges:
    waiting, refused = _why_not(fleet, policy, promotion, platform)
    text = f"waits: {waiting}" if waiting else f"refused: {refused}" if refused else ""
    text = text[:_LONGEST_NOTE]
    notes = {fleet.champion: text} if fleet.champion is not None and text else {}
    for number in sorted({*fleet.notes, *notes}):
        if fleet.notes.get(number) != notes.get(number):
            with suppress(NotFoundError):  # the version was deleted; its alias may outlive it
                platform.catalog.note_promotion(fleet.family, number, notes.get(number, ""))
    changes = FleetChanges(
        waiting=waiting,
        refused=refused,
        already_reported=bool(notes) and fleet.notes.get(fleet.champion or 0) == text,
    )
    champion = fleet.base(fleet.champion)
    moves = not text and champion is not None and champion.number != fleet.serving
    if champion is not None and moves and not _overtaken(fleet, platform):
        platform.catalog.set_serving(champion)
        changes = replace(changes, promoted=str(champion))
        fleet = replace(fleet, serving=champion.number)
    if moves or notes != fleet.notes:
        changes = replace(changes, is_outdated=_overtaken(fleet, platform))
    return changes


def _overtaken(fleet: Fleet, platform: Platform) -> bool:
    """Whether a person or another process moved what was looked at before it was written."""
    aliases = (
        platform.catalog.alias(fleet.family, name) for name in (CHAMPION_ALIAS, SERVING_ALIAS)
    )
    return tuple(aliases) != (fleet.champion, fleet.serving)


def _why_not(
    fleet: Fleet, policy: GatePolicy, promotion: PromotionPolicy, platform: Platform
) -> tuple[str | None, str | None]:
    """Return what a promotion waits for, and why it is refused; neither where it may go on."""
    champion = fleet.base(fleet.champion)
    if fleet.champion is None or fleet.champion == fleet.serving:
        return None, None
    if champion is None:
        return None, (
            f"champion stands on version {fleet.champion} of {fleet.family}, which cannot serve\n"
            "  expected: a version that ingestion made ready\n"
            "  found:    one that waits for it, that it refused, or that is a copy of another\n"
            "  do:       look at the last ingest run; put champion on the original of a copy"
        )
    if champion.served and promotion.free_rollback:
        return None, None
    missing = [w.adapter for w in plan(fleet, policy).work if w.base_version == champion.version]
    if missing:
        return f"{champion} waits for {len(missing)} verdicts: {listed(missing, 10)}", None
    return None, promotion_blockers(fleet, champion, promotion, platform)


def _named(number: int | None) -> str:
    return "none" if number is None else f"version {number}"
