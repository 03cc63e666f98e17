"""The recovery strategy `distilled` in a transfer: it reads prompts, and no training row."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.lifecycle.test_recovery import FAMILY, ITEMS, TransferSetup, fit_here, strategies
from tests.tiny import tiny_tokenizer
from trans_peft.data import ChatMessage, Example
from trans_peft.data.overlap import distinct_from, similarity
from trans_peft.domain.data import DataSource
from trans_peft.domain.recovery import (
    CompensationPolicy,
    DistillationPolicy,
    RecoveryPolicy,
    RecoveryStrategy,
)
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import DataError, EvaluationError, InvalidSpecError, TrainingError
from trans_peft.lifecycle.report import report
from trans_peft.training import distill, prompt_writing
from trans_peft.training.prompt_writing import like_examples
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.decoding.prefixes import CacheSupport

WORDS = ["red", "blue", "green", "white", "black", "brown", "gray", "pink", "gold", "teal"]
PROMPTS = [f"{one} and {other} make" for one in WORDS for other in WORDS if one < other]


class Setup(TransferSetup):
    """A transfer whose recipe names rows that do not exist, and that records what is read."""

    def __init__(self, folder, monkeypatch, **fields):
        absent = DataSource(str(folder / "absent.jsonl"), "0" * 64)
        super().__init__(folder, **{"data": absent} | fields)
        self.read = []
        read = FileStore.read

        def recorded(store, uri, **options):
            self.read.append(uri)
            return read(store, uri, **options)

        monkeypatch.setattr(FileStore, "read", recorded)

    def write(self, rows, name="parity.jsonl"):
        path = self.folder / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    def distilled(self, rows=None, **settings):
        rows = [{"prompt": text} for text in PROMPTS] if rows is None else rows
        uri = self.write(rows).replace("parity", "{adapter}")
        settings = {
            "prompts_uri": uri,
            "steps": 3,
            "batch_size": 8,
            "learning_rate": 1e-5,
        } | settings
        outcome = self.transfer(distillation=DistillationPolicy(**settings))
        assert strategies(outcome)[0] == ("direct", "needs-retuning")
        return outcome, outcome.tried[1]


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A transfer that trains in this process, which saves seconds per test."""
    monkeypatch.setattr(distill, "fit", fit_here)
    return Setup(tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_distilled_weights_are_judged_and_registered(tmp_path, monkeypatch):
    setup = Setup(tmp_path, monkeypatch)  # with a training process
    outcome, tried = setup.distilled()
    assert (tried.strategy, tried.verdict) == ("distilled", "needs-retuning")
    assert "45 prompts of " in tried.note
    assert "3 steps" in tried.note
    assert "held-out prompts" in tried.note
    (result,) = setup.platform.work_dir.glob("training/distill-*/result.json")
    weights = json.loads(result.read_text())["weights_sha256"]
    assert weights != setup.source.weights_sha256
    setup.forget(weights, setup.bases[1])
    setup.answered(weights, setup.bases[1], right=ITEMS)
    outcome, tried = setup.distilled()
    assert (outcome.verdict, outcome.strategy) == ("passed", "distilled")
    assert "level 2.5 %" in outcome.judgment.reason  # one of two strategies
    version = setup.version(outcome)
    assert version.made_by is RecoveryStrategy.DISTILLED
    assert version.trained_on.version == "v1"
    read = {uri.rpartition("/")[2] for uri in setup.read}
    assert "parity.jsonl" in read
    assert "absent.jsonl" not in read
    assert not [*setup.platform.work_dir.rglob("targets.safetensors")]
    assert not [*setup.platform.work_dir.rglob("prompts.jsonl")]


def test_answers_and_training_steps_are_reported_as_progress(setup):
    _, tried = setup.distilled()
    assert tried.verdict == "needs-retuning"
    of_distillation = [str(step) for step in setup.progress if "items" not in step.unit]
    assert of_distillation[-4:] == [
        "parity: answers for distillation on v1: 45 of 45 prompts",
        "parity: distillation on v2: 1 of 3 steps",
        "parity: distillation on v2: 2 of 3 steps, 0 s left",
        "parity: distillation on v2: 3 of 3 steps",
    ]


def test_the_new_bases_own_probabilities_can_be_kept(setup):
    _, tried = setup.distilled(beta=1.0)
    assert tried.verdict == "needs-retuning"
    assert "held-out prompts" in tried.note


def test_answers_in_the_file_are_not_used(setup):
    _, plain = setup.distilled()
    rows = [{"prompt": text, "completion": f" wrong {i}"} for i, text in enumerate(PROMPTS)]
    _, labeled = setup.distilled(rows)
    assert "whose 45 answers were not used" in labeled.note
    assert plain.note.rpartition("; ")[2] == labeled.note.rpartition("; ")[2]  # the divergence


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": text} for text in PROMPTS[:10]], "at least 32"),
        ([{"prompt": "one and the same"}] * 50, "at least 32"),
        ([{"prompt": f"{i}  IS"} for i in range(ITEMS)], "at least 32"),  # the suite's items
        ([{"prompt": ""}] * 50, "50 rows are not valid prompts"),
        ([{"text": text} for text in PROMPTS], "45 rows are not valid prompts"),
        ([{"prompt": text * 200} for text in PROMPTS], "at most 512 tokens"),
    ],
    ids=["few", "one repeated", "of the suite", "empty", "no prompt", "long"],
)
def test_unusable_prompts_leave_the_direct_verdict(setup, rows, reason):
    outcome, tried = setup.distilled(rows)
    assert (tried.verdict, outcome.strategy) == ("", "direct")
    assert reason in tried.reason
    assert not [*setup.platform.work_dir.glob("training/distill-*")]


def test_a_missing_file_leaves_the_direct_verdict(setup):
    _, tried = setup.distilled(prompts_uri=str(setup.folder / "elsewhere.jsonl"))
    assert "elsewhere.jsonl" in tried.reason


def test_an_adapter_without_prompts_keeps_the_whole_level_and_is_reported(setup):
    outcome, tried = setup.distilled(prompts_uri="")
    assert (tried.strategy, tried.verdict) == ("distilled", "")
    assert "(synthetic_prompts) gives prompts" in str(tried)
    assert str(tried) in report(FAMILY, setup.platform).markdown()
    assert "level 5 %" in outcome.judgment.reason
    with_prompts, _ = setup.distilled()
    assert "level 2.5 %" in with_prompts.judgment.reason


def test_an_old_base_that_is_gone_leaves_the_direct_verdict(setup):
    import shutil

    setup.distilled(steps=1)  # the direct results are stored
    shutil.rmtree(setup.folder / "bases" / "v1")
    for copy in (setup.platform.work_dir / "bases").iterdir():
        shutil.rmtree(copy, ignore_errors=True)
    _, tried = setup.distilled(steps=1)
    assert tried.verdict == ""
    assert "v1" in tried.reason


def test_a_prompt_that_does_not_fit_with_its_answer_is_left_out(setup, monkeypatch):
    context = len(max(PROMPTS, key=len)) - 1 + setup.suite.max_new_tokens
    lengths = []

    def generated(model, tokenizer, ids, **options):
        lengths.extend(map(len, ids))
        return generate(model, tokenizer, ids, **options)

    monkeypatch.setattr(distill, "context_of", lambda model: context)
    monkeypatch.setattr(distill, "generate", generated)
    _, tried = setup.distilled()
    assert tried.verdict
    assert 32 <= len(lengths) < len(PROMPTS)
    assert max(lengths) + setup.suite.max_new_tokens <= context


def test_a_divergence_that_does_not_fall_is_not_judged(setup):
    outcome, tried = setup.distilled(learning_rate=1e-30)
    assert tried.verdict == ""
    assert "does not fall" in tried.reason
    assert len(setup.platform.registry.versions("parity")) == 2
    assert outcome.strategy is RecoveryStrategy.DIRECT


@pytest.mark.parametrize("error", [TrainingError, EvaluationError, torch.OutOfMemoryError])
def test_a_training_that_fails_leaves_the_direct_verdict(setup, monkeypatch, error):
    def fail(job, on_event):
        raise error(f"the loss is nan in {job.start}")

    monkeypatch.setattr(distill, "fit", fail)
    _, tried = setup.distilled()
    assert tried.verdict == ""
    assert "the loss is nan" in tried.reason


def test_a_teacher_at_chance_is_not_imitated(tmp_path, monkeypatch):
    setup = Setup(tmp_path, monkeypatch, chance=99.0)
    setup.forget(setup.source.weights_sha256, setup.bases[0])
    setup.answered(setup.source.weights_sha256, setup.bases[0], right=90)
    _, tried = setup.distilled()
    assert "no better than by chance (parity: 93.8 of 99)" in tried.reason


def test_an_adapter_without_a_recipe_is_not_distilled(tmp_path):
    setup = TransferSetup(tmp_path, recipe=False)
    outcome = setup.transfer(distillation=DistillationPolicy())
    assert "no recipe" in outcome.tried[1].reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prompts": 3}, "prompts must be at least 32"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"beta": -1.0}, "beta"),
        ({"prompts_uri": "s3://traffic/{name}.jsonl"}, "may contain {adapter} only"),
    ],
)
def test_invalid_settings_are_refused(settings, reason):
    with pytest.raises(InvalidSpecError, match=reason):
        DistillationPolicy(**settings)


def test_the_strategies_are_tried_in_order():
    policy = RecoveryPolicy(
        scales=(0.5,),
        compensation=CompensationPolicy(),
        distillation=DistillationPolicy(),
        retune_steps=2,
        retrain=True,
    )
    assert policy.strategies == tuple(RecoveryStrategy)


# Prompts that the base writes.


@pytest.fixture(autouse=True)
def no_probe(monkeypatch):
    """The bases below are no models that could be probed."""
    monkeypatch.setattr(prompt_writing, "cache_support", lambda model: CacheSupport())


class Base:
    """A base that continues with the given texts."""

    config = SimpleNamespace(max_position_embeddings=1024)

    def __init__(self, *texts):
        self.tokenizer = tiny_tokenizer()
        self.model = self
        self.texts = texts
        self.prompts = []

    def parameters(self):
        return iter([torch.zeros(1)])

    def generate(self, *, input_ids, attention_mask, generation_config):
        assert generation_config.do_sample
        assert not torch.is_grad_enabled()
        self.prompts += [
            self.tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        made = [
            self.tokenizer(self.texts[i % len(self.texts)])["input_ids"]
            for i in range(len(input_ids))
        ]
        width = max(map(len, made))
        padded = [ids + [self.tokenizer.pad_token_id] * (width - len(ids)) for ids in made]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def test_the_base_continues_a_list_of_examples():
    examples = [Example(str(i), text, "(no answer)") for i, text in enumerate(PROMPTS[:3])]
    base = Base(
        "tea and milk make\n\n###\n\nmore",
        "a text without an end",
        PROMPTS[0] + "\n\n###\n\n",
        "suite item\n\n###",
        "\n\n###\n\n",
        "sun and sand make\n\n###\n\n",
    )
    found = like_examples(base, examples, ["Suite  item"], count=10)
    assert [example.prompt for example in found] == ["tea and milk make", "sun and sand make"]
    shown = base.prompts[0].split("\n\n###\n\n")
    assert sorted(shown) == sorted([*PROMPTS[:3], ""])
    assert len(set(base.prompts)) > 3  # the order differs
    again = Base(*base.texts)
    like_examples(again, examples, ["Suite  item"], count=10)
    assert again.prompts == base.prompts


def test_the_separator_occurs_in_no_example():
    texts = [f"### Instruction:\n{text}\n\n### Response:\n" for text in PROMPTS[:3]]
    examples = [Example(text, text, "(no answer)") for text in texts]
    made = "### Instruction:\nsun and sand\n\n### Response:"
    base = Base(made + "\n\n-----\n\n", "unfinished\n\n###\n\nmore")
    assert [e.prompt for e in like_examples(base, examples, [], count=5)] == [made]
    assert "\n\n-----\n\n" in base.prompts[0]


def test_examples_that_cannot_be_continued_are_refused():
    every = Example("1", "### ----- ===== @@@@@ ~~~~~", "(no answer)")
    with pytest.raises(DataError, match="every separator"):
        like_examples(Base("a"), [every], [], count=5)
    with pytest.raises(DataError, match="too long"):
        like_examples(Base("a"), [Example("1", "long " * 300, "(no answer)")], [], count=5)


@pytest.mark.parametrize(
    ("batch_size", "processes", "expected"),
    [(16, 1, (4, 4)), (2, 1, (2, 1)), (16, 2, (4, 2)), (3, 4, (1, 1))],
)
def test_a_step_has_the_policys_prompts_in_batches_that_fit(setup, batch_size, processes, expected):
    job = SimpleNamespace(recipe=replace(setup.source.recipe, processes=processes))  # batches of 4
    policy = DistillationPolicy(batch_size=batch_size)
    optimizer = distill.Distillation(None, None, job, None, policy)._recipe().optimizer
    assert (optimizer.batch_size, optimizer.gradient_accumulation) == expected


def test_a_chat_example_gives_its_last_message_and_keeps_the_system_message():
    turns = [("system", "Be brief."), ("user", "red?"), ("assistant", "(no answer)")]
    example = Example("1", "", "(no answer)", tuple(ChatMessage(*turn) for turn in turns))
    (found,) = like_examples(Base("blue?\n\n###\n\n"), [example], [], count=1)
    assert found.messages == (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "blue?"),
        ChatMessage("assistant", "(no answer)"),
    )


# Duplicates.


def test_similarity_is_the_share_of_common_5_grams():
    assert similarity("abcdefg", "abcdefh") == pytest.approx(2 / 4)
    assert similarity("Same  Text", "same text\n") == 1
    assert similarity("ab", "ac") == 0


def test_what_all_prompts_share_is_not_compared():
    template = "You are a helpful assistant of a bank. " * 40 + "Question: {}\nAnswer:"
    prompts = [template.format(text) for text in PROMPTS]
    items = [template.format(PROMPTS[0].upper()), "another text"]
    assert distinct_from(prompts, items, text=str, limit=9) == prompts[1:10]
    assert distinct_from(prompts[:1] * 3, [], text=str) == prompts[:1]


def test_items_of_another_template_are_found():
    """A suite of `instruction` rows, and a file with the same questions as `prompt`."""
    questions = [f"is the number {n * 7919} odd or even" for n in range(40)]
    framed = [
        f"Below is an instruction.\n\n### Instruction:\n{q}\n\n### Response:" for q in questions
    ]
    assert distinct_from(questions, framed, text=str) == []
    assert distinct_from(framed, questions, text=str) == []


def test_the_system_message_is_no_part_of_a_prompts_text():
    turns = [("system", "Be brief."), ("user", "red?"), ("assistant", "(no answer)")]
    example = Example("1", "", "(no answer)", tuple(ChatMessage(*turn) for turn in turns))
    assert example.prompt_text() == "red?"


def test_distinct_prompts_equal_those_of_all_pairs():
    import random

    draws = random.Random(4)
    texts = ["".join(draws.choices("ab", k=draws.randint(1, 14))) * 3 for _ in range(300)]
    items, candidates = texts[:60], texts[60:]
    expected = []
    for candidate in candidates:
        if all(similarity(candidate, other) < 0.8 for other in [*items, *expected]):
            expected.append(candidate)
    assert distinct_from(candidates, items, text=str) == expected
    assert 0 < len(expected) < len(candidates)
