from dataclasses import replace

import pytest

from tests.tiny import write_tiny_base
from tests.training.conftest import data_file, make_job  # noqa: F401


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory):
    """Heads of 32 features, which the kernels for GPUs need."""
    return write_tiny_base(tmp_path_factory.mktemp("wide-base"), hidden=128)


@pytest.fixture
def wide_job(make_job, wide_base, tmp_path):  # noqa: F811
    """Return a function that makes a job on `wide_base`, in a folder of its own."""
    return lambda name, recipe: replace(make_job(tmp_path / name, recipe), base_folder=wide_base)
