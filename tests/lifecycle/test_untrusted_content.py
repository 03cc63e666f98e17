"""Ingestion and adoption of content that would hang or exhaust a worker."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from tokenizers import normalizers

from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_base
from trans_peft.bases.publish import publish
from trans_peft.domain.base import Manifest, Upload
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.places import Places
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import AccessError, AdapterError, TransPeftError, UploadError
from trans_peft.isolation import CallLimits
from trans_peft.lifecycle import adopt as adoption
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.bases import ingest, pending
from trans_peft.methods import patterns

FAMILY = "tiny"


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A platform with v1 ready, an adapter's folder and a suite."""
    root = tmp_path_factory.mktemp("untrusted")
    platform = replace(memory_platform(root / "work"), store=FileStore())
    uri = str(root / "bases" / "v1")
    publish(write_tiny_base(root / "v1"), uri, family=FAMILY, version="v1", store=platform.store)
    ingest(Upload(uri), platform)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny_model(), config).save_pretrained(root / "peft")
    rows = [{"id": f"{i}", "prompt": f"{i} is", "completion": " odd"} for i in range(4)]
    (root / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = Suite("parity", DataSource(str(root / "eval.jsonl")), max_new_tokens=4)
    return platform, root, suite


@pytest.fixture
def adopted(setup, tmp_path):
    """Return a function that adopts the adapter with other options in its config."""
    platform, root, suite = setup

    def run(files: dict[str, bytes] | None = None, **changes):
        folder = tmp_path / "peft"
        folder.mkdir()
        for file in (root / "peft").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)
        return adopt("theirs", str(folder), FAMILY, [suite], platform, base_version="v1")

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(([a-z_.0-9]+)+)+X"},
        {"rank_pattern": {r"(([a-z_.0-9]+)+)+X": 2}},
        {"r": 400_000_000},
        {"r": 16_000_000},
        {"target_modules": "(q_proj"},
        {"xlora_path": "x" * (1 << 20)},
    ],
)
def test_an_adapter_that_exceeds_the_limits_is_not_adopted(setup, adopted, changes, monkeypatch):
    monkeypatch.setattr(patterns, "_LIMITS", CallLimits(cpu_s=1))
    with pytest.raises(TransPeftError):
        adopted(**changes)
    assert "theirs" not in setup[0].registry.adapters(FAMILY)


def test_a_worker_reads_adapters_and_suites_from_allowed_places_only(setup, tmp_path):
    platform, root, suite = setup
    closed = replace(platform, store=FileStore(places=Places((root / "bases",), ())))
    with pytest.raises(AccessError, match="may not read"):
        adopt("theirs", str(root / "peft"), FAMILY, [suite], closed, base_version="v1")
    pinned = replace(suite, data=suite.data.pinned("0" * 64))
    with pytest.raises(AccessError, match="may not read"):
        adopt("theirs", str(root / "peft"), FAMILY, [pinned], closed, base_version="v1")


def growing(tokenizer):
    rule = normalizers.Replace("a", "a" * 1500)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([rule] * 3)


def looping(tokenizer):
    tokenizer.chat_template = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    )


def broken(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}"


@pytest.mark.parametrize("spoil", [growing, looping, broken])
def test_a_base_whose_tokenizer_exceeds_the_limits_is_refused(setup, tmp_path, spoil, monkeypatch):
    from trans_peft.bases import model_check

    monkeypatch.setattr(
        model_check, "LIMITS", replace(model_check.LIMITS, cpu_s=5, memory_bytes=1 << 30)
    )
    platform, _, _ = setup
    folder = write_tiny_base(tmp_path / "v2")
    tokenizer = tiny_tokenizer()
    spoil(tokenizer)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UploadError, match=r"tokenizer|template|processor time|memory"):
        publish(folder, str(tmp_path / "up"), family=FAMILY, version="v2", store=platform.store)
        ingest(Upload(str(tmp_path / "up")), platform)
    assert [base.version for base in platform.catalog.versions(FAMILY)] == ["v1"]


@pytest.mark.parametrize("name", [*adoption._MAX_BYTES])
def test_a_file_that_is_too_large_is_not_copied(adopted, name, monkeypatch):
    monkeypatch.setitem(adoption._MAX_BYTES, name, 1)
    with pytest.raises(AdapterError, match=f"the file {name} in .* is too large"):
        adopted({name: b"{}"} if "template" in name or "tokenizer" in name else {})


def test_a_long_configuration_is_too_large(adopted):
    with pytest.raises(AdapterError, match="too large"):
        adopted(note="x" * (1 << 20))


def test_a_deeply_nested_upload_is_refused_once(setup, tmp_path):
    platform, _, _ = setup
    folder = write_tiny_base(tmp_path / "v3")
    uri = str(tmp_path / "uploads" / "v3")
    publish(folder, uri, family=FAMILY, version="v3", store=platform.store)
    config = Path(uri) / "config.json"
    config.write_text(config.read_text().rstrip()[:-1] + ',"x":' + "[" * 900 + "]" * 900 + "}")
    (Path(uri) / Manifest.FILE_NAME).unlink()
    platform.catalog.register_manually(FAMILY, uri)
    (upload,) = [upload for upload in pending(platform) if upload.uri == uri]
    with pytest.raises(UploadError, match="nested more than"):
        ingest(upload, platform)
    assert uri not in [upload.uri for upload in pending(platform)]
