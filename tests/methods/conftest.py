import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Threads cost more than they give on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
