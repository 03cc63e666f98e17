"""Files that make a registered adapter version a model of MLflow (`python_function` flavor).

They lie beside the files of the PEFT folder: `PeftModel.from_pretrained` and
`mlflow.pyfunc.load_model` load the same artifact.
"""

import tempfile
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any
from uuid import uuid4

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.evaluation import Suite

__all__ = ["LOADER", "MODEL_FILES", "write_model_files"]

LOADER = "trans_peft.serving.pyfunc"
"""The module from which MLflow calls `_load_pyfunc`."""

MODEL_FILES = frozenset(
    {
        "MLmodel",
        "conda.yaml",
        "input_example.json",
        "python_env.yaml",
        "registered_model_meta",  # added by MLflow's own downloads
        "requirements.txt",
        "serving_input_example.json",
    }
)
"""Names of the files beside those of the PEFT folder."""

_MAX_NEW_TOKENS = 64
"""Default for adapters whose suites all choose between given answers."""


def write_model_files(version: AdapterVersion, folder: Path) -> Path:
    """Write MLflow's files for an adapter version to a new folder, and return it.

    The signature takes prompts, as texts or as chats, and returns texts. Its parameters have the
    values of the first suite that generates answers, so that a prediction equals what was judged.
    The metadata identifies the base and the weights, which the loader compares.
    """
    # Imported here: it takes seconds, and reading the registry does not need it.
    from mlflow.models import Model

    suite = next((suite for suite in version.suites if not suite.is_choice), None)
    folder.mkdir()
    for name, content in _files(
        suite.max_new_tokens if suite else _MAX_NEW_TOKENS, suite.stop if suite else ()
    ).items():
        (folder / name).write_bytes(content)
    model = Model.load(str(folder))
    model.metadata = _metadata(version, suite or version.suites[0])
    model.model_uuid = uuid4().hex
    model.utc_time_created = str(datetime.now(UTC).replace(tzinfo=None))  # MLflow's format
    model.save(str(folder / "MLmodel"))
    return folder


@lru_cache(maxsize=64)
def _files(max_new_tokens: int, stop: tuple[str, ...]) -> dict[str, bytes]:
    """Return the files that MLflow writes for a model with these defaults, by name.

    They are made once for many adapters, because MLflow validates the example each time.
    """
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    parameters: list[Any] = [
        ParamSpec("max_new_tokens", DataType.long, max_new_tokens),
        ParamSpec("stop", DataType.string, list(stop), shape=(-1,)),
    ]
    with tempfile.TemporaryDirectory(prefix="trans-peft-") as scratch:
        folder = Path(scratch, "model")
        mlflow.pyfunc.save_model(
            folder,
            loader_module=LOADER,
            signature=ModelSignature(
                inputs=Schema([ColSpec(AnyType())]),
                outputs=Schema([ColSpec(DataType.string)]),
                params=ParamSchema(parameters),
            ),
            input_example=["The capital of France is"],
            pip_requirements=[f"trans-peft[eval,mlflow,s3]=={installed_version('trans-peft')}"],
            model_config={"require_serving": True},
        )
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _metadata(version: AdapterVersion, suite: Suite) -> dict[str, str]:
    return {
        "adapter": version.adapter,
        "family": version.base.family,
        "base_version": version.base.version,
        "base_fingerprint": version.base.fingerprint_sha256,
        "weights_sha256": version.weights_sha256,
        "dtype": suite.dtype,
    }
