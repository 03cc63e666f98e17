"""Check that evaluations can be compared item by item, and count the pairs of results."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from trans_peft.domain.evaluation import BARE, Evaluation, GatePolicy
from trans_peft.domain.names import quoted
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.statistics.clusters import ClusterCounts
from trans_peft.validation.statistics.degrees import DegreeChanges
from trans_peft.validation.statistics.judged import JudgedChanges, LabeledMarks
from trans_peft.validation.statistics.order import SuiteClusters, cluster_of, order, order_seed

__all__ = [
    "check_comparable",
    "check_flips",
    "check_same_questions",
    "check_slices",
    "count_flips",
    "count_pairs",
]

_MAX_SHOWN_IDS = 5


def count_pairs(
    first: Evaluation, second: Evaluation, margin: float
) -> ClusterCounts | DegreeChanges:
    """Return the changes from the first evaluation to the second, by cluster.

    Both have the same items. In a suite with degrees, the changes are bet on with the effect
    `margin`, in an order that depends on the suite and the second base only. Marks of a judge model
    become changes of the share of right answers.
    """
    if not (first.has_degrees or second.has_degrees):
        return count_flips(first, second)
    before = {item.id: item.correct for item in first.items}
    after = {item.id: item for item in second.items}
    clusters = {id_: cluster_of(item) for id_, item in after.items()}
    seed = order_seed(second.suite_sha256, second.base_fingerprint_sha256)
    ids = order(after, seed, clusters)
    changes = [float(after[id_].correct - before[id_]) for id_ in ids]
    of_suite = SuiteClusters([clusters[id_] for id_ in ids])
    if second.labeled:
        return JudgedChanges(changes, of_suite, margin, LabeledMarks.of(second.labeled))
    return DegreeChanges(changes, of_suite, margin)


def count_flips(first: Evaluation, second: Evaluation) -> ClusterCounts:
    """Count the items that are right in one of two evaluations of the same items, by cluster.

    In a suite with degrees these are the items whose degrees differ by at least one half.
    """
    before = {item.id: item.correct for item in first.items}
    changes = [item.correct - before[item.id] for item in second.items]
    flips = [(change >= 0.5) - (change <= -0.5) for change in changes]
    return ClusterCounts.of(flips, map(cluster_of, second.items))


def check_same_questions(first: Evaluation, second: Evaluation) -> None:
    """Raise InvalidSpecError unless both evaluations have the same items, suite and decoding."""
    sides = {"first": first, "second": second}
    problems = _different_settings(sides) + _different_items(sides, None)
    if problems:
        raise InvalidSpecError(
            f"the two evaluations cannot be compared: {'; '.join(problems)}",
            expected="the same items, scoring rule and decoding settings",
            do="evaluate both on the same pinned suite",
        )


def check_comparable(  # noqa: PLR0913  the arguments of `judge`
    required: Sequence[str],
    reference: Mapping[str, Evaluation],
    candidate: Mapping[str, Evaluation],
    bare: Mapping[str, Evaluation],
    fresh: Mapping[str, Evaluation] | None = None,
    *,
    bare_required: bool,
    partial: Collection[str] = (),
) -> None:
    """Raise InvalidSpecError, with all reasons, unless every suite can be compared item by item.

    Results are comparable if they have the same suite hash, item ids, decoding settings (with the
    dtype) and engine. The mappings are those of `trans_peft.validation.gate.judge`. Results of the
    fresh adapter may be missing. Results of the bare base may be missing from suites that are not
    required, and from all suites without `bare_required`. Results on the new base of a suite in
    `partial` may be missing or lack items.
    """
    fresh = fresh or {}
    problems = [] if required else ["no required suite has results"]
    for name in sorted({*required, *reference, *candidate, *bare, *fresh}):
        sides = {
            "adapter on its old base": reference.get(name),
            "adapter on the new base": candidate.get(name),
            "bare new base": bare.get(name),
            "fresh adapter": fresh.get(name),
        }
        optional = {"fresh adapter"}
        if not bare_required or name not in required:
            optional.add("bare new base")
        if name in partial:
            optional |= {"adapter on the new base", "bare new base"}
        results = {side: result for side, result in sides.items() if result is not None}
        found = [f"no result: {side}" for side in sides if side not in {*results, *optional}]
        found += _different_settings(results)
        found += _different_items(results, reference.get(name) if name in partial else None)
        if name in candidate and name in bare:
            if candidate[name].base_fingerprint_sha256 != bare[name].base_fingerprint_sha256:
                found.append("adapter and bare base were evaluated on different bases")
            if bare[name].weights_sha256 != BARE:
                found.append("the result of the bare base comes from an adapter")
        if name in candidate and name in fresh:
            if candidate[name].base_fingerprint_sha256 != fresh[name].base_fingerprint_sha256:
                found.append("adapter and fresh adapter were evaluated on different bases")
            if fresh[name].weights_sha256 == BARE:
                found.append("the result of the fresh adapter comes from the bare base")
        problems += [f"suite {name!r}: {problem}" for problem in found]
    if problems:
        raise InvalidSpecError(
            "the evaluations cannot be compared:\n    " + "\n    ".join(problems),
            expected="the same items, scoring rule, decoding settings and engine",
            do="evaluate all of them on the same pinned suite with the same engine; no verdict was "
            "recorded",
        )


def check_slices(policy: GatePolicy, reference: Mapping[str, Evaluation]) -> None:
    """Raise InvalidSpecError unless the required suites have the required slices.

    `reference` are complete evaluations by suite name, so this is known before the new base is
    evaluated.
    """
    problems = []
    for required in dict.fromkeys(policy.required_slices):
        suite, _, name = required.partition("/")
        items = reference[suite].items if suite in reference else ()
        slices = sorted({item.slice for item in items} - {""})
        if suite not in policy.requires(reference):
            problems.append(f"{quoted(required)}: the suite is not required")
        elif name not in slices:
            known = ", ".join(slices) or "none: its data names no column `slice`"
            problems.append(f"{quoted(required)}: the suite has the slices {known}")
    if problems:
        raise InvalidSpecError(
            "the policy requires slices that do not exist: " + "; ".join(problems),
            expected="SUITE/SLICE, with a required suite and a value of its column for slices",
            do="correct required_slices in the gate policy, or the suite's data",
        )


def check_flips(policy: GatePolicy, reference: Mapping[str, Evaluation]) -> None:
    """Raise InvalidSpecError if negative flips are limited on suites with a judge model.

    A mark that fell is no answer that became wrong, and nothing corrects the number of such marks.
    """
    suites = [name for name in policy.requires(reference) if name in reference]
    judged = [name for name in suites if reference[name].labeled]
    if policy.max_negative_flip_points is not None and judged:
        raise InvalidSpecError(
            f"the policy limits negative flips, which a judge model cannot count: {judged}",
            expected="required suites whose answers are scored by a rule",
            do="remove max_negative_flip_points from the gate policy, or do not require these "
            "suites",
        )


def _different_settings(results: Mapping[str, Evaluation]) -> list[str]:
    problems = []
    for name in ("suite", "suite_sha256", "decoding_sha256", "engine"):
        values = {side: getattr(result, name) for side, result in results.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{value[:12]} ({side})" for side, value in values.items())
            problems.append(f"{name} differs: {listed}")
    return problems


def _different_items(results: Mapping[str, Evaluation], whole: Evaluation | None) -> list[str]:
    """Return a problem if results differ in their items, or have items that `whole` lacks."""
    counts = Counter(item.id for result in results.values() for item in result.items)
    if whole is None:
        unshared = sorted(id_ for id_, count in counts.items() if count < len(results))
    else:
        unshared = sorted(counts.keys() - {item.id for item in whole.items})
    if not unshared:
        return []
    dots = ", ..." if len(unshared) > _MAX_SHOWN_IDS else ""
    shown = ", ".join(unshared[:_MAX_SHOWN_IDS])
    where = "in all evaluations" if whole is None else "in the evaluation on the old base"
    return [f"{len(unshared)} items are not {where}: {shown}{dots}"]
