"""Prompts that are written during a training and kept with the adapter."""

import itertools
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.lifecycle.test_distillation import PROMPTS, WORDS
from tests.lifecycle.test_recovery import FAMILY, ITEMS, POLICY, TransferSetup, fit_here
from tests.tiny import tiny_model, tiny_tokenizer
from trans_peft.data import ChatMessage, Example, write_examples
from trans_peft.data.rare_text import RareText
from trans_peft.domain.compute import ComputeSettings
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.privacy import PrivacySettings
from trans_peft.domain.recipe import OptimizerSettings, SyntheticPrompts, TrainingRecipe
from trans_peft.domain.recovery import DistillationPolicy, RecoveryPolicy
from trans_peft.domain.spec import AdapterSpec
from trans_peft.errors import DataError, InvalidSpecError, NotFoundError, TrainingError
from trans_peft.lifecycle import synthetic_prompts
from trans_peft.lifecycle import train as training
from trans_peft.lifecycle.recovery import retraining
from trans_peft.lifecycle.synthetic_prompts import keep_prompts, kept_prompts
from trans_peft.models import load_base
from trans_peft.training import distill
from trans_peft.training.dp_sgd import DpSgd
from trans_peft.training.events import MemoryEstimated, TrainingMetrics, TrainingStarted
from trans_peft.training.job import TrainingJob
from trans_peft.training.prompt_writing import (
    PromptLimits,
    PromptTraits,
    _samples,
    prompt_model_rows,
    sampled,
)
from trans_peft.transfer.load_adapter import attached

SECRET = "the card of the customer Jane is 4929 1234"


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """Trainings run in this process, which saves seconds per test."""
    for module in (synthetic_prompts, training, distill):
        monkeypatch.setattr(module, "fit", fit_here)
    return TransferSetup(tmp_path)


def trained(setup, prompts, adapter="kept", on_event=lambda event: None, **fields):
    rows = [{"prompt": text, "completion": " odd"} for text in PROMPTS]
    path = setup.folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe = TrainingRecipe(
        adapter=adapter,
        family=FAMILY,
        base_version="v1",
        data=DataSource(str(path)),
        suites=(setup.suite,),
        spec=AdapterSpec("LORA", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
        optimizer=OptimizerSettings(learning_rate=1e-2, steps=3, batch_size=4),
        synthetic_prompts=prompts,
        **fields,
    )
    return training.train(recipe, setup.platform, on_event=on_event)


def writes(monkeypatch, *texts):
    """Let the base write these texts."""
    from trans_peft.training import prompt_writing

    def written(model, tokenizer, rows, new_tokens, end, seed):
        return list(texts)

    monkeypatch.setattr(prompt_writing, "_written", written)


NEW = [f"{one} or {other}, as it is" for one in WORDS for other in WORDS if one < other]


def test_prompts_are_kept_with_the_adapter_and_used_after_an_update(setup, monkeypatch):
    writes(monkeypatch, *NEW)
    version = trained(setup, SyntheticPrompts(steps=2, count=40))
    folder = setup.platform.registry.download(version, setup.folder / "downloaded")
    kept = [example.prompt for example in kept_prompts(folder).prompts]
    assert kept == NEW[:40]
    assert not [*setup.platform.work_dir.rglob("prompt-model")]  # it is deleted

    from trans_peft.lifecycle.recovery.prompts import prompts_for
    from trans_peft.lifecycle.recovery.readiness import why_no_prompts

    assert why_no_prompts(version, DistillationPolicy()) == ""
    found = prompts_for(version, folder, DistillationPolicy(), setup.platform)
    assert {example.prompt for example in found.examples} == set(kept)
    assert found.note == "40 prompts that were kept with the adapter"


def test_the_strategy_distilled_uses_kept_prompts_and_retraining_keeps_them(setup, monkeypatch):
    writes(monkeypatch, *NEW)
    rows = setup.folder / "rows.jsonl"
    recipe = replace(
        setup.source.recipe,
        data=DataSource(str(rows)),
        synthetic_prompts=SyntheticPrompts(steps=2),
        base_version="v1",
    )
    version = training.train(recipe, setup.platform, on_event=lambda event: None)
    setup.source = version
    setup.forget(version.weights_sha256, setup.bases[0])
    setup.answered(version.weights_sha256, setup.bases[0], right=ITEMS)
    settings = DistillationPolicy(steps=3, batch_size=8, learning_rate=1e-5)
    outcome = setup.transfer(distillation=settings, retrain=True)
    assert "45 prompts that were kept with the adapter" in outcome.tried[1].note

    policy = replace(POLICY, recovery=RecoveryPolicy(distillation=settings, retrain=True))
    monkeypatch.setattr(retraining, "fit", fit_here)
    retraining.retrain(outcome.training, policy, setup.platform, on_event=lambda event: None)
    adapters = [*setup.platform.work_dir.glob("training/*/adapter/synthetic_prompts.jsonl")]
    assert len(adapters) == 2  # of v1 and of v2


def test_approved_prompts_are_pinned_and_not_needed_later(setup, monkeypatch):
    approved = setup.folder / "approved.jsonl"
    approved.write_text("\n".join(json.dumps({"prompt": text}) for text in PROMPTS[:3]))
    writes(monkeypatch, *NEW)
    version = trained(setup, SyntheticPrompts(DataSource(str(approved))))
    approved.unlink()
    assert version.recipe.synthetic_prompts.approved.sha256
    folder = setup.platform.registry.download(version, setup.folder / "downloaded")
    assert len(kept_prompts(folder).prompts) == 45
    assert training.resolve_recipe(version.recipe, setup.platform)[0] == version.recipe


def test_a_prompt_model_is_sampled_while_new_prompts_come(setup, monkeypatch):
    """One of 20 rounds gives a prompt: a model with differential privacy learns little."""
    from trans_peft.training import prompt_writing

    rounds = []

    def written(model, tokenizer, rows, new_tokens, end, seed):
        rounds.append(seed)
        return [NEW[len(rounds) // 20]] if len(rounds) % 20 == 0 and len(rounds) <= 100 else []

    monkeypatch.setattr(prompt_writing, "_written", written)
    with pytest.raises(DataError, match="5 synthetic prompts could be written"):
        trained(setup, SyntheticPrompts(steps=2))
    assert len(rounds) == len(set(rounds)) == 100 + 24


def test_too_few_prompts_end_the_training_before_the_adapter(setup, monkeypatch):
    writes(monkeypatch, *NEW[:31])
    with pytest.raises(DataError, match="31 synthetic prompts could be written for kept"):
        trained(setup, SyntheticPrompts(steps=2))
    assert not [*setup.platform.work_dir.glob("training/*/adapter")]
    assert not [*setup.platform.work_dir.rglob("synthetic_prompts.jsonl")]


def chat(number, system, text):
    turns = [("system", system), ("user", text), ("assistant", "an answer")]
    turns = tuple(ChatMessage(*turn) for turn in turns if turn[1])
    return Example(str(number), "", "an answer", turns, ("an answer", "b"), "a reference")


@pytest.mark.parametrize(
    ("systems", "kept"),
    [
        (["Be brief."] * 3 + ["I am Jane Roe, born in 1970."], "Be brief."),
        ([f"I am customer {n}." for n in range(4)], None),
        (["I am a customer of Jane Roe."] * 3 + [""] * 4, None),
        ([""] * 4, None),
    ],
)
def test_a_chat_prompt_has_a_common_system_message_and_nothing_else_of_a_row(
    tmp_path, monkeypatch, systems, kept
):
    from trans_peft.training import prompt_writing

    monkeypatch.setattr(prompt_writing, "attached", lambda model, folder: nullcontext(model))
    writes(monkeypatch, "what is it?")
    base = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace()), tokenizer=tiny_tokenizer()
    )
    examples = [chat(n, system, f"question {n}") for n, system in enumerate(systems)]
    (found,) = sampled(base, tmp_path, PromptTraits.of(examples), [], PromptLimits(1, 64))
    expected = [ChatMessage("system", kept)] if kept else []
    answer = ChatMessage("assistant", "(no answer)")
    assert found.messages == (*expected, ChatMessage("user", "what is it?"), answer)
    assert (found.choices, found.reference) == ((), "")


def test_a_second_call_keeps_the_first_prompts(setup, monkeypatch):
    job = TrainingJob(
        recipe=replace(
            setup.source.recipe, synthetic_prompts=SyntheticPrompts(steps=2), base_version="v1"
        ),
        base_folder=setup.folder / "v1",
        base_name="v1",
        base_revision="",
        data_file=setup.folder / "rows.jsonl",
        work_dir=setup.folder / "job",
    )
    examples = [Example(text, text, " odd") for text in PROMPTS]

    def write(store=setup.platform.store):
        return synthetic_prompts.write_synthetic_prompts(
            job, examples, store, on_event=lambda event: None
        )

    writes(monkeypatch, *NEW[:40])
    assert write() == 40
    writes(monkeypatch, *NEW)
    assert write() == 40
    kept = kept_prompts(job.work_dir).prompts
    assert [example.prompt for example in kept] == NEW[:40]
    other = setup.folder / "other"
    other.mkdir()
    keep_prompts(other, job.work_dir)  # nothing to copy
    keep_prompts(job.work_dir, other)
    assert kept_prompts(other).prompts == kept


def test_a_prompt_model_that_cannot_be_trained_ends_the_training_before_the_adapter(
    setup, monkeypatch
):
    def fail(job, on_event):
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(synthetic_prompts, "fit", fail)
    with pytest.raises(TrainingError, match="nan"):
        trained(setup, SyntheticPrompts(steps=2))
    assert "kept" not in setup.platform.registry.adapters(FAMILY)
    assert not [*setup.platform.work_dir.glob("training/*/adapter")]


def test_an_adapter_without_its_file_is_not_distilled(setup):
    """The recipe says that there are prompts, but the registry has none."""
    from trans_peft.lifecycle.recovery.prompts import prompts_for
    from trans_peft.lifecycle.recovery.readiness import why_no_prompts

    recipe = replace(setup.source.recipe, synthetic_prompts=SyntheticPrompts(steps=1))
    source, policy = replace(setup.source, recipe=recipe), DistillationPolicy()
    assert why_no_prompts(source, policy) == ""
    assert "neither the policy" in why_no_prompts(setup.source, policy)
    with pytest.raises(NotFoundError, match=r"synthetic_prompts.jsonl"):
        prompts_for(source, setup.peft, policy, setup.platform)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"approved": DataSource("a.jsonl"), "steps": 3},
        {"steps": -1},
        {"steps": 3, "count": 31},
        {"steps": 2.5},
        {"approved": DataSource("a.jsonl"), "privacy": PrivacySettings(8.0)},
    ],
)
def test_invalid_settings_are_refused(fields):
    with pytest.raises(InvalidSpecError, match="synthetic_prompts is invalid"):
        SyntheticPrompts(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"epsilon": 0},
        {"epsilon": -1.0},
        {"epsilon": 101},
        {"epsilon": float("nan")},
        {"epsilon": "8"},
        {"delta": 0},
        {"delta": 1},
        {"delta": 1e-11},
        {"clip": 0},
        {"clip": float("inf")},
        {"batch_size": 0},
        {"batch_size": 2.5},
    ],
)
def test_invalid_privacy_is_refused(fields):
    with pytest.raises(InvalidSpecError, match=f"privacy is invalid: {next(iter(fields))} must"):
        PrivacySettings(**{"epsilon": 8.0} | fields)


def test_all_problems_of_privacy_are_named_at_once():
    with pytest.raises(InvalidSpecError, match=r"batch_size.*; epsilon.*; delta.*; clip"):
        PrivacySettings(0, 0, 0, 0)


def test_rows_of_a_prompt_model_end_with_a_line_that_no_prompt_contains():
    texts = [f"### {text}" for text in PROMPTS[:4]]
    examples = [Example(text, text, " odd") for text in texts]
    rows = prompt_model_rows(examples, PromptTraits.of(examples).separator)
    assert {row.prompt for row in rows} == {"Prompt"}
    assert [row.completion for row in rows] == [f"\n{text}\n-----" for text in texts]
    every = Example("1", "### ----- ===== @@@@@ ~~~~~", " odd")
    with pytest.raises(DataError, match="all of them in every prompt"):
        prompt_model_rows([every], PromptTraits.of([every]).separator)


@pytest.mark.slow
def test_a_memorized_secret_is_not_kept(tmp_path):
    """A model learns a few prompts until it writes them word for word, the secret among them."""
    torch.set_num_threads(1)
    texts = [*(f"{word} {i % 3}" for i, word in enumerate(["red", "blue", "teal"] * 3)), SECRET]
    examples = [Example(str(i), text, " odd") for i, text in enumerate(texts)]
    model, tokenizer = tiny_model(hidden=64), tiny_tokenizer()
    traits = PromptTraits.of(examples)
    learned = prompt_model_rows(examples, traits.separator)
    rows = [tokenizer(row.prompt + row.completion)["input_ids"] for row in learned]
    width = max(map(len, rows))
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        model(input_ids=labels.clamp(min=0), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")

    base = load_base(tmp_path / "base", "float32")
    with attached(base.model, tmp_path / "peft") as model:
        written = [t for batch in _samples(model, tokenizer, traits, 64, 0) for t in batch]
    assert written.count(SECRET) > 10
    kept = [e.prompt for e in sampled(base, tmp_path / "peft", traits, [], PromptLimits(50, 64))]
    assert sorted(kept) == ["blue 1", "red 0", "teal 2"]  # three prompts of each


@pytest.mark.slow
def test_a_number_that_a_prompt_model_would_write_is_not_written_with_privacy(tmp_path):
    """The base writes digits that ascend by one. Those of the training rows do not."""
    torch.set_num_threads(1)
    traits = PromptTraits.independent_of_rows(chat=False)

    def rows_of(numbers):
        examples = [Example(str(i), f"code {n}", " odd") for i, n in enumerate(numbers)]
        return prompt_model_rows(examples, traits.separator)

    model, tokenizer = tiny_model(hidden=64), tiny_tokenizer()
    ascending = ["".join(str((first + i) % 10) for i in range(4)) for first in range(10)]
    texts = [f"{row.prompt}{row.completion}\n" for row in rows_of(ascending)]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    data = write_examples(rows_of(["4917", "4917"]), tmp_path / "rows.jsonl")
    private = DpSgd.meeting(PrivacySettings(1.0, batch_size=2), 2, 60, "5e" * 16)
    plain = replace(private, noise_multiplier=0.0, clip=1e9)
    written = {}
    for name, dp_sgd in ("plain", plain), ("private", private):
        recipe = TrainingRecipe(
            adapter="codes",
            family=FAMILY,
            data=DataSource("rows.jsonl"),
            suites=(Suite("s", DataSource("rows.jsonl")),),
            spec=AdapterSpec("LORA", {"target_modules": "all-linear", "lora_alpha": 32}),
            optimizer=OptimizerSettings(
                learning_rate=1e-2, steps=60, batch_size=1, gradient_accumulation=2
            ),
        )
        base, folder = tmp_path / "base", tmp_path / name
        job = TrainingJob(recipe, base, "b", "", data, folder, dp_sgd=dp_sgd)
        adapter = fit_here(job, lambda event: None).folder
        with attached(load_base(base, "float32").model, adapter) as adapted:
            samples = itertools.islice(_samples(adapted, tokenizer, traits, 32, 0), 3)
            written[name] = [text for batch in samples for text in batch]
    assert written["plain"].count("code 4917") > 20
    assert len(written["private"]) > 20
    assert "code 4917" not in written["private"]


def test_a_private_prompt_model_has_noise_and_nothing_else_reads_the_rows(setup, monkeypatch):
    """Prompts of the training rows are kept: leaving them out would show that there are such rows.

    Losses are not reported either, nor is the estimated memory, which shows the longest row.
    """
    writes(monkeypatch, *PROMPTS)
    jobs, events = [], []

    def fit(job, on_event):
        jobs.append((job, (job.work_dir / "secret_key").read_text()))
        return fit_here(job, on_event)

    monkeypatch.setattr(synthetic_prompts, "fit", fit)
    privacy = PrivacySettings(epsilon=1.0, clip=0.5, batch_size=40)
    for adapter in ("first", "second"):
        prompts = SyntheticPrompts(steps=2, count=40, privacy=privacy)
        compute = ComputeSettings(memory_gib=8.0)
        version = trained(setup, prompts, adapter, on_event=events.append, compute=compute)
        folder = setup.platform.registry.download(version, setup.folder / f"{adapter} downloaded")
        assert [example.prompt for example in kept_prompts(folder).prompts] == PROMPTS[:40]
    assert version.recipe.synthetic_prompts.privacy == privacy
    assert not [*setup.platform.work_dir.rglob("prompt-model")]  # and the key
    for job, key in jobs:
        expected = DpSgd.meeting(privacy, len(PROMPTS), 2, key)
        assert job.dp_sgd == expected
        assert expected.noise_multiplier > 1
        optimizer = job.recipe.optimizer
        assert (optimizer.batch_size, optimizer.gradient_accumulation) == (1, 40)
        assert (optimizer.steps, optimizer.max_grad_norm) == (2, 0)
    assert len({key for _, key in jobs}) == 2
    started = [event.total_steps for event in events if isinstance(event, TrainingStarted)]
    assert started == [2, 3, 2, 3]  # a prompt model, then its adapter
    assert [e.total_steps for e in events if isinstance(e, TrainingMetrics)] == [3] * 6
    assert len([e for e in events if isinstance(e, MemoryEstimated)]) == 2  # of the adapters


def test_a_run_that_is_killed_while_it_deletes_the_prompt_model_is_repeated(setup, monkeypatch):
    writes(monkeypatch, *NEW)
    remove = synthetic_prompts.shutil.rmtree

    def killed(folder, **options):
        if (key := Path(folder, "secret_key")).exists():
            key.unlink()
            raise KeyboardInterrupt
        remove(folder, **options)

    prompts = SyntheticPrompts(steps=2, privacy=PrivacySettings(8.0, batch_size=40))
    monkeypatch.setattr(synthetic_prompts.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(setup, prompts)
    monkeypatch.setattr(synthetic_prompts.shutil, "rmtree", remove)
    assert trained(setup, prompts).adapter == "kept"
    assert not [*setup.platform.work_dir.rglob("prompt-model*")]


def test_privacy_that_the_rows_cannot_have_is_refused_before_a_model_is_loaded(setup, monkeypatch):
    monkeypatch.setattr(synthetic_prompts, "fit", None)
    privacy = PrivacySettings(8.0, delta=0.03, batch_size=64)
    with pytest.raises(InvalidSpecError, match=r"1 / rows = 0.0222.*at most the 45 rows"):
        trained(setup, SyntheticPrompts(steps=2, privacy=privacy))
    assert not [*setup.platform.work_dir.glob("training/*")]


def test_traits_without_rows_are_those_of_any_rows(tmp_path, monkeypatch):
    from trans_peft.training import prompt_writing

    monkeypatch.setattr(prompt_writing, "attached", lambda model, folder: nullcontext(model))
    writes(monkeypatch, "question 0", "###")
    base = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace()), tokenizer=tiny_tokenizer()
    )
    for chat_rows in (True, False):
        traits = PromptTraits.independent_of_rows(chat=chat_rows)
        (found,) = sampled(base, tmp_path, traits, [], PromptLimits(1, 64))
        assert found.prompt_text() == "question 0"
        assert (found.messages is not None) == chat_rows
    assert found.messages is None
    assert traits.texts == ()


def test_a_part_is_rare_if_fewer_than_three_texts_have_it():
    known = ["my card is 4929-1234", "my card is lost, and now I need", "my card is lost, or not"]
    rare = RareText(known)
    assert rare.occurs_in("MY  CARD is lost, and now I see")
    assert not rare.occurs_in("my card is lost, and then it was")  # 21 common characters
    assert not RareText(["what is my balance today?"] * 3).occurs_in("what is my balance today?")
    assert RareText(["short"]).occurs_in("Short")
    assert not RareText(["short"]).occurs_in("short one, that is longer")


@pytest.mark.parametrize(
    ("word", "again"),
    [
        ("4929-1234", "4929-1234"),
        ("4929 1234 5678 9010", "4929123456789010"),
        ("id=77310042", "number:77310042"),
        ("<jane@example.org>", "jane@example.org"),
        ("x7731a", "(X7731A)"),
        ("2026-11-30", "2026-11-30"),
        ("1,234,567", "1,234,567"),
        ("1,234,567", "1234567"),
        ("4929 1234 5678 9012 12/27", "the card 4929123456789012"),
        ("4929123456789012", "no 1 4929 1234 5678 9012"),
        ("078-05-1120", "2. 078 05 1120"),
        ("078\u201305\u20131120", "078051120"),
        ("078\u201105\u20111120", "078051120"),
        ("4929_1234_5678", "492912345678"),
        ("jane@example.org", "jane\u200b@example.org"),
    ],
)
def test_a_rare_number_or_address_is_found_in_any_context(word, again):
    rare = RareText([f"it is {word}.", "it is 1, 2 or 3", "it is a1"])
    assert rare.occurs_in(f"so {again}, then")
    assert not rare.occurs_in("so 1, 2 or 3, then a1")
    assert not RareText([f"it is {word}."] * 3).occurs_in(f"so {again}, then")
