"""A judge model in the order of work: pinned, checked first, loaded after the answers."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_model, write_tiny_base
from trans_peft.bases.publish import publish
from trans_peft.domain.base import Upload
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.judge_model import JudgeModel
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import DataError, EvaluationError, IntegrityError, InvalidSpecError
from trans_peft.lifecycle import judge_model
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.bases import ingest
from trans_peft.lifecycle.evaluation import evaluate_on, pin_suites
from trans_peft.lifecycle.mixed_evaluation import evaluate_together
from trans_peft.models import load_base


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return DataSource(str(path))


def labeled(right=30, wrong=30):
    labels = ["y"] * right + ["n"] * wrong
    return [{"prompt": f"{i}+0=", "completion": str(i), "label": x} for i, x in enumerate(labels)]


@pytest.fixture
def place(tmp_path):
    platform = replace(memory_platform(tmp_path / "work"), store=FileStore())
    uri = str(tmp_path / "bases")
    publish(write_tiny_base(tmp_path / "v1"), uri, family="tiny", version="v1", store=FileStore())
    ingest(Upload(uri), platform)
    write_tiny_base(tmp_path / "judge", seed=7)
    judge = JudgeModel(
        str(tmp_path / "judge"),
        "{prompt}{answer}?",
        ("y", "n"),
        (1, 0),
        write(tmp_path / "labeled.jsonl", labeled()),
    )
    rows = [{"id": f"{i}", "prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(6)]
    suite = Suite(
        "sums", write(tmp_path / "rows.jsonl", rows), scoring="judge", max_new_tokens=2, judge=judge
    )
    return platform, suite, platform.catalog.versions("tiny")[0]


@pytest.fixture
def by_length(monkeypatch):
    """Marks by the item instead of the model: labeled answers 0 to 29 are right."""
    asked = []

    def mark_answers(engine, tokenizer, judge, answers, *, context, on_progress=None):
        asked.append([(item.prompt, answer) for item, answer in answers])
        return [0.9 if int(item.prompt[:-3]) < 30 else 0.2 for item, _ in answers]

    monkeypatch.setattr("trans_peft.validation.judge_model.mark_answers", mark_answers)
    return asked


def test_a_suite_is_marked_after_its_answers_with_one_model_in_memory(
    place, by_length, monkeypatch
):
    platform, suite, base = place
    loaded = []

    def load(folder, dtype):
        found = load_base(folder, dtype)
        loaded.append((len(by_length), sum(map(torch.numel, found.model.parameters()))))
        return found

    monkeypatch.setattr("trans_peft.models.load_base", load)
    (pinned,) = pin_suites([suite], platform)
    assert pinned.judge.fingerprint_sha256 and pinned.judge.labeled.sha256
    assert pin_suites([pinned], platform) == (pinned,)
    found = evaluate_on(base, [pinned], platform)["sums"]
    # The judge marks the labeled answers, then the base answers, then the judge marks its answers.
    assert [number for number, _ in loaded] == [0, 1, 1]
    assert by_length[0] == [(f"{i}+0=", str(i)) for i in range(60)]
    assert [prompt for prompt, _ in by_length[1]] == [f"{i}+1=" for i in range(6)]
    assert [item.correct for item in found.items] == [0.9] * 6
    assert [item.answer for item in found.items] == [None] * 6
    assert found.labeled == ((True, 0.9),) * 30 + ((False, 0.2),) * 30
    assert evaluate_on(base, [pinned], platform)["sums"] == found
    assert len(loaded) == 3, "stored"
    kept = replace(pinned, name="kept", keep_answers=True)
    again = evaluate_on(base, [kept], platform)["kept"]
    assert [item.answer for item in again.items] == [answer for _, answer in by_length[2]]
    assert len(loaded) == 5, "the marks of the labeled answers are stored"


def test_a_judge_that_cannot_tell_right_from_wrong_is_an_error_before_any_answer(place):
    """A model with random weights, whose choices have enough probability."""
    platform, suite, base = place
    uninformed = replace(suite.judge, choices=tuple("yn0123456789"), marks=(1, *(0,) * 11))
    (pinned,) = pin_suites([replace(suite, judge=uninformed)], platform)
    with pytest.raises(
        InvalidSpecError, match=r"(?s)'sums' does not tell right.*for 30 right answers, and of"
    ):
        evaluate_on(base, [pinned], platform)
    assert platform.evaluations.get(pinned.evaluation_key("bare", base.fingerprint_sha256)) is None


def test_it_is_an_error_before_an_adapter_is_adopted(place, tmp_path):
    platform, suite, _ = place
    uninformed = replace(suite.judge, choices=tuple("yn0123456789"), marks=(1, *(0,) * 11))
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "lora")
    suites = [replace(suite, judge=uninformed)]
    with pytest.raises(InvalidSpecError, match="does not tell right answers from wrong ones"):
        adopt("mine", str(tmp_path / "lora"), "tiny", suites, platform, base_version="v1")
    assert platform.registry.adapters("tiny") == ()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*labeled(), {"prompt": "p", "completion": "c", "label": "maybe"}], "label 'maybe'"),
        ([*labeled(), {"prompt": "p", "completion": "c"}], "the column 'label' is empty"),
        (
            [{**row, "label": str(i)} for i, row in enumerate(labeled())],
            "the column 'label' has too many different values",
        ),
        (labeled(wrong=3), "30 right and 3 wrong answers"),
    ],
)
def test_invalid_labels_are_an_error_before_the_judge_is_loaded(
    rows, message, place, tmp_path, monkeypatch
):
    platform, suite, base = place
    judge = replace(suite.judge, labeled=write(tmp_path / "bad.jsonl", rows))
    (pinned,) = pin_suites([replace(suite, judge=judge)], platform)
    monkeypatch.setattr("trans_peft.models.load_base", None)
    with pytest.raises(DataError, match=message):
        evaluate_on(base, [pinned], platform)


def test_a_judge_whose_files_changed_is_refused(place, tmp_path, monkeypatch):
    platform, suite, base = place
    (pinned,) = pin_suites([suite], platform)
    write_tiny_base(tmp_path / "judge", seed=8)
    judge_model._fingerprints.clear()
    with pytest.raises(IntegrityError, match=r"judge model at .* has changed"):
        evaluate_on(base, [pinned], platform)


def test_a_suite_with_a_judge_shares_no_batch(place, monkeypatch):
    platform, suite, base = place
    (pinned,) = pin_suites([suite], platform)
    from trans_peft.lifecycle.evaluation import BARE_BASE

    other = replace(BARE_BASE, name="other", weights_sha256="ab" * 32)
    monkeypatch.setattr("trans_peft.models.load_base", None)
    assert evaluate_together(base, [(BARE_BASE, [pinned]), (other, [pinned])], platform) == {}


@pytest.mark.parametrize(
    ("length", "value", "kind", "message"),
    [
        (1, float("nan"), EvaluationError, "the model's logits are not finite"),
        (600, 0.0, DataError, "but the context is 512"),
    ],
)
def test_errors_while_marking_name_the_judge_and_the_answers(
    place, tmp_path, length, value, kind, message
):
    platform, suite, base = place
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = value
    model.save_pretrained(tmp_path / "judge")
    rows = [{**row, "prompt": row["prompt"] * length} for row in labeled()]
    judge = replace(suite.judge, labeled=write(tmp_path / "others.jsonl", rows))
    (pinned,) = pin_suites([replace(suite, judge=judge)], platform)
    place_of = f"the judge model {tmp_path}/judge, labeled answers of sums: "
    with pytest.raises(kind, match=f"(?s){place_of}.*{message}"):
        evaluate_on(base, [pinned], platform)
