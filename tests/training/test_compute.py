"""Settings of time and memory change no draw and no result, or are refused before a model loads."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.training.conftest import recipe
from tests.training.short_runs import SHORT
from tests.training.test_finetune import trained
from trans_peft.domain.compute import ComputeSettings
from trans_peft.domain.optimizer import OptimizerSettings
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import InvalidSpecError, UnsupportedModelError
from trans_peft.training import finetune as finetune_module
from trans_peft.training import machine_check
from trans_peft.training.compilation import compile_layers
from trans_peft.training.machine_check import check_machine

CHECKPOINTED = ComputeSettings(gradient_checkpointing=True)
COMPILED = ComputeSettings(compile=True)


@pytest.mark.parametrize(
    "granularity",
    [pytest.param("neuron", marks=pytest.mark.slow), "element"],  # a second for each
)
def test_checkpointing_changes_no_draw(short_run, granularity):
    """Dropout draws the same again, because the recomputation restores torch's generator."""
    settings = replace(
        recipe(dropout=0.1, **SHORT), perturbation=Perturbation(0.3, 0.3, granularity)
    )
    expected = short_run(settings)
    torch.testing.assert_close(short_run(replace(settings, compute=CHECKPOINTED)), expected)


@pytest.mark.slow  # the compiler needs a minute of processor time
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("granularity", "checkpointing"), [("neuron", False), ("element", True)], ids=str
)
def test_compiling_changes_no_draw(short_run, granularity, checkpointing):
    """Without dropout, which compiled code draws in another order."""
    settings = replace(recipe(**SHORT), perturbation=Perturbation(0.3, 0.3, granularity))
    compute = ComputeSettings(compile=True, gradient_checkpointing=checkpointing)
    expected = short_run(settings)
    found = short_run(replace(settings, compute=compute))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_only_models_with_decoder_layers_are_compiled():
    with pytest.raises(UnsupportedModelError, match="no decoder layers that can be compiled"):
        compile_layers(nn.Linear(2, 2))


NEEDS = {
    "8 bits": ({"optimizer": OptimizerSettings(name="adamw_8bit")}, "bitsandbytes and a GPU"),
    "paged": ({"optimizer": OptimizerSettings(name="paged_adamw_32bit")}, "bitsandbytes and a GPU"),
    "flash": (
        {"dtype": "bfloat16", "compute": ComputeSettings(attention="flash_attention_2")},
        "flash_attention_2 needs the package flash-attn and a GPU",
    ),
    "flex": ({"compute": ComputeSettings(attention="flex_attention")}, "needs a GPU"),
    "liger": ({"compute": ComputeSettings(liger=True)}, "the package liger-kernel and a GPU"),
    "compile": ({"compute": COMPILED}, r"a C\+\+ compiler"),
}


@pytest.mark.parametrize("case", NEEDS)
def test_what_the_machine_cannot_run_is_refused(monkeypatch, case):
    change, message = NEEDS[case]
    monkeypatch.setattr(machine_check, "find_spec", lambda name: None)
    monkeypatch.setattr(machine_check.shutil, "which", lambda name: None)
    with pytest.raises(InvalidSpecError, match=message):
        check_machine(replace(recipe(), **change))


def test_all_settings_that_cannot_run_are_named_before_a_base_is_loaded(
    make_job, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine_check, "find_spec", lambda name: None)
    compute = ComputeSettings(attention="flex_attention", liger=True)
    job = make_job(tmp_path, replace(recipe(name="adamw_8bit"), compute=compute))
    monkeypatch.setattr(finetune_module, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(
        InvalidSpecError, match=r"(?s)optimizer.name.*compute.attention.*compute.liger"
    ):
        trained(job)


def test_a_machine_that_has_what_they_need_is_accepted(monkeypatch):
    monkeypatch.setattr(machine_check, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(machine_check.torch.cuda, "is_available", lambda: True)
    check_machine(
        replace(
            recipe(name="paged_adamw_8bit"),
            compute=ComputeSettings(attention="flex_attention", liger=True, compile=True),
        )
    )
    check_machine(recipe())


def test_flash_attention_needs_16_bits():
    compute = ComputeSettings(attention="flash_attention_2")
    with pytest.raises(InvalidSpecError, match="needs the dtype bfloat16 or nf4, not float32"):
        replace(recipe(), compute=compute)


def test_ligers_kernels_are_in_the_base_before_the_adapter(short_run, monkeypatch):
    """The kernels need Triton; this function stands for the one that patches the layers."""
    patched = []
    monkeypatch.setattr(
        finetune_module,
        "apply_liger_kernel",
        lambda model, options: patched.append((type(model).__name__, options)),
    )
    short_run(replace(recipe(**SHORT | {"steps": 2}), compute=ComputeSettings(liger=True)))
    assert patched == [("LlamaForCausalLM", {"fused_linear_cross_entropy": False})]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention", "flash"),
        ("compile", 1),
        ("gradient_checkpointing", None),
        ("liger", "yes"),
        ("memory_gib", 0),
        ("sharding", 1),
    ],
)
def test_a_value_of_another_kind_is_refused(field, value):
    with pytest.raises(InvalidSpecError, match=f"{field} must be .*, not {value!r}"):
        ComputeSettings(**{field: value})


def test_every_compute_setting_is_part_of_the_hash():
    changed: dict[str, object] = {
        "gradient_checkpointing": True,
        "attention": "eager",
        "compile": True,
        "liger": True,
        "memory_gib": 8.0,
        "sharding": True,
    }
    assert set(changed) == set(vars(ComputeSettings()))
    hashes = {
        replace(recipe(processes=2), compute=ComputeSettings(**{k: v})).sha256
        for k, v in changed.items()
    }
    assert len(hashes | {recipe(processes=2).sha256}) == 7
