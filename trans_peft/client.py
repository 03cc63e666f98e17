"""Connect to a platform: MLflow for everything registered, S3 or folders for files.

This is the composition root of the wheel. The flows, the command line's `resolve` and notebooks
all build their `Platform` here.
"""

import os
from collections.abc import Collection
from pathlib import Path

from trans_peft.domain.owners import Owners
from trans_peft.domain.places import Places
from trans_peft.errors import InvalidSpecError
from trans_peft.extras import explaining_missing_extras
from trans_peft.ports import Platform
from trans_peft.validation.guards import guards_named

__all__ = ["DEFAULT_WORK_DIR", "connect"]

DEFAULT_WORK_DIR = Path("~/.cache/trans-peft")
"""Downloads and checkpoints go here unless `connect` gets another folder."""


def connect(
    tracking_uri: str | None = None,
    *,
    work_dir: str | Path = DEFAULT_WORK_DIR,
    cache_bytes: int | None = None,
    places: Places = Places(),  # noqa: B008  frozen
    may_lack: Collection[str] = (),
    owners: Owners = Owners(),  # noqa: B008  frozen
) -> Platform:
    """Return the platform behind an MLflow tracking server. Nothing is requested yet.

    `tracking_uri` defaults to the environment variable `MLFLOW_TRACKING_URI`. S3 uses boto3's own
    `AWS_*` variables and profiles. `work_dir` holds copies of bases, downloads and checkpoints of
    unfinished training; it must not be shared between machines. `cache_bytes` limits the copies of
    bases (None: the disk is the limit). `places` limits which local folders and hub data sets are
    read (by default any, as suits a user's own machine). `may_lack` names the guards of the sandbox
    for generated code that this machine may lack (by default none; see docs/suites.md). `owners`
    says from where each base family takes its versions (by default from anywhere; see
    docs/uploads.md).

    Raises InvalidSpecError without a tracking URI or for a guard that does not exist,
    ModuleNotFoundError without the extra `mlflow`.

    Example::

        import trans_peft as tp

        platform = tp.connect("http://mlflow:5000")
        version = tp.resolve("chat", platform)
        folder = platform.registry.download(version, Path("adapters/chat"))
    """
    tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not tracking_uri:
        raise InvalidSpecError(
            "there is no MLflow tracking URI to connect to",
            expected="the argument `tracking_uri` or the environment variable MLFLOW_TRACKING_URI",
            do="pass the URL of your MLflow server, such as http://localhost:5000",
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
        )
