"""`Tracking` in dictionaries: as fast as a test of thousands of odd tags needs it to be.

It keeps what MLflow's server keeps, and checks nothing: any text in any tag, any name.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

from trans_peft.domain.names import check_case, same_but_for_case
from trans_peft.edges.mlflow_client import FinishedRun, full_tags, own_tags, tag
from trans_peft.edges.mlflow_search import FoundModel
from trans_peft.errors import NotFoundError


@dataclass
class Model:
    name: str
    tags: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)


@dataclass
class Version:
    name: str
    version: str
    source: str
    tags: dict[str, str]
    run_id: str | None = None
    model_id: str | None = None


class FakeTracking:
    """What `MlflowCatalog` and `MlflowRegistry` ask of `Tracking`."""

    uri = "fake://"

    def __init__(self) -> None:
        self.known: dict[str, Model] = {}
        self.made: dict[str, list[Version]] = {}
        self._runs: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
        self._metrics: dict[str, dict[str, float]] = {}
        self._ids = itertools.count(1)

    @property
    def client(self) -> SimpleNamespace:
        return SimpleNamespace(
            get_model_version=lambda name, number: self.version(name, int(number)),
            get_model_version_download_uri=self._download_uri,
            delete_registered_model_alias=lambda name, alias: self.known[name].aliases.pop(
                alias, 0
            ),
        )

    def _download_uri(self, name: str, number: str) -> str:
        raise NotFoundError(f"the source of {name} {number} is gone")

    def models(self, tags: dict[str, str]) -> list[FoundModel]:
        return [
            self.found_model(name)
            for name, model in sorted(self.known.items())
            if full_tags(tags).items() <= model.tags.items()
        ]

    def newest_model(self, tags: dict[str, str]) -> str:
        return str(
            [(model.name, len(self.made.get(model.name, ()))) for model in self.models(tags)]
        )

    def model_name(self, name: str) -> str | None:
        return same_but_for_case(name, self.known) or (name if name in self.known else None)

    def found_model(self, name: str) -> FoundModel:
        if name not in self.known:
            raise NotFoundError(f"there is no {name!r}")
        model, latest = self.known[name], self.made.get(name, ())[-1:]
        numbers = (int(version.version) for version in latest)
        return FoundModel(name, {**model.tags}, {**model.aliases}, max(numbers, default=0))

    def model(self, name: str, kind: str) -> Model:
        if name not in self.known or own_tags(self.known[name].tags).get("kind", "base") != kind:
            raise NotFoundError(f"{name!r} is no {kind}")
        return self.known[name]

    def make_model(self, name: str, tags: dict[str, str]) -> Model:
        if name not in self.known:
            check_case("the name", name, self.known)
        return self.known.setdefault(name, Model(name, full_tags(tags)))

    def versions(self, name: str) -> list[Version]:
        return list(self.made.get(name, ()))

    def tagged_versions(self, tags: dict[str, str]) -> list[Version]:
        return [
            version
            for _, versions in sorted(self.made.items())
            for version in versions
            if full_tags(tags).items() <= version.tags.items()
        ]

    def versions_of(self, names: Iterable[str]) -> list[Version]:
        return [version for name in names for version in self.versions(name)]

    def version(self, name: str, number: int) -> Version:
        for version in self.made.get(name, ()):
            if version.version == str(number):
                return version
        raise NotFoundError(f"{name} has no version {number}")

    def make_version(self, name: str, source: str, tags: dict[str, str | None], **_: object) -> int:
        made = self.made.setdefault(name, [])
        number = int(made[-1].version) + 1 if made else 1
        made.append(Version(name, str(number), source, full_tags(tags)))
        return number

    def tag_version(self, name: str, number: int, tags: dict[str, str | None]) -> None:
        self.version(name, number).tags.update(full_tags(tags))

    def untag_version(self, name: str, number: int, key: str) -> None:
        self.version(name, number).tags.pop(tag(key), None)

    def tag_model(self, name: str, key: str, value: str) -> None:
        self.known[name].tags[tag(key)] = value

    def untag_model(self, name: str, key: str) -> None:
        self.known[name].tags.pop(tag(key), None)

    def set_alias(self, name: str, alias: str, number: int) -> None:
        self.version(name, number)
        self.known[name].aliases[alias] = str(number)

    def upload_model(self, *_: object, **__: object) -> str:
        return f"m-{next(self._ids)}"

    @contextmanager
    def run(self, purpose: str, name: str, tags: dict[str, str]) -> Iterator[str]:
        run_id = f"run-{next(self._ids)}"
        self._runs[run_id] = (dict(tags), {})
        yield run_id

    def oldest_run(self, purpose: str, tags: dict[str, str]) -> str | None:
        return next((run.id for run in self.finished_runs(purpose, tags)), None)

    def finished_runs(
        self, purpose: str, tags: dict[str, str], limit: int = 100
    ) -> list[FinishedRun]:
        """Return the runs. The folder of a run's files is its id."""
        found = [run_id for run_id, (its, _) in self._runs.items() if tags.items() <= its.items()]
        return [FinishedRun(run_id, run_id, self._metrics.get(run_id, {})) for run_id in found]

    def artifact_uri(self, run_id: str) -> str:
        return run_id

    def log_params(self, *_: object) -> None:
        pass

    def log_datasets(self, *_: object) -> None:
        pass

    def log_table(self, *_: object) -> None:
        pass

    def log_metrics(self, run_id: str, values: dict[str, float], **_: object) -> None:
        self._metrics[run_id] = dict(values)

    def write_text(self, run_id: str, name: str, text: str) -> None:
        self._runs[run_id][1][name] = text

    def read_text(self, run_id: str, name: str) -> str:
        if name not in self._runs.get(run_id, ({}, {}))[1]:
            raise NotFoundError(f"{run_id} has no {name}")
        return self._runs[run_id][1][name]
