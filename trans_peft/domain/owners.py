"""Whose a base family is: from which places its versions may come, and with whose signature.

Without a setting, the versions of a family come from below `<root>/<family>/`, where `root` is the
place in which uploads are looked for. So who may write there, by the bucket's policy, owns the
family. Without a root there is no place to bind a family to, and any place is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar
from urllib.parse import unquote

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.names import name_problem, quoted, same_but_for_case
from trans_peft.errors import InvalidSpecError

__all__ = ["FamilyRule", "Owners"]


@dataclass(frozen=True)
class FamilyRule:
    """What one family asks of a place and of an upload.

    `prefixes`: its versions come from below one of these URIs; empty: from below the default one.
    `key`: path of the public key (PEM, elliptic curve) that each of its uploads must be signed for;
    empty: none needs a signature.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    prefixes: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True)
class Owners:
    """The rules of all families. `root_uri` is where uploads are looked for."""

    root_uri: str = ""
    families: Mapping[str, FamilyRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [problem for name in self.families if (problem := name_problem("family", name))]
        problems += [
            f"{other} and {name} differ in upper and lower case alone"
            for name in self.families
            if (other := same_but_for_case(name, self.families)) is not None and other < name
        ]
        problems += [
            f"a prefix of {name} must be a plain URI or path; found {quoted(prefix)}"
            for name, rule in self.families.items()
            for prefix in rule.prefixes
            if not prefix or _parts(prefix) is None
        ]
        if problems:
            raise InvalidSpecError(f"the families' owners cannot be used: {'; '.join(problems)}")

    def prefixes(self, family: str) -> tuple[str, ...]:
        """Return the URIs below which a family's versions lie; empty: anywhere."""
        rule = self._rule(family)
        if rule and rule.prefixes:
            return rule.prefixes
        return (f"{self.root_uri.rstrip('/')}/{family}/",) if self.root_uri else ()

    def key(self, family: str) -> str:
        """Return the path of the public key that a family's uploads are signed for, or nothing."""
        rule = self._rule(family)
        return rule.key if rule else ""

    def _rule(self, family: str) -> FamilyRule | None:
        """Return the rule of the family, also for a name that differs in case alone."""
        return self.families.get(same_but_for_case(family, self.families) or family)

    def objection(self, family: str, uri: str) -> str | None:
        """Return why a version of a family may not come from `uri`, or None if it may."""
        if other := same_but_for_case(family, self.families):
            return f"its name differs from that of {other} in upper and lower case alone"
        allowed = self.prefixes(family)
        if not allowed:
            return None
        place = _parts(uri)
        if place is None:
            return "its URI has a part that is empty, '.' or '..'"
        for prefix in allowed:
            owned = _parts(prefix)
            if owned is not None and place[: len(owned)] == owned:
                return None
        return "the place belongs to another family, or to none"


def _parts(uri: str) -> tuple[str, ...] | None:
    """Return scheme, bucket and the parts of a path; None where a part could lead elsewhere.

    A `file://` URI and the path that it means are one place. An S3 key is taken as it is.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        scheme, rest = "file", uri
    elif scheme == "file":
        rest = unquote(rest.removeprefix("localhost"))
    parts = rest.removesuffix("/").split("/")
    if scheme == "file" and rest.startswith("/"):
        parts[0] = "root"
    elif scheme == "file":
        parts.insert(0, "here")
    if {"", ".", ".."} & {*parts}:
        return None
    return (scheme, *parts)
