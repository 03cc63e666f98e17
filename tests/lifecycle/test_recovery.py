"""Recovery strategies and the effect probe in a transfer, with tiny models and given results.

A test stores results under the key of the weights that a strategy makes, and so chooses which
strategy passes. Everything else is computed.
"""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.lifecycle.test_life import write_update
from tests.tiny import tiny_model, write_tiny_base
from trans_peft.bases.publish import publish
from trans_peft.data import pin
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import Upload
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Evaluation, GatePolicy, ItemResult, Suite, Verdict
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.outcome import Reason, TransferTask
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.domain.recipe import OptimizerSettings, TrainingRecipe
from trans_peft.domain.recovery import RecoveryPolicy, RecoveryStrategy
from trans_peft.domain.spec import AdapterSpec
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import AdapterError, InvalidSpecError, NotFoundError
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.bases import ingest
from trans_peft.lifecycle.evaluation import BARE_BASE
from trans_peft.lifecycle.reconcile import observe, observe_adapter, plan
from trans_peft.lifecycle.recovery import retraining
from trans_peft.lifecycle.recovery.retraining import retrain
from trans_peft.lifecycle.report import report
from trans_peft.lifecycle.transfer import transfer
from trans_peft.models import adapter_weights_sha256
from trans_peft.training.finetune import finetune
from trans_peft.training.job import TrainingResult
from trans_peft.transfer.load_adapter import attached
from trans_peft.transfer.peft_folder import read_peft_folder
from trans_peft.transfer.scaling import rescaled

ITEMS, FAMILY = 96, "tiny"
POLICY = GatePolicy(margin_points=10.0, must_beat_bare=False)
OPTIONS = {"r": 2, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]}
SPEC = AdapterSpec("LORA", OPTIONS)


class TransferSetup:
    """v1, v2 and one adapter of v1 that answers every item correctly there."""

    def __init__(
        self,
        folder,
        *,
        recipe=True,
        spec=SPEC,
        chance=None,
        edit=lambda folder: None,
        **recipe_fields,
    ):
        torch.set_num_threads(1)
        self.folder = folder
        self.platform = replace(memory_platform(folder / "work"), store=FileStore())
        self.bases = []
        for version, written in (
            ("v1", write_tiny_base(folder / "v1")),
            ("v2", write_update(folder / "v2")),
        ):
            uri = str(folder / "bases" / version)
            publish(written, uri, family=FAMILY, version=version, store=FileStore())
            self.bases.append(ingest(Upload(uri), self.platform))
        rows = [{"id": f"{i}", "prompt": f"{i} is", "completion": " odd"} for i in range(ITEMS)]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = pin(DataSource(str(folder / "rows.jsonl")), self.platform.store)
        self.suite = Suite("parity", data, max_new_tokens=4, chance_points=chance)
        torch.manual_seed(3)
        self.peft = folder / "peft"
        model = get_peft_model(tiny_model(), LoraConfig(**OPTIONS, init_lora_weights=False))
        model.save_pretrained(self.peft)
        edit(self.peft)
        v1 = self.bases[0]
        self.source = self.platform.registry.register(
            AdapterVersion(
                adapter="parity",
                number=0,
                base=v1.ref,
                trained_on=v1.ref,
                weights_sha256=adapter_weights_sha256(self.peft),
                method=read_peft_folder(self.peft).peft_type,
                suites=(self.suite,),
                recipe=TrainingRecipe(
                    adapter="parity",
                    family=FAMILY,
                    suites=(self.suite,),
                    spec=spec,
                    optimizer=OptimizerSettings(learning_rate=1e-2, steps=3, batch_size=4),
                    **{"data": data} | recipe_fields,
                )
                if recipe
                else None,
            ),
            self.peft,
        )
        self.answered(self.source.weights_sha256, v1, right=ITEMS)

    def answered(self, weights_sha256, base, right):
        self.platform.evaluations.put(
            Evaluation(
                suite="parity",
                weights_sha256=weights_sha256,
                base_fingerprint_sha256=base.fingerprint_sha256,
                suite_sha256=self.suite.suite_sha256,
                decoding_sha256=self.suite.decoding_sha256,
                items=tuple(ItemResult(f"{i}", i < right, "a") for i in range(ITEMS)),
            )
        )

    def forget(self, weights_sha256, base):
        key = self.suite.evaluation_key(weights_sha256, base.fingerprint_sha256)
        self.platform.evaluations._evaluations.pop(key)

    def transfer(self, policy=POLICY, **recovery):
        policy = replace(policy, recovery=RecoveryPolicy(**recovery))
        v2 = self.bases[1].ref
        task = TransferTask("parity", self.source.number, v2, Reason.NO_VERDICT)
        fleet = observe_adapter("parity", FAMILY, self.platform)
        self.progress = []
        return transfer(task, fleet, policy, self.platform, on_progress=self.progress.append)

    def version(self, outcome):
        versions = self.platform.registry.versions("parity")
        return next(v for v in versions if v.number == outcome.new_number)


@pytest.fixture
def setup(tmp_path):
    return TransferSetup(tmp_path)


def fit_here(job, on_event):
    """Train in this process, which saves seconds."""
    job.check()
    if not job.result_file.exists():
        finetune(job, PartialState(cpu=True), on_event)
    return TrainingResult.read(job.result_file)


def strategies(outcome):
    return [(item.strategy, item.verdict) for item in outcome.tried]


def test_without_recovery_strategies_only_direct_transfer_is_tried(setup):
    outcome = setup.transfer()
    assert (outcome.verdict, outcome.strategy) == (Verdict.NEEDS_RETUNING, RecoveryStrategy.DIRECT)
    assert (outcome.tried, outcome.training) == ((), None)
    assert "level 5 %" in outcome.judgment.reason


def test_recovery_stops_at_the_first_pass_and_registers_one_version(setup, tmp_path):
    scaled = rescaled(setup.peft, tmp_path / "scaled", 1.1)
    setup.answered(adapter_weights_sha256(scaled), setup.bases[1], right=ITEMS)
    outcome = setup.transfer(scales=(0.25, 1.1), retune_steps=5, retrain=True)
    assert strategies(outcome) == [("direct", "needs-retuning"), ("rescaled", "passed")]
    assert (outcome.verdict, outcome.strategy, outcome.training) == ("passed", "rescaled", None)
    assert "level 1.25 %" in outcome.judgment.reason  # one of four strategies
    assert "scale x 1.1" in outcome.tried[1].note
    assert 0 < sum(item.seconds for item in outcome.tried) <= outcome.seconds
    assert outcome.weights_sha256 == setup.source.weights_sha256  # the transferred weights
    first, second = setup.platform.registry.versions("parity")
    assert (second.made_by, second.transferred_from) == ("rescaled", first.number)
    assert second.weights_sha256 == adapter_weights_sha256(scaled)
    assert not second.is_trained  # the trained weights are transferred to the next base
    again = setup.transfer(scales=(0.25, 1.1), retune_steps=5, retrain=True)
    assert (again.new_number, again.verdict_key) == (outcome.new_number, outcome.verdict_key)
    assert len(setup.platform.registry.versions("parity")) == 2


def test_without_a_pass_direct_transfer_is_registered_and_retraining_is_pending(setup):
    outcome = setup.transfer(scales=(1.1,), retrain=True)
    assert strategies(outcome) == [
        ("direct", "needs-retuning"),
        ("rescaled", "needs-retuning"),
        ("retrained", ""),
    ]
    assert (outcome.strategy, setup.version(outcome).made_by) == ("direct", "direct")
    assert setup.version(outcome).weights_sha256 == setup.source.weights_sha256
    assert outcome.training == replace(setup.source.recipe, base_version="v2")


def test_retuning_continues_from_the_old_weights(setup):
    outcome = setup.transfer(retune_steps=2)
    assert strategies(outcome) == [("direct", "needs-retuning"), ("re-tuned", "needs-retuning")]
    (result,) = setup.platform.work_dir.glob("training/retune-*/result.json")
    weights = json.loads(result.read_text())["weights_sha256"]
    old, new = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (setup.peft, result.parent / "adapter")
    )
    for key in old:  # two steps at 1e-2 move a weight by 0.02 at most
        assert 0 < (old[key] - new[key]).abs().max() < 0.03
    setup.forget(weights, setup.bases[1])
    setup.answered(weights, setup.bases[1], right=ITEMS)
    outcome = setup.transfer(retune_steps=2)
    assert (outcome.verdict, outcome.strategy) == ("passed", "re-tuned")
    assert setup.version(outcome).made_by is RecoveryStrategy.RETUNED
    assert setup.version(outcome).trained_on.version == "v1"  # the reference does not change


def test_a_scale_that_does_not_fit_the_training_rows_is_not_tried(setup):
    outcome = setup.transfer(scales=(0.25,))
    assert "no factor" in outcome.tried[1].reason


def test_retraining_is_evaluated_by_the_same_gate(setup, monkeypatch):
    monkeypatch.setattr(retraining, "fit", fit_here)
    v1, v2 = setup.bases
    setup.platform.registry.set_alias("parity", v1.alias, setup.source.number)
    policy = replace(POLICY, recovery=RecoveryPolicy(retrain=True))
    direct = setup.transfer(retrain=True)

    def train():
        return retrain(direct.training, policy, setup.platform, on_event=lambda event: None)

    failed = train()
    assert strategies(failed) == [("direct", "needs-retuning"), ("retrained", "needs-retuning")]
    assert (failed.strategy, failed.new_number, failed.training) == (
        "direct",
        direct.new_number,
        None,
    )
    assert failed.verdict_key == direct.verdict_key
    assert len(setup.platform.registry.versions("parity")) == 2

    (result,) = setup.platform.work_dir.glob("training/*/result.json")
    weights = json.loads(result.read_text())["weights_sha256"]
    setup.forget(weights, v2)
    setup.answered(weights, v2, right=ITEMS)
    passed = train()
    assert (passed.verdict, passed.strategy) == ("passed", "retrained")
    version = setup.version(passed)
    assert (version.is_trained, version.made_by) == (True, "retrained")

    # Each base has the version that was trained on it, and no transfer is planned.
    fleet = observe(FAMILY, setup.platform)
    assert plan(fleet, policy).tasks == ()
    apply_verdicts(fleet, policy, PromotionPolicy(), setup.platform)
    assert setup.platform.registry.alias("parity", v1.alias) == setup.source.number
    assert setup.platform.registry.alias("parity", v2.alias) == version.number
    assert "retrained here after an update" in report(FAMILY, setup.platform).markdown()


def test_a_retrained_adapter_has_its_share_of_the_evidence(setup, monkeypatch):
    def fit_and_answer(job, on_event):
        result = fit_here(job, on_event)
        setup.answered(result.weights_sha256, setup.bases[1], right=ITEMS)
        return result

    monkeypatch.setattr(retraining, "fit", fit_and_answer)
    policy = replace(POLICY, sequential=True, recovery=RecoveryPolicy(retrain=True))
    left = setup.transfer(retrain=True).training
    passed = retrain(left, policy, setup.platform, on_event=lambda event: None)
    assert (passed.verdict, passed.strategy) == ("passed", "retrained")
    # It passes at alpha / 2, so its own e-value is 2 / alpha. The mean of both strategies is half.
    assert passed.judgment.alpha == pytest.approx(POLICY.alpha / 2)
    assert passed.judgment.e_value == pytest.approx(1 / POLICY.alpha)


def test_retraining_finds_the_old_base_by_fingerprint(setup, monkeypatch):
    monkeypatch.setattr(retraining, "fit", fit_here)
    policy = replace(POLICY, recovery=RecoveryPolicy(retrain=True))
    left = setup.transfer(retrain=True).training
    catalog, (v1, v2) = setup.platform.catalog, setup.bases

    def train(*bases):
        monkeypatch.setattr(catalog, "versions", lambda family: bases)
        return retrain(left, policy, setup.platform, on_event=lambda event: None)

    with pytest.raises(NotFoundError, match="no longer in the catalog"):
        train(v2, replace(v1, fingerprint_sha256="f" * 64))  # the label is another base's now
    assert not [*setup.platform.work_dir.glob("training/*")]
    assert strategies(train(v2, replace(v1, version="first")))[-1] == (
        "retrained",
        "needs-retuning",
    )


def test_the_report_shows_all_strategies_and_the_chance_level(tmp_path):
    setup = TransferSetup(tmp_path, chance=50.0)
    setup.transfer(scales=(0.25,))
    page = report(FAMILY, setup.platform).markdown()
    assert "parity 100.0 (chance 50.0)" in page
    assert "Strategy: direct. Tried: direct: needs-retuning; rescaled: not tried" in page
    assert "rescaled: not tried (no factor increases" in page


def test_an_inconclusive_candidate_is_registered_instead_of_one_that_needs_retuning(setup):
    scaled = rescaled(setup.peft, setup.folder / "scaled", 1.1)
    setup.answered(adapter_weights_sha256(scaled), setup.bases[1], right=ITEMS - 8)
    outcome = setup.transfer(scales=(0.25, 1.1))
    assert strategies(outcome) == [("direct", "needs-retuning"), ("rescaled", "inconclusive")]
    assert (outcome.verdict, outcome.strategy) == ("inconclusive", "rescaled")
    assert setup.version(outcome).made_by is RecoveryStrategy.RESCALED


def test_an_adapter_that_may_have_lost_its_score_is_recovered_after_retire(setup):
    v2 = setup.bases[1]
    for weights in (setup.source.weights_sha256, BARE_BASE.weights_sha256):
        setup.answered(weights, v2, right=ITEMS - 8)  # a loss of 8 points, margin 10
    assert setup.transfer().verdict == "retire"
    scaled = rescaled(setup.peft, setup.folder / "scaled", 1.1)
    setup.answered(adapter_weights_sha256(scaled), v2, right=ITEMS)
    outcome = setup.transfer(scales=(0.25, 1.1))
    assert strategies(outcome) == [("direct", "retire"), ("rescaled", "passed")]
    assert setup.version(outcome).made_by is RecoveryStrategy.RESCALED


def test_an_adapter_that_kept_its_score_is_not_recovered_after_retire(setup):
    v2 = setup.bases[1]
    for weights in (setup.source.weights_sha256, BARE_BASE.weights_sha256):
        setup.answered(weights, v2, right=ITEMS)
    outcome = setup.transfer(replace(POLICY, must_beat_bare=True), scales=(1.1,), retrain=True)
    assert strategies(outcome) == [("direct", "retire")]
    assert outcome.training is None


def test_an_adapter_trained_on_the_new_base_is_a_second_reference(setup):
    fresh = get_peft_model(tiny_model(), LoraConfig(**OPTIONS, init_lora_weights=False))
    fresh.save_pretrained(setup.folder / "fresh")
    v2, weights = setup.bases[1], adapter_weights_sha256(setup.folder / "fresh")
    setup.platform.registry.register(
        replace(
            setup.source,
            base=v2.ref,
            trained_on=v2.ref,
            weights_sha256=weights,
        ),
        setup.folder / "fresh",
    )
    later = replace(setup.source, weights_sha256="later")  # trained on v1 once more
    setup.answered("later", setup.bases[0], right=ITEMS)
    setup.answered("later", v2, right=ITEMS)
    setup.answered(weights, v2, right=90)
    setup.platform.registry.register(later, setup.peft)
    outcome = setup.transfer()
    compared = outcome.judgment.suites[0].versus_fresh_adapter
    assert compared.reference_score == pytest.approx(100 * 90 / ITEMS)
    assert outcome.verdict is Verdict.PASSED


def test_an_adapter_without_a_recipe_is_not_recovered(tmp_path):
    outcome = TransferSetup(tmp_path, recipe=False).transfer(
        scales=(0.5,), retune_steps=2, retrain=True
    )
    assert [item.verdict for item in outcome.tried] == ["needs-retuning", "", "", ""]
    assert all("no recipe" in item.reason for item in outcome.tried[1:])
    assert (outcome.strategy, outcome.training) == ("direct", None)


def test_missing_training_rows_are_reported(setup):
    (setup.folder / "rows.jsonl").rename(setup.folder / "kept.jsonl")
    setup.answered(setup.source.weights_sha256, setup.bases[1], right=0)
    setup.answered("bare", setup.bases[1], right=0)
    outcome = setup.transfer(scales=(0.5,))
    assert "cannot be read" in outcome.tried[1].reason


@pytest.mark.slow
def test_a_failed_retuning_keeps_the_verdict(tmp_path):
    setup = TransferSetup(
        tmp_path, spec=AdapterSpec("LORA", OPTIONS | {"r": 4})
    )  # differs from the adapter
    outcome = setup.transfer(retune_steps=2)
    assert (outcome.verdict, outcome.strategy) == ("needs-retuning", "direct")
    assert "training failed" in outcome.tried[1].reason


def test_invalid_recovery_settings_are_refused():
    for wrong in ({"scales": (1.0,)}, {"scales": (0.5, 0.5)}, {"scales": (-1,)}):
        with pytest.raises(InvalidSpecError):
            RecoveryPolicy(**wrong)
    with pytest.raises(InvalidSpecError, match="retune_steps"):
        RecoveryPolicy(retune_steps=-1)


def test_the_hash_of_a_policy_without_recovery_is_stable():
    known = {"margin_points": 5.0, "alpha": 0.05, "required_suites": [], "must_beat_bare": True}
    assert GatePolicy().sha256 == content_sha256(known)
    assert GatePolicy(recovery=RecoveryPolicy(scales=(0.5,))).sha256 != content_sha256(known)


def test_rescaling_multiplies_the_output_of_the_adapter(setup, tmp_path):
    ids = torch.tensor([[65, 66, 67]])

    def change(folder):
        base = tiny_model().eval()
        with torch.no_grad():
            bare = base.model.layers[0].self_attn.v_proj(torch.ones(1, 32))
            with attached(base, folder) as model:
                layer = model.get_base_model().model.layers[0].self_attn.v_proj
                model(ids)
                return layer(torch.ones(1, 32)) - bare

    twice = change(rescaled(setup.peft, tmp_path / "twice", 2.0))
    assert torch.allclose(twice, 2 * change(setup.peft), atol=1e-5)


# The effect probe runs before any evaluation on the new base.


def silence(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))


def rename(folder):
    path = folder / "adapter_model.safetensors"
    save_file({k.replace("q_proj", "qq_proj"): v for k, v in load_file(path).items()}, path)


def thin_out(folder):
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.1." not in k}, path)


def zero(folder):
    path = folder / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize("edit", [silence, zero])
def test_an_adapter_without_effect_is_incompatible_before_evaluation(edit, tmp_path):
    setup = TransferSetup(tmp_path, edit=edit)
    outcome = setup.transfer(scales=(2.0,), retune_steps=2)
    assert outcome.verdict is Verdict.INCOMPATIBLE
    assert "no logit" in outcome.judgment.reason
    assert (outcome.tried, outcome.evaluations) == ((), ())
    assert len(setup.platform.evaluations._evaluations) == 1  # the given one on v1


@pytest.mark.parametrize("edit", [thin_out, rename])
def test_missing_module_weights_are_an_error_before_evaluation(edit, tmp_path):
    setup = TransferSetup(tmp_path, edit=edit)
    with pytest.raises(AdapterError, match="tensors missing from the file"):
        setup.transfer()
    assert len(setup.platform.evaluations._evaluations) == 1
