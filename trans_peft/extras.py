"""Optional dependencies: which extra of the distribution installs which package."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["EXTRA_OF", "explaining_missing_extras"]

EXTRA_OF = {
    "accelerate": "train",
    "boto3": "s3",
    "botocore": "s3",
    "cyclopts": "cli",
    "datasets": "eval",
    "fastapi": "ui",
    "jinja2": "ui",
    "opacus": "privacy",
    "OpenSSL": "signatures",
    "math_verify": "eval",
    "matplotlib": "figures",
    "mlflow": "mlflow",
    "model_signing": "signatures",
    "prometheus_client": "ui",
    "psutil": "mlflow",
    "pydantic": "cli",
    "rapidfuzz": "eval",
    "rich": "cli",
    "sacrebleu": "eval",
    "scipy": "eval",
    "starlette": "ui",
    "trl": "train",
    "uvicorn": "ui",
    "yaml": "cli",
}
"""Top-level module -> extra that installs it, as declared in pyproject.toml."""


@contextmanager
def explaining_missing_extras() -> Iterator[None]:
    """Raise ModuleNotFoundError with the pip command if the block imports a missing extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = EXTRA_OF.get(package)
        if extra is None or "pip install" in str(error):
            raise
        raise ModuleNotFoundError(
            f"{package} is not installed: in a checkout of trans-peft, run "
            f"`pip install '.[{extra}]'`, or `pip install '.[all]'` for everything",
            name=error.name,
        ) from error
