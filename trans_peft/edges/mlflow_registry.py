"""`AdapterRegistry` in MLflow's model registry: one registered model per adapter.

    registered model   kind=adapter, family, retired, alias.<alias> (where reconcile last set it),
                       manual-override.<alias> (the record of a user's change of that alias)
      version          adapter, family, base_*, trained_on_*, weights_sha256, method, suites, ...
                       verdict, verdict_key, verdict_reason, outcome.on-<base>
      alias            on-<first 12 digits of a base's fingerprint>: serves on that base

The files of a version are a plain PEFT folder: `PeftModel.from_pretrained` loads the result of
`mlflow.artifacts.download_artifacts("models:/name/3")`. The files of `edges.mlflow_model` lie
beside them, so that `mlflow.pyfunc.load_model` loads the version on its base. MLflow has no
compare-and-set. `register` therefore searches before and after it creates a version. Of two
versions with the same bytes for the same base, the lower number stays, and the other one gets the
tag `superseded`.
"""

import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trans_peft.domain.adapter import AdapterVersion, AliasState, ManualOverride
from trans_peft.domain.conventions import ALIAS_TAG_PREFIX, OVERRIDE_TAG_PREFIX, OWNER_TAG
from trans_peft.domain.fleet import FamilyAdapters, RegisteredAdapter
from trans_peft.domain.names import name_problem, quoted
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.edges.json_codec import to_json
from trans_peft.edges.mlflow_client import Tracking, copied_from, own_tags, tag
from trans_peft.edges.mlflow_lineage import log_scores
from trans_peft.edges.mlflow_model import MODEL_FILES, write_model_files
from trans_peft.edges.mlflow_outcomes import MlflowOutcomes, newest_outcomes
from trans_peft.edges.mlflow_search import FoundModel, FoundVersion
from trans_peft.edges.mlflow_tags import NONE, adapter_version, alias_states, version_tags
from trans_peft.errors import (
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    TransPeftError,
    translating_full_disk_errors,
)
from trans_peft.files import check_unused
from trans_peft.models import adapter_weights_sha256, remove_unrecorded_template

__all__ = ["MlflowRegistry"]


class MlflowRegistry:
    """Adapters and their versions in the MLflow server at `tracking_uri`."""

    def __init__(self, tracking_uri: str) -> None:
        self._tracking = Tracking(tracking_uri)
        self._outcomes = MlflowOutcomes(self._tracking)

    def adapters(self, family: str) -> tuple[str, ...]:
        """Return the names of the family's live adapters (not tagged `retired`), sorted."""
        models = self._tracking.models({"kind": "adapter", "family": family})
        return tuple(sorted(model.name for model in models if _is_live(model, family)))

    def registered_name(self, adapter: str) -> str | None:
        """Return the name of a registered model that equals `adapter` if case is ignored, or None.

        The model may also be a base family, as MLflow has one set of names.
        """
        return self._tracking.model_name(adapter)

    def fleet(self, family: str) -> FamilyAdapters:
        """Return all live adapters of a family, in two searches in parallel.

        Tags of the registered model and tags of its versions both name a family. An adapter is
        unreadable if one of the two is missing, or if its `kind` is missing or wrong.

        The two searches, and the pages of each, read the registry at different moments. Models and
        versions that do not match are therefore read again, the versions after the model:

        - versions without a model: the model was registered in between, its tags are wrong, or it
          was on none of the pages because another one was deleted meanwhile;
        - version numbers other than 1 to the latest one: a version was registered in between, it
          has no tag of the family, it was deleted, or another one was deleted meanwhile.

        What remains is an adapter whose tags and aliases were read seconds apart. This equals an
        adapter that changes after it was read, which every caller has to expect:
        `apply_verdicts` reads an adapter again before it writes, and a task before it starts.
        """
        with ThreadPoolExecutor(1) as pool:
            search = pool.submit(self._tracking.tagged_versions, {"family": family})
            models = {model.name: model for model in self._tracking.models({"family": family})}
            versions = _by_name(search.result())
        strangers = {name for name, found in versions.items() if any(map(_is_ours, found))}
        for name in sorted(strangers - models.keys()):
            if model := self._claimed(name, family):
                models[name] = model
        live = {name: model for name, model in models.items() if _is_live(model, family)}
        gaps = [name for name, model in live.items() if _has_gaps(model, versions.get(name, []))]
        again = _by_name(self._tracking.versions_of(gaps))
        versions |= {name: again.get(name, []) for name in gaps}
        adapters: list[RegisteredAdapter] = []
        unreadable: list[str] = []
        for name, model in sorted(live.items()):
            try:
                adapters.append(_adapter(model, _ours(name, versions.get(name, []))))
            except TransPeftError as error:
                unreadable.append(f"{name}: {error}")
        aside = filter(None, (_why_aside(model, family) for model in models.values()))
        return FamilyAdapters(tuple(adapters), (*unreadable, *aside))

    def newest(self, family: str) -> str:
        """Return the adapter that changed last, and when, in ms since the epoch; empty without one.

        MLflow sets the time when it creates, changes or deletes a version of a model.
        """
        return self._tracking.newest_model({"kind": "adapter", "family": family})

    def set_aside(self) -> tuple[str, ...]:
        """Return the adapters of families that do not exist, each with the reason."""
        models = [(model.name, own_tags(model.tags)) for model in self._tracking.models({})]
        families = {name for name, tags in models if tags.get("kind") == "base"}
        return tuple(
            f"the adapter {quoted(name)} claims the family {quoted(claimed)}, which does not exist"
            for name, tags in models
            if tags.get("kind") != "base" and (tags.get("kind") == "adapter" or "family" in tags)
            if (claimed := tags.get("family", "")) not in families
        )

    def adapter(self, name: str) -> RegisteredAdapter:
        """Return one adapter with its versions, outcomes and aliases, in two requests.

        Raises NotFoundError, IntegrityError.
        """
        return _adapter(self._tracking.model(name, "adapter"), self._found(name))

    def _claimed(self, name: str, family: str) -> FoundModel | None:
        """Return a model that a search for the family did not find, although its versions name it.

        None if the model was deleted, or if it is an adapter of another family: a version that
        confirms its tags exists, and that family reports the version with this one.
        """
        try:
            model = self._tracking.found_model(name)
        except NotFoundError:
            return None
        tags = own_tags(model.tags)
        if tags.get("kind") != "adapter" or tags.get("family") == family:
            return model
        confirmed = name_problem("the name", name) is not None or any(
            own_tags(found.tags).get("family") == tags.get("family")
            for found in self._tracking.versions(name)
            if _is_ours(found)
        )
        return None if confirmed else model

    def family(self, adapter: str) -> str:
        """Return the family of an adapter, live or not. NotFoundError."""
        return own_tags(self._tracking.model(adapter, "adapter").tags).get("family", "")

    def versions(self, adapter: str) -> tuple[AdapterVersion, ...]:
        """Return all versions of one adapter, oldest first. NotFoundError, IntegrityError."""
        return tuple(adapter_version(found) for found in self._found(adapter))

    def register(
        self,
        draft: AdapterVersion,
        folder: Path,
        *,
        tags: Mapping[str, str] | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> AdapterVersion:
        """Register a PEFT folder as a new version, or return the same version if it exists.

        `tags` and `scores` are shown on MLflow's pages. InvalidSpecError if a tag has a name that
        this class uses.
        """
        ours = version_tags(draft)
        taken = sorted(ours.keys() & (tags or {}).keys())
        if taken:
            raise InvalidSpecError(
                f"these tag names are reserved for the registry: {', '.join(taken)}"
            )
        self._make_adapter(draft.adapter, draft.base.family)
        if not self._same(draft):
            purpose = "training" if draft.transferred_from is None else "transfers"
            with tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch:
                model_files = write_model_files(draft, Path(scratch, "model"))
                model_id = self._tracking.upload_model(
                    purpose,
                    draft.adapter,
                    (folder, model_files),
                    run_id=draft.run_id,
                    tags={"adapter": draft.adapter},
                )
            if scores:
                self._log_scores(draft, model_id, scores)
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
        """Store an outcome with the version that it created, or else with its source version."""
        found = self._found(outcome.adapter)
        number = outcome.new_number or outcome.source_number
        if number not in [int(version.version) for version in found]:
            raise NotFoundError(f"there is no version {number} of {outcome.adapter}")
        self._outcomes.record(outcome, number, found)

    def outcomes(self, adapter: str) -> tuple[TransferOutcome, ...]:
        """Return the newest outcome for each base, without evaluations, by base fingerprint."""
        return newest_outcomes(self._found(adapter))

    def alias(self, adapter: str, alias: str) -> int | None:
        """Return the version number that an alias points to. NotFoundError."""
        number = self._tracking.model(adapter, "adapter").aliases.get(alias)
        return None if number is None else int(number)

    def aliases(self, adapter: str) -> Mapping[str, AliasState]:
        """Return all aliases that are set, were set here or have a manual override recorded."""
        return alias_states(self._tracking.model(adapter, "adapter"))

    def set_alias(self, adapter: str, alias: str, number: int | None) -> bool:
        """Set an alias to a version, or remove it (None), and record that this class did so.

        Returns False, without writing, if a person set or removed the alias.
        """
        if number is not None:
            self._tracking.client.get_model_version(adapter, str(number))
        state = self.aliases(adapter).get(alias, AliasState())
        if state.is_manual:
            return False
        if state.number != number:
            # Recorded first, as "old>new": after a crash in between, both count as set here.
            self._record_alias(
                adapter, alias, f"{_number_text(state.number)}>{_number_text(number)}"
            )
            if number is not None:
                self._tracking.set_alias(adapter, alias, number)
            else:
                self._tracking.client.delete_registered_model_alias(adapter, alias)
        self._record_alias(adapter, alias, _number_text(number))
        return True

    def owns_alias(self, adapter: str, alias: str) -> bool:
        """Whether the alias is as this class last set it. False: a person changed it."""
        return not self.aliases(adapter).get(alias, AliasState()).is_manual

    def record_manual_override(
        self, adapter: str, alias: str, override: ManualOverride | None
    ) -> None:
        """Record a manual override of an alias, to be shown in MLflow; None removes the record."""
        name = f"{OVERRIDE_TAG_PREFIX}{alias}"
        if override is not None:
            self._tracking.tag_model(adapter, name, to_json(override))
        elif name in own_tags(self._tracking.model(adapter, "adapter").tags):
            self._tracking.untag_model(adapter, name)

    def download(self, version: AdapterVersion, folder: str | Path) -> Path:
        """Write a version's PEFT files to a new or empty folder, and return it.

        Raises InvalidSpecError for a folder with files, NotFoundError, and IntegrityError if the
        weights differ from the registered ones; the folder is then empty.
        """
        folder = Path(folder)
        check_unused(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (
            translating_full_disk_errors(folder),
            tempfile.TemporaryDirectory(prefix=".trans-peft-", dir=folder) as scratch,
        ):
            # Within `folder`, which may be a disk of its own. MLflow's stores choose a name below.
            written = self._tracking.download_model(
                version.adapter, version.number, Path(scratch, "download")
            )
            found = adapter_weights_sha256(written)
            if found != version.weights_sha256 and not remove_unrecorded_template(
                written, version.weights_sha256
            ):
                raise IntegrityError(
                    f"the stored weights of {version} differ from the registered ones",
                    expected=version.weights_sha256,
                    found=found,
                    do="restore them from a backup of MLflow's artifacts",
                )
            for path in written.iterdir():
                if path.name not in MODEL_FILES:
                    path.rename(folder / path.name)
        return folder

    def _log_scores(
        self, draft: AdapterVersion, model_id: str, scores: Mapping[str, float]
    ) -> None:
        """Record the scores with the run that trained the weights, or with a new run."""
        figures = {suite: {"score": score} for suite, score in scores.items()}
        if draft.run_id is not None:
            log_scores(self._tracking, draft.run_id, model_id, draft.suites, figures)
            return
        with self._tracking.run("adoptions", draft.adapter, {"adapter": draft.adapter}) as run_id:
            log_scores(self._tracking, run_id, model_id, draft.suites, figures)

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
        """Return the versions of an adapter that `register` created, oldest first."""
        found = self._tracking.versions(adapter)
        if not found:
            self._tracking.model(adapter, "adapter")
        return _ours(adapter, found)

    def _same(self, draft: AdapterVersion) -> list[AdapterVersion]:
        """Return the versions with the draft's weights and base, the lowest number first."""
        return [
            version
            for version in self.versions(draft.adapter)
            if version.weights_sha256 == draft.weights_sha256
            and version.base.fingerprint_sha256 == draft.base.fingerprint_sha256
        ]

    def _record_alias(self, adapter: str, alias: str, where: str) -> None:
        self._tracking.tag_model(adapter, f"{ALIAS_TAG_PREFIX}{alias}", where)


def _adapter(model: Any, found: list[Any]) -> RegisteredAdapter:
    """Return the adapter with this registered model and these versions. IntegrityError."""
    family = own_tags(model.tags).get("family", "")
    return RegisteredAdapter(
        name=model.name,
        family=family,
        versions=tuple(map(adapter_version, found)),
        outcomes=newest_outcomes(found),
        aliases=alias_states(model),
        is_live=_is_live(model, family),
        owner=model.tags.get(OWNER_TAG, ""),
    )


def _by_name(found: Iterable[FoundVersion]) -> dict[str, list[FoundVersion]]:
    """Return versions by name of the model, oldest first, each once.

    A search returns a version twice if an earlier one is registered while its pages are read.
    """
    versions: dict[str, dict[int, FoundVersion]] = {}
    for version in found:
        versions.setdefault(version.name, {})[int(version.version)] = version
    return {name: [one for _, one in sorted(its.items())] for name, its in versions.items()}


def _has_gaps(model: FoundModel, found: list[FoundVersion]) -> bool:
    """Whether `found` cannot be all versions of a model."""
    return [int(version.version) for version in found] != [*range(1, model.latest + 1)]


def _ours(name: str, found: list[Any]) -> list[Any]:
    """Return the versions that `register` created, without copies made by "Promote model".

    A copy would be a second version with the same bytes. NotFoundError if all are of another kind.
    """
    ours = [version for version in found if _is_ours(version)]
    if found and not ours:
        raise NotFoundError(f"{name!r} is not an adapter", found="versions of another kind")
    return ours


def _number_text(number: int | None) -> str:
    return NONE if number is None else str(number)


def _is_ours(found: Any) -> bool:
    """Whether `register` created a version: it has the tags and is not a copy."""
    tags = own_tags(found.tags)
    return not copied_from(found) and ("weights_sha256" in tags or "adapter" in tags)


def _is_live(model: Any, family: str) -> bool:
    """Whether a model is an adapter of the family with valid tags, and not retired."""
    tags = own_tags(model.tags)
    is_adapter = tags.get("kind") == "adapter" and tags.get("retired", "false") != "true"
    return is_adapter and not _why_aside(model, family)


def _why_aside(model: Any, family: str) -> str | None:
    """Return why a model with the tags of an adapter of the family is unreadable, or None."""
    tags = own_tags(model.tags)
    if model.name == family and tags.get("kind") == "base":
        return None
    if problem := name_problem("the name", model.name):
        return f"the adapter {quoted(model.name)}: {problem}"
    retired = tags.get("retired", "false")
    wanted = {"kind": "adapter", "family": family}
    if retired != "true" and (wrong := {k: v for k, v in wanted.items() if tags.get(k) != v}):
        return "; ".join(
            f"{model.name}: the tag {tag(key)} must be {value} for an adapter of {family}; found "
            + (quoted(tags[key]) if key in tags else "no such tag")
            for key, value in wrong.items()
        )
    if retired not in ("true", "false"):
        return (
            f"{model.name}: the tag {tag('retired')} must be true or false; found {quoted(retired)}"
        )
    return None
