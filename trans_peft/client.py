"""Connect to a platform: an MLflow server for the registry, S3 or local folders for files.

The flows, the command `trans-peft resolve` and notebooks build their `Platform` here.
"""

import os
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

from trans_peft.domain.owners import Owners
from trans_peft.domain.places import Places
from trans_peft.errors import InvalidSpecError
from trans_peft.extras import explaining_missing_extras
from trans_peft.ports import Platform
from trans_peft.validation.guards import guards_named

__all__ = ["DEFAULT_WORK_DIR", "connect"]

DEFAULT_WORK_DIR = Path("~/.cache/trans-peft")
"""The default folder for copies of bases, downloads and checkpoints."""

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # MLflow's, without a server


def connect(  # noqa: PLR0913  the settings of a worker
    tracking_uri: str | None = None,
    *,
    work_dir: str | Path = DEFAULT_WORK_DIR,
    cache_bytes: int | None = None,
    places: Places = Places(),  # noqa: B008  frozen
    may_lack: Collection[str] = (),
    owners: Owners = Owners(),  # noqa: B008  frozen
    checkpoints_uri: str = "",
    suites_uri: str = "",
    vllm: str | Path | None = None,
) -> Platform:
    """Return the platform of an MLflow tracking server. Sends no request yet.

    The first operation raises StoreError within seconds if no MLflow server responds at the URI.
    S3 credentials and endpoints come from boto3's `AWS_*` variables and profiles.

    Args:
        tracking_uri: The URL of the server, or of the database of an MLflow without a server; by
            default the variable `MLFLOW_TRACKING_URI`.
        work_dir: The folder for copies of bases, downloads and checkpoints of unfinished training.
            Machines must not share it.
        cache_bytes: The limit for copies of bases in bytes; None means the size of the disk.
        places: The local folders and hub data sets that may be read; by default all of them.
        may_lack: Names of the guards of the sandbox for generated code that may be missing on this
            machine; by default none (docs/suites.md).
        owners: The places and signing keys from which each base family accepts versions; by default
            any place (docs/uploads.md).
        checkpoints_uri: The prefix for checkpoints of unfinished training, so that another machine
            can continue it; by default they stay in `work_dir`.
        suites_uri: The prefix for the items of suites that are tasks of lm-evaluation-harness. All
            workers must be able to read it. By default such suites cannot be pinned.
        vllm: The Python environment with vLLM, for policies that choose that engine; by default the
            environment of this process.

    Raises InvalidSpecError without a tracking URI, for a malformed one or for an unknown guard, and
    ModuleNotFoundError without the extra `mlflow`.

    Example::

        import trans_peft as tp

        platform = tp.connect("http://mlflow:5000")
        version = tp.resolve("chat", platform)
        folder = platform.registry.download(version, "adapters/chat")
    """
    # MLflow's own variable. pydantic-settings, which reads the settings of a worker, belongs to the
    # extra `platform`, and a notebook or a server of adapters does not need that.
    tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not tracking_uri:
        raise InvalidSpecError(
            "no MLflow tracking URI is configured",
            expected="the argument `tracking_uri` or the environment variable MLFLOW_TRACKING_URI",
            do="pass the URL of your MLflow server, such as http://localhost:5000",
        )
    if not _names_a_server_or_database(tracking_uri):
        raise InvalidSpecError(
            "the MLflow tracking URI is malformed",
            expected="http://HOST:PORT, https://HOST or a database URI such as sqlite:///mlflow.db",
            found=repr(tracking_uri),
            do="correct the argument `tracking_uri` or the variable MLFLOW_TRACKING_URI",
        )
    with explaining_missing_extras():
        from trans_peft.edges.mlflow_catalog import MlflowCatalog
        from trans_peft.edges.mlflow_evaluations import MlflowEvaluations
        from trans_peft.edges.mlflow_registry import MlflowRegistry
        from trans_peft.edges.mlflow_runs import MlflowRunLog
        from trans_peft.edges.stores import SchemeStore

        return Platform(
            store=SchemeStore(places),
            catalog=MlflowCatalog(tracking_uri),
            registry=MlflowRegistry(tracking_uri),
            evaluations=MlflowEvaluations(tracking_uri),
            runs=MlflowRunLog(tracking_uri),
            work_dir=Path(work_dir).expanduser(),
            cache_bytes=cache_bytes,
            may_lack=guards_named(may_lack),
            owners=owners,
            checkpoints_uri=checkpoints_uri,
            suites_uri=suites_uri,
            vllm=None if vllm is None else Path(vllm).expanduser(),
        )


def _names_a_server_or_database(uri: object) -> bool:
    """Whether MLflow would connect to the URI. It takes any other text for a local folder."""
    try:
        parts = urlsplit(str(uri))
        valid_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    if parts.scheme in ("http", "https"):
        return valid_port and bool(parts.hostname) and not set(" \t\n") & set(parts.netloc)
    return parts.scheme.partition("+")[0] in _DATABASES and "://" in str(uri)
