"""What is refused before the first training."""

import shutil

import pytest
import torch
import yaml

from trans_peft.cli import main
from trans_peft.domain.experiment import OLD
from trans_peft.errors import StoreError
from trans_peft.experiment.cells import answer_loss
from trans_peft.experiment.disk import Disk, check_disk
from trans_peft.experiment.prepare import recipe_of


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ("unrelated", "families.tiny: old and v2: the weights are unrelated"),
        ("deeper", "families.tiny: old and v2: the number of layers was 1 and is 2"),
    ],
)
def test_bases_of_another_family_are_refused_in_words(bases, tmp_path, capsys, new, words):
    value = yaml.safe_load((bases / "repeats.yaml").read_text())
    value["families"]["tiny"]["new"]["v2"] = str(bases / new)
    for name in ("v1", "train.jsonl", "sums.jsonl"):
        copy = shutil.copytree if (bases / name).is_dir() else shutil.copy
        copy(bases / name, tmp_path / name)
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(value))
    for options in ([], ["--dry-run"]):
        code = main(
            ["experiment", str(tmp_path / "e.yaml"), "--out", str(tmp_path / "out"),
             "--state", str(tmp_path / "state"), *options]
        )  # fmt: skip
        assert code == 2
        assert words in capsys.readouterr().err


def test_what_does_not_fit_on_the_disk_is_refused(tmp_path):
    check_disk(Disk(bases=60, adapters=40, free=100), tmp_path)
    with pytest.raises(StoreError, match="does not fit on the disk"):
        check_disk(Disk(bases=60, adapters=41, free=100), tmp_path)


def test_nothing_runs_if_the_disk_is_too_small(bases, tmp_path, capsys, trained, monkeypatch):
    from trans_peft.experiment import disk

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    code = main(
        ["experiment", str(bases / "repeats.yaml"), "--out", str(tmp_path / "out"),
         "--state", str(tmp_path / "state")]
    )  # fmt: skip
    assert code == 3 and not trained
    assert "does not fit on the disk" in capsys.readouterr().err


def test_the_held_out_loss_is_that_of_transformers(bases, tmp_path):
    """Compared with the loss that transformers computes for labels without the prompts."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from trans_peft.cli.files import read_experiment
    from trans_peft.data import parse_examples

    example = read_experiment(bases / "repeats.yaml")
    (planned, *_) = example.trainings()
    assert planned.base == OLD
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases / "v1"),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "adapter")
    rows = parse_examples((bases / "sums.jsonl").read_bytes(), "sums.jsonl")
    found = answer_loss(bases / "v1", tmp_path / "adapter", rows, recipe_of(example, planned, "b"))

    base = AutoModelForCausalLM.from_pretrained(bases / "v1")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    from tests.tiny import tiny_tokenizer

    tokenizer, losses = tiny_tokenizer(), []
    for row in rows:
        prompt = tokenizer(row.prompt)["input_ids"]
        answer = [*tokenizer(row.completion)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            losses += [float(model(input_ids=ids, labels=labels).loss)] * len(answer)
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)
