"""Which evaluations may be compared, and the counts that a comparison in pairs rests on."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from trans_peft.domain.evaluation import BARE, Evaluation
from trans_peft.errors import InvalidSpecError

__all__ = ["Pairs", "check_comparable", "check_same_questions", "count_pairs"]

_SHOWN = 5


class Pairs(NamedTuple):
    """How many items were answered twice, and how many rightly in only one of the two places."""

    n: int
    only_first: int
    only_second: int

    @property
    def points(self) -> float:
        """Second minus first, in points."""
        return 100.0 * (self.only_second - self.only_first) / self.n

    @property
    def discordant(self) -> int:
        """How many items were answered rightly in just one of the two places."""
        return self.only_first + self.only_second


def count_pairs(first: Evaluation, second: Evaluation) -> Pairs:
    """Count the pairs of two comparable evaluations, item by item."""
    before = {item.id: item.correct for item in first.items}
    changes = [item.correct - before[item.id] for item in second.items]
    return Pairs(len(changes), changes.count(-1), changes.count(1))


def check_same_questions(first: Evaluation, second: Evaluation) -> None:
    """Raise InvalidSpecError unless both asked the same items, decoded in the same way."""
    sides = {"first": first, "second": second}
    problems = _differences(sides) + _other_items(sides, None)
    if problems:
        raise InvalidSpecError(
            f"two evaluations cannot be compared: {'; '.join(problems)}",
            expected="the same items, decoded in the same way",
        )


def check_comparable(
    required: Sequence[str],
    reference: Mapping[str, Evaluation],
    candidate: Mapping[str, Evaluation],
    bare: Mapping[str, Evaluation],
    fresh: Mapping[str, Evaluation] | None = None,
    *,
    bare_required: bool,
    partial: Collection[str] = (),
) -> None:
    """Raise InvalidSpecError, with all reasons, unless every suite can be compared in pairs.

    Comparable are the same questions (suite hash, item ids) marked by the same rule and decoded in
    the same way. Bare results may be missing where they are not required, those of a fresh adapter
    anywhere. Of a `partial` suite, the results on the new base may be missing or lack items.
    """
    fresh = fresh or {}
    problems = [] if required else ["there is no suite to judge by"]
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
        told = [f"no result: {side}" for side in sides if side not in {*results, *optional}]
        told += _differences(results)
        told += _other_items(results, reference.get(name) if name in partial else None)
        if name in candidate and name in bare:
            if candidate[name].base_fingerprint_sha256 != bare[name].base_fingerprint_sha256:
                told.append("adapter and bare base were run on different bases")
            if bare[name].weights_sha256 != BARE:
                told.append("the result of the bare base was made with an adapter")
        if name in candidate and name in fresh:
            if candidate[name].base_fingerprint_sha256 != fresh[name].base_fingerprint_sha256:
                told.append("adapter and fresh adapter were run on different bases")
            if fresh[name].weights_sha256 == BARE:
                told.append("the result of the fresh adapter was made without one")
        problems += [f"suite {name!r}: {problem}" for problem in told]
    if problems:
        raise InvalidSpecError(
            "the evaluations cannot be compared:\n    " + "\n    ".join(problems),
            expected="the same items, marked by the same rule, decoded in the same way",
            do="evaluate all sides on the same pinned suite; nothing was judged",
        )


def _differences(results: Mapping[str, Evaluation]) -> list[str]:
    problems = []
    for what in ("suite", "suite_sha256", "decoding_sha256"):
        found = {side: getattr(result, what) for side, result in results.items()}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{value[:12]} ({side})" for side, value in found.items())
            problems.append(f"{what} differs: {told}")
    return problems


def _other_items(results: Mapping[str, Evaluation], whole: Evaluation | None) -> list[str]:
    """Where there is a `whole`, the others may lack some of its items, but have no more."""
    asked = Counter(item.id for result in results.values() for item in result.items)
    if whole is None:
        unshared = sorted(id_ for id_, count in asked.items() if count < len(results))
    else:
        unshared = sorted(asked.keys() - {item.id for item in whole.items})
    if not unshared:
        return []
    dots = ", ..." if len(unshared) > _SHOWN else ""
    shown = ", ".join(unshared[:_SHOWN])
    where = "on all sides" if whole is None else "on the old base"
    return [f"{len(unshared)} items are not answered {where}: {shown}{dots}"]
