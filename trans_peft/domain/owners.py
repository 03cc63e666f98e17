"""From which places a base family takes its versions, and with whose signature.

By default, the versions of a family come from below `<root>/<family>/`, where `root` is the prefix
of all uploads. Everyone who may write there by the bucket's policy owns the family. Without a root,
versions may come from any place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar
from urllib.parse import unquote

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.names import name_problem, quoted, same_but_for_case
from trans_peft.errors import InvalidSpecError, UploadError

__all__ = ["FamilyRule", "Owners"]


@dataclass(frozen=True)
class FamilyRule:
    """The rule for the uploads of one family.

    Attributes:
        prefixes: URIs below which its versions must be. Empty: below the default prefix.
        key: Path of the public key (PEM, elliptic curve) that verifies the signature of each of its
            uploads. Empty: uploads need no signature.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    prefixes: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True)
class Owners:
    """The rules of all families.

    Attributes:
        root_uri: Prefix of all uploads. Empty: there is none.
        families: Rules by family. Names must not differ in case alone.
    """

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
            raise InvalidSpecError(f"the rules of families are invalid: {'; '.join(problems)}")

    def prefixes(self, family: str) -> tuple[str, ...]:
        """Return the URIs below which a family's versions must be. Empty: any place is allowed."""
        name = self._ruled_name(family)
        rule = self.families.get(name)
        if rule and rule.prefixes:
            return rule.prefixes
        return (f"{self.root_uri.rstrip('/')}/{name}/",) if self.root_uri else ()

    def key(self, family: str) -> str:
        """Return the path of the public key that verifies a family's uploads, or an empty text."""
        rule = self.families.get(self._ruled_name(family))
        return rule.key if rule else ""

    def _ruled_name(self, family: str) -> str:
        """Return the name as a rule spells it, if one differs in case alone."""
        return same_but_for_case(family, self.families) or family

    def check(self, family: str, uri: str, upload: object) -> None:
        """Raise UploadError if a version of a family must not come from `uri`."""
        if objection := self.objection(family, uri):
            raise UploadError(
                f"{upload} cannot become a version of the base family {family}: {objection}",
                expected=f"a URI below {' or '.join(self.prefixes(family))}",
                found=uri,
                do="upload the files there, or add this URI to TRANS_PEFT_FAMILIES on the workers",
            )

    def objection(self, family: str, uri: str) -> str | None:
        """Return why a version of a family must not come from `uri`, or None if it may."""
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
        return "the place does not belong to this family"


def _parts(uri: str) -> tuple[str, ...] | None:
    """Return scheme, bucket and the parts of a path, or None if a part is empty, `.` or `..`.

    A `file://` URI and its path have the same parts. S3 keys are not decoded.
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
