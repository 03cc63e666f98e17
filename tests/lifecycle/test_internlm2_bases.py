"""Ingestion of an InternLM2 upload: its conversion to the Llama layout becomes ready."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.bases.internlm2_uploads import (
    CONFIG,
    internlm2_logits,
    random_weights,
    write_internlm2,
)
from trans_peft.bases.cache import download
from trans_peft.bases.conversion import CONVERTED_FROM
from trans_peft.bases.manifest import dump_manifest
from trans_peft.domain.base import Manifest, ManifestFile, Upload
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import UploadError
from trans_peft.lifecycle.bases import ingest, pending
from trans_peft.models import load_base

FAMILY = "internlm2"


@pytest.fixture
def platform(tmp_path):
    torch.set_num_threads(1)
    return replace(memory_platform(tmp_path / "work"), store=FileStore())


@pytest.fixture
def upload(tmp_path):
    """The files that an S3 client uploads: those of the model hub, then a manifest."""
    folder = write_internlm2(tmp_path / "bases" / "v1", shards=2)
    write_manifest(folder)
    return folder


def write_manifest(folder, version="v1"):
    files = [
        ManifestFile(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.iterdir())
        if path.name != Manifest.FILE_NAME
    ]
    manifest = Manifest(FAMILY, version, "v0", tuple(files))
    (folder / Manifest.FILE_NAME).write_bytes(dump_manifest(manifest))


def root(upload):
    return str(upload.parent)


def test_an_upload_becomes_ready_as_a_llama_base_that_takes_an_adapter(platform, upload, tmp_path):
    before = platform.store.list(str(upload))
    (found,) = pending(platform, root_uri=root(upload))
    base = ingest(found, platform)
    assert (base.family, base.version, base.parent, base.ready) == (FAMILY, "v1", "v0", True)
    assert base.uri == f"{upload}.as-llama"
    assert platform.store.list(str(upload)) == before
    assert pending(platform, root_uri=root(upload)) == ()
    assert ingest(found, platform) == base
    assert platform.catalog.versions(FAMILY) == (base,)
    assert [*(tmp_path / "work" / "converted").glob("*/")] == []

    known = platform.catalog.fingerprint(base)
    assert known.architecture == "LlamaForCausalLM"
    folder = download(base.uri, platform.store, tmp_path / "cache", fingerprint=known)
    loaded = load_base(folder, "float32", "cpu")
    ids = torch.arange(65, 81)
    with torch.no_grad():
        expected = internlm2_logits(CONFIG, random_weights(CONFIG), ids)
        torch.testing.assert_close(
            loaded.model(ids[None]).logits[0], expected, rtol=1e-5, atol=2e-5
        )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(
        loaded.model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    with torch.no_grad():
        assert not torch.equal(adapted(ids[None]).logits[0], expected)
    assert [*tmp_path.rglob("EXECUTED")] == []


def test_the_registry_records_the_conversion(platform, upload):
    base = ingest(Upload(str(upload)), platform)
    provenance = json.loads((upload.with_name("v1.as-llama") / CONVERTED_FROM).read_text())
    assert provenance["uri"] == str(upload)
    assert {file["name"] for file in provenance["files"]} == {
        path.name for path in upload.iterdir() if path.name != Manifest.FILE_NAME
    }
    source = platform.catalog._sources[FAMILY, base.number]
    assert source == f"upload, converted from {upload}, manifest"


def test_a_manually_registered_version_is_converted_too(platform, tmp_path):
    folder = write_internlm2(tmp_path / "elsewhere" / "base")
    number = platform.catalog.register_manually(FAMILY, str(folder))
    (found,) = pending(platform)
    base = ingest(found, platform)
    assert (base.number, base.ready, base.uri) == (number, True, f"{folder}.as-llama")
    assert pending(platform, root_uri=str(tmp_path / "elsewhere")) == ()


@pytest.mark.parametrize("written", range(9))
def test_an_interrupted_ingestion_leaves_no_pending_upload_behind(platform, upload, written):
    class Killed(FileStore):
        left = written

        def write(self, uri, data):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            super().write(uri, data)

    with pytest.raises(KeyboardInterrupt):
        ingest(Upload(str(upload)), replace(platform, store=Killed()))
    assert platform.catalog.families() == ()
    assert pending(platform, root_uri=root(upload)) == (Upload(str(upload)),)
    assert ingest(Upload(str(upload)), platform).ready


def test_an_ingestion_killed_before_registration_is_repeated_from_the_upload(platform, upload):
    class Unreachable:
        families, versions = platform.catalog.families, platform.catalog.versions

        def make_ready(self, *arguments, **named):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(Upload(str(upload)), replace(platform, catalog=Unreachable()))
    assert (upload.with_name("v1.as-llama") / Manifest.FILE_NAME).is_file()
    assert pending(platform, root_uri=root(upload)) == (Upload(str(upload)),)


def test_files_that_differ_from_the_manifest_are_refused_once(platform, upload):
    weights = upload / "model-00002-of-00002.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    (upload / "modeling_internlm2.py").write_text("# other code of the very same length?")
    with pytest.raises(UploadError) as caught:
        ingest(Upload(str(upload)), platform)
    assert caught.match(r"modeling_internlm2\.py: \d+ bytes, the manifest lists \d+")
    assert pending(platform, root_uri=root(upload)) == ()
    write_manifest(upload)
    assert pending(platform, root_uri=root(upload)) == (Upload(str(upload)),)
    ingest(Upload(str(upload)), platform)


def test_a_flipped_bit_is_refused_before_anything_is_published(platform, upload):
    weights = upload / "model-00002-of-00002.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UploadError, match=r"00002\.safetensors: sha256 \w+, the manifest lists"):
        ingest(Upload(str(upload)), platform)
    assert not upload.with_name("v1.as-llama").exists()


def test_an_update_of_the_family_is_a_version_of_its_own(platform, upload):
    ingest(Upload(str(upload)), platform)
    config = CONFIG | {"rope_scaling": {"type": "dynamic", "factor": 3.0}}
    second = write_internlm2(upload.with_name("v2"), config, random_weights(CONFIG, seed=1))
    write_manifest(second, "v2")
    (found,) = pending(platform, root_uri=root(upload))
    ingest(found, platform)
    assert [base.version for base in platform.catalog.versions(FAMILY)] == ["v1", "v2"]
