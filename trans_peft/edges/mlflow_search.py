"""Registered models and versions as a search of MLflow's REST API returns them.

MLflow's client turns each page into protocol buffers and then into entities, which takes ten times
as long as parsing its JSON. A fleet has thousands of both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FoundModel", "FoundVersion", "Page", "all_pages", "entry_of", "page_of"]


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
    """Return the items of all pages of a search. `search` takes the token of a page, or None."""
    found, token = [], None
    while True:
        page = search(token)
        found += page
        token = page.token
        if not token:
            return found


def page_of(answer: Mapping[str, Any]) -> Page:
    """Return the page in an answer of `registered-models/search` or `model-versions/search`."""
    page = Page(
        FoundModel(
            row["name"],
            _tags(row),
            {alias["alias"]: alias["version"] for alias in row.get("aliases", ())},
            max((int(version["version"]) for version in row.get("latest_versions", ())), default=0),
        )
        for row in answer.get("registered_models", ())
    )
    page += (
        FoundVersion(
            row["name"], row["version"], row.get("source", ""), row.get("run_id", ""), _tags(row)
        )
        for row in answer.get("model_versions", ())
    )
    page.token = answer.get("next_page_token", "")
    return page


def entry_of(entity: Any) -> FoundModel | FoundVersion:
    """Return an entity of MLflow's client in the form of this module."""
    if hasattr(entity, "latest_versions"):
        latest = max((int(found.version) for found in entity.latest_versions), default=0)
        return FoundModel(entity.name, entity.tags, entity.aliases, latest)
    return FoundVersion(
        entity.name, str(entity.version), entity.source or "", entity.run_id or "", entity.tags
    )


def _tags(row: Mapping[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag.get("value", "") for tag in row.get("tags", ())}
