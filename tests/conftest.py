import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests must not access the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that spin on shared cores cost minutes

from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples at every run. New ones: pytest --hypothesis-profile=default
settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


_LONG = ("test_tutorial.py", "test_examples.py", "tests/study/", "tests/training/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that no worker is left with one at the end."""
    items.sort(key=lambda item: not any(name in item.path.as_posix() for name in _LONG))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("quantized") and find_spec("bitsandbytes") is None:
        pytest.skip("needs the extra `quantized`, without which this .venv starts a second sooner")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU with CUDA, and CUDA_VISIBLE_DEVICES: `make gpu`")


from tests.harness_tasks import harness_tasks  # noqa: E402, F401
from tests.servers import servers, unique  # noqa: E402, F401
