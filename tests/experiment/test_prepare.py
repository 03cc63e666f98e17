"""What is refused before the first training."""

import shutil

import pytest
import torch
import yaml
from filelock import FileLock
from transformers import LlamaForCausalLM

from tests.tiny import tiny_tokenizer, write_tiny_base
from trans_peft.cli import main
from trans_peft.cli.experiment import _finder
from trans_peft.cli.show import progress
from trans_peft.cli.workspace import Workspace
from trans_peft.domain.experiment import OLD
from trans_peft.errors import StoreError, TrainingError
from trans_peft.experiment import cells
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


@pytest.fixture
def command(bases, tmp_path, capsys):
    """Run the experiment of `repeats.yaml` with changed fields; return exit code and errors."""

    def run(*options: str, **changes: object) -> tuple[int, str]:
        value = yaml.safe_load((bases / "repeats.yaml").read_text()) | changes
        (bases / "changed.yaml").write_text(yaml.safe_dump(value))
        arguments = ["--out", tmp_path / "out", "--state", tmp_path / "state", *options]
        code = main(["experiment", str(bases / "changed.yaml"), *map(str, arguments)])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("spared", [[0], [7]])
def test_layers_that_cannot_be_spared_are_refused_before_a_training(command, trained, spared):
    arms = {"a": {"masking_p": 0.1, "spared_layers": spared}}
    for options in ((), ("--dry-run",)):
        code, text = command(*options, arms=arms, sweeps=[])
        assert code == 2 and not trained
        assert f"spared_layers {spared}: tiny/old has the layers 0 to 0" in text


def test_a_dry_run_reports_invalid_rows_and_prints_the_plan(bases, command, capsys):
    (bases / "empty.jsonl").touch()
    code, text = command("--dry-run", training={"data": {"uri": "empty.jsonl"}}, longer=[])
    assert (code, text.splitlines()[-1]) == (2, f"DataError: {bases}/empty.jsonl has no rows")


def test_an_error_of_a_bare_base_names_the_base(bases, command, trained):
    model = LlamaForCausalLM.from_pretrained(bases / "v2")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(bases / "nan")
    tiny_tokenizer().save_pretrained(bases / "nan")
    code, text = command(families={"tiny": {"old": "v1", "new": {"v2": "nan"}}})
    assert code == 3 and not trained
    assert "EvaluationError: tiny/v2, without an adapter: the model's logits are not" in text


def test_an_error_of_a_training_names_the_training(command, trained, monkeypatch):
    def failing(job, *, on_event):
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(cells, "fit", failing)
    code, text = command()
    assert code == 3
    assert "TrainingError: tiny/old, LoRA, plain, seed 42: the loss is not finite" in text


def test_a_second_command_for_a_folder_of_results_is_refused(command, tmp_path, trained):
    with FileLock(tmp_path / "out" / ".lock"):
        code, text = command()
        assert code == 3 and f"another command writes to {tmp_path}/out" in text
        assert command("--dry-run")[0] == 0
    assert not trained


def test_a_converted_base_is_that_of_its_place_and_content(tmp_path, monkeypatch):
    monkeypatch.setattr("trans_peft.bases.converters.needs_conversion", lambda *_: True)
    converted = []

    def convert(uri, store, folder):
        converted.append(uri)
        shutil.copytree(uri, folder)

    monkeypatch.setattr("trans_peft.bases.converters.convert", convert)
    places = [tmp_path / "a" / "b-c", tmp_path / "a-b" / "c"]
    for seed, place in enumerate(places):
        write_tiny_base(place, seed=seed)
    with progress() as shown:
        find = _finder(Workspace.at(tmp_path / "state", shown), download=True)
        first, second = (find(str(place)).fingerprint_sha256 for place in places)
        assert first != second
        write_tiny_base(places[0], seed=2)
        assert find(str(places[0])).fingerprint_sha256 not in (first, second)
        assert find(str(places[1])).fingerprint_sha256 == second
    assert converted == [*map(str, places), str(places[0])]
