import pytest

from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def one_thread():
    """Tiny matrices are multiplied faster by one thread than by many that wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()
