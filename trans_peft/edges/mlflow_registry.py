"""`AdapterRegistry` in MLflow's model registry: one registered model per adapter.

    registered model   kind=adapter, family, retired, alias.<alias> (where we last set it),
                       by-hand.<alias> (what a person did to it, as reconcile saw it)
      version          adapter, family, base_*, trained_on_*, weights_sha256, method, suites, ...
                       verdict, verdict_key, verdict_reason, outcome.on-<base>
      alias            on-<first 12 digits of a base's fingerprint>: serves on that base

A version's files are a stock PEFT folder: `mlflow.artifacts.download_artifacts("models:/name/3")`
gives what `PeftModel.from_pretrained` takes. MLflow has no compare-and-set: register looks before
it makes, looks again, and of two with the same bytes on the same base the lower number lives; the
other is tagged `superseded`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trans_peft.domain.adapter import AdapterVersion, AliasState, HandSet, VersionState
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.remedies import Rung
from trans_peft.edges.json_nouns import from_json, to_json
from trans_peft.edges.mlflow_client import Tracking, copied_from, own_tags, tag
from trans_peft.edges.mlflow_outcomes import MlflowOutcomes
from trans_peft.errors import IntegrityError, InvalidSpecError, NotFoundError
from trans_peft.models import adapter_weights_sha256, keeps_no_template

__all__ = ["MlflowRegistry"]

_NONE = "none"


class MlflowRegistry:
    """Adapters and their versions in the MLflow server at `tracking_uri`."""

    def __init__(self, tracking_uri: str) -> None:
        self._tracking = Tracking(tracking_uri)
        self._outcomes = MlflowOutcomes(self._tracking)

    def adapters(self, family: str) -> tuple[str, ...]:
        """Return the names of the family's live adapters (not tagged `retired`), sorted."""
        models = self._tracking.models({"kind": "adapter", "family": family})
        live = (m.name for m in models if own_tags(m.tags).get("retired", "false") == "false")
        return tuple(sorted(live))

    def versions(self, adapter: str) -> tuple[AdapterVersion, ...]:
        """Return all versions of one adapter, oldest first. NotFoundError."""
        return tuple(_version(found) for found in self._found(adapter))

    def register(
        self, draft: AdapterVersion, folder: Path, *, tags: Mapping[str, str] | None = None
    ) -> AdapterVersion:
        """Register the PEFT folder as a new version, or return the one that is there.

        `tags` are for people who look at the page; InvalidSpecError if one has a name of ours.
        """
        ours = _tags(draft)
        taken = sorted(ours.keys() & (tags or {}).keys())
        if taken:
            raise InvalidSpecError(f"these tags are the registry's own: {', '.join(taken)}")
        self._make_adapter(draft.adapter, draft.family)
        if not self._same(draft):
            purpose = "training" if draft.transferred_from is None else "transfers"
            model_id = self._tracking.upload_model(
                purpose, draft.adapter, folder, run_id=draft.run_id, tags={"adapter": draft.adapter}
            )
            self._tracking.make_version(
                draft.adapter,
                f"models:/{model_id}",
                {**(tags or {}), **ours},
                run_id=draft.run_id,
                model_id=model_id,
            )
        winner, *others = self._same(draft)
        for other in others:
            if not other.state.superseded:
                self._tracking.tag_version(draft.adapter, other.number, {"superseded": "true"})
        return winner

    def record(self, outcome: TransferOutcome) -> None:
        """Keep an outcome: on the version it made, or on its source where it made none."""
        found = self._found(outcome.adapter)
        number = outcome.new_number or outcome.source_number
        if number not in [int(version.version) for version in found]:
            raise NotFoundError(f"there is no version {number} of {outcome.adapter}")
        self._outcomes.record(outcome, number, found)

    def outcomes(self, adapter: str) -> tuple[TransferOutcome, ...]:
        """Return the newest outcome per base (evaluations left out), by base fingerprint."""
        return self._outcomes.newest(self._found(adapter))

    def alias(self, adapter: str, alias: str) -> int | None:
        """Return the number of the version that carries the alias. NotFoundError."""
        number = self._tracking.model(adapter, "adapter").aliases.get(alias)
        return None if number is None else int(number)

    def aliases(self, adapter: str) -> Mapping[str, AliasState]:
        """Return every alias of the adapter that is set, or was set by us or recorded once."""
        return _aliases(self._tracking.model(adapter, "adapter"))

    def set_alias(self, adapter: str, alias: str, number: int | None) -> bool:
        """Move the alias to a version, or take it away (None), and remember that we did.

        Where it stands by a person's hand nothing is written: False.
        """
        if number is not None:
            self._tracking.client.get_model_version(adapter, str(number))
        state = self.aliases(adapter).get(alias, AliasState())
        if state.by_hand:
            return False
        if state.number != number:
            # The intention is written down first: after a crash in between, either is ours.
            self._remember(adapter, alias, f"{_word(state.number)}>{_word(number)}")
            if number is not None:
                self._tracking.set_alias(adapter, alias, number)
            else:
                self._tracking.client.delete_registered_model_alias(adapter, alias)
        self._remember(adapter, alias, _word(number))
        return True

    def owns_alias(self, adapter: str, alias: str) -> bool:
        """Whether the alias stands as we last set it (or nobody ever did). False: a person's."""
        return not self.aliases(adapter).get(alias, AliasState()).by_hand

    def record_hand(self, adapter: str, alias: str, hand: HandSet | None) -> None:
        """Write down what a person did to the alias, for people to see (None: no longer so)."""
        name = f"by-hand.{alias}"
        if hand is not None:
            self._tracking.tag_model(adapter, name, to_json(HandSet, hand))
        elif name in own_tags(self._tracking.model(adapter, "adapter").tags):
            self._tracking.untag_model(adapter, name)

    def download(self, version: AdapterVersion, folder: Path) -> Path:
        """Write the version's PEFT folder below `folder` and return where it is.

        NotFoundError; IntegrityError unless the weights are those that were registered.
        """
        written = self._tracking.download_model(version.adapter, version.number, folder)
        found = adapter_weights_sha256(written)
        if found != version.weights_sha256 and keeps_no_template(written, version.weights_sha256):
            return written
        if found != version.weights_sha256:
            raise IntegrityError(
                f"the stored weights of {version} are other ones",
                expected=version.weights_sha256,
                found=found,
                do="restore them from a backup of MLflow's artifacts",
            )
        return written

    def _make_adapter(self, adapter: str, family: str) -> None:
        wanted = {"kind": "adapter", "family": family}
        tags = own_tags(self._tracking.make_model(adapter, wanted).tags)
        if {key: tags.get(key) for key in wanted} != wanted:
            raise InvalidSpecError(
                f"{adapter!r} is registered already, and not as an adapter of {family}",
                expected=f"an adapter of {family}",
                found=f"kind {tags.get('kind')}, family {tags.get('family')}",
                do="give the new adapter another name",
            )

    def _found(self, adapter: str) -> list[Any]:
        """Return MLflow's versions of an adapter that are ours.

        A copy that "Promote model" made is not: elsewhere it is still its original's, and in the
        adapter itself it would be a second version with the same bytes.
        """
        found = self._tracking.versions(adapter)
        if not found:
            self._tracking.model(adapter, "adapter")
        ours = [
            version
            for version in found
            if own_tags(version.tags).get("adapter") == adapter and not copied_from(version)
        ]
        if found and not ours:
            raise NotFoundError(f"{adapter!r} is no adapter", found="versions of something else")
        return ours

    def _same(self, draft: AdapterVersion) -> list[AdapterVersion]:
        """Return the versions with the draft's bytes on the draft's base, the lowest first."""
        return [
            version
            for version in self.versions(draft.adapter)
            if version.weights_sha256 == draft.weights_sha256
            and version.base_fingerprint_sha256 == draft.base_fingerprint_sha256
        ]

    def _remember(self, adapter: str, alias: str, where: str) -> None:
        self._tracking.tag_model(adapter, f"alias.{alias}", where)


def _aliases(model: Any) -> dict[str, AliasState]:
    tags = own_tags(model.tags)
    known = {*model.aliases}
    for prefix in ("alias.", "by-hand."):
        known |= {name.removeprefix(prefix) for name in tags if name.startswith(prefix)}
    return {alias: _alias_state(model, alias, tags) for alias in known}


def _alias_state(model: Any, alias: str, tags: Mapping[str, str]) -> AliasState:
    stands = model.aliases.get(alias)
    ours = tags.get(f"alias.{alias}", _NONE).split(">")  # two where a write was cut off
    name = f"by-hand.{alias}"
    where = f"the tag {name} of {model.name}"
    return AliasState(
        number=None if stands is None else int(stands),
        by_hand=str(stands or _NONE) not in ours,
        unfinished=len(ours) > 1,
        recorded=from_json(HandSet, tags[name], where=where) if name in tags else None,
    )


def _word(number: int | None) -> str:
    return _NONE if number is None else str(number)


def _tags(draft: AdapterVersion) -> dict[str, str]:
    transferred = draft.transferred_from
    return {
        "adapter": draft.adapter,
        "family": draft.family,
        "base_version": draft.base_version,
        "base_fingerprint": draft.base_fingerprint_sha256,
        "trained_on_version": draft.trained_on_version,
        "trained_on_fingerprint": draft.trained_on_fingerprint_sha256,
        "weights_sha256": draft.weights_sha256,
        "method": draft.method,
        "recipe_sha256": draft.recipe_sha256,
        "suites": to_json(tuple[Suite, ...], draft.suites),
        "transferred_from": "" if transferred is None else str(transferred),
        "recipe": "" if draft.recipe is None else to_json(TrainingRecipe, draft.recipe),
        "made_by": draft.made_by.value,
    }


def _version(found: Any) -> AdapterVersion:
    tags = own_tags(found.tags)
    where = f"version {found.version} of {found.name}"
    try:
        return AdapterVersion(
            adapter=found.name,
            number=int(found.version),
            family=tags["family"],
            base_version=tags["base_version"],
            base_fingerprint_sha256=tags["base_fingerprint"],
            trained_on_version=tags["trained_on_version"],
            trained_on_fingerprint_sha256=tags["trained_on_fingerprint"],
            weights_sha256=tags["weights_sha256"],
            method=tags["method"],
            recipe_sha256=tags.get("recipe_sha256", ""),
            suites=from_json(tuple[Suite, ...], tags["suites"], where=f"the suites of {where}"),
            transferred_from=int(tags["transferred_from"]) if "transferred_from" in tags else None,
            run_id=found.run_id or None,
            recipe=(
                from_json(TrainingRecipe, tags["recipe"], where=f"the recipe of {where}")
                if "recipe" in tags
                else None
            ),
            made_by=Rung(tags.get("made_by", Rung.DIRECT)),
            state=VersionState(
                verdict=tags.get("verdict"),
                verdict_key=tags.get("verdict_key"),
                superseded="superseded" in tags,
            ),
        )
    except KeyError as error:
        raise IntegrityError(
            f"{where} has lost a tag",
            expected=tag(error.args[0]),
            do="set the tag again in MLflow's page, or delete the version",
        ) from error
