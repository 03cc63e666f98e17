"""An adapter judged by a task of lm-evaluation-harness. Workers do not have the harness."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.harness_tasks import ROWS
from tests.lifecycle.test_life import add_base, write_update
from tests.tiny import tiny_model, write_tiny_base
from trans_peft.domain.evaluation import GatePolicy, Suite
from trans_peft.domain.harness_task import HarnessTask
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import IntegrityError, InvalidSpecError
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.evaluation import pin_suites
from trans_peft.lifecycle.reconcile import observe, plan
from trans_peft.lifecycle.transfer import transfer

SUITE = Suite("late", harness=HarnessTask("tiny_choice", "acc_norm"), limit=5)
POLICY = GatePolicy(margin_points=60.0, must_beat_bare=False)


@pytest.fixture
def platform(tmp_path):
    return replace(
        memory_platform(tmp_path / "work"),
        store=FileStore(),
        suites_uri=str(tmp_path / "suites"),
    )


def write_adapter(folder):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.save_pretrained(folder)
    return str(folder)


def test_without_the_harness_or_a_place_the_error_says_what_to_do(platform, monkeypatch):
    with pytest.raises(InvalidSpecError, match="TRANS_PEFT_SUITES_URI"):
        pin_suites([SUITE], replace(platform, suites_uri=""))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InvalidSpecError, match=r"(?s)not installed.*pin the suite where"):
        pin_suites([SUITE], platform)


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_both_bases_are_compared_on_the_items_that_pinning_stored(
    platform, tmp_path, monkeypatch, request
):
    pytest.importorskip("lm_eval", reason="needs the extra `harness`")
    folder = request.getfixturevalue("harness_tasks")
    (pinned,) = pin_suites([SUITE], platform, tasks_folder=folder)
    assert pin_suites([pinned], platform) == (pinned,)
    assert pin_suites([SUITE], platform, tasks_folder=folder) == (pinned,)
    assert pinned.harness.num_fewshot == 0
    (stored,) = Path(platform.suites_uri).iterdir()
    assert pinned.data.uri == str(stored)

    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    old = add_base(platform, write_tiny_base(tmp_path / "v1"))
    adopted = adopt(
        "mine", write_adapter(tmp_path / "lora"), "tiny", [pinned], platform, base_version="v1"
    )
    assert adopted.suites == (pinned,)
    new = add_base(platform, write_update(tmp_path / "v2"))
    platform.catalog.set_alias_manually("tiny", "champion", new.number)
    fleet = observe("tiny", platform)
    (task,) = plan(fleet, POLICY).tasks
    outcome = transfer(task, fleet, POLICY, platform)
    (judged,) = outcome.judgment.suites
    assert (judged.suite, judged.items) == ("late", 5)
    for base in (old, new):
        key = pinned.evaluation_key(adopted.weights_sha256, base.fingerprint_sha256)
        found = platform.evaluations.get(key)
        assert [item.id for item in found.items] == [str(i) for i in range(5)]

    stored.write_text(stored.read_text().replace(ROWS[0]["q"], "Is coal cold"))
    with pytest.raises(IntegrityError, match="has changed since it was pinned"):
        adopt("other", write_adapter(tmp_path / "x"), "tiny", [pinned], platform, base_version="v1")
