"""A client of one MLflow server, with paging, retries of conflicting writes, and mapped errors.

It neither reads nor sets MLflow's global state: each `Tracking`
has its own URI, so that one process can use two servers. Tags of this library start with
`trans_peft.`; the methods here take and return tag names without that prefix.
"""

import contextlib
import errno
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.environment_variables import (
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
)
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response
from requests.exceptions import RequestException

from trans_peft.domain.conventions import TAG_PREFIX
from trans_peft.domain.names import check_case
from trans_peft.edges.mlflow_search import (
    FoundModel,
    FoundVersion,
    Page,
    all_pages,
    entry_of,
    malformed_answer,
    page_of,
)
from trans_peft.errors import (
    AccessError,
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
    TransPeftError,
    full_disk_error,
    is_full_disk,
    map_exceptions,
    unknown_name,
)

__all__ = [
    "DatasetUse",
    "FinishedRun",
    "Tracking",
    "copied_from",
    "full_tags",
    "logged_model_id",
    "mapped_errors",
    "own_tags",
    "tag",
]

_CONNECT_TIMEOUT_S = 3
_KINDS = {"base": "base family"}
_PARAM_LIMIT = 6000
_PAGE = 1000
_BY_NUMBER = ("name ASC", "version_number ASC")
_MAX_FILTER = 2000
"""Characters of one filter. It is part of a URL, which proxies limit to 8 KiB."""

if find_spec("dbruntime") is None:
    # MLflow tries to import it for the headers of each request. None makes that fail at once.
    sys.modules.setdefault("dbruntime", cast(Any, None))


def tag(name: str) -> str:
    """Return the full name of a tag of this library."""
    return f"{TAG_PREFIX}{name}"


def own_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of this library among MLflow's, without the prefix."""
    return {
        key.removeprefix(TAG_PREFIX): v for key, v in tags.items() if key.startswith(TAG_PREFIX)
    }


def full_tags(tags: Mapping[str, str | None]) -> dict[str, str]:
    """Return tags with the prefix, without those that have no value."""
    return {tag(key): value for key, value in tags.items() if value}


_FILE_ERROR = re.compile(
    r"(\d{3}) Client Error"  # requests: files behind MLflow's server
    r"|An error occurred \((\w+)\) when calling"  # boto3: s3://
    r"|(\d{3}) (?:GET|HEAD) https?://"  # google-cloud-storage: gs://
    r"|ErrorCode:(\w+)"  # azure-storage-blob: wasbs://
)
"""Matches the error code in the text of a failed file transfer, in the form of each store."""

_CONNECTION_ERROR = re.compile(
    r"(?:NewConnectionError|NameResolutionError).*?\[Errno -?\d+\] ([\w ,']+)|ConnectTimeoutError"
)
"""Matches urllib3's text for a server that cannot be reached; the group is the system's reason."""

_MISSING = {"404", "NoSuchKey", "BlobNotFound"}
_DENIED = {
    *("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *("ExpiredToken", "InvalidToken", "AuthenticationFailed", "AuthorizationFailure"),
}
_CLIENTS = ("botocore.", "boto3.", "s3transfer.", "google.", "azure.")
"""Packages whose exceptions MLflow's client does not translate."""


class _ConflictError(StoreError):
    """Another client wrote the same row between MLflow's read and its write."""


class _MappedClient:
    """An `MlflowClient` whose methods raise errors of `trans_peft.errors`."""

    def __init__(self, client: MlflowClient, tracking_uri: str) -> None:
        self._client = client
        self._tracking_uri = tracking_uri

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with mapped_errors(self._tracking_uri):
                return method(*args, **kwargs)

        return call


def mapped_errors(tracking_uri: str) -> contextlib.AbstractContextManager[None]:
    """Translate errors of MLflow and of its client, and a full disk for temporary files."""
    return map_exceptions(
        {
            RequestException: lambda error: _transfer_error(tracking_uri, str(error)),
            MlflowException: lambda error: _response_error(tracking_uri, error),
            OSError: _disk_error,
            Exception: lambda error: _client_error(tracking_uri, error),
        }
    )


def _response_error(tracking_uri: str, error: MlflowException) -> TransPeftError:
    if "failures occurred while downloading" in error.message:
        return _transfer_error(tracking_uri, error.message)
    if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
        return _missing(tracking_uri, error.message)
    if error.error_code == "INVALID_PARAMETER_VALUE":
        return InvalidSpecError(
            f"MLflow at {tracking_uri} does not accept a value",
            found=error.message,
            do="correct the name or the value that MLflow reports",
        )
    if error.error_code in ("RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"):
        return _ConflictError(
            f"MLflow at {tracking_uri} refuses a request that another client's may have overtaken",
            found=error.message,
            do="repeat the operation",
        )
    if error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return _denied(tracking_uri, error.message)
    return _unavailable(tracking_uri, error.message)


def _client_error(tracking_uri: str, error: Exception) -> TransPeftError | None:
    """Return the error for one of a store's own client, None for any other exception."""
    if not type(error).__module__.startswith(_CLIENTS):
        return None
    return _transfer_error(tracking_uri, str(error))


def _transfer_error(tracking_uri: str, text: str) -> TransPeftError:
    """Return the error for a failed file transfer. MLflow's client keeps only the text of it."""
    codes = {code for groups in _FILE_ERROR.findall(text) for code in groups if code}
    if codes and codes <= _MISSING:
        return _missing(tracking_uri, text)
    if codes & _DENIED or "Unable to locate credentials" in text:
        return _denied(tracking_uri, text)
    if os.strerror(errno.ENOSPC) in text:
        return full_disk_error(tempfile.gettempdir(), text)
    return _unavailable(tracking_uri, text)


def _missing(tracking_uri: str, found: object) -> NotFoundError:
    return NotFoundError(
        f"MLflow at {tracking_uri} does not have what was requested",
        expected="an experiment, run, model, version or file that exists there",
        found=found,
        do="check the name, and that MLFLOW_TRACKING_URI names the right server",
    )


def _disk_error(error: OSError) -> StoreError | None:
    return full_disk_error(tempfile.gettempdir(), error) if is_full_disk(error) else None


def _denied(tracking_uri: str, found: object) -> AccessError:
    return AccessError(
        f"MLflow at {tracking_uri} denies access",
        found=found,
        do="check MLFLOW_TRACKING_USERNAME, the password or token, the permissions of this user "
        "and --allowed-hosts of the server",
    )


def _unavailable(tracking_uri: str, found: str) -> StoreError:
    refused = _CONNECTION_ERROR.search(found)
    return StoreError(
        f"MLflow at {tracking_uri} failed or cannot be reached",
        expected="a running MLflow server that responds",
        found=(refused[1] or "it does not respond in time") if refused else found,
        do="check that the server runs, and check MLFLOW_TRACKING_URI",
    )


def _check_server(tracking_uri: str) -> None:
    """Raise StoreError within seconds unless an MLflow server responds, AccessError if it denies.

    MLflow's client repeats a failed request for minutes without a message. That suits a server
    which restarts, but not the first request, where a wrong URL is more likely.
    """
    with mapped_errors(tracking_uri):
        response = http_request(
            get_default_host_creds(tracking_uri),
            "/api/2.0/mlflow/registered-models/search",
            "GET",
            params={"max_results": 1},
            max_retries=min(2, MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()),
            timeout=(_CONNECT_TIMEOUT_S, min(10, MLFLOW_HTTP_REQUEST_TIMEOUT.get())),
            raise_on_status=False,
        )
    if response.status_code in (401, 403):
        raise _denied(tracking_uri, response.text[:500])
    if response.status_code >= 500 or response.status_code == 429:
        raise _unavailable(tracking_uri, f"status {response.status_code}: {response.text[:500]}")
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not (
        response.ok and answer.keys() <= {"registered_models", "next_page_token"}
    ):
        raise StoreError(
            f"the server at {tracking_uri} is not an MLflow server",
            expected="the URL of an MLflow tracking server with a model registry",
            found=f"status {response.status_code} for a search of registered models",
            do="check MLFLOW_TRACKING_URI, its port and its path",
        )


class FinishedRun(NamedTuple):
    """A finished run: its id, the folder of its files, and its last metrics."""

    id: str
    artifact_uri: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class DatasetUse:
    """A data set that a run used.

    Attributes:
        name: The name that MLflow shows.
        digest: The start of the hash of its bytes.
        source_type: The kind of its address, such as "s3".
        source: The address as JSON.
        context: What the run used it for: "training" or "evaluation".
    """

    name: str
    digest: str
    source_type: str
    source: str
    context: str


class Tracking:
    """One MLflow server: experiments, runs, registered models, artifacts.

    The first use of `client` raises StoreError within seconds if no MLflow server responds.
    """

    def __init__(self, tracking_uri: str) -> None:
        self.uri = tracking_uri
        self._experiments: dict[str, str] = {}

    @cached_property
    def client(self) -> Any:
        """An `MlflowClient` whose methods raise errors of `trans_peft.errors`."""
        if self._is_server:
            _check_server(self.uri)
        return _MappedClient(MlflowClient(self.uri, registry_uri=self.uri), self.uri)

    @property
    def _is_server(self) -> bool:
        """Whether the URI is that of a server, and not of a database."""
        return self.uri.startswith(("http://", "https://"))

    # Experiments and runs

    def experiment(self, purpose: str) -> str:
        """Return the id of the experiment `trans-peft/<purpose>`, created if it is missing."""
        name = f"trans-peft/{purpose}"
        if name not in self._experiments:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                with contextlib.suppress(_ConflictError):  # another process created it first
                    self.client.create_experiment(name)
                found = self.client.get_experiment_by_name(name)
            if found is None or found.lifecycle_stage != "active":
                raise StoreError(
                    f"the experiment {name!r} at {self.uri} cannot be used",
                    found="it is deleted" if found else "it could not be created",
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
        """Start a run. It is finished at the end of the block, or failed if the block raises."""
        run_id = self.start_run(purpose, name, tags)
        try:
            yield run_id
        except BaseException:
            with contextlib.suppress(StoreError):  # the error of the block matters more
                self.client.set_terminated(run_id, status="FAILED")
            raise
        self.client.set_terminated(run_id, status="FINISHED")

    def oldest_run(self, purpose: str, tags: Mapping[str, str]) -> str | None:
        """Return the id of the oldest finished run with these tags."""
        found = self.finished_runs(purpose, tags, limit=1)
        return found[0].id if found else None

    def finished_runs(
        self, purpose: str, tags: Mapping[str, str], *, limit: int = 100
    ) -> tuple[FinishedRun, ...]:
        """Return at most `limit` finished runs with these tags, the oldest first."""
        runs = self.client.search_runs(
            [self.experiment(purpose)],
            filter_string=f"{_with_tags(tags)} AND attributes.status = 'FINISHED'",
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
            max_results=limit,
        )
        return tuple(
            FinishedRun(run.info.run_id, run.info.artifact_uri, run.data.metrics) for run in runs
        )

    def log_metrics(
        self,
        run_id: str,
        values: Mapping[str, float],
        *,
        step: int,
        time_ms: int,
        model_id: str | None = None,
        dataset: DatasetUse | None = None,
    ) -> None:
        """Record metrics at a step, synchronously; optionally as those of a model and data set."""
        metrics = [
            Metric(
                _metric_name(name),
                float(value),
                time_ms,
                step,
                model_id=model_id,
                dataset_name=dataset.name if dataset else None,
                dataset_digest=dataset.digest if dataset else None,
            )
            for name, value in values.items()
        ]
        self.client.log_batch(run_id, metrics=metrics)

    def log_datasets(self, run_id: str, used: Sequence[DatasetUse]) -> None:
        """Record the data sets that a run used."""
        inputs = [
            DatasetInput(
                Dataset(use.name, use.digest, use.source_type, use.source),
                [InputTag("mlflow.data.context", use.context)],
            )
            for use in used
        ]
        if inputs:
            self.client.log_inputs(run_id, datasets=inputs)

    def log_table(self, run_id: str, rows: Sequence[Mapping[str, str]], name: str) -> None:
        """Attach a table that MLflow's page shows. All rows have the same keys."""
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        with mapped_errors(self.uri):
            self.client.log_table(run_id, columns, name)

    def log_params(self, run_id: str, values: Mapping[str, object]) -> None:
        """Record parameters, cut to the length that MLflow accepts."""
        params = [
            Param(_metric_name(name), str(value)[:_PARAM_LIMIT]) for name, value in values.items()
        ]
        for at in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[at : at + 100])

    def write_text(self, run_id: str, name: str, text: str) -> None:
        """Attach a text file to a run."""
        with mapped_errors(self.uri), tempfile.TemporaryDirectory(prefix="trans-peft-") as folder:
            path = Path(folder, name)
            path.write_text(text)
            self.client.log_artifact(run_id, str(path))

    def artifact_uri(self, run_id: str) -> str:
        """Return the folder of a run's files. Raises NotFoundError."""
        return str(self.client.get_run(run_id).info.artifact_uri)

    def read_text(self, folder_uri: str, name: str) -> str:
        """Return a text file of a run's folder. Raises NotFoundError, IntegrityError, StoreError.

        MLflow's `client.download_artifacts` reports every failure as a missing file.
        """
        with mapped_errors(self.uri), tempfile.TemporaryDirectory(prefix="trans-peft-") as folder:
            content = self._download(f"{folder_uri}/{name}", folder).read_bytes()
        try:
            return content.decode()
        except UnicodeError as error:
            raise IntegrityError(f"{folder_uri}/{name} is not text", found=error) from error

    def system_metrics(self, run_id: str) -> SystemMetricsMonitor:
        """Return a monitor, not yet started, that records the machine's use into a run.

        It records GPUs only if the package nvidia-ml-py is installed.
        """
        return SystemMetricsMonitor(run_id, tracking_uri=self.uri)

    # The model registry

    def models(self, tags: Mapping[str, str]) -> list[FoundModel]:
        """Return all registered models with these tags, sorted by name."""
        return self._search("registered-models", _with_tags(tags), ["name ASC"])

    def newest_model(self, tags: Mapping[str, str]) -> str:
        """Return the name of the model with these tags that changed last, and the time in ms.

        Empty if no model has the tags. MLflow counts versions as changes, and no tags or aliases.
        """
        found = self.client.search_registered_models(
            _with_tags(tags), max_results=1, order_by=["last_updated_timestamp DESC"]
        )
        return "".join(f"{model.name} {model.last_updated_timestamp}" for model in found)

    def model_name(self, name: str) -> str | None:
        """Return the name of a registered model that equals `name` if case is ignored, or None.

        `_` in a filter with ILIKE matches any character, so there can be several pages.
        """
        wanted = f"name ILIKE {_literal(name)}"
        found = all_pages(
            lambda token: self.client.search_registered_models(
                wanted, max_results=_PAGE, page_token=token
            )
        )
        same = sorted(model.name for model in found if model.name.lower() == name.lower())
        return name if name in same else next(iter(same), None)

    def found_model(self, name: str) -> FoundModel:
        """Return the registered model of that name, of whatever kind. NotFoundError."""
        return cast(FoundModel, entry_of(self._registered(name)))

    def model(self, name: str, kind: str) -> Any:
        """Return a registered model and its aliases. NotFoundError, also for another kind."""
        try:
            found = self._registered(name)
        except NotFoundError as error:
            known = [model.name for model in self.models({"kind": kind})]
            raise unknown_name(_KINDS.get(kind, kind), name, known) from error
        its_kind = own_tags(found.tags).get("kind", "base")  # users register bases without this tag
        if its_kind != kind:
            raise NotFoundError(
                f"{name!r} is not a registered {kind}",
                expected=f"the name of a registered {kind}",
                found=f"a registered {its_kind}",
                do="check the spelling, or register it under another name",
            )
        return found

    def make_model(self, name: str, tags: Mapping[str, str]) -> Any:
        """Return the registered model of that name; create it with these tags if it is missing."""
        with contextlib.suppress(NotFoundError):
            return self._registered(name)
        if (existing := self.model_name(name)) is not None:
            check_case("the name", name, [existing])
        with contextlib.suppress(_ConflictError):
            return self.client.create_registered_model(name, tags=full_tags(tags))
        return self._registered(name)  # another process created it first

    def _registered(self, name: str) -> Any:
        """Return MLflow's entity of a registered model. NotFoundError.

        MLflow's client ignores what it does not know in an answer. Of any JSON object without a
        model, it makes a model without a name.
        """
        found = self.client.get_registered_model(name)
        if found.name.lower() != name.lower():  # some databases ignore case
            raise malformed_answer(f"the registered model {name!r}", found.name or "no model")
        return found

    def versions(self, name: str) -> list[FoundVersion]:
        """Return all versions of a registered model, oldest first; empty if there is no model."""
        return self._search("model-versions", f"name = {_literal(name)}", _BY_NUMBER)

    def tagged_versions(self, tags: Mapping[str, str]) -> list[FoundVersion]:
        """Return the versions of all registered models with these tags, by name and number."""
        return self._search("model-versions", _with_tags(tags), _BY_NUMBER)

    def versions_of(self, names: Iterable[str]) -> list[FoundVersion]:
        """Return all versions of these registered models, in few requests."""
        found: list[FoundVersion] = []
        for wanted in _names_filters(names):
            found += self._search("model-versions", wanted, _BY_NUMBER)
        return found

    def _search(self, kind: str, wanted: str, order_by: Sequence[str]) -> list[Any]:
        """Return all results of a search for "registered-models" or "model-versions"."""
        if self._is_server:
            return all_pages(lambda token: self._page(kind, wanted, order_by, token))
        search = getattr(self.client, f"search_{kind.replace('-', '_')}")  # a database
        entities = all_pages(
            lambda token: search(wanted, max_results=_PAGE, order_by=[*order_by], page_token=token)
        )
        return [*map(entry_of, entities)]

    def _page(self, kind: str, wanted: str, order_by: Sequence[str], token: str | None) -> Page:
        """Return one page of a search, as `mlflow_search` says.

        A connection stays with the worker process of MLflow that accepted it. Each page has a
        connection of its own, so that two searches in parallel do not wait for one worker while the
        others are idle.
        """
        params = {"filter": wanted, "max_results": _PAGE, "order_by": [*order_by]}
        response = self._request(
            f"{kind}/search",
            "GET",
            extra_headers={"Connection": "close"},
            params=params | ({"page_token": token} if token else {}),
        )
        try:  # `verify_rest_response` parses the answer as well, and reads an empty one as `{}`
            answer = response.json()
        except ValueError as error:
            raise malformed_answer("a JSON object", response.text) from error
        return page_of(answer, kind)

    def _request(self, endpoint: str, method: str, **options: Any) -> Any:
        """Return the response of MLflow's REST API, without its client. Raises mapped errors."""
        _ = self.client  # checks the server at the first use
        path = f"/api/2.0/mlflow/{endpoint}"
        with mapped_errors(self.uri):
            response = http_request(get_default_host_creds(self.uri), path, method, **options)
            if response.status_code != 200:
                verify_rest_response(response, path)
        return response

    def make_version(
        self,
        name: str,
        source: str,
        tags: Mapping[str, str | None],
        *,
        run_id: str | None = None,
        model_id: str | None = None,
    ) -> int:
        """Register a version with its tags in one request, and return its number."""
        created = self.client.create_model_version(
            name,
            source,
            run_id=run_id,
            tags=full_tags(tags),
            model_id=model_id,
            await_creation_for=0,  # the open-source server creates it synchronously
        )
        return int(created.version)

    def tag_version(self, name: str, number: int, tags: Mapping[str, str | None]) -> None:
        """Set tags on a version, in this order."""
        for key, value in full_tags(tags).items():
            named = {"name": name, "version": str(number), "key": key, "value": value}
            _retry_conflict(self._set_tag, "model-versions", named)

    def untag_version(self, name: str, number: int, key: str) -> None:
        """Remove a tag from a version."""
        self.client.delete_model_version_tag(name, str(number), tag(key))

    def tag_model(self, name: str, key: str, value: str) -> None:
        """Set a tag on a registered model."""
        named = {"name": name, "key": tag(key), "value": value}
        _retry_conflict(self._set_tag, "registered-models", named)

    def _set_tag(self, kind: str, named: Mapping[str, str]) -> None:
        """Set a tag of a "registered-models" or "model-versions" entry.

        MLflow's client reads the registered model before each tag, to see whether it is a prompt.
        """
        if not self._is_server:
            set_tag = f"set_{kind.replace('-', '_').removesuffix('s')}_tag"
            getattr(self.client, set_tag)(**named)
            return
        self._request(f"{kind}/set-tag", "POST", json=named)

    def untag_model(self, name: str, key: str) -> None:
        """Remove a tag from a registered model."""
        self.client.delete_registered_model_tag(name, tag(key))

    def set_alias(self, name: str, alias: str, number: int) -> None:
        """Move an alias to a version."""
        _retry_conflict(self.client.set_registered_model_alias, name, alias, str(number))

    def upload_model(
        self,
        purpose: str,
        name: str,
        folders: Sequence[Path],
        *,
        run_id: str | None,
        tags: Mapping[str, str],
    ) -> str:
        """Upload the files of all folders as one logged model, and return the id of that model."""
        model = self.client.create_logged_model(
            self.experiment(purpose),
            name=re.sub(
                r"[/:.%\"']", "-", name
            ),  # characters that MLflow refuses in the names of logged models
            source_run_id=run_id,
            model_type="peft-adapter",
            tags=full_tags(tags),
        )
        try:
            for folder in folders:
                self.client.log_model_artifacts(model.model_id, str(folder))
        except BaseException:
            with contextlib.suppress(StoreError):
                self.client.finalize_logged_model(model.model_id, "FAILED")
            raise
        self.client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def download_model(self, name: str, number: int, folder: Path) -> Path:
        """Write the files of a version below a folder and return their folder. NotFoundError."""
        folder.mkdir(parents=True, exist_ok=True)
        # MLflow resolves `models:/` URIs through its global state: resolve the URI here instead.
        uri = self.client.get_model_version_download_uri(name, str(number))
        with mapped_errors(self.uri):
            return self._download(uri, str(folder))

    def _download(self, uri: str, folder: str) -> Path:
        found = mlflow.artifacts.download_artifacts(
            uri, dst_path=folder, tracking_uri=self.uri, registry_uri=self.uri
        )
        return Path(found)


def copied_from(found: Any) -> str | None:
    """Return the registered model that a version was copied from ("Promote model"), or None.

    MLflow's `copy_model_version` creates a version whose source is `models:/<name>/<number>`. The
    source of a logged model is `models:/m-<id>`.
    """
    copied = re.fullmatch(r"models:/([^/]+)/\d+", found.source or "")
    return copied and copied.group(1)


def logged_model_id(found: Any) -> str | None:
    """Return the id of the logged model that a version was created from, or None.

    MLflow's REST API does not return `model_id`.
    """
    logged = re.fullmatch(r"models:/(m-\w+)", found.source or "")
    return logged and logged.group(1)


def _retry_conflict(write: Callable[..., Any], *arguments: Any) -> None:
    """Write, and write again if another client wrote the same row meanwhile."""
    try:
        write(*arguments)
    except _ConflictError:
        write(*arguments)


def _with_tags(tags: Mapping[str, str]) -> str:
    """Return MLflow's filter for all of these tags."""
    return " AND ".join(f"tags.`{tag(key)}` = {_literal(value)}" for key, value in tags.items())


def _names_filters(names: Iterable[str]) -> Iterator[str]:
    """Yield MLflow's filters for models with these names, each of limited length."""
    listed = ""
    for name in map(_literal, names):
        if listed and len(listed) + len(name) > _MAX_FILTER:
            yield f"name IN ({listed})"
            listed = ""
        listed += f", {name}" if listed else name
    if listed:
        yield f"name IN ({listed})"


def _literal(value: str) -> str:
    if "'" in value or '"' in value or "`" in value:
        raise InvalidSpecError(
            f"the name {value!r} contains quotes", do="choose one without quotes"
        )
    return f"'{value}'"


def _metric_name(name: str) -> str:
    """Replace characters that MLflow refuses in the names of metrics and parameters."""
    return re.sub(r"[^\w\-./: ]", "_", name)
