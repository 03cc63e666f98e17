"""Make the text that a Jinja environment writes independent of memory addresses.

Python's text for a function, a generator or an object without its own text contains its address:
`{{ messages[0].items }}` would write another prompt in each process. Such values come from
attribute look-ups, calls and filters. `stabilize` replaces them with objects that behave the same
and have a constant text.
"""

from collections.abc import Callable, Iterator
from functools import update_wrapper
from typing import Any

__all__ = ["stabilize"]


_ADDRESS = " at 0x"
_DATA = (str, bytes, int, float, list, tuple, dict, type(None))
"""Types without an address in their text. Items of lists are replaced one by one."""


class _StableObject:
    def __init__(self, original: Any) -> None:
        self._original = original

    def __repr__(self) -> str:
        return "<object>"


class _StableFunction(_StableObject):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._original(*arguments, **options)


class _StableIterator(_StableObject):
    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._original)


def stabilize(environment: Any) -> None:
    """Change a sandboxed environment in place, before it compiles a template."""
    getattr_, getitem, call = environment.getattr, environment.getitem, environment.call

    def stable_call(context: Any, function: Any, *arguments: Any, **options: Any) -> Any:
        return _stable(call(context, _original(function), *arguments, **options))

    environment.getattr = lambda value, name: _stable(getattr_(_original(value), name))
    environment.getitem = lambda value, key: _stable(getitem(_original(value), key))
    environment.call = stable_call
    for name, function in environment.filters.items():
        environment.filters[name] = _stable_filter(function)
    for name, value in environment.globals.items():
        environment.globals[name] = _stable(value)


def _stable_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    def stable(*arguments: Any, **options: Any) -> Any:
        return _stable(function(*arguments, **options))

    return update_wrapper(stable, function)  # with Jinja's marks


def _stable(value: Any) -> Any:
    """Return the value, or a replacement if its text contains an address."""
    if isinstance(value, (_StableObject, *_DATA)) or _ADDRESS not in repr(value):
        return value
    if isinstance(value, Iterator):
        return _StableIterator(value)
    return _StableFunction(value) if callable(value) else _StableObject(value)


def _original(value: Any) -> Any:
    """Return the object with the attributes, and with Jinja's marks of a function."""
    return value._original if isinstance(value, _StableObject) else value
