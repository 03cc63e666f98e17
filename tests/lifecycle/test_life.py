"""One adapter from training to rollback, with a tiny model and ports in memory."""

import json
from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_base
from trans_peft.bases.publish import publish
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.base import Upload
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import GatePolicy, Suite, Verdict
from trans_peft.domain.leakage import SuiteLeakage
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.domain.recipe import OptimizerSettings, Perturbation, TrainingRecipe
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import AdapterError, NotFoundError, UploadError
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.bases import ingest, pending
from trans_peft.lifecycle.reconcile import observe, plan
from trans_peft.lifecycle.report import report
from trans_peft.lifecycle.resolve import resolve
from trans_peft.lifecycle.train import train
from trans_peft.lifecycle.transfer import transfer

FAMILY = "tiny"
POLICY = GatePolicy(margin_points=10.0)


def rows(path, count, start=0):
    lines = [
        json.dumps(
            {
                "id": f"{start + i}",
                "prompt": f"{start + i} is",
                "completion": " odd" if i % 2 else " even",
            }
        )
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return DataSource(str(path))


def add_base(platform, folder):
    """Publish a folder as a version with its name, and ingest it."""
    uri = str(folder.parent / "bases" / folder.name)
    publish(folder, uri, family=FAMILY, version=folder.name, store=FileStore())
    return ingest(Upload(uri), platform)


def write_update(folder, noise=1e-3):
    """v2: the same model after a small step in a random direction."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class WatchedStore(FileStore):
    """A store that remembers which files were written."""

    def __init__(self):
        super().__init__()
        self.written = []

    def write(self, uri, data):
        super().write(uri, data)
        self.written.append(uri)


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """v1 ready and serving, one adapter trained on it under Trans-PEFT."""
    root = tmp_path_factory.mktemp("life")
    platform = replace(
        memory_platform(root / "work"),
        store=WatchedStore(),
        checkpoints_uri=str(root / "checkpoints"),
    )
    uploads = root / "bases"
    publish(
        write_tiny_base(root / "v1"),
        str(uploads / "v1"),
        family=FAMILY,
        version="v1",
        store=FileStore(),
    )
    v1 = ingest(Upload(str(uploads / "v1")), platform)
    platform.catalog.set_alias_manually(FAMILY, "champion", v1.number)
    apply_verdicts(observe(FAMILY, platform), POLICY, PromotionPolicy(), platform)
    recipe = TrainingRecipe(
        adapter="parity",
        family=FAMILY,
        data=rows(root / "train.jsonl", 64),
        suites=(Suite("parity", rows(root / "eval.jsonl", 24, start=100), max_new_tokens=5),),
        spec=AdapterSpec("LORA", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
        perturbation=Perturbation(masking_p=0.1, dropping_p=0.1),
        optimizer=OptimizerSettings(learning_rate=1e-2, steps=6, batch_size=8),
    )
    events = []
    version = train(recipe, platform, on_event=events.append)
    return platform, root, recipe, version, events


def test_training_registers_a_live_adapter_that_serves_where_it_was_trained(life):
    platform, _, _recipe, version, _ = life
    assert platform.registry.adapters(FAMILY) == ("parity",)
    assert version.is_trained
    assert version.suites[0].data.sha256  # pinned
    assert version.leakage == (SuiteLeakage("parity", 0, 64, 0, 24),)
    assert resolve("parity", platform) == version
    run = platform.runs.runs[0]
    assert run.status == "finished"
    assert [step for step, _ in run.recorded_metrics["loss"]] == list(range(1, 7))
    assert run.recorded_params["masking_p"] == 0.1
    assert json.loads(run.files["recipe.json"])["base_version"] == "v1"
    assert platform.registry.tags(version)["dropping_p"] == "0.1"


def test_its_checkpoint_was_copied_and_is_removed_after_the_registration(life):
    """The training removes its last checkpoint when it ends, maybe before it was copied."""
    platform, _, _, _, events = life
    copied = [uri for uri in platform.store.written if uri.endswith("/checkpoint-6.json")]
    reported = [event for event in events if "after step 6 was not copied" in str(event)]
    assert len(copied) + len(reported) == 1
    assert platform.store.list(platform.checkpoints_uri) == ()


def test_the_same_recipe_again_trains_nothing(life):
    platform, _, recipe, version, _ = life
    events = []
    assert train(recipe, platform, on_event=events.append) == version
    assert events == []


def test_what_is_registered_is_stock_peft(life, tmp_path):
    platform, _, _, version, _ = life
    folder = platform.registry.download(version, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["revision"] == version.base.fingerprint_sha256
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny_model(), folder)
    ids = torch.tensor([[65, 66, 67]])
    with torch.no_grad(), model.disable_adapter():
        bare = model(ids).logits
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, bare)


def test_an_update_is_evaluated_promoted_and_rolled_back(life):
    platform, root, _, trained, _ = life
    publish(
        write_update(root / "v2"),
        str(root / "bases" / "v2"),
        family=FAMILY,
        version="v2",
        parent="v1",
        store=FileStore(),
    )
    (upload,) = pending(platform, root_uri=str(root / "bases"))
    v2 = ingest(upload, platform)
    assert pending(platform, root_uri=str(root / "bases")) == ()

    fleet = observe(FAMILY, platform)
    (task,) = plan(fleet, POLICY).tasks
    answered = []
    outcome = transfer(
        task,
        fleet,
        POLICY,
        platform,
        on_progress=lambda progress: answered.append(progress.description),
    )
    assert outcome.compatibility.ok
    assert outcome.effect is not None and outcome.effect.found
    assert outcome.judgment.suites[0].items == 24
    assert set(answered) == {
        "parity: parity on v2",
        "bare base: parity on v2",
    }  # stored results on v1 are reused
    transferred = platform.registry.versions("parity")[-1]
    assert transferred.number == outcome.new_number
    assert transferred.transferred_from == trained.number
    assert transferred.weights_sha256 == trained.weights_sha256
    assert transferred.base.version == "v2"

    # under another policy the stored results are reused: no item is evaluated
    answered.clear()
    lenient = GatePolicy(margin_points=60.0, must_beat_bare=False)
    fleet = observe(FAMILY, platform)
    (again,) = plan(fleet, lenient).tasks
    outcome = transfer(
        again,
        fleet,
        lenient,
        platform,
        on_progress=lambda progress: answered.append(progress.description),
    )
    assert (outcome.verdict, answered) == (Verdict.PASSED, [])
    assert len(platform.registry.versions("parity")) == 2

    platform.catalog.set_alias_manually(FAMILY, "champion", v2.number)
    apply_verdicts(observe(FAMILY, platform), lenient, PromotionPolicy(), platform)
    assert resolve("parity", platform).number == transferred.number
    assert "| parity |" in report(FAMILY, platform).markdown()
    platform.catalog.set_alias_manually(FAMILY, "champion", 1)
    apply_verdicts(observe(FAMILY, platform), lenient, PromotionPolicy(), platform)
    assert resolve("parity", platform).number == trained.number


def test_an_existing_peft_folder_is_adopted_once(life, tmp_path):
    platform, _, recipe, trained, _ = life
    folder = platform.registry.download(trained, tmp_path / "theirs")
    adopted = adopt("theirs", str(folder), FAMILY, recipe.suites, platform)  # by its revision
    assert (adopted.base.version, adopted.recipe_sha256) == ("v1", "")
    assert adopted.weights_sha256 == trained.weights_sha256
    assert (
        adopt("theirs", str(folder), FAMILY, recipe.suites, platform, base_version="v1") == adopted
    )
    assert resolve("theirs", platform, base="v1") == adopted


def test_adoption_fails_without_a_base_version_or_weights(life, tmp_path):
    platform, _, recipe, trained, _ = life
    folder = platform.registry.download(trained, tmp_path / "theirs")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"revision": None}))
    with pytest.raises(NotFoundError, match="pass the base version"):
        adopt("lost", str(folder), FAMILY, recipe.suites, platform)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="is not a PEFT folder"):
        adopt("lost", str(folder), FAMILY, recipe.suites, platform)
    assert "lost" not in platform.registry.adapters(FAMILY)


def test_a_refused_upload_is_pending_again_only_after_a_change(life):
    platform, root, _, _, _ = life
    broken = root / "bases" / "v3"
    publish(root / "v1", str(broken), family=FAMILY, version="v3", store=FileStore())
    (broken / "config.json").write_text("{}")
    (upload,) = pending(platform, root_uri=str(root / "bases"))
    with pytest.raises(UploadError, match=r"config\.json"):
        ingest(upload, platform)
    assert pending(platform, root_uri=str(root / "bases")) == ()
    assert [base.version for base in platform.catalog.versions(FAMILY)] == ["v1", "v2"]
    (broken / "config.json").write_bytes((root / "v1" / "config.json").read_bytes())
    assert pending(platform, root_uri=str(root / "bases")) == (upload,)  # mended: looked at again
