"""The reference for `AdapterRegistry.fleet`: each adapter in a read of its own."""

from trans_peft.domain.fleet import RegisteredAdapter
from trans_peft.errors import TransPeftError
from trans_peft.ports import AdapterRegistry


def one_by_one(
    registry: AdapterRegistry, family: str
) -> tuple[tuple[RegisteredAdapter, ...], tuple[str, ...]]:
    """Return the live adapters that can be read, and the reasons why the others cannot."""
    live: list[RegisteredAdapter] = []
    unreadable: list[str] = []
    for name in registry.adapters(family):
        try:
            live.append(registry.adapter(name))
        except TransPeftError as error:
            unreadable.append(f"{name}: {error}")
    return tuple(live), tuple(unreadable)
