"""An adapter keeps its chat template on every base: in adoption, training and transfer."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from trans_peft.bases.publish import publish
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.base import Upload
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import GatePolicy, Suite
from trans_peft.domain.outcome import Reason, TransferTask
from trans_peft.domain.recipe import OptimizerSettings, TrainingRecipe
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import BaseUnreadableError, ContentError, DataError
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.base_files import tokenizer_folder
from trans_peft.lifecycle.bases import ingest
from trans_peft.lifecycle.reconcile import observe_adapter
from trans_peft.lifecycle.resolve import find_base, resolve
from trans_peft.lifecycle.train import train
from trans_peft.lifecycle.transfer import transfer
from trans_peft.models import adapter_weights_sha256
from trans_peft.text.chat import pinned
from trans_peft.text.saved_template import TEMPLATE_NAME, saved_template
from trans_peft.validation import engine

FAMILY = "tiny"
NEW = "{{ strftime_now('%Y') }}:{% for m in messages %}[{{ m.content }}]{% endfor %}"
OWN = "{% for m in messages %}({{ m.content }}){% endfor %}"


def write_base(folder, template, noise=0.0):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def add_base(platform, root, version, template, noise=0.0):
    folder = write_base(root / version, template, noise)
    uri = str(root / "bases" / version)
    publish(folder, uri, family=FAMILY, version=version, store=FileStore())
    return ingest(Upload(uri), platform)


@pytest.fixture
def setup(tmp_path):
    """v1 and v2 with different chat templates, and a suite of two chats."""
    platform = replace(memory_platform(tmp_path / "work"), store=FileStore())
    add_base(platform, tmp_path, "v1", CHAT_TEMPLATE)
    add_base(platform, tmp_path, "v2", NEW, noise=1e-3)
    rows = [
        [{"role": "user", "content": f"{i} is"}, {"role": "assistant", "content": "odd"}]
        for i in range(2)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": r}) for r in rows))
    return platform, tmp_path, (Suite("s", DataSource(str(tmp_path / "chats.jsonl"))),)


@pytest.fixture
def prompts(monkeypatch):
    """The prompts of every evaluation as text, in order."""
    prompts, generate = [], engine.generate

    def recording(model, tokenizer, ids, **options):
        prompts.append([tokenizer.decode(row) for row in ids])
        return generate(model, tokenizer, ids, **options)

    monkeypatch.setattr(engine, "generate", recording)
    return prompts


def write_adapter(folder, template=None):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(2)
    get_peft_model(tiny_model(), config).save_pretrained(folder)
    if template is not None:
        (folder / TEMPLATE_NAME).write_text(template)
    return folder


def rendered(template):
    tokenizer = tiny_tokenizer()
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{i} is"}],
            chat_template=pinned(template),
            tokenize=False,
            add_generation_prompt=True,
        )
        for i in range(2)
    ]


def judge(platform, adapter, **policy):
    v2 = find_base(FAMILY, "v2", platform).ref
    task = TransferTask(adapter.adapter, adapter.number, v2, Reason.NO_VERDICT)
    fleet = observe_adapter(task.adapter, FAMILY, platform)
    return transfer(task, fleet, GatePolicy(margin_points=60.0, **policy), platform)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("own", "kept", "expected"),
    [(None, CHAT_TEMPLATE, "of tiny/v1"), (OWN, OWN, "adapter"), (NEW, NEW, "adapter")],
)
def test_an_adopted_adapter_keeps_one_template_on_both_bases(
    own, kept, expected, sequential, setup, prompts
):
    platform, root, suites = setup
    folder = write_adapter(root / "peft", own)
    adopted = adopt("theirs", str(folder), FAMILY, suites, platform, base_version="v1")
    assert prompts == [rendered(kept)]
    assert platform.registry.tags(adopted)["chat_template"] == expected
    prompts.clear()
    outcome = judge(platform, adopted, sequential=sequential)
    # The adapter's chats are rendered with its own template, those of the bare base with v2's.
    assert sorted(map(sorted, prompts)) == sorted([rendered(kept), rendered(NEW)])
    assert any("keeps the one it was trained with" in n for n in outcome.compatibility.notes)
    versions = platform.registry.versions("theirs")
    for version in (adopted, versions[-1]):
        served = platform.registry.download(version, root / f"served-{version.number}")
        assert saved_template(served) == pinned(kept)
        assert adapter_weights_sha256(served) == version.weights_sha256
    assert adopt("theirs", str(folder), FAMILY, suites, platform, base_version="v1") == adopted
    assert resolve("theirs", platform, base="v1") == adopted


def test_a_template_in_tokenizer_config_belongs_to_the_adapter(setup, prompts):
    platform, root, suites = setup
    folder = write_adapter(root / "peft")
    settings = {"chat_template": [{"name": "default", "template": OWN}, {"name": "x"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    adopt("theirs", str(folder), FAMILY, suites, platform, base_version="v1")
    assert prompts == [rendered(OWN)]


@pytest.mark.parametrize(
    ("template", "expected"), [("{{ 1 | random }}", "random"), ("{% if %}", "TemplateSyntaxError")]
)
def test_an_adapter_whose_template_cannot_be_used_is_not_adopted(template, expected, setup):
    platform, root, suites = setup
    folder = write_adapter(root / "peft", template)
    with pytest.raises(ContentError, match=expected):
        adopt("theirs", str(folder), FAMILY, suites, platform, base_version="v1")
    assert "theirs" not in platform.registry.adapters(FAMILY)


@pytest.mark.slow
def test_a_trained_adapter_keeps_the_template_it_was_trained_with(setup, prompts):
    platform, root, suites = setup
    recipe = TrainingRecipe(
        adapter="mine",
        family=FAMILY,
        base_version="v1",
        data=suites[0].data,
        suites=suites,
        spec=AdapterSpec("LORA", {"r": 2, "target_modules": ["q_proj"]}),
        optimizer=OptimizerSettings(learning_rate=1e-2, steps=1, batch_size=2),
    )
    trained = train(recipe, platform, on_event=lambda _: None)
    assert prompts == [rendered(CHAT_TEMPLATE)]
    served = platform.registry.download(trained, root / "served")
    assert saved_template(served) == CHAT_TEMPLATE
    prompts.clear()
    judge(platform, trained)
    assert sorted(prompts) == sorted([rendered(CHAT_TEMPLATE), rendered(NEW)])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", lambda text: text.replace("<eos>", "<pad>")),
        ("tokenizer.json", lambda text: text.replace('"a"', '"#"')),
        ("chat_template.jinja", lambda text: text + "!"),
        ("config.json", lambda text: text.replace('"llama"', '"gpt2"')),
        ("special_tokens_map.json", lambda text: '{"bos_token": "a"}'),
    ],
)
def test_a_tokenizer_that_was_rewritten_after_ready_is_not_compared(name, change, setup):
    platform, root, suites = setup
    adopted = adopt(
        "theirs", str(write_adapter(root / "peft")), FAMILY, suites, platform, base_version="v1"
    )
    path = root / "bases" / "v2" / name
    path.write_text(change(path.read_text() if path.exists() else ""))
    v2 = next(base for base in platform.catalog.versions(FAMILY) if base.version == "v2")
    if name == "special_tokens_map.json":  # it came beside the manifest, so it does not count
        tokenizer_folder(v2, platform, root / "tokenizer")
        assert not (root / "tokenizer" / name).exists()
        return
    with pytest.raises(BaseUnreadableError, match="changed after the base was made ready"):
        tokenizer_folder(v2, platform, root / "tokenizer")
    with pytest.raises(BaseUnreadableError):
        judge(platform, adopted)


def test_an_adapter_may_bring_a_template_to_a_base_without_one(setup, prompts):
    platform, root, suites = setup
    add_base(platform, root, "v3", None)
    folder = write_adapter(root / "peft", OWN)
    adopt("theirs", str(folder), FAMILY, suites, platform, base_version="v3")
    assert prompts == [rendered(OWN)]
    with pytest.raises(DataError, match="no chat template"):
        adopt("bare", str(write_adapter(root / "x")), FAMILY, suites, platform, base_version="v3")
