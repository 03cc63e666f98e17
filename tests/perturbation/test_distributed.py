"""Two processes with gloo: dropped layers carry LoRA in their FFN, and nothing waits for ever."""

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import tiny_model
from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation import perturbed

STEPS = 4
PERTURBATION = Perturbation(masking_p=0.3, dropping_p=0.6)
IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))


def model():
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False
    )
    return get_peft_model(tiny_model(layers=3), config).train()


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def reference():
    """Both ranks in one process, one after the other, their gradients averaged."""
    ours = model()
    optimizer = torch.optim.AdamW(trainable(ours), lr=0.01)
    for step in range(STEPS):
        for rank in range(2):
            with perturbed(ours, PERTURBATION, seed=1, rank=rank, step=step):
                (
                    ours(input_ids=IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss / 2
                ).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in trainable(ours)]


def worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=60), world_size=2, rank=rank
    )
    ours = model()
    parallel = DistributedDataParallel(ours)
    optimizer = torch.optim.AdamW(trainable(ours), lr=0.01)
    with perturbed(ours, PERTURBATION, seed=1):  # the rank is torch.distributed's
        for _ in range(STEPS):
            parallel(input_ids=IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.save([p.detach() for p in trainable(ours)], f"{folder}/{rank}.pt")
    dist.barrier()  # rank 0 holds the store: it leaves no earlier than the other
    os._exit(0)  # taking gloo's process group down has waited for ever


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_processes_train_as_one_that_draws_for_both(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, reference())
