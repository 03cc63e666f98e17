"""A verdict explained: what it means, the figures of every suite, and the items that changed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import (
    DEFAULT_ENGINE,
    Comparison,
    Evaluation,
    NegativeFlips,
    SliceJudgment,
    Suite,
    SuiteJudgment,
    flipped_items,
    prefix_key,
)
from trans_peft.domain.fleet import RegisteredAdapter
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.errors import TransPeftError
from trans_peft.ports import EvaluationStore
from trans_peft.ui.figures import finite
from trans_peft.ui.index import Override, State
from trans_peft.ui.picture import Picture, picture

__all__ = ["MEANINGS", "Flips", "Meaning", "SuiteView", "meaning_of", "suites_of"]


@dataclass(frozen=True)
class Meaning:
    """What a verdict says, and what to do: a row of the table in docs/verdicts.md."""

    condition: str
    do: str


MEANINGS: Mapping[State, Meaning] = {
    State.FAILED: Meaning(
        "The transfer raised an error. The outcome contains the reason and the number of attempts.",
        "Read the reason. After three attempts under one policy, the task is parked until a person "
        "acts.",
    ),
    State.INCOMPATIBLE: Meaning(
        "The weights cannot be used on this base: architecture, shapes or token ids differ, or the "
        "adapter changes no logit (its scale is 0, or its weights are zero). Nothing is evaluated.",
        "Retrain the adapter on this base.",
    ),
    State.PASSED: Meaning(
        "On every required suite, the adapter is non-inferior to itself on the old base and "
        "superior to the bare new base (unless the policy sets must_beat_bare: false).",
        "Nothing.",
    ),
    State.NEEDS_RETUNING: Meaning(
        "On at least one required suite, the adapter is inferior to itself on the old base.",
        "Re-tune the adapter on this base.",
    ),
    State.RETIRE: Meaning(
        "On every required suite, the bare new base is non-inferior to the adapter on it.",
        "Consider serving the base without the adapter.",
    ),
    State.INCONCLUSIVE: Meaning(
        "None of passed, needs-retuning and retire is shown. The reason states how many more items "
        "would decide.",
        "Use a larger suite, or set the alias manually.",
    ),
}
"""The table of docs/verdicts.md. A test compares them."""


def meaning_of(state: State, override: Override, base: BaseVersion, number: int | None) -> Meaning:
    """Return the meaning of a verdict. For a manual override, `do` says how to undo it.

    `number` is the adapter's version for `base`; None if the transfer registered none.
    """
    meaning = MEANINGS[state]
    if override is Override.NONE:
        return meaning
    if override is Override.BLOCKED:
        version = f"version {number}" if number else f"a version for {base}"
        done, undo = "does not serve", f"set that alias on {version}"
    else:
        done, undo = "serves", "remove that alias"
    text = (
        f"The adapter {done} on {base}, because a person changed its alias {base.alias}. Reconcile "
        f"keeps this. To undo it, {undo} in MLflow."
    )
    return replace(meaning, do=text if state is State.PASSED else f"{meaning.do} {text}")


@dataclass(frozen=True)
class Flips:
    """The items whose result differs between the old base and the new one.

    Attributes:
        lost: Ids of the items that are right on the old base and wrong on the new one.
        gained: Ids of the items that are wrong on the old base and right on the new one.
        compared: Number of items that both evaluations have.
        problem: Why the items cannot be listed; empty if they can.
    """

    lost: tuple[str, ...] = ()
    gained: tuple[str, ...] = ()
    compared: int = 0
    problem: str = ""


@dataclass(frozen=True)
class ComparisonView:
    """A comparison of docs/verdicts.md. A bound of None does not exist.

    Any other figure of None is unknown.

    Attributes:
        reference: What the adapter on the new base is compared with.
        reference_score: Score of the reference, in points.
        items: Number of items that both sides answered.
        discordant: Number of items that exactly one side answered correctly.
        difference: Score of the adapter minus `reference_score`.
        lower: Lower bound of the difference.
        upper: Upper bound of the difference.
        inferiority_bound: Upper bound at the level of the inferiority tests.
        shown: The tests that are significant.
        picture: The comparison on an axis.
    """

    reference: str
    reference_score: float | None
    items: int
    discordant: int
    difference: float | None
    lower: float | None
    upper: float | None
    inferiority_bound: float | None
    shown: tuple[str, ...]
    picture: Picture


@dataclass(frozen=True)
class SuiteView:
    """The figures of one suite behind a verdict. A figure of None is unknown.

    Attributes:
        suite: Name of the suite.
        score: Score of the adapter on the new base, in points.
        items: Number of items that were compared.
        suite_items: Number of items of the suite, if the evaluation ended early; otherwise None.
        power: Probability of `passed` in the comparison with the old base if nothing was lost.
        more_items: Number of further items that would decide; 0 without an estimate.
        chance: Score of random guessing in points, if the suite states it.
        comparisons: The comparisons with the old base, the bare new base and a fresh adapter.
        flips: The items whose result changed.
        clusters: Number of clusters of the items; 0 if all items are independent.
        negative_flips: Figures of the items that are right on the old base and wrong on the new
            one. None if the outcome does not record them.
        slices: Figures of each slice.
        engine: Name of the engine that answered on both bases.
        engine_note: Why the default engine answered instead of the policy's; empty if it did not.
    """

    suite: str
    score: float | None
    items: int
    suite_items: int | None
    power: float | None
    more_items: int
    chance: float | None
    comparisons: tuple[ComparisonView, ...]
    flips: Flips
    clusters: int = 0
    negative_flips: NegativeFlips | None = None
    slices: tuple[SliceJudgment, ...] = ()
    engine: str = DEFAULT_ENGINE
    engine_note: str = ""


def suites_of(
    adapter: RegisteredAdapter,
    base: BaseVersion,
    outcome: TransferOutcome,
    evaluations: EvaluationStore,
) -> tuple[SuiteView, ...]:
    """Return the figures of every suite of an outcome, with the items that changed."""
    source = next((v for v in adapter.versions if v.number == outcome.source_number), None)
    made = next((v for v in adapter.versions if v.number == outcome.new_number), None)
    suites = {suite.name: suite for suite in source.suites} if source else {}
    return tuple(
        _suite_view(
            figures,
            finite(outcome.judgment.margin_points),
            suites.get(figures.suite),
            _flips(figures, suites.get(figures.suite), source, made, base, evaluations),
        )
        for figures in outcome.judgment.suites
    )


def _suite_view(
    figures: SuiteJudgment, margin_points: float | None, suite: Suite | None, flips: Flips
) -> SuiteView:
    old, bare, fresh = (
        figures.versus_old_base,
        figures.versus_bare_base,
        figures.versus_fresh_adapter,
    )
    loss = None if margin_points is None else -margin_points
    views = [_comparison_view("the adapter on the old base", old, loss, _versus_adapter(old))]
    if bare is not None:
        result = "good" if bare.superior else "bad" if bare.reference_non_inferior else "open"
        views.append(_comparison_view("the bare new base", bare, margin_points, result))
    if fresh is not None:
        views.append(_comparison_view("a fresh adapter", fresh, loss, _versus_adapter(fresh)))
    return SuiteView(
        suite=figures.suite,
        score=finite(figures.score),
        items=figures.items,
        suite_items=figures.prefix.suite_items if figures.prefix else None,
        power=finite(figures.power),
        more_items=figures.more_items,
        chance=suite.chance_points if suite else None,
        comparisons=tuple(views),
        flips=flips,
        clusters=figures.clusters,
        negative_flips=figures.negative_flips,
        slices=figures.slices,
        engine=figures.engine,
        engine_note=figures.engine_note,
    )


def _versus_adapter(found: Comparison) -> str:
    return "good" if found.non_inferior else "bad" if found.inferior else "open"


def _comparison_view(
    reference: str, found: Comparison, limit: float | None, result: str
) -> ComparisonView:
    tests = {
        "non-inferior": found.non_inferior,
        "inferior": found.inferior,
        "superior": found.superior,
        "reference non-inferior": found.reference_non_inferior,
    }
    return ComparisonView(
        reference=reference,
        reference_score=finite(found.reference_score),
        items=found.items,
        discordant=found.discordant,
        difference=finite(found.difference),
        lower=finite(found.lower),
        upper=finite(found.upper),
        inferiority_bound=finite(found.inferiority_bound),
        shown=tuple(name for name, holds in tests.items() if holds),
        picture=picture(found, limit, result),
    )


def _flips(
    figures: SuiteJudgment,
    suite: Suite | None,
    source: AdapterVersion | None,
    made: AdapterVersion | None,
    base: BaseVersion,
    evaluations: EvaluationStore,
) -> Flips:
    """Return the items that changed, from the two stored evaluations of a suite."""
    if suite is None or source is None:
        return Flips(problem="the registry no longer has the version or the suite that was judged")
    if made is None:
        return Flips(problem="the outcome names no version whose evaluation could be looked up")
    sides = (source.weights_sha256, source.base), (made.weights_sha256, base)
    old_key, new_key = (
        suite.evaluation_key(weights_sha256, side.fingerprint_sha256, figures.engine)
        for weights_sha256, side in sides
    )
    if figures.prefix is not None and figures.items < figures.prefix.suite_items:
        new_key = prefix_key(new_key, figures.prefix, figures.items)
    try:
        old, new = evaluations.get(old_key), evaluations.get(new_key)
    except TransPeftError as error:
        return Flips(problem=f"the stored evaluations cannot be read: {error}")
    missing = [
        f"the evaluation on {where} is not stored"
        for where, found in ((source.base, old), (base, new))
        if found is None
    ]
    if old is None or new is None:
        return Flips(problem="; ".join(missing))
    return _compared(old, new)


def _compared(old: Evaluation, new: Evaluation) -> Flips:
    flipped = flipped_items(old, new)
    return Flips(
        lost=tuple(old.id for old, new in flipped if old.correct > new.correct),
        gained=tuple(old.id for old, new in flipped if old.correct < new.correct),
        compared=len({item.id for item in old.items} & {item.id for item in new.items}),
    )
