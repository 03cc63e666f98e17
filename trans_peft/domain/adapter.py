"""Adapters: how one is configured, and one registered version of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trans_peft.domain.base import serving_alias
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.strictness import STRICT
from trans_peft.errors import InvalidSpecError, NotFoundError

__all__ = ["AdapterSpec", "AdapterVersion", "VersionState", "source_version"]


@dataclass(frozen=True)
class AdapterSpec:
    """One PEFT configuration: the type in PEFT's spelling ("LORA") and the fields of its config.

    `options` are PEFT's own names (`r`, `lora_alpha`, `target_modules`, `use_dora`, ...). They are
    checked against PEFT when the config is built (`trans_peft.methods.specs`).
    """

    __pydantic_config__: ClassVar = STRICT

    peft_type: str = "LORA"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.peft_type or self.peft_type != self.peft_type.upper():
            raise InvalidSpecError(
                "the adapter's type is not spelled as PEFT spells it",
                expected="upper case, such as LORA",
                found=repr(self.peft_type),
                do="take the value that stands as peft_type in adapter_config.json",
            )


@dataclass(frozen=True)
class VersionState:
    """What may change about a registered version: its verdict. The bytes never do."""

    verdict: str | None = None
    verdict_key: str | None = None
    superseded: bool = False


@dataclass(frozen=True)
class AdapterVersion:
    """The bytes of one adapter on one base: immutable once registered.

    `number` is the registry's. `base_*` is the base these bytes are bound to, `trained_on_*` the
    base they were trained on: the same for a trained version, different for a transferred one,
    whose `transferred_from` is the number of the version it was made from. `recipe_sha256` is empty
    for an adopted adapter: nobody knows how it was trained.
    """

    adapter: str
    number: int
    family: str
    base_version: str
    base_fingerprint_sha256: str
    trained_on_version: str
    trained_on_fingerprint_sha256: str
    weights_sha256: str
    method: str
    suites: tuple[Suite, ...]
    transferred_from: int | None = None
    recipe_sha256: str = ""
    run_id: str | None = None
    state: VersionState = VersionState()

    @property
    def alias(self) -> str:
        """The alias that says: this version serves on its base."""
        return serving_alias(self.base_fingerprint_sha256)

    @property
    def is_trained(self) -> bool:
        """Whether these bytes were trained on the base they are bound to."""
        return self.base_fingerprint_sha256 == self.trained_on_fingerprint_sha256

    def __str__(self) -> str:
        return f"{self.adapter} version {self.number}"


def source_version(versions: Sequence[AdapterVersion]) -> AdapterVersion:
    """Return the version whose bytes are carried to new bases: the latest that was trained.

    Raises NotFoundError where none was (every version is a transferred or a superseded one).
    """
    trained = [v for v in versions if v.is_trained and not v.state.superseded]
    if not trained:
        raise NotFoundError(
            "the adapter has no trained version to carry over",
            expected="a version bound to the base it was trained on",
            found=", ".join(str(version) for version in versions) or "no version at all",
            do="train it, or adopt the PEFT folder it came from",
        )
    return max(trained, key=lambda version: version.number)
