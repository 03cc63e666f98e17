"""Each example as a user runs it: what comes out is a stock adapter, and the draws were counted."""

import importlib.util
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trans_peft.perturbation import perturbed

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_adapter(base, folder):
    bare = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(8)[None]
    before = bare(ids).logits
    adapted = PeftModel.from_pretrained(bare, folder)
    assert not torch.allclose(adapted(ids).logits, before, atol=1e-4)
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, before)


@pytest.mark.parametrize(
    ("name", "steps", "forwards"),
    [("plain_loop", 8, 1), ("hf_trainer", 4, 2), ("trl_sft", 4, 1), ("accelerate_loop", 4, 2)],
)
def test_one_line_perturbs_each_style_of_training(
    name, steps, forwards, tiny_base, tmp_path, monkeypatch
):
    moments = []

    @contextmanager
    def observed(model, *args, **options):
        with perturbed(model, *args, **options) as handle:
            step_counter = handle._step_counter
            stack = step_counter._stack
            watch = stack.register_forward_pre_hook(
                lambda module, _: moments.append(
                    (step_counter.position.step, step_counter.position.micro_step)
                )
            )
            yield handle
            watch.remove()

    example = load(name)
    monkeypatch.setattr(example.tp, "perturbed", observed)
    example.main(str(tiny_base), str(tmp_path))
    assert moments == [(step, micro) for step in range(steps) for micro in range(forwards)]
    check_adapter(tiny_base, tmp_path)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_without_arguments_prints_its_usage(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert f"usage: {name}.py [-h] BASE OUTPUT" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_accelerate_launch_trains_in_two_processes(tiny_base, tmp_path):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2",
        "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
        str(EXAMPLES / "accelerate_loop.py"), str(tiny_base), str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check_adapter(tiny_base, tmp_path)
