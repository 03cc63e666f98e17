import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Use one thread: several are slower on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
