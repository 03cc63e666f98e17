"""A shard: one base in memory, and adapters of every kind on it in turn."""

import gc
import json
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.lifecycle.test_life import add_base, write_update
from tests.tiny import tiny_model, write_tiny_base
from trans_peft import models
from trans_peft.data import read_examples
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, GatePolicy, Suite
from trans_peft.domain.outcome import Reason, TransferTask
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import EvaluationError, IntegrityError
from trans_peft.lifecycle import evaluation, kept_downloads
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.mixed_evaluation import evaluate_shard
from trans_peft.lifecycle.reconcile import observe_adapter
from trans_peft.lifecycle.recovery.evaluator import CandidateEvaluator
from trans_peft.lifecycle.resolve import find_base
from trans_peft.lifecycle.transfer import transfer
from trans_peft.methods.bottleneck import BottleneckConfig
from trans_peft.transfer import mixed_adapters
from trans_peft.transfer.load_adapter import attached
from trans_peft.validation import evaluate as evaluating
from trans_peft.validation.decoding import sampling
from trans_peft.validation.evaluate import answer, evaluate

FAMILY, ITEMS = "tiny", 40
POLICY = GatePolicy(margin_points=10.0)
LM = {"task_type": "CAUSAL_LM"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {
    "lora-r-2": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **LM),
    "lora-r-8": LoraConfig(
        r=8, target_modules=[*ATTENTION, "down_proj"], init_lora_weights=False, **LM
    ),
    "dora": LoraConfig(r=4, target_modules=ATTENTION, use_dora=True, init_lora_weights=False, **LM),
    "bottleneck": BottleneckConfig(init_bottleneck_weights=False, **LM),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
        **LM,
    ),
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """v1, v2 and one adapter of each kind; two suites, of which one begins with examples."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("shard")
    platform = replace(memory_platform(root / "work"), store=FileStore())
    add_base(platform, write_tiny_base(root / "v1"))
    add_base(platform, write_update(root / "v2", noise=2e-2))
    shots = "".join(f"{i} is {'odd' if i % 2 else 'even'}. " for i in range(9))
    suites = []
    for name, before in (("plain", ""), ("few-shot", shots)):
        rows = [
            {"id": f"{i}", "prompt": f"{before}{i} is", "completion": " odd"} for i in range(ITEMS)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = DataSource(str(root / f"{name}.jsonl"))
        suites.append(Suite(name, source, max_new_tokens=4, stop=(), keep_answers=True))
    for seed, (name, config) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        get_peft_model(tiny_model(), config).save_pretrained(root / name)
        adopt(name, str(root / name), FAMILY, suites, platform, base_version="v1")
    return platform, root


@pytest.fixture
def counted(monkeypatch):
    """Counts how often a base is loaded and a suite is read."""
    calls = Counter()
    load, read = transformers.AutoModelForCausalLM.from_pretrained, evaluation.read_examples

    def loading(folder, **options):
        calls["load"] += 1
        return load(folder, **options)

    def reading(source, store, **options):
        calls[source.uri.rpartition("/")[2]] += 1
        return read(source, store, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loading)
    monkeypatch.setattr(evaluation, "read_examples", reading)
    monkeypatch.setattr(models, "_cached", None)
    return calls


def with_results_on_v1(shard):
    """The platform with a store that has the evaluations on v1 alone."""
    platform, root = shard
    there = replace(platform, evaluations=memory_platform(root / "unused").evaluations)
    for name in KINDS:
        version = platform.registry.versions(name)[0]
        for suite in version.suites:
            key = suite.evaluation_key(version.weights_sha256, version.base.fingerprint_sha256)
            there.evaluations.put(platform.evaluations.get(key))
    return there


def judge(platform, name, policy=POLICY, progress=None):
    task = TransferTask(name, 1, find_base(FAMILY, "v2", platform).ref, Reason.NO_VERDICT)
    fleet = observe_adapter(name, FAMILY, platform)
    return transfer(task, fleet, policy, platform, on_progress=progress)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_shard_loads_its_base_and_evaluates_the_bare_base_once(shard, counted, sequential):
    there = with_results_on_v1(shard)
    progress = []
    for name in KINDS:
        judge(there, name, replace(POLICY, sequential=sequential), progress.append)
    assert counted == {"load": 1, "plain.jsonl": 1, "few-shot.jsonl": 1}
    items = Counter()
    for step in progress:
        items[step.description] = max(items[step.description], step.done)
    bare = {what: done for what, done in items.items() if what.startswith("bare base")}
    if not sequential:
        assert bare == {"bare base: plain on v2": ITEMS, "bare base: few-shot on v2": ITEMS}
        assert (
            len([step for step in progress if step.description in bare]) == 2 * 2
        )  # batches of 32
    assert {step.description.partition(":")[0] for step in progress} <= {*KINDS, "bare base"}
    assert all(step.done <= step.total for step in progress)
    assert all((step.eta_s == 0) == (step.done == step.total) for step in progress)
    assert all((step.eta_s or 0) >= 0 for step in progress)


def test_threads_transfer_as_one_thread_does_and_one_of_them_computes_at_a_time(
    shard, counted, monkeypatch
):
    expected = {name: judge(with_results_on_v1(shard), name) for name in KINDS}
    models.release_base()
    computing, overlap = threading.Lock(), threading.Barrier(2)
    judging = CandidateEvaluator.judge

    def judged(self, made):
        assert computing.acquire(blocking=False)
        try:
            return judging(self, made)
        finally:
            computing.release()

    there = with_results_on_v1(shard)
    recorded = there.registry.record

    def record(outcome):
        overlap.wait(timeout=60)
        recorded(outcome)

    names = ("lora-r-2", "lora-r-8", "dora", "ia3")  # two pairs
    monkeypatch.setattr(CandidateEvaluator, "judge", judged)
    monkeypatch.setattr(there.registry, "record", record)
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(names, pool.map(partial(judge, there), names), strict=True))
    for name in names:
        assert expected[name].judgment == found[name].judgment
        assert [
            (one.suite, one.weights_sha256, one.items) for one in expected[name].evaluations
        ] == [(one.suite, one.weights_sha256, one.items) for one in found[name].evaluations]
    assert counted["load"] == 2


def test_missing_reference_evaluations_are_computed_first(shard):
    platform, root = shard
    empty = replace(platform, evaluations=memory_platform(root / "unused").evaluations)
    progress = []
    judge(empty, "ia3", progress=progress.append)
    assert list(dict.fromkeys(step.description for step in progress)) == [
        "ia3: plain on v1", "ia3: few-shot on v1", "ia3: plain on v2", "ia3: few-shot on v2",
        "bare base: plain on v2", "bare base: few-shot on v2",
    ]  # fmt: skip


def test_a_suite_that_changed_after_registration_is_an_error(shard, counted):
    platform, root = shard
    empty = replace(platform, evaluations=memory_platform(root / "unused").evaluations)
    rows = root / "plain.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("odd", "even"))
    try:
        with pytest.raises(IntegrityError, match="has changed since it was pinned"):
            judge(empty, "ia3")
    finally:
        rows.write_text(before)


def test_adapters_on_a_shared_base_answer_as_on_a_separate_base(shard):
    platform, root = shard
    outcomes = {name: judge(platform, name) for name in KINDS}
    for name, outcome in outcomes.items():
        weights = outcome.weights_sha256
        found = {
            e.suite: e
            for e in outcome.evaluations
            if (e.weights_sha256, e.base_fingerprint_sha256)
            == (weights, outcome.base.fingerprint_sha256)
        }
        alone = LlamaForCausalLM.from_pretrained(root / "v2")
        alone = PeftModel.from_pretrained(alone, root / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(root / "v2")
        for suite in platform.registry.versions(name)[0].suites:
            expected = evaluate(
                alone,
                tokenizer,
                suite,
                read_examples(suite.data, FileStore()),
                weights_sha256=weights,
                base_fingerprint_sha256=outcome.base.fingerprint_sha256,
                batch_size=7,
            )
            assert found[suite.name].items == expected.items
    held = models._cached.base.model
    fresh = LlamaForCausalLM.from_pretrained(root / "v2").state_dict()
    assert held.state_dict().keys() == fresh.keys()
    assert all(torch.equal(weight, fresh[name]) for name, weight in held.state_dict().items())
    assert type(held) is LlamaForCausalLM


def alive():
    """Return the bytes of all live tensors and the number of live modules.

    Other subclasses of a tensor, such as the fake ones of `torch.compile`, may have no bytes.
    """
    gc.collect()
    objects = gc.get_objects()
    storages = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in objects
        if type(found) in (torch.Tensor, torch.nn.Parameter)
    }
    modules = sum(issubclass(type(found), torch.nn.Module) for found in objects)
    return sum(storages.values()), modules


def test_ten_adapters_leak_no_tensors_or_modules(shard):
    platform, root = shard
    base = models.load_base(root / "v2", "float32")
    suite = platform.registry.versions("dora")[0].suites[1]
    tokenized = evaluation.tokenized_suite_for(suite, base, platform)
    before, after = alive(), []
    for name in [*KINDS, *KINDS]:
        with attached(base.model, root / name) as model:
            answer(model, tokenized, weights_sha256=name, base_fingerprint_sha256="v2")
        del model
        if name == next(reversed(KINDS)):
            after.append(alive())
    assert after == [before, before]


def test_tokenized_suites_are_freed_with_their_base(shard):
    platform, root = shard
    suite = platform.registry.versions("dora")[0].suites[0]
    base = models.load_base(root / "v2", "float32")
    kept = evaluation.tokenized_suite_for(suite, base, platform)
    assert evaluation.tokenized_suite_for(suite, base, platform) is kept
    there = weakref.ref(base)
    del base
    models.load_base(root / "v1", "float32")
    gc.collect()
    assert there() is None
    assert len(evaluation._tokenized_suites) <= 1


def test_the_number_of_kept_tokenized_suites_is_limited(shard):
    platform, root = shard
    suite = platform.registry.versions("dora")[0].suites[0]
    base = models.load_base(root / "v2", "float32")
    many = [replace(suite, name=f"suite-{i}") for i in range(evaluation._MAX_SUITES_PER_BASE + 3)]
    made = [evaluation.tokenized_suite_for(one, base, platform) for one in many]
    assert evaluation.tokenized_suite_for(many[-1], base, platform) is made[-1]
    assert len(evaluation._tokenized_suites[base]) == evaluation._MAX_SUITES_PER_BASE
    assert evaluation.tokenized_suite_for(many[0], base, platform) is not made[0]


def with_empty_store(shard):
    platform, root = shard
    return replace(platform, evaluations=memory_platform(root / "unused").evaluations)


def prepare_shard(platform, names=tuple(KINDS), policy=POLICY, size=None):
    v2 = find_base(FAMILY, "v2", platform).ref
    return evaluate_shard(
        [
            (
                TransferTask(name, 1, v2, Reason.NO_VERDICT),
                observe_adapter(name, FAMILY, platform),
            )
            for name in names
        ],
        policy,
        platform,
        size=size,
    )


def stored(platform, names=(*KINDS, BARE)):
    """The results of the evaluations in the store, by subject, base and suite."""
    suites = platform.registry.versions("dora")[0].suites
    found = {}
    for name in names:
        weights = BARE if name == BARE else platform.registry.versions(name)[0].weights_sha256
        for version in ("v1", "v2"):
            base = find_base(FAMILY, version, platform)
            for suite in suites:
                key = suite.evaluation_key(weights, base.fingerprint_sha256)
                if (one := platform.evaluations.get(key)) is not None:
                    found[name, version, suite.name] = one.items
    return found


def test_adapters_that_do_not_fit_the_memory_end_no_other_mixed_evaluation(shard, monkeypatch):
    there, attach = with_results_on_v1(shard), mixed_adapters.attach

    def attach_or_fail(model, folder, *given, **options):
        if folder.parent.name == "lora-r-2":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attach(model, folder, *given, **options)

    monkeypatch.setattr(mixed_adapters, "attach", attach_or_fail)
    left_out = prepare_shard(there, ("lora-r-2", "lora-r-8", "dora", "ia3"), size=2)
    assert left_out.keys() == {"lora-r-2", "lora-r-8"}
    assert "CUDA out of memory" in left_out["lora-r-2"]
    v2 = find_base(FAMILY, "v2", there)
    for name in ("dora", "ia3"):
        version = there.registry.versions(name)[0]
        for suite in version.suites:
            key = suite.evaluation_key(version.weights_sha256, v2.fingerprint_sha256)
            assert there.evaluations.get(key) is not None


@pytest.fixture(scope="module")
def one_by_one(shard):
    there = with_results_on_v1(shard)
    outcomes = {name: judge(there, name).judgment for name in KINDS}
    return stored(there), outcomes


def on_v1_and_of(names, one_by_one):
    """The results on v1, and those of some adapters and the bare base on v2."""
    return {
        key: items
        for key, items in one_by_one[0].items()
        if key[1] == "v1" or key[0] in (*names, BARE)
    }


def test_a_shard_stores_from_mixed_batches_what_each_adapter_answers_alone(shard, one_by_one):
    expected, judgments = one_by_one
    there = with_empty_store(shard)
    left_out = prepare_shard(there)
    assert list(left_out) == ["bottleneck"]
    assert "the method BOTTLENECK" in left_out["bottleneck"]
    found = stored(there)
    assert found == {key: one for key, one in expected.items() if key[0] != "bottleneck"}
    progress = []
    outcomes = {name: judge(there, name, progress=progress.append).judgment for name in KINDS}
    assert outcomes == judgments
    assert {step.description.partition(":")[0] for step in progress} == {"bottleneck"}


def test_parts_of_a_shard_give_the_same_answers(shard, one_by_one, monkeypatch):
    there, names = with_results_on_v1(shard), ("lora-r-2", "lora-r-8", "dora", "ia3")
    together, counts = mixed_adapters.attached_together, []

    def counting(model, folders):
        counts.append(len(folders))
        return together(model, folders)

    monkeypatch.setattr(mixed_adapters, "attached_together", counting)
    assert prepare_shard(there, names, size=2) == {}
    assert counts == [2, 2]
    assert stored(there) == on_v1_and_of(names, one_by_one)


@pytest.mark.parametrize(("max_bytes", "kept"), [(2 << 30, 2), (3_000, 1), (2_000, 0)])
def test_files_of_the_shard_are_kept_for_its_transfers(
    shard, tmp_path, monkeypatch, max_bytes, kept
):
    """The two adapters have 2,872 and 2,149 bytes. The newer one is kept rather than the older."""
    there, names = with_results_on_v1(shard), ("lora-r-2", "ia3")
    downloaded = []
    plain = there.registry.download

    def counting(version, folder):
        downloaded.append(version.adapter)
        return plain(version, folder)

    monkeypatch.setattr(there.registry, "download", counting)
    monkeypatch.setattr(kept_downloads, "MAX_BYTES", max_bytes)
    monkeypatch.setattr(kept_downloads, "_kept", {})
    assert prepare_shard(there, names) == {}
    assert downloaded == [*names]
    for place in ("first", "second"):  # kept files are given once
        for name in names:
            version = there.registry.versions(name)[0]
            found = kept_downloads.download(version, tmp_path / place / name, there)
            assert found == tmp_path / place / name
            assert models.adapter_weights_sha256(found) == version.weights_sha256
        assert downloaded == [*names, *names[: 2 - kept]]
        kept = 0
        downloaded[len(names) :] = []


def test_near_ties_are_asked_again_alone(shard, one_by_one, monkeypatch):
    there, names = with_results_on_v1(shard), ("ia3",)
    asked = []

    def alone(model, questions, **options):
        asked.append((options["weights_sha256"], len(questions.examples)))
        return answer(model, questions, **options)

    monkeypatch.setattr(evaluating, "answer", alone)
    monkeypatch.setattr(sampling, "NEAR_TIE", 1e9)
    assert prepare_shard(there, names) == {}
    assert stored(there) == on_v1_and_of(names, one_by_one)
    assert len(asked) == 4  # two suites of the adapter and of the bare base
    assert {count for _, count in asked} == {ITEMS}


def test_an_adapter_that_fails_in_a_batch_fails_no_other(shard, one_by_one, monkeypatch):
    there, names = with_results_on_v1(shard), ("lora-r-8", "ia3")
    broken = there.registry.versions("lora-r-8")[0].weights_sha256
    together = evaluating.answer_together

    def failing(model, asked, **options):
        if broken in [one.weights_sha256 for one in asked]:
            raise EvaluationError("the model's logits are not finite")
        return together(model, asked, **options)

    monkeypatch.setattr(evaluating, "answer_together", failing)
    assert prepare_shard(there, names) == {}
    assert stored(there) == on_v1_and_of(["ia3"], one_by_one)


def test_a_suite_that_cannot_be_read_keeps_no_other_suite_from_mixed_batches(shard, one_by_one):
    there, (_, root) = with_results_on_v1(shard), shard
    rows = root / "plain.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("odd", "even"))
    evaluation._tokenized_suites.clear()
    try:
        left_out = prepare_shard(there, ["ia3", "lora-r-2"])
    finally:
        rows.write_text(before)
    assert "has changed since it was pinned" in left_out["ia3"]
    assert stored(there) == {
        key: items
        for key, items in on_v1_and_of(["ia3", "lora-r-2"], one_by_one).items()
        if key[1] == "v1" or key[2] == "few-shot"
    }


def test_nothing_is_evaluated_together_under_a_sequential_policy(shard):
    there = with_empty_store(shard)
    assert prepare_shard(there, policy=replace(POLICY, sequential=True)) == {}
    assert stored(there) == {}
