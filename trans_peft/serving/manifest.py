"""The serving manifest: which version of each adapter serves on one base version, and why.

The rule is that of `trans_peft.lifecycle.resolve`, applied to every live adapter of a family.
"""

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from trans_peft.domain.base import BaseRef, BaseVersion
from trans_peft.domain.conventions import CHAMPION_ALIAS, SERVING_ALIAS
from trans_peft.domain.fleet import Fleet, IdleReason, RegisteredAdapter
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.errors import IntegrityError
from trans_peft.lifecycle.promotion import idle_adapter
from trans_peft.lifecycle.reconcile import observe
from trans_peft.lifecycle.resolve import find_base, why_not_serving
from trans_peft.ports import Platform

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "FORMAT",
    "IdleEntry",
    "ServedAdapter",
    "ServingManifest",
    "json_schema",
    "manifest_from_json",
    "manifest_of",
    "manifest_to_json",
    "serving_manifest",
]

FORMAT = "trans-peft/serving-manifest/1"


@dataclass(frozen=True)
class ServedAdapter:
    """One adapter version that serves on a base.

    Attributes:
        name: Name of the adapter.
        number: Number of the version.
        base: The base version that it serves on.
        weights_sha256: Hash of its weights (`models.adapter_weights_sha256`).
        method: PEFT type, such as "LORA".
        made_by: "training" on this base, or the recovery strategy of the transfer.
        verdict: Verdict of the transfer. None if the version was trained on this base.
        policy_sha256: Hash of the gate policy of that verdict. Empty without one.
        is_manual: Whether a person set the alias, whatever the verdict.
    """

    name: str
    number: int
    base: BaseRef
    weights_sha256: str
    method: str
    made_by: str
    verdict: str | None = None
    policy_sha256: str = ""
    is_manual: bool = False

    @property
    def engine_name(self) -> str:
        """The name of exactly these weights, for folders and inside of servers.

        It ends with the version and the start of the hash, so that a name never gets other weights.
        """
        return f"{self.name}.v{self.number}.{self.weights_sha256[:12]}"


@dataclass(frozen=True)
class IdleEntry:
    """An adapter that does not serve on the base.

    Attributes:
        name: Name of the adapter.
        reason: A verdict, an `IdleReason`, or "unreadable".
        detail: The reason in a sentence.
    """

    name: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ServingManifest:
    """All adapters of a family that serve on one base version, and those that do not.

    Attributes:
        base: The base version.
        base_aliases: The aliases of this base version: `serving`, `champion`, both or none.
        adapters: The adapters that serve, sorted by name.
        idle: The live adapters that do not serve, sorted by name.
        format: Version of this format.
    """

    base: BaseRef
    base_aliases: tuple[str, ...]
    adapters: tuple[ServedAdapter, ...]
    idle: tuple[IdleEntry, ...] = ()
    format: str = FORMAT

    @property
    def is_next(self) -> bool:
        """Whether the base is `champion` and does not serve yet."""
        return CHAMPION_ALIAS in self.base_aliases and SERVING_ALIAS not in self.base_aliases


def serving_manifest(family: str, base: str, platform: Platform) -> ServingManifest:
    """Return what serves on a base version: a label, or the alias `serving` or `champion`.

    Retired adapters are left out. Raises NotFoundError for an unknown family or base, and
    StoreError if the registry does not respond.
    """
    target = find_base(family, base, platform)
    return manifest_of(observe(family, platform), target)


def manifest_of(fleet: Fleet, base: BaseVersion) -> ServingManifest:
    """Return what serves on a base version of a fleet that was read from the registry."""
    adapters: list[ServedAdapter] = []
    idle: list[IdleEntry] = []
    for adapter in fleet.adapters:
        served = _served(adapter, base)
        if served is not None:
            adapters.append(served)
        else:
            idle.append(_idle(adapter, base))
    for text in fleet.unreadable:
        name, _, detail = text.partition(": ")
        idle.append(IdleEntry(name, "unreadable", detail))
    aliases = {SERVING_ALIAS: fleet.serving, CHAMPION_ALIAS: fleet.champion}
    return ServingManifest(
        base=base.ref,
        base_aliases=tuple(
            alias
            for alias, number in aliases.items()
            if (named := fleet.base(number)) is not None
            and named.fingerprint_sha256 == base.fingerprint_sha256
        ),
        adapters=tuple(sorted(adapters, key=lambda found: found.name)),
        idle=tuple(sorted(idle, key=lambda found: found.name)),
    )


def manifest_to_json(manifest: ServingManifest) -> str:
    """Return a manifest as JSON, as `json_schema` describes it."""
    return json.dumps(_codec().dump_python(manifest, mode="json"), indent=2)


def manifest_from_json(text: str | bytes, where: str = "the serving manifest") -> ServingManifest:
    """Read a manifest. Raises IntegrityError, which names `where`, if it is invalid."""
    from pydantic import ValidationError

    try:
        manifest = _codec().validate_json(text)
    except ValidationError as error:
        raise IntegrityError(f"{where} cannot be read", found=str(error)) from error
    if manifest.format != FORMAT:
        raise IntegrityError(
            f"{where} has another format",
            expected=FORMAT,
            found=manifest.format,
            do="write it again with the same version of trans-peft that reads it",
        )
    return manifest


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of manifests, which is docs/reference/serving-manifest.json."""
    return _codec().json_schema(mode="serialization")


@cache
def _codec() -> "TypeAdapter[ServingManifest]":
    from pydantic import TypeAdapter  # `trans-peft --help` imports this module

    return TypeAdapter(ServingManifest)


def _served(adapter: RegisteredAdapter, base: BaseVersion) -> ServedAdapter | None:
    state = adapter.alias_on(base)
    version = adapter.serving_on(base)
    if version is None:
        return None
    outcome = adapter.outcome_on(base)
    is_direct = version.made_by is RecoveryStrategy.DIRECT
    is_judged = outcome is not None and outcome.new_number == version.number
    return ServedAdapter(
        name=adapter.name,
        number=version.number,
        base=base.ref,
        weights_sha256=version.weights_sha256,
        method=version.method,
        made_by="training" if is_direct and version.is_trained else str(version.made_by),
        verdict=version.state.verdict,
        policy_sha256=outcome.policy_sha256 if outcome is not None and is_judged else "",
        is_manual=state.is_manual,
    )


def _idle(adapter: RegisteredAdapter, base: BaseVersion) -> IdleEntry:
    found = idle_adapter(adapter, base)
    reason = IdleReason.NO_VERDICT if found is None else found.reason
    detail = f"{adapter.name} does not serve on {base}: {why_not_serving(adapter, base)}"
    return IdleEntry(adapter.name, str(reason), detail)
