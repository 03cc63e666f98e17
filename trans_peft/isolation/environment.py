"""The environment of a child process, without the credentials of its parent."""

import os
import sys
from pathlib import Path

__all__ = ["child_environment", "without_credentials"]

_SECRETS = ("AWS_", "MLFLOW_", "PREFECT_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def without_credentials() -> dict[str, str]:
    """Return this process's environment without credentials."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_SECRETS)}


def child_environment() -> dict[str, str]:
    """Return this process's environment without credentials.

    Its variables disable CUDA, downloads from the Hugging Face hub, and threads of libraries.
    """
    library = str(Path(__file__).parents[2])
    return without_credentials() | {
        "PYTHONPATH": os.pathsep.join([library, *filter(None, sys.path)]),
        "PYTHONHASHSEED": "0",  # sympy's order of terms, and so its time, depends on hashes
        "CUDA_VISIBLE_DEVICES": "",  # a forked process cannot use CUDA
        "HF_HUB_OFFLINE": "1",
        "RUST_BACKTRACE": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
