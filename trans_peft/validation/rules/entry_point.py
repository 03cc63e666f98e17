"""A rule of one's own: a Python callable that an installed package offers by entry point.

    [project.entry-points."trans_peft.scoring"]
    my-rule = "my_package.scoring:is_right"

    def is_right(answer: str, reference: str) -> bool: ...

The suite names it with the version of its package, `python:my-rule==1.2.0`, so that the version is
part of every result's key: with another one installed the suite is refused, not marked otherwise.
"""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from trans_peft.errors import EvaluationError, InvalidSpecError

__all__ = ["GROUP", "entry_point"]

GROUP = "trans_peft.scoring"


def entry_point(requirement: str) -> Callable[[str, str], float]:
    """Return the rule that `name==version` asks for, loaded.

    InvalidSpecError where it is not installed in that version or cannot be loaded. The rule raises
    EvaluationError where the callable answers with anything but True or False.
    """
    name, _, version = requirement.partition("==")
    offered = {point.name: point for point in entry_points(group=GROUP)}
    point = offered.get(name)
    if point is None or not version or _version(point) != version:
        there = [f"{other.name}=={_version(other)}" for other in offered.values()]
        raise InvalidSpecError(
            "the suite's scoring rule is not installed in the version that it names",
            expected=f"python:NAME==VERSION, of an entry point in the group {GROUP}",
            found=f"python:{requirement}; installed: {', '.join(there) or 'none'}",
        )
    try:
        is_right = point.load()
    except Exception as error:  # whatever that package raises
        raise InvalidSpecError(
            f"the scoring rule {requirement} cannot be loaded",
            found=f"{type(error).__name__}: {error}",
        ) from error

    def degree(answer: str, reference: str) -> float:
        right = is_right(answer, reference)
        if not isinstance(right, bool):
            raise EvaluationError(
                f"the scoring rule {requirement} does not say whether an answer is right",
                expected="True or False",
                found=repr(right),
            )
        return 100.0 if right else 0.0

    return degree


def _version(point: EntryPoint) -> str:
    return point.dist.version if point.dist is not None else ""
