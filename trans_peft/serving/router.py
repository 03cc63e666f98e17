"""Decide what a server answers a request with: an adapter version, the bare base, or an error.

`Router` is a pure function of the name in the request and of what was last read from the registry.
"""

from bisect import bisect
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from trans_peft.domain.fleet import IdleReason
from trans_peft.domain.names import LONGEST_NAME, quoted
from trans_peft.errors import closest, listed
from trans_peft.serving.manifest import IdleEntry, ServedAdapter, ServingManifest

__all__ = ["NEXT_SUFFIX", "BareBase", "Refusal", "RefusalReason", "Router"]

NEXT_SUFFIX = "@next"
"""Ends a name that is answered only on the base that is `champion` and does not serve yet."""

_COMPARED = 40
"""An unknown name is compared with this many names at most: each takes a tenth of a millisecond."""


class RefusalReason(StrEnum):
    """Why a request gets no answer, as the field `code` of the error."""

    NO_MODEL = "model_missing"
    UNKNOWN = "adapter_unknown"
    NOT_SERVED = "adapter_not_served"
    BLOCKED = "adapter_blocked"
    OTHER_BASE = "adapter_for_another_base"
    UNREADABLE = "adapter_unreadable"
    NOT_NEXT = "base_is_not_next"
    REGISTRY_AWAY = "registry_unavailable"
    DAMAGED = "adapter_damaged"
    UNSUPPORTED = "adapter_unsupported"
    CLOSED = "route_closed"


_STATUS = {
    RefusalReason.NO_MODEL: 400,
    RefusalReason.REGISTRY_AWAY: 503,
    RefusalReason.DAMAGED: 500,
    RefusalReason.UNSUPPORTED: 422,
}
_IDLE = {
    IdleReason.BLOCKED: RefusalReason.BLOCKED,
    IdleReason.OTHER_BASE: RefusalReason.OTHER_BASE,
    "unreadable": RefusalReason.UNREADABLE,
}


@dataclass(frozen=True)
class Refusal:
    """An error for the client: its reason and a sentence for a person."""

    reason: RefusalReason
    message: str

    @property
    def status(self) -> int:
        """The HTTP status. 404 unless the request, the server or the registry is at fault."""
        return _STATUS.get(self.reason, 404)


@dataclass(frozen=True)
class BareBase:
    """The base without an adapter, which the operator allows under one name."""


@dataclass(frozen=True)
class Router:
    """What one server answers each name with.

    Attributes:
        manifest: What serves on the server's base, as it was last read. None before the first read.
        registry_error: Why the last read failed. Empty if it did not.
        loaded: Engine names of the adapters that the server has loaded.
        base_name: The name under which the bare base answers, and which the registry gave to no
            adapter, live or retired. None: it does not answer.
    """

    manifest: ServingManifest | None
    registry_error: str = ""
    loaded: Collection[str] = ()
    base_name: str | None = None

    def route(self, model: object) -> ServedAdapter | BareBase | Refusal:
        """Return what answers a request for `model`, the value of that field in its body.

        A registry that is away changes nothing for an adapter that is loaded, and nothing for the
        bare base after the first read. All other names are refused until it is back.
        """
        if not isinstance(model, str) or not model:
            return Refusal(
                RefusalReason.NO_MODEL,
                "the request names no model; set the field `model` to the name of an adapter",
            )
        name = model.removesuffix(NEXT_SUFFIX)
        if len(name) > LONGEST_NAME and model != self.base_name:
            return Refusal(
                RefusalReason.UNKNOWN,
                f"there is no adapter {quoted(name)}; a name has at most {LONGEST_NAME} characters",
            )
        adapter = next((a for a in self._adapters if a.name == name), None)
        if model == self.base_name and self._is_free(name):
            return BareBase()
        is_loaded = adapter is not None and adapter.engine_name in self.loaded
        if (self.manifest is None or self.registry_error) and not is_loaded:
            return self._registry_is_away(model)
        if self.manifest is not None and name != model and not self.manifest.is_next:
            return self._not_next(model)
        if adapter is not None:
            return adapter
        return self._refusal(name)

    @property
    def engine_names(self) -> frozenset[str]:
        """The engine names of all adapters that serve."""
        return frozenset(adapter.engine_name for adapter in self._adapters)

    @property
    def _adapters(self) -> tuple[ServedAdapter, ...]:
        return self.manifest.adapters if self.manifest else ()

    @property
    def _idle(self) -> tuple[IdleEntry, ...]:
        return self.manifest.idle if self.manifest else ()

    def _is_free(self, name: str) -> bool:
        """Whether the registry was read, and no adapter had that name."""
        if self.manifest is None:
            return False
        is_served = any(adapter.name == name for adapter in self._adapters)
        return not is_served and all(entry.name != name for entry in self._idle)

    def _registry_is_away(self, model: str) -> Refusal:
        return Refusal(
            RefusalReason.REGISTRY_AWAY,
            f"{quoted(model)} is not loaded here, and the registry cannot be read now: "
            f"{self.registry_error or 'it was not read yet'}",
        )

    def _not_next(self, model: str) -> Refusal:
        assert self.manifest is not None
        aliases = " and ".join(self.manifest.base_aliases) or "no alias"
        return Refusal(
            RefusalReason.NOT_NEXT,
            f"{quoted(model)} needs the base that is champion and does not serve yet; this server "
            f"has {self.manifest.base}, which has {aliases}",
        )

    def _refusal(self, name: str) -> Refusal:
        for entry in self._idle:
            if entry.name == name:
                reason = _IDLE.get(entry.reason, RefusalReason.NOT_SERVED)
                return Refusal(reason, entry.detail)
        known = [adapter.name for adapter in self._adapters]  # sorted
        start = max(0, min(bisect(known, name) - _COMPARED // 2, len(known) - _COMPARED))
        near = known[start : start + _COMPARED]
        served = [*closest(name, near), *known[:start], *known[start + _COMPARED :]]
        return Refusal(
            RefusalReason.UNKNOWN,
            f"there is no adapter {quoted(name)}; adapters that serve: {listed(served) or 'none'}",
        )
