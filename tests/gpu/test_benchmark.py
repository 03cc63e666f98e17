"""The benchmark of `make gpu` runs without a GPU for a tiny shape, and records nothing."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.gpu_judging import equal_scores
from benchmarks.gpu_memory import RECIPE, changes
from benchmarks.gpu_training import linear_flop
from benchmarks.ratios import RESULTS
from tests.tiny import tiny_model
from trans_peft.cli.files import read_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()


def test_the_work_of_a_step_is_what_pytorch_counts_in_matrix_products():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).train()
    model.enable_input_require_grads()  # else the first layer needs no gradient of its inputs
    ids = torch.zeros(2, 9, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids).logits.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    assert linear_flop(model, 18, 18) == counted[torch.ops.aten.mm]
    assert linear_flop(model, 18, 18) - linear_flop(model, 18, 8) == 10 * 4 * 258 * 32


def test_scores_are_compared_by_adapter():
    assert equal_scores({"a": 50.0, "b": 20.0, "c": 0.0}, {"a": 50.0, "b": 22.5}) == (
        "1 of 2 scores equal, largest difference 2.5"
    )


def test_a_real_shape_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--shape", "7b"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--shape 7b needs a GPU with CUDA. Without one: --shape tiny" in capsys.readouterr().err


@pytest.mark.slow  # trains and evaluates: half a minute
def test_the_tiny_shape_runs_all_parts_and_records_nothing(monkeypatch, capsys):
    before = RESULTS.read_text()
    parts = ["train", "judge", "vllm"]
    arguments = ["--shape", "tiny", "--pairs", "1", "--vllm", "no-python", "--only", *parts]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    gpu.main()
    assert RESULTS.read_text() == before
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gpu.")]
    assert [line.partition(":")[0] for line in lines] == [
        "gpu.train_tiny_perturbed_vs_plain",
        "gpu.train_tiny_mfu",
        "gpu.train_tiny_vs_trl",
        "gpu.judge_3_mixed_vs_serial_tiny",
        "gpu.judge_3_vs_vllm_tiny",
    ]
    assert all("not a result" in line for line in lines[:-1])
    assert "3 of 3 scores equal" in lines[3]
    assert "not measured: " in lines[-1]


def test_the_page_has_the_recipe_that_is_estimated_and_every_goal():
    assert f"```yaml\n{RECIPE.read_text()}```" in PAGE
    names = [name for name, _ in changes(read_recipe(RECIPE))]
    assert [name for name in names[1:] if f"| `{name}`" not in PAGE] == []
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `gpu.")]
    assert {row[0].strip("| `"): row[2].strip() for row in rows} == gpu.GOALS
