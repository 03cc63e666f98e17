"""Masks and drops under FSDP2 (`fully_shard`): two gloo processes against one unsharded process."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.tiny import tiny_model
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.recipe import Perturbation
from trans_peft.methods.specs import attach
from trans_peft.perturbation import perturbed

SPEC = AdapterSpec("LORA", {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]})
PERTURBATION = Perturbation(masking_p=0.3, dropping_p=0.3)
STEPS = 4


def made():
    base = tiny_model()
    torch.manual_seed(1)
    model = attach(base, SPEC).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW, trained


def loss(model, step, rank):
    generator = torch.Generator().manual_seed(2 * step + rank)
    ids = torch.randint(0, 256, (2, 20), generator=generator)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def unsharded():
    """Both ranks' batches in one process: the losses by rank, and the trained weights."""
    model, make, trained = made()
    optimizer, losses = make(trained, lr=1e-2), ([], [])
    for step in range(STEPS):
        for rank in (0, 1):
            with perturbed(model, PERTURBATION, seed=7, rank=rank, step=step):
                found = loss(model, step, rank)
                (found / 2).backward()
                losses[rank].append(found.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, [p.detach() for p in trained]


def sharded(rank, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model, make, _ = made()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = make(trained, lr=1e-2), []
    with perturbed(model, PERTURBATION, seed=7):
        for step in range(STEPS):
            found = loss(model, step, rank)
            found.backward()
            losses.append(found.item())
            optimizer.step()
            optimizer.zero_grad()
    torch.save((losses, [p.full_tensor().detach() for p in trained]), Path(folder) / str(rank))
    dist.destroy_process_group()


@pytest.mark.slow  # two further processes import torch and transformers: 30 CPU seconds
def test_a_sharded_model_has_the_draws_losses_and_weights_of_an_unsharded_one(tmp_path):
    multiprocessing.spawn(sharded, (str(tmp_path),), nprocs=2)
    losses, weights = unsharded()
    for rank in (0, 1):
        found_losses, found_weights = torch.load(tmp_path / str(rank))
        assert found_losses == pytest.approx(losses[rank], rel=1e-6)
        torch.testing.assert_close(found_weights, weights, rtol=1e-4, atol=1e-6)
    assert (weights[1] != 0).all(), "LoRA's B was trained"
