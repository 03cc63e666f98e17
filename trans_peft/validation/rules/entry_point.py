"""Custom scoring rules: Python callables that installed packages register as entry points.

    [project.entry-points."trans_peft.scoring"]
    my-rule = "my_package.scoring:is_right"

    def is_right(answer: str, reference: str) -> bool: ...

A suite names the rule and the version of its package, `python:my-rule==1.2.0`. The version is
therefore part of the key of every result, and the suite is refused if another version is installed.
"""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import EvaluationError, InvalidSpecError

__all__ = ["GROUP", "entry_point"]

GROUP = "trans_peft.scoring"


def entry_point(requirement: str) -> Callable[[str, str], float]:
    """Load the entry point `name==version` and return it as a scoring rule.

    InvalidSpecError if that version is not installed or cannot be loaded. The rule raises
    EvaluationError if the callable returns anything but True or False.
    """
    name, _, version = requirement.partition("==")
    registered = {point.name: point for point in entry_points(group=GROUP)}
    point = registered.get(name)
    if point is None or not version or _version(point) != version:
        installed = [f"{other.name}=={_version(other)}" for other in registered.values()]
        raise InvalidSpecError(
            "the suite's scoring rule is not installed in the required version",
            expected=f"python:NAME==VERSION of an entry point in the group {GROUP}",
            found=f"python:{requirement}; installed: {', '.join(installed) or 'none'}",
            do="install that version on this machine, or correct `scoring` in the suite",
        )
    try:
        is_right = point.load()
    except Exception as error:  # the package may raise anything
        raise InvalidSpecError(
            f"the scoring rule {requirement} cannot be loaded",
            found=f"{type(error).__name__}: {error}",
            do="correct the package, and install it again",
        ) from error

    def degree(answer: str, reference: str) -> float:
        right = is_right(answer, reference)
        if not isinstance(right, bool):
            raise EvaluationError(
                f"the scoring rule {requirement} did not return True or False",
                found=excerpt(repr(right)),
                do="correct the rule, and give the package a new version",
            )
        return 100.0 if right else 0.0

    return degree


def _version(point: EntryPoint) -> str:
    return point.dist.version if point.dist is not None else ""
