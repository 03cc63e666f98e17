"""`BaseCatalog` in MLflow's model registry: one registered model per family.

    registered model   kind=base
      version          family, version, fingerprint, parent, source, fingerprint_run, ready=true;
                       served=<family>; promotion (why `champion` here does not serve);
                       manifest, where the upload had one;
                       drift, where there was an earlier version;
                       uri, where what serves was converted from the version's MLflow source

A registered model with the tag `kind=base` is a base family. `make_ready` sets the tag, and users
may set it. A version is ready if it has the tags `ready=true` and `family` with this family's name:
a version that "Promote model" copied from another family, with all tags, still has to be ingested.
A copy from the same family, or of an adapter, is not a base version. MLflow has no compare-and-set.
If two processes register a version at the same time, the lowest number wins, and the other one gets
the tag `superseded`, which hides it.

Any client of MLflow can write any tag and choose any name for a model. Entries that cannot be read
are listed by `set_aside` with the reason, and do not affect others.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from trans_peft.domain.base import BaseRef, BaseVersion, Fingerprint
from trans_peft.domain.conventions import SERVING_ALIAS
from trans_peft.domain.names import check_case, check_names, name_problem, quoted
from trans_peft.edges.json_codec import from_json, to_json
from trans_peft.edges.mlflow_client import Tracking, copied_from, own_tags, tag
from trans_peft.edges.mlflow_tags import checked_sha256
from trans_peft.errors import (
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
    TransPeftError,
    UploadError,
)

__all__ = ["MlflowCatalog"]

_FILE = "fingerprint.json"
_HASHES = ("fingerprint", "manifest")


class _Read(NamedTuple):
    """The versions of a family, and for those that cannot be read, why."""

    versions: tuple[BaseVersion, ...]
    set_aside: tuple[str, ...]


class MlflowCatalog:
    """Base families and their versions in the MLflow server at `tracking_uri`."""

    def __init__(self, tracking_uri: str) -> None:
        self._tracking = Tracking(tracking_uri)
        self._fingerprints: dict[str, Fingerprint] = {}

    def families(self) -> tuple[str, ...]:
        """Return the names of all base families, sorted; names that break the rule left out."""
        models = self._tracking.models({"kind": "base"})
        return tuple(sorted(model.name for model in models if not _why_aside(model)))

    def set_aside(self, family: str | None = None) -> tuple[str, ...]:
        """Return what `families`, or `versions` of a family, leave out, with the reason."""
        if family is not None:
            return self._read(family).set_aside
        ready = {
            found.name
            for found in self._tracking.tagged_versions({"ready": "true"})
            if own_tags(found.tags).get("family") == found.name and _may_be_a_base(found)
        }
        return tuple(
            f"the base family {quoted(model.name)}: {problem}"
            for model in self._tracking.models({})
            if _claims_to_be_a_base(model, ready) and (problem := _why_aside(model))
        )

    def versions(self, family: str) -> tuple[BaseVersion, ...]:
        """Return all versions of a family, ready or not, oldest first. NotFoundError."""
        check_names("the catalog", family=family)
        self._tracking.model(family, "base")
        return self._read(family).versions

    def alias(self, family: str, alias: str) -> int | None:
        """Return the version number that an alias points to. NotFoundError without the family."""
        number = self._tracking.model(family, "base").aliases.get(alias)
        return None if number is None else int(number)

    def set_serving(self, base: BaseVersion) -> None:
        """Set the alias `serving` to this version. InvalidSpecError if it is not ready."""
        known = next((b for b in self.versions(base.family) if b.number == base.number), None)
        if known is None:
            raise NotFoundError(f"there is no version number {base.number} of {base.family}")
        if not known.ready:
            raise InvalidSpecError(f"{known} is not ready: it cannot serve")
        if not known.served:
            self._tracking.tag_version(base.family, base.number, {"served": base.family})
        self._tracking.set_alias(base.family, SERVING_ALIAS, base.number)

    def promotion_notes(self, family: str) -> Mapping[int, str]:
        """Return version number -> note on why the `champion` there is not promoted."""
        notes = {
            int(found.version): own_tags(found.tags).get("promotion", "")
            for found in self._tracking.versions(family)
        }
        return {number: text for number, text in notes.items() if text}

    def note_promotion(self, family: str, number: int, text: str) -> None:
        """Set the promotion note of a version, ready or not; an empty text removes it."""
        if text:
            self._tracking.tag_version(family, number, {"promotion": text})
        elif number in self.promotion_notes(family):
            self._tracking.untag_version(family, number, "promotion")

    def make_ready(
        self, draft: BaseVersion, *, fingerprint: Fingerprint, source: str
    ) -> BaseVersion:
        """Register a verified version, or complete the draft's number. `ready` is set last.

        May run twice, and in several processes at once. UploadError if the version, or that number,
        is ready already with another fingerprint.
        """
        family, version, uri = draft.family, draft.version, draft.uri
        number = draft.number or None
        self._make_family(family)
        known = {base.number: base for base in self._read(family).versions}
        check_case("the version", version, [b.version for b in known.values()])
        if number is not None and number not in known:
            raise NotFoundError(f"there is no version number {number} of {family}")
        for base in known.values():
            if base.ready and (base.version == version or base.number == number):
                return self._same(base, version, fingerprint, number)
        run_id = self._store_fingerprint(
            BaseRef(family, version, fingerprint.digest), uri, fingerprint
        )
        tags = {
            "family": family,
            "version": version,
            "parent": draft.parent,
            "source": source,
            "manifest": draft.manifest_sha256 or None,
            "drift": draft.drift or None,
            "fingerprint": fingerprint.digest,
            "fingerprint_run": run_id,
        }
        if number is not None:
            registered = known[number]
            if (registered.version, registered.fingerprint_sha256) != (version, fingerprint.digest):
                elsewhere = uri if uri.rstrip("/") != registered.uri.rstrip("/") else None
                self._tracking.tag_version(family, number, {"uri": elsewhere, **tags})
            # Else an earlier call wrote all tags but `ready`.
        elif not self._claims(family, version):
            number = self._tracking.make_version(family, uri, tags)
        winner = self._claims(family, version)[0]
        if winner.fingerprint_sha256 == fingerprint.digest:
            last = {"fingerprint_run": run_id, "ready": "true"}
            self._tracking.tag_version(family, winner.number, last)
        return self._same(winner, version, fingerprint, number)

    def fingerprint(self, base: BaseVersion) -> Fingerprint:
        """Return the fingerprint of a ready version. NotFoundError, IntegrityError."""
        digest = base.fingerprint_sha256
        if digest not in self._fingerprints:
            found = self._tracking.client.get_model_version(base.family, str(base.number))
            run_id = own_tags(found.tags).get("fingerprint_run")
            if run_id is None:
                raise NotFoundError(
                    f"{base} has no fingerprint: it was never made ready",
                    do="reconcile the family, which verifies the version and makes it ready",
                )
            text = self._tracking.read_text(self._tracking.artifact_uri(run_id), _FILE)
            stored = from_json(Fingerprint, text, where=f"{_FILE} of run {run_id}")
            if stored.digest != digest:
                raise IntegrityError(
                    f"the stored fingerprint of {base} has another digest",
                    expected=digest,
                    found=stored.digest,
                    do=f"restore {_FILE} of the run {run_id} in MLflow from a backup, or publish "
                    "the files again as a new version",
                )
            self._fingerprints[digest] = stored
        return self._fingerprints[digest]

    def _make_family(self, family: str) -> None:
        model = self._tracking.make_model(family, {"kind": "base"})
        kind = own_tags(model.tags).get("kind")
        if kind is None:
            self._tracking.tag_model(family, "kind", "base")
        elif kind != "base":
            raise InvalidSpecError(
                f"{family!r} is registered already, and not as a base",
                expected="kind base",
                found=f"kind {kind}",
                do="give the family another name",
            )

    def _read(self, family: str) -> _Read:
        """Read all versions of a family; one that cannot be read does not affect the others."""
        versions: list[BaseVersion] = []
        aside = []
        labels: dict[str, int] = {}
        for found in filter(_may_be_a_base, self._tracking.versions(family)):
            try:
                base = self._base(found)
            except StoreError:
                raise  # the server failed; the version may be valid
            except TransPeftError as error:
                aside.append(f"version {found.version} of {family}: {error}")
                continue
            if base.ready and labels.setdefault(base.version, base.number) != base.number:
                first = labels[base.version]
                aside.append(
                    f"version {base.number} of {family}: its name {base.version} is also that of "
                    f"version {first}"
                )
                continue
            versions.append(base)
        return _Read(tuple(versions), tuple(aside))

    def _base(self, found: Any) -> BaseVersion:
        """Return MLflow's version as a BaseVersion. InvalidSpecError, IntegrityError."""
        tags = own_tags(found.tags)
        where = f"version {found.version} of {found.name}"
        ours = tags.get("family") == found.name
        number = int(found.version)
        uri = found.source or ""
        if uri.startswith("models:/"):  # a version that "Promote model" copied
            uri = self._tracking.client.get_model_version_download_uri(found.name, str(number))
        ready = ours and tags.get("ready") == "true"
        if ready and "fingerprint" not in tags:
            raise IntegrityError(
                f"{where} is ready, but its tag {tag('fingerprint')} is missing",
                do=f"restore that tag in MLflow, or remove the tag {tag('ready')}: reconcile then "
                "verifies the version again",
            )
        known = {name: checked_sha256(tags, name, where) for name in _HASHES if name in tags}
        return BaseVersion(
            family=found.name,
            version=tags.get("version", str(number)),
            uri=tags.get("uri", uri) if ours else uri,
            number=number,
            fingerprint_sha256=known.get("fingerprint", "") if ours else "",
            parent=tags.get("parent"),
            ready=ready,
            manifest_sha256=known.get("manifest", "") if ours else "",
            served=tags.get("served") == found.name,  # copies have the tag of the original
            drift=tags.get("drift", "") if ours else "",
        )

    def _claims(self, family: str, version: str) -> list[BaseVersion]:
        """Return the versions of this name with a fingerprint: ready ones first, then by number."""
        bases = self._read(family).versions
        claims = [b for b in bases if b.version == version and b.fingerprint_sha256]
        return sorted(claims, key=lambda base: (not base.ready, base.number))

    def _same(
        self, winner: BaseVersion, version: str, fingerprint: Fingerprint, number: int | None
    ) -> BaseVersion:
        """Return the winner and mark version `number` as superseded. UploadError if they differ."""
        if number is not None and number != winner.number:
            self._tracking.tag_version(winner.family, number, {"superseded": "true"})
        if (winner.version, winner.fingerprint_sha256) != (version, fingerprint.digest):
            raise UploadError(
                f"{winner} (number {winner.number}) is registered already with other content",
                expected=f"{winner.version}, fingerprint {winner.fingerprint_sha256}",
                found=f"{version}, fingerprint {fingerprint.digest}",
                do="publish it under a new version",
            )
        return replace(winner, ready=True)

    def _store_fingerprint(self, base: BaseRef, uri: str, fingerprint: Fingerprint) -> str:
        """Store a fingerprint as a file of a run, and return the run's id."""
        with self._tracking.run("bases", str(base), base.labels) as run_id:
            self._tracking.log_params(
                run_id,
                {
                    "uri": uri,
                    "architecture": fingerprint.architecture,
                    "layers": fingerprint.layer_count,
                    "tensors": len(fingerprint.tensors),
                },
            )
            self._tracking.write_text(run_id, _FILE, to_json(fingerprint))
        return run_id


def _claims_to_be_a_base(model: Any, ready: set[str]) -> bool:
    """Whether a model is tagged as a base, has ready versions, or has a kind that is unknown.

    The registry of adapters reports a model with a `family`.
    """
    tags = own_tags(model.tags)
    kind = tags.get("kind", "adapter")
    return kind == "base" or model.name in ready or (kind != "adapter" and "family" not in tags)


def _why_aside(model: Any) -> str | None:
    """Return why a registered model cannot be read as a base family, or None if it can."""
    tags = own_tags(model.tags)
    if problem := name_problem("the name", model.name):
        return problem
    if tags.get("kind") != "base":
        found = quoted(tags["kind"]) if "kind" in tags else "no such tag"
        return f"the tag {tag('kind')} must be base; found {found}"
    if tags.get("family", model.name) != model.name:
        return f"the tag {tag('family')} belongs to adapters; found {quoted(tags['family'])}"
    return None


def _may_be_a_base(found: Any) -> bool:
    """Whether a version is neither superseded, nor a copy of an adapter or of the same family.

    "Promote model" within one family creates a second version with the same tags. From an adapter
    it creates a version that cannot be loaded as a base.
    """
    tags = own_tags(found.tags)
    return copied_from(found) != found.name and "superseded" not in tags and "adapter" not in tags
