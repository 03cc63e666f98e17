"""Convert tags of MLflow's registry to adapter versions and alias states, and back.

Any client of MLflow can write any text into any tag. A tag that is missing or invalid is therefore
an IntegrityError that names the tag and the version, never another exception.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from trans_peft.domain.adapter import AdapterVersion, AliasState, ManualOverride, VersionState
from trans_peft.domain.base import BaseRef
from trans_peft.domain.conventions import ALIAS_TAG_PREFIX, OVERRIDE_TAG_PREFIX
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.leakage import SuiteLeakage
from trans_peft.domain.names import quoted
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.edges.json_codec import from_json, to_json
from trans_peft.edges.mlflow_client import own_tags, tag
from trans_peft.errors import IntegrityError, InvalidSpecError

__all__ = ["NONE", "adapter_version", "alias_states", "checked_sha256", "version_tags"]

NONE = "none"
"""Value of an alias's tag if the alias is not set."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")


def version_tags(draft: AdapterVersion) -> dict[str, str]:
    """Return the tags for registering a version, without the prefix."""
    transferred = draft.transferred_from
    return {
        "adapter": draft.adapter,
        **draft.base.labels,
        "trained_on_version": draft.trained_on.version,
        "trained_on_fingerprint": draft.trained_on.fingerprint_sha256,
        "weights_sha256": draft.weights_sha256,
        "method": draft.method,
        "recipe_sha256": draft.recipe_sha256,
        "suites": to_json(draft.suites),
        "transferred_from": "" if transferred is None else str(transferred),
        "recipe": "" if draft.recipe is None else to_json(draft.recipe),
        "made_by": draft.made_by.value,
        "leakage": to_json(draft.leakage) if draft.leakage else "",
    }


def adapter_version(found: Any) -> AdapterVersion:
    """Return MLflow's version as an AdapterVersion. IntegrityError, which names the tag."""
    tags = own_tags(found.tags)
    where = f"version {found.version} of {found.name}"
    try:
        version = AdapterVersion(
            adapter=found.name,
            number=int(found.version),
            base=_base(tags, "base", where),
            trained_on=_base(tags, "trained_on", where),
            weights_sha256=checked_sha256(tags, "weights_sha256", where),
            method=tags["method"],
            recipe_sha256=tags.get("recipe_sha256", ""),
            suites=_parse_tag(tuple[Suite, ...], tags, "suites", where),
            transferred_from=_number(tags, "transferred_from", where),
            run_id=found.run_id or None,
            recipe=_parse_tag(TrainingRecipe, tags, "recipe", where) if "recipe" in tags else None,
            made_by=_strategy(tags, where),
            leakage=(
                _parse_tag(tuple[SuiteLeakage, ...], tags, "leakage", where)
                if "leakage" in tags
                else ()
            ),
            state=VersionState(
                verdict=tags.get("verdict"),
                verdict_key=tags.get("verdict_key"),
                superseded="superseded" in tags,
            ),
        )
    except KeyError as error:
        raise IntegrityError(
            f"{where} has a missing tag",
            expected=tag(error.args[0]),
            do="set the tag again in MLflow's page, or delete the version",
        ) from error
    except InvalidSpecError as error:  # an invalid name
        raise IntegrityError(
            f"the tags of {where} cannot be read",
            found=error,
            do="correct the tag in MLflow's page, or delete the version",
        ) from error
    if tags.get("adapter") != found.name:
        raise _tag_error("adapter", tags.get("adapter", ""), where, found.name)
    if not version.suites:
        raise _tag_error("suites", tags["suites"], where, "at least one suite")
    recipe = version.recipe
    if recipe and (recipe.adapter, recipe.family) != (version.adapter, version.base.family):
        other_recipe = f"a recipe of {recipe.adapter} in the family {recipe.family}"
        raise _tag_error("recipe", other_recipe, where, "the recipe of this adapter")
    return version


def alias_states(model: Any) -> dict[str, AliasState]:
    """Return all aliases of a registered model that are set, were set here or have a record."""
    tags = own_tags(model.tags)
    known = {*model.aliases}
    for prefix in (ALIAS_TAG_PREFIX, OVERRIDE_TAG_PREFIX):
        known |= {name.removeprefix(prefix) for name in tags if name.startswith(prefix)}
    return {alias: _alias_state(model, alias, tags) for alias in known}


def checked_sha256(tags: Mapping[str, str], name: str, where: str) -> str:
    """Return the tag. KeyError if it is missing, IntegrityError unless it has 64 hex digits."""
    if not _SHA256.fullmatch(tags[name]):
        raise _tag_error(name, tags[name], where, "a sha256 in 64 hex digits")
    return tags[name]


def _base(tags: Mapping[str, str], prefix: str, where: str) -> BaseRef:
    """Return the base that an adapter version is bound to ("base"), or was trained on."""
    fingerprint_sha256 = checked_sha256(tags, f"{prefix}_fingerprint", where)
    return BaseRef(tags["family"], tags[f"{prefix}_version"], fingerprint_sha256)


def _alias_state(model: Any, alias: str, tags: Mapping[str, str]) -> AliasState:
    current = model.aliases.get(alias)
    # "old>new" after an interrupted write: both are versions that reconcile set.
    recorded = tags.get(f"{ALIAS_TAG_PREFIX}{alias}", NONE).split(">")
    return AliasState(
        number=None if current is None else int(current),
        is_manual=str(current or NONE) not in recorded,
        is_unfinished=len(recorded) > 1,
        recorded=_override(tags.get(f"{OVERRIDE_TAG_PREFIX}{alias}")),
    )


def _override(text: str | None) -> ManualOverride | None:
    """Return the recorded manual override; None if it is unreadable, so that it is rewritten."""
    try:
        return None if text is None else from_json(ManualOverride, text, where="the record")
    except IntegrityError:
        return None


def _parse_tag(kind: Any, tags: Mapping[str, str], name: str, where: str) -> Any:
    try:
        return _parsed(kind, tags[name])
    except IntegrityError:  # raise it with the name of the tag
        return from_json(kind, tags[name], where=f"the tag {tag(name)} of {where}")


@lru_cache(maxsize=64)
def _parsed(kind: Any, text: str) -> Any:
    """Return the value of a tag. Versions of one adapter share their suites and their recipe."""
    return from_json(kind, text, where="the tag")


def _number(tags: Mapping[str, str], name: str, where: str) -> int | None:
    if name not in tags:
        return None
    if not _NUMBER.fullmatch(tags[name]):
        raise _tag_error(name, tags[name], where, "a version number")
    return int(tags[name])


def _strategy(tags: Mapping[str, str], where: str) -> RecoveryStrategy:
    text = tags.get("made_by", RecoveryStrategy.DIRECT.value)
    if text not in [strategy.value for strategy in RecoveryStrategy]:
        raise _tag_error("made_by", text, where, ", ".join(RecoveryStrategy))
    return RecoveryStrategy(text)


def _tag_error(name: str, text: str, where: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"the tag {tag(name)} of {where} cannot be read",
        expected=expected,
        found=quoted(text),
        do="set the tag again in MLflow's page, or delete the version",
    )
