"""The door to MLflow: one server, its errors in our words, and what its API leaves to the caller.

The one place that imports mlflow. Nothing here reads or sets MLflow's global state: each `Tracking`
carries its URI, so one process can talk to two servers. Tags of this product start with
`trans_peft.`; the methods here take and give their names without it.
"""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from requests.exceptions import RequestException

from trans_peft.domain.conventions import TAG_PREFIX
from trans_peft.domain.names import check_case
from trans_peft.errors import (
    AccessError,
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
    TransPeftError,
    full_disk_error,
    translating_full_disk_errors,
)

__all__ = ["Tracking", "all_pages", "copied_from", "full_tags", "map_exceptions", "own_tags", "tag"]

_PARAM_LIMIT = 6000
_PAGE = 1000


def tag(name: str) -> str:
    """Return the full name of one of our tags."""
    return f"{TAG_PREFIX}{name}"


def own_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return our tags among those that MLflow has, without the prefix."""
    return {
        key.removeprefix(TAG_PREFIX): v for key, v in tags.items() if key.startswith(TAG_PREFIX)
    }


def full_tags(tags: Mapping[str, str | None]) -> dict[str, str]:
    """Return tags as MLflow takes them: prefixed, those without a value left out."""
    return {tag(key): value for key, value in tags.items() if value}


class _ConflictError(StoreError):
    """Another client wrote the same row between MLflow's look and its write."""


class _InWords:
    """An `MlflowClient` whose every call fails with our errors."""

    def __init__(self, client: MlflowClient, tracking_uri: str) -> None:
        self._client = client
        self._tracking_uri = tracking_uri

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with map_exceptions(self._tracking_uri):
                return method(*args, **kwargs)

        return call


@contextlib.contextmanager
def map_exceptions(tracking_uri: str) -> Iterator[None]:
    """Turn what MLflow and its client say into our errors."""
    try:
        with translating_full_disk_errors(tempfile.gettempdir()):
            yield
    except RequestException as error:  # for a file that is sent
        raise _of_a_file(tracking_uri, str(error)) from error
    except MlflowException as error:
        if "failures occurred while downloading" in error.message:
            raise _of_a_file(tracking_uri, error.message) from error
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            raise NotFoundError(f"MLflow at {tracking_uri}: {error.message}") from error
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise InvalidSpecError(f"MLflow at {tracking_uri}: {error.message}") from error
        if error.error_code in ("RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"):
            raise _ConflictError(f"MLflow at {tracking_uri}: {error.message}") from error
        if error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            raise _not_let_in(tracking_uri, error.message) from error
        raise _no_answer(tracking_uri, error.message) from error


def _of_a_file(tracking_uri: str, text: str) -> TransPeftError:
    """Return what went wrong with a file, of which MLflow's client keeps nothing but the text."""
    status = re.search(r"(\d{3}) Client Error", text)
    if status and status[1] == "404":
        return NotFoundError(f"MLflow at {tracking_uri}: {text}")
    if status and status[1] in ("401", "403"):
        return _not_let_in(tracking_uri, text)
    if os.strerror(errno.ENOSPC) in text:
        return full_disk_error(tempfile.gettempdir(), text)
    return _no_answer(tracking_uri, text)


def _not_let_in(tracking_uri: str, found: object) -> AccessError:
    return AccessError(
        f"MLflow at {tracking_uri} does not let us in",
        found=found,
        do="check MLFLOW_TRACKING_USERNAME, the password or token, what this user may do, and the "
        "server's --allowed-hosts",
    )


def _no_answer(tracking_uri: str, found: object) -> StoreError:
    return StoreError(
        f"MLflow at {tracking_uri} does not answer as it should",
        found=found,
        do="check that the server runs, and MLFLOW_TRACKING_URI",
    )


class Tracking:
    """One MLflow server: experiments, runs, registered models, artifacts."""

    def __init__(self, tracking_uri: str) -> None:
        self.uri = tracking_uri
        self._experiments: dict[str, str] = {}

    @cached_property
    def client(self) -> Any:
        """An `MlflowClient` whose errors are ours."""
        return _InWords(MlflowClient(self.uri, registry_uri=self.uri), self.uri)

    # Experiments and runs

    def experiment(self, purpose: str) -> str:
        """Return the id of the experiment `trans-peft/<purpose>`, made where it is missing."""
        name = f"trans-peft/{purpose}"
        if name not in self._experiments:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                with contextlib.suppress(_ConflictError):  # somebody was faster
                    self.client.create_experiment(name)
                found = self.client.get_experiment_by_name(name)
            if found is None or found.lifecycle_stage != "active":
                raise StoreError(
                    f"the experiment {name!r} at {self.uri} cannot be used",
                    found="deleted" if found else "it could not be made",
                    do="restore it with `mlflow experiments restore`",
                )
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def start_run(self, purpose: str, name: str, tags: Mapping[str, str | None]) -> str:
        """Start a run and return its id."""
        run = self.client.create_run(self.experiment(purpose), run_name=name, tags=full_tags(tags))
        return str(run.info.run_id)

    @contextlib.contextmanager
    def run(self, purpose: str, name: str, tags: Mapping[str, str | None]) -> Iterator[str]:
        """Start a run; it is finished, or failed where the block raises."""
        run_id = self.start_run(purpose, name, tags)
        try:
            yield run_id
        except BaseException:
            with contextlib.suppress(StoreError):  # what happened in the block matters more
                self.client.set_terminated(run_id, status="FAILED")
            raise
        self.client.set_terminated(run_id, status="FINISHED")

    def oldest_run(self, purpose: str, tags: Mapping[str, str]) -> str | None:
        """Return the id of the oldest finished run with these tags."""
        wanted = [f"tags.`{tag(key)}` = {_literal(value)}" for key, value in tags.items()]
        runs = self.client.search_runs(
            [self.experiment(purpose)],
            filter_string=" AND ".join([*wanted, "attributes.status = 'FINISHED'"]),
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
            max_results=1,
        )
        return runs[0].info.run_id if runs else None

    def log_metrics(
        self, run_id: str, values: Mapping[str, float], *, step: int, time_ms: int
    ) -> None:
        """Record figures at a step; they are in the page when this returns."""
        metrics = [
            Metric(_metric_name(name), float(value), time_ms, step)
            for name, value in values.items()
        ]
        self.client.log_batch(run_id, metrics=metrics)

    def log_params(self, run_id: str, values: Mapping[str, object]) -> None:
        """Record parameters, shortened where MLflow would refuse them."""
        params = [
            Param(_metric_name(name), str(value)[:_PARAM_LIMIT]) for name, value in values.items()
        ]
        for at in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[at : at + 100])

    def write_text(self, run_id: str, name: str, text: str) -> None:
        """Attach a text file to a run."""
        with map_exceptions(self.uri), tempfile.TemporaryDirectory(prefix="trans-peft-") as folder:
            path = Path(folder, name)
            path.write_text(text)
            self.client.log_artifact(run_id, str(path))

    def read_text(self, run_id: str, name: str) -> str:
        """Return a text file of a run. NotFoundError, IntegrityError."""
        # `client.download_artifacts` takes whatever goes wrong for a file that is not there.
        folder_uri = self.client.get_run(run_id).info.artifact_uri
        with map_exceptions(self.uri), tempfile.TemporaryDirectory(prefix="trans-peft-") as folder:
            content = self._download(f"{folder_uri}/{name}", folder).read_bytes()
        try:
            return content.decode()
        except UnicodeError as error:
            raise IntegrityError(f"{name} of run {run_id} is not text", found=error) from error

    def system_metrics(self, run_id: str) -> SystemMetricsMonitor:
        """Return what samples this machine (processor, memory, devices) into a run, not started."""
        return SystemMetricsMonitor(run_id, tracking_uri=self.uri)

    # The model registry

    def models(self, tags: Mapping[str, str]) -> list[Any]:
        """Return all registered models with these tags, sorted by name."""
        wanted = [f"tags.`{tag(key)}` = {_literal(value)}" for key, value in tags.items()]
        return all_pages(
            lambda token: self.client.search_registered_models(
                " AND ".join(wanted), max_results=_PAGE, order_by=["name ASC"], page_token=token
            )
        )

    def model(self, name: str, kind: str) -> Any:
        """Return a registered model, its aliases with it. NotFoundError, also for another kind."""
        found = self.client.get_registered_model(name)
        its_kind = own_tags(found.tags).get("kind", "base")  # what a person made may become a base
        if its_kind != kind:
            raise NotFoundError(f"{name!r} is no {kind}", found=f"a registered {its_kind}")
        return found

    def make_model(self, name: str, tags: Mapping[str, str]) -> Any:
        """Return the registered model of that name, made with these tags where it is missing."""
        with contextlib.suppress(NotFoundError):
            return self.client.get_registered_model(name)
        check_case("the name", name, self._like(name))
        with contextlib.suppress(_ConflictError):
            return self.client.create_registered_model(name, tags=full_tags(tags))
        return self.client.get_registered_model(name)  # somebody was faster

    def _like(self, name: str) -> list[str]:
        """Return the names of registered models that ILIKE finds: `_` matches any character."""
        wanted = f"name ILIKE {_literal(name)}"
        found = all_pages(
            lambda token: self.client.search_registered_models(
                wanted, max_results=_PAGE, page_token=token
            )
        )
        return [model.name for model in found]

    def versions(self, name: str) -> list[Any]:
        """Return all versions of a registered model, the oldest first; none where there is none."""
        return all_pages(
            lambda token: self.client.search_model_versions(
                f"name = {_literal(name)}",
                max_results=_PAGE,
                order_by=["name ASC", "version_number ASC"],
                page_token=token,
            )
        )

    def make_version(
        self,
        name: str,
        source: str,
        tags: Mapping[str, str | None],
        *,
        run_id: str | None = None,
        model_id: str | None = None,
    ) -> int:
        """Register a version with its tags, in one step, and return its number."""
        made = self.client.create_model_version(
            name,
            source,
            run_id=run_id,
            tags=full_tags(tags),
            model_id=model_id,
            await_creation_for=0,  # the open-source server makes it at once
        )
        return int(made.version)

    def tag_version(self, name: str, number: int, tags: Mapping[str, str | None]) -> None:
        """Set tags on a version, in this order."""
        for key, value in full_tags(tags).items():
            _settled(self.client.set_model_version_tag, name, str(number), key, value)

    def untag_version(self, name: str, number: int, key: str) -> None:
        """Take a tag off a version."""
        self.client.delete_model_version_tag(name, str(number), tag(key))

    def tag_model(self, name: str, key: str, value: str) -> None:
        """Set a tag on a registered model."""
        _settled(self.client.set_registered_model_tag, name, tag(key), value)

    def untag_model(self, name: str, key: str) -> None:
        """Take a tag off a registered model."""
        self.client.delete_registered_model_tag(name, tag(key))

    def set_alias(self, name: str, alias: str, number: int) -> None:
        """Move an alias to a version."""
        _settled(self.client.set_registered_model_alias, name, alias, str(number))

    def upload_model(
        self, purpose: str, name: str, folder: Path, *, run_id: str | None, tags: Mapping[str, str]
    ) -> str:
        """Store a folder as it is, as a logged model, and return the model's id."""
        model = self.client.create_logged_model(
            self.experiment(purpose),
            name=re.sub(r"[/:.%\"']", "-", name),  # a logged model's name may hold none of these
            source_run_id=run_id,
            model_type="peft-adapter",
            tags=full_tags(tags),
        )
        try:
            self.client.log_model_artifacts(model.model_id, str(folder))
        except BaseException:
            with contextlib.suppress(StoreError):
                self.client.finalize_logged_model(model.model_id, "FAILED")
            raise
        self.client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def download_model(self, name: str, number: int, folder: Path) -> Path:
        """Write the files of a model version below a folder and return where. NotFoundError."""
        # `models:/` URIs are resolved through MLflow's global state, so it is done here by hand.
        uri = self.client.get_model_version_download_uri(name, str(number))
        with map_exceptions(self.uri):
            return self._download(uri, str(folder))

    def _download(self, uri: str, folder: str) -> Path:
        found = mlflow.artifacts.download_artifacts(
            uri, dst_path=folder, tracking_uri=self.uri, registry_uri=self.uri
        )
        return Path(found)


def copied_from(found: Any) -> str | None:
    """Return the registered model from which "Promote model" copied a version; None: not copied.

    MLflow's `copy_model_version` makes a version whose source is `models:/<name>/<number>`; that of
    a logged model is `models:/m-<id>`.
    """
    copied = re.fullmatch(r"models:/([^/]+)/\d+", found.source or "")
    return copied and copied.group(1)


def _settled(write: Callable[..., Any], *arguments: str) -> None:
    """Write; where another client was writing the same, write again: the last one counts."""
    try:
        write(*arguments)
    except _ConflictError:
        write(*arguments)


def all_pages(search: Callable[[str | None], Any]) -> list[Any]:
    """Return what every page of a search holds; `search` is given the token of the page."""
    found, token = [], None
    while True:
        page = search(token)
        found += page
        token = page.token
        if not token:
            return found


def _literal(value: str) -> str:
    if "'" in value or '"' in value or "`" in value:
        raise InvalidSpecError(f"quotes in a name: {value!r}", do="choose one without them")
    return f"'{value}'"


def _metric_name(name: str) -> str:
    """MLflow's alphabet for the names of metrics and parameters."""
    return re.sub(r"[^\w\-./: ]", "_", name)
