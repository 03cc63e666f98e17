"""Registered models and versions as a search of MLflow's REST API returns them.

MLflow's client turns each page into protocol buffers and then into entities, which takes ten times
as long as parsing its JSON. A fleet has thousands of both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trans_peft.domain.names import quoted
from trans_peft.errors import StoreError

__all__ = [
    "FoundModel",
    "FoundVersion",
    "Page",
    "all_pages",
    "entry_of",
    "malformed_answer",
    "page_of",
]


@dataclass(frozen=True, slots=True)
class FoundVersion:
    """A version of a registered model. `version` is its number."""

    name: str
    version: str
    source: str
    run_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A registered model.

    Attributes:
        name: Its name.
        tags: Its tags.
        aliases: Version numbers by alias. A search of versions does not return them.
        latest: The highest number of its versions; 0 if it has none.
    """

    name: str
    tags: Mapping[str, str]
    aliases: Mapping[str, str]
    latest: int


class Page(list[Any]):
    """One page of a search, and the token of the next page; empty after the last one."""

    token: str = ""


def all_pages(search: Callable[[str | None], Any]) -> list[Any]:
    """Return the items of all pages of a search. `search` takes the token of a page, or None.

    Raises StoreError if a page names itself or an earlier one as the next.
    """
    found: list[Any] = []
    token: str | None = None
    asked: set[str | None] = set()
    while True:
        asked.add(token)
        page = search(token)
        found += page
        token = page.token
        if not token:
            return found
        if token in asked:
            raise malformed_answer("the token of a page that was read before", token)


def page_of(answer: object, kind: str) -> Page:
    """Return the page in an answer to a search for "registered-models" or "model-versions".

    MLflow's server leaves out an empty list, so that an empty page is `{}`. Raises StoreError for
    an answer of another shape: taken as an empty page, it would revoke every adapter.
    """
    key = kind.replace("-", "_")
    if not isinstance(answer, dict) or not (key in answer or answer.keys() <= {"next_page_token"}):
        raise malformed_answer(f"a JSON object with {key}", answer)
    try:
        page = Page(map(_model if key == "registered_models" else _version, answer.get(key, ())))
        page.token = _text(answer.get("next_page_token", ""))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise malformed_answer(f"{key} with the fields of MLflow's REST API", answer) from error
    return page


def malformed_answer(expected: str, found: object) -> StoreError:
    """Return the error for an answer that MLflow's server does not give."""
    return StoreError(
        "the answer of MLflow to a read of its registry has another shape",
        expected=expected,
        found=quoted(found, 200),
        do="check MLFLOW_TRACKING_URI, the version of the server, and the proxies before it",
    )


def entry_of(entity: Any) -> FoundModel | FoundVersion:
    """Return an entity of MLflow's client in the form of this module."""
    if hasattr(entity, "latest_versions"):
        latest = max((int(found.version) for found in entity.latest_versions), default=0)
        return FoundModel(entity.name, entity.tags, entity.aliases, latest)
    return FoundVersion(
        entity.name, str(entity.version), entity.source or "", entity.run_id or "", entity.tags
    )


def _model(row: Mapping[str, Any]) -> FoundModel:
    numbers = (int(version["version"]) for version in row.get("latest_versions", ()))
    aliases = {
        _text(alias["alias"]): str(int(alias["version"])) for alias in row.get("aliases", ())
    }
    return FoundModel(_text(row["name"]), _tags(row), aliases, max(numbers, default=0))


def _version(row: Mapping[str, Any]) -> FoundVersion:
    return FoundVersion(
        _text(row["name"]),
        str(int(row["version"])),
        _text(row.get("source", "")),
        _text(row.get("run_id", "")),
        _tags(row),
    )


def _tags(row: Mapping[str, Any]) -> dict[str, str]:
    return {_text(tag["key"]): _text(tag.get("value", "")) for tag in row.get("tags", ())}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{quoted(value)} is not text")
    return value
