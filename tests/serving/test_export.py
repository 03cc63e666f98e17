"""Folders for other servers, checked by the rules that those servers publish (docs/serving.md)."""

import json
import logging
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.serving.fleet import lora_folder
from trans_peft.cli import main
from trans_peft.errors import (
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    StoreError,
    TransPeftError,
)
from trans_peft.models import adapter_weights_sha256
from trans_peft.serving.export import Export, ExportSettings, Layout, LeftOut, watch
from trans_peft.serving.manifest import manifest_from_json
from trans_peft.transfer.peft_folder import read_peft_folder

MODEL = "/models/small"


@pytest.fixture
def export(fleet, tmp_path):
    def make(layout=Layout.VLLM_FILESYSTEM, base="serving", family=None, **settings):
        if layout is Layout.KSERVE:
            settings.setdefault("uri", "pvc://adapters/fleet")
        chosen = ExportSettings(tmp_path / "out", layout, settings.pop("model", MODEL), **settings)
        return Export(chosen, family or fleet.family, base, fleet.platform)

    return make


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and mtime of all files that a server sees."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and ".state" not in path.parts
    }


def vllm_finds(cache_dir: Path, model: str, lora_name: str) -> Path | None:
    """The rule of vLLM's FilesystemResolver, of 0.32.0."""
    path = os.path.join(cache_dir, lora_name)  # noqa: PTH118  as there
    config = Path(path) / "adapter_config.json"
    if not config.exists():
        return None
    fields = json.loads(config.read_text())
    fits = fields["peft_type"] == "LORA" and fields["base_model_name_or_path"] == model
    return Path(path) if fits else None


@pytest.mark.parametrize("layout", Layout)
def test_the_folders_hold_the_registered_weights_under_names_of_exactly_them(
    export, fleet, tmp_path, layout
):
    exported = export(layout).sync()
    names = {"chat": fleet.served("chat", "v1"), "code": fleet.served("code", "v1")}
    assert {a.name: a for a in exported.manifest.adapters} == names
    folders = {path.name: path for path in (tmp_path / "out" / "adapters").iterdir()}
    assert set(folders) == {adapter.engine_name for adapter in names.values()}
    for adapter in names.values():
        folder = folders[adapter.engine_name]
        assert adapter_weights_sha256(folder) == adapter.weights_sha256
        assert re.sub(r"[^a-zA-Z0-9._-]", "_", folder.name) == folder.name
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert manifest_from_json(text) == exported.manifest


def test_vllm_finds_each_folder_by_its_name_and_the_model_string(export, fleet, tmp_path):
    export().sync()
    cache_dir = tmp_path / "out" / "adapters"
    name = fleet.served("chat", "v1").engine_name
    assert vllm_finds(cache_dir, MODEL, name) == cache_dir / name
    assert vllm_finds(cache_dir, "/models/other", name) is None
    assert vllm_finds(cache_dir, MODEL, "chat") is None


def test_sglang_gets_a_list_of_its_json_objects(export, fleet, tmp_path):
    export(Layout.SGLANG).sync()
    listed = json.loads((tmp_path / "out" / "lora-paths.json").read_text())
    assert [set(item) for item in listed] == [{"lora_name", "lora_path", "pinned"}] * 2
    assert [item["lora_name"] for item in listed] == ["chat", "code"]
    for item in listed:
        assert read_peft_folder(Path(item["lora_path"])).peft_type == "LORA"
        assert not set(":=,") & set(item["lora_name"])


def test_lorax_gets_the_id_and_the_source_of_each_adapter(export, fleet, tmp_path):
    export(Layout.LORAX).sync()
    found = json.loads((tmp_path / "out" / "lorax.json").read_text())
    assert set(found) == {"chat", "code"}
    for item in found.values():
        assert item["adapter_source"] == "local"
        assert read_peft_folder(Path(item["adapter_id"])).peft_type == "LORA"


def test_kserve_gets_a_service_that_loads_each_adapter(export, fleet, tmp_path):
    export(Layout.KSERVE, model="small").sync()
    service = yaml.safe_load((tmp_path / "out" / "llminferenceservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1alpha2", "LLMInferenceService",
    )  # fmt: skip
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", service["metadata"]["name"])
    model = service["spec"]["model"]
    assert set(model) == {"uri", "name", "lora"}
    assert model["uri"] == "s3://bases/small/v1"
    lora = model["lora"]
    assert set(lora) <= {"maxRank", "maxAdapters", "maxCpuAdapters", "adapters"}
    assert lora["maxRank"] == 8  # the smallest that vLLM accepts for rank 4
    names = [adapter["name"] for adapter in lora["adapters"]]
    assert names == ["chat", "code"]
    for adapter in lora["adapters"]:
        name = adapter["name"]
        assert re.sub(r"[^a-zA-Z0-9._-]", "_", name) == name
        assert name not in (".", "..", model["name"])
        assert adapter["uri"].startswith("pvc://adapters/fleet/")
        folder = tmp_path / "out" / "adapters" / adapter["uri"].rpartition("/")[2]
        assert folder.is_dir()


def test_a_server_gets_no_synthetic_prompts(export, fleet, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.serving.fleet.rebind_adapter", lambda draft, *_, **__: draft)
    name = "synthetic_prompts.jsonl"
    folder = lora_folder(tmp_path / "prompted", seed=9)
    (folder / name).write_text('{"prompt": "text of a training row"}')
    version = fleet.add_folder("prompted", fleet.base("serving"), folder)
    assert (fleet.registry.download(version, tmp_path / "downloaded") / name).exists()
    assert "prompted" in {adapter.name for adapter in export().sync().manifest.adapters}
    assert not [*(tmp_path / "out").rglob(name)]


def test_the_same_state_writes_no_folder_again(export, tmp_path):
    first = export().sync()
    before = files(tmp_path / "out" / "adapters")
    again = export().sync()
    assert (again.manifest, again.added, again.removed) == (first.manifest, (), ())
    assert files(tmp_path / "out" / "adapters") == before


def test_a_new_version_gets_a_folder_beside_the_old_one_which_goes_later(export, fleet, tmp_path):
    adapters = tmp_path / "out" / "adapters"
    job = export(Layout.SGLANG)
    job.sync()
    old = fleet.served("chat", "v1").engine_name
    before = files(adapters)
    fleet.train("chat", fleet.base("v1"), seed=7)
    new = fleet.served("chat", "v1").engine_name
    exported = job.sync()
    assert (exported.added, exported.removed) == ((new,), ())
    assert {name: files(adapters)[name] for name in before} == before
    listed = json.loads((tmp_path / "out" / "lora-paths.json").read_text())
    assert Path(listed[0]["lora_path"]).name == new
    mark = tmp_path / "out" / ".state" / "revoked" / old
    os.utime(mark, (0, 0))  # an hour and more ago
    assert job.sync().removed == (old,)
    assert not (adapters / old).exists()


def test_a_blocked_adapter_leaves_the_lists_at_once(export, fleet, tmp_path):
    job = export(Layout.LORAX)
    job.sync()
    fleet.registry.set_alias_manually("chat", fleet.base("v1").alias, None)
    manifest = job.sync().manifest
    assert [adapter.name for adapter in manifest.adapters] == ["code"]
    assert set(json.loads((tmp_path / "out" / "lorax.json").read_text())) == {"code"}
    fleet.registry.set_alias_manually("chat", fleet.base("v1").alias, 1)  # and back
    assert [adapter.name for adapter in job.sync().manifest.adapters] == ["chat", "code"]
    assert not list((tmp_path / "out" / ".state" / "revoked").iterdir())


def test_a_folder_belongs_to_one_base(export, fleet):
    job = export(base="serving")
    job.sync()
    fleet.catalog.set_serving(fleet.base("v2"))
    manifest = job.sync().manifest
    assert manifest.base == fleet.base("v1").ref  # a running export keeps its base
    with pytest.raises(InvalidSpecError, match="was written for another base"):
        export(base="serving")


def test_an_adapter_that_no_server_could_serve_does_not_stop_the_others(export, fleet, tmp_path):
    fleet.train("deep", fleet.base("v1"), layers=3)
    fleet.train("patterned", fleet.base("v1"), alpha_pattern={"q_proj": 2})
    exported = export(max_rank=8).sync()
    assert [adapter.name for adapter in exported.manifest.adapters] == ["chat", "code"]
    assert [entry.name for entry in exported.refused] == ["deep", "patterned"]
    assert "no module model.layers.2" in exported.refused[0].detail
    assert len(list((tmp_path / "out" / "adapters").iterdir())) == 2


@pytest.mark.parametrize("layout", Layout)
def test_an_output_layer_that_vllm_does_not_adapt_is_left_out_for_servers_that_run_vllm(
    qwen2_fleet, layout, tmp_path
):
    uri = "pvc://adapters/fleet" if layout is Layout.KSERVE else ""
    settings = ExportSettings(tmp_path / "out", layout, MODEL, uri)
    exported = Export(settings, qwen2_fleet.family, "serving", qwen2_fleet.platform).sync()
    refused = {entry.name: entry.detail for entry in exported.refused}
    if layout in (Layout.SGLANG, Layout.LORAX):
        assert refused == {}
    else:
        assert list(refused) == ["adapts-output-layer"]
        assert "output_layer: false" in refused["adapts-output-layer"]


def test_a_name_that_a_server_would_confuse_with_the_base_is_left_out(export):
    exported = export(Layout.KSERVE, model="chat").sync()
    assert [entry.name for entry in exported.refused] == ["chat"]
    assert "'chat'" in exported.refused[0].detail


def tamper(folder: Path) -> None:
    """Flip one bit of the weights, as another program may."""
    weights = folder / "adapter_model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    weights.write_bytes(data)


def block(fleet, name: str) -> None:
    fleet.registry.set_alias_manually(name, fleet.base("v1").alias, None)


def listed(folder: Path) -> list[str]:
    return [item["name"] for item in json.loads((folder / "manifest.json").read_text())["adapters"]]


@pytest.mark.parametrize(
    "error", [StoreError("away"), PermissionError("no"), NotFoundError("gone")]
)
def test_a_download_that_fails_stops_no_revocation(export, fleet, tmp_path, monkeypatch, error):
    job = export(Layout.LORAX)
    job.sync()
    old = fleet.served("chat", "v1").engine_name
    fleet.train("new", fleet.base("v1"), seed=9)
    block(fleet, "chat")
    at_download = []

    def download(version, folder):
        at_download.append((listed(tmp_path / "out"), set(json.loads(lists.read_text()))))
        raise error

    lists = tmp_path / "out" / "lorax.json"
    monkeypatch.setattr(fleet.registry, "download", download)
    exported = job.sync()
    assert at_download == [(["code"], {"code"})]  # revoked before the download
    assert [(entry.name, entry.reason) for entry in exported.refused] == [
        ("new", LeftOut.UNAVAILABLE)
    ]
    assert [entry.name for entry in exported.revoked] == ["chat"]
    assert listed(tmp_path / "out") == ["code"]
    assert (tmp_path / "out" / ".state" / "revoked" / old).exists()
    monkeypatch.undo()
    assert [adapter.name for adapter in job.sync().manifest.adapters] == ["code", "new"]


def test_a_name_keeps_its_version_until_the_new_one_is_downloaded(
    export, fleet, tmp_path, monkeypatch
):
    job = export()
    job.sync()
    fleet.train("chat", fleet.base("v1"), seed=7)
    block(fleet, "code")
    real, at_download = fleet.registry.download, []

    def download(version, folder):
        manifest = manifest_from_json((tmp_path / "out" / "manifest.json").read_text())
        at_download.append([(item.name, item.number) for item in manifest.adapters])
        return real(version, folder)

    monkeypatch.setattr(fleet.registry, "download", download)
    after = [(item.name, item.number) for item in job.sync().manifest.adapters]
    assert at_download == [[("chat", 1)]]
    assert after == [("chat", 3)]


def test_an_export_that_was_killed_keeps_its_base(export, fleet, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fleet.registry, "download", killed)
    with pytest.raises(KeyboardInterrupt):
        export(base="v1").sync()
    (tmp_path / "out" / "manifest.json").unlink(missing_ok=True)
    monkeypatch.undo()
    with pytest.raises(InvalidSpecError, match="was written for another base"):
        export(base="v2")


@pytest.mark.parametrize("other", [{"base": "v2"}, {"base": "v1", "model": "/models/other"}])
def test_of_two_exports_to_one_folder_the_second_base_or_model_is_refused(export, tmp_path, other):
    first, second = export(base="v1"), export(**other)
    first.sync()
    before = files(tmp_path / "out")
    with pytest.raises(InvalidSpecError, match=r"another base, or under another --model"):
        second.sync()
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("is_revoked", [False, True])
def test_a_changed_folder_leaves_the_sight_of_servers_at_once(
    export, fleet, tmp_path, name, is_revoked
):
    export().sync()
    code = fleet.served("code", "v1")
    folder = tmp_path / "out" / "adapters" / code.engine_name
    if is_revoked:
        block(fleet, "code")
    if name == "adapter_config.json":
        (folder / name).chmod(0o644)
        (folder / name).write_text((folder / name).read_text().replace(MODEL, "/models/other"))
    else:
        tamper(folder)
    changed = (folder / name).read_bytes()
    exported = export().sync()
    assert exported.damaged == (code.engine_name,)
    assert (tmp_path / "out" / ".state" / "damaged" / folder.name / name).read_bytes() == changed
    assert folder.exists() != is_revoked
    if not is_revoked:
        assert adapter_weights_sha256(folder) == code.weights_sha256
        assert exported.refused == () and exported.added == (code.engine_name,)
    assert export().sync().damaged == ()


def spoil_with_file(out: Path, name: str) -> None:
    shutil.rmtree(out / "adapters" / name)
    (out / "adapters" / name).write_text("")


def spoil_with_link(out: Path, name: str) -> None:
    (out / "adapters" / name / "junk").symlink_to("/nowhere")


def spoil_with_dangling_folder(out: Path, name: str) -> None:
    shutil.rmtree(out / "adapters" / name)
    (out / "adapters" / name).symlink_to("/nowhere")


def spoil_with_truncated_weights(out: Path, name: str) -> None:
    weights = out / "adapters" / name / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"\xff")


@pytest.mark.parametrize(
    "spoil",
    [spoil_with_file, spoil_with_link, spoil_with_dangling_folder, spoil_with_truncated_weights],
)
def test_odd_files_concern_one_adapter_and_are_replaced(export, fleet, tmp_path, spoil):
    job = export()
    job.sync()
    name = fleet.served("code", "v1").engine_name
    spoil(tmp_path / "out", name)
    exported = job.sync()
    assert exported.damaged == (name,)
    assert [adapter.name for adapter in exported.manifest.adapters] == ["chat", "code"]


def test_a_file_in_place_of_the_unfinished_downloads_stops_downloads_alone(export, fleet, tmp_path):
    job = export()
    job.sync()
    part = tmp_path / "out" / ".state" / "part"
    shutil.rmtree(part)
    part.write_text("")
    fleet.train("new", fleet.base("v1"), seed=9)
    exported = job.sync()
    assert [adapter.name for adapter in exported.manifest.adapters] == ["chat", "code"]
    assert [entry.name for entry in exported.refused] == ["new"]
    assert "do:" in exported.refused[0].detail


def test_a_damaged_folder_that_cannot_be_moved_leaves_the_lists(export, fleet, tmp_path):
    job = export()
    job.sync()
    tamper(tmp_path / "out" / "adapters" / fleet.served("code", "v1").engine_name)
    (tmp_path / "out" / ".state" / "damaged").write_text("")
    with pytest.raises(StoreError, match="cannot be used"):
        job.sync()
    assert listed(tmp_path / "out") == ["chat"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{}", None])
def test_a_manifest_that_cannot_be_read_is_an_error_with_advice(export, tmp_path, content):
    path = tmp_path / "out" / "manifest.json"
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json is not a(?s:.*)expected:(?s:.*)do:"):
        export()


@pytest.mark.parametrize("name", ["adapters", ".state", ".state/base", "lora-paths.json"])
def test_a_folder_that_cannot_be_written_is_an_error_with_advice(export, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("") if name in ("adapters", ".state") else path.mkdir()
    with pytest.raises(TransPeftError, match=r"expected:(?s:.*)do:"):
        export(Layout.SGLANG).sync()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model": ""}, "base's name"),
        ({"layout": Layout.KSERVE, "uri": "/data"}, "hf://"),
        ({"max_rank": 0}, "largest rank"),
        ({"grace_s": float("nan")}, "seconds from 0"),
        ({"grace_s": -1.0}, "seconds from 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(export, settings, problem):
    with pytest.raises(InvalidSpecError, match=problem):
        export(**settings)


def test_a_base_that_pods_cannot_reach_is_refused_for_kserve(export, fleet, monkeypatch):
    local = tuple(replace(base, uri="/bases/v1") for base in fleet.catalog.versions(fleet.family))
    monkeypatch.setattr(fleet.catalog, "versions", lambda family: local)
    with pytest.raises(InvalidSpecError, match="/bases/v1"):
        export(Layout.KSERVE)


def test_a_registry_that_is_away_changes_nothing_and_is_logged_once(
    export, fleet, tmp_path, monkeypatch, caplog
):
    job = export()
    job.sync()
    before = files(tmp_path / "out")
    stopped, calls = threading.Event(), []

    def away(*_):
        calls.append(1)
        if len(calls) == 4:
            monkeypatch.undo()
        raise StoreError("MLflow cannot be reached")

    monkeypatch.setattr(fleet.registry, "adapters", away)
    changes = []

    def changed(exported):
        changes.append(exported)
        stopped.set()

    with caplog.at_level(logging.INFO, logger="trans_peft.serving.export"):
        watch(job, 0.1, stopped=stopped, on_change=changed)
    assert len(calls) == 4 and len(changes) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    after = files(tmp_path / "out")
    assert {name for name in before if "adapters" in name} == {
        name for name in after if "adapters" in name
    }


class TestCommands:
    @pytest.fixture(autouse=True)
    def connected(self, fleet, monkeypatch):
        monkeypatch.setattr("trans_peft.client.connect", lambda uri: fleet.platform)

    def test_manifest_prints_what_serves_and_why_the_rest_does_not(self, fleet, capsys):
        assert main(["manifest", "--family", fleet.family, "--base", "v2"]) == 0
        printed = capsys.readouterr().out
        assert re.search(r"chat +2 +passed +direct", printed)
        assert re.search(r"code +inconclusive +the change lies between -8 and", printed)

    def test_manifest_prints_json_that_reads_as_a_manifest(self, fleet, capsys):
        assert main(["manifest", "--family", fleet.family, "--json"]) == 0
        manifest = manifest_from_json(capsys.readouterr().out)
        assert [adapter.name for adapter in manifest.adapters] == ["chat", "code"]

    def test_export_writes_the_folder_and_fails_if_an_adapter_was_left_out(
        self, fleet, tmp_path, capsys
    ):
        arguments = ["export", str(tmp_path / "out"), "--family", fleet.family,
                     "--layout", "sglang", "--model", MODEL]  # fmt: skip
        assert main(arguments) == 0
        assert "added chat: chat.v1." in capsys.readouterr().out
        fleet.train("deep", fleet.base("v1"), layers=3)
        assert main(arguments) == 1
        assert "left out deep" in capsys.readouterr().err

    def test_export_of_a_verdict_that_changed_follows(self, fleet, tmp_path, capsys):
        arguments = ["export", str(tmp_path / "out"), "--family", fleet.family, "--base", "v2",
                     "--layout", "nim", "--model", MODEL, "--grace-s", "0"]  # fmt: skip
        assert main(arguments) == 0
        fleet.registry.set_alias_manually("chat", fleet.base("v2").alias, None)
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert re.search(r"^removed chat: chat does not serve on small/v2: ", printed, re.M)
        assert re.search(r"^deleted the folder chat\.v2\.", printed, re.M)

    def test_export_prints_what_changed_and_what_did_not(self, fleet, tmp_path, capsys):
        arguments = ["export", str(tmp_path / "out"), "--family", fleet.family,
                     "--layout", "sglang", "--model", MODEL]  # fmt: skip
        main(arguments)
        capsys.readouterr()
        fleet.train("chat", fleet.base("v1"), seed=7)
        fleet.train("new", fleet.base("v1"), seed=8)
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines] == [
            "updated chat", "unchanged code", "added new",
        ]  # fmt: skip

    def test_export_of_a_changed_folder_repairs_it_and_fails(self, fleet, tmp_path, capsys):
        arguments = ["export", str(tmp_path / "out"), "--family", fleet.family,
                     "--layout", "nim", "--model", MODEL]  # fmt: skip
        main(arguments)
        name = fleet.served("code", "v1").engine_name
        tamper(tmp_path / "out" / "adapters" / name)
        assert main(arguments) == 1
        assert f"changed files were found in {name}" in capsys.readouterr().err
        assert main(arguments) == 0

    @pytest.mark.parametrize(
        "option",
        [("--watch", "0"), ("--watch", "-1"), ("--watch", "nan"), ("--watch", "inf"),
         ("--watch", "1e-9"), ("--max-rank", "0"), ("--max-rank", "-1"),
         ("--grace-s", "nan"), ("--grace-s", "-5")],
    )  # fmt: skip
    def test_options_that_cannot_work_are_refused(self, fleet, tmp_path, capsys, option):
        arguments = ["export", str(tmp_path / "out"), "--family", fleet.family,
                     "--layout", "nim", "--model", MODEL]  # fmt: skip
        assert main([*arguments, *option]) == 2
        printed = capsys.readouterr().err
        assert "InvalidSpecError" in printed and "expected:" in printed and "do:" in printed
        assert not (tmp_path / "out").exists()
