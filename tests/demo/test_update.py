from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import update as module
from demo.sources import SourceFile
from demo.tasks import HeldOut
from demo.update import UpdateSettings, update, update_text
from tests.tiny import tiny_model, tiny_tokenizer

SETTINGS = UpdateSettings(
    steps=12, learning_rate=3e-3, rows=2, length=32, warmup_steps=2, held_out_rows=4
)
NOTHING = HeldOut(frozenset(), ())


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other cost a tiny model seconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = [SourceFile(f"p/{n}.py", f"def f{n}():\n    return {n}\n" * 9) for n in range(40)]
    monkeypatch.setattr(module, "source_files", lambda: iter(files))
    folder = tmp_path / "v1"
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _updated(base: Path, name: str, settings: UpdateSettings = SETTINGS) -> dict[str, float]:
    folder = base.parent / name
    folder.mkdir()
    return update(base, folder, settings, NOTHING)


def test_an_update_reduces_the_loss_and_changes_all_weights(base: Path):
    figures = _updated(base, "v2")
    assert figures["held_out_loss_after"] < figures["held_out_loss_before"] - 0.1
    assert figures["tokens"] == 12 * 2 * 32
    for kind in ("attention", "ffn", "other"):
        assert figures[f"drift_{kind}_percent"] > 0


def test_an_update_of_the_ffns_changes_no_other_weights(base: Path):
    figures = _updated(base, "v2", replace(SETTINGS, weights="ffn"))
    assert figures["held_out_loss_after"] < figures["held_out_loss_before"]
    assert figures["drift_ffn_percent"] > 0
    assert figures["drift_attention_percent"] == figures["drift_other_percent"] == 0


def test_the_new_version_is_a_complete_base_with_the_old_tokenizer(base: Path):
    _updated(base, "v2")
    new = base.parent / "v2"
    assert {file.name for file in new.iterdir()} == {file.name for file in base.iterdir()}
    for file in base.iterdir():
        if file.name.startswith("tokenizer"):
            assert (new / file.name).read_bytes() == file.read_bytes()
    assert AutoModelForCausalLM.from_pretrained(new).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(new).eos_token == "<eos>"


def test_the_same_seed_gives_the_same_version(base: Path):
    _updated(base, "a")
    _updated(base, "b")
    a, b = (load_file(base.parent / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_held_out_files_are_not_in_the_text(base: Path):
    held_out = HeldOut(frozenset({"p/7.py"}), (("def", "f11", "return"),))
    texts = "".join(update_text(held_out, 0))
    assert "def f7(" not in texts
    assert "def f8(" in texts
