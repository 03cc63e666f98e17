"""Owners of base families: the places and signing keys of their versions."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.bases.internlm2_uploads import write_internlm2
from tests.bases.test_signatures import write_keys
from tests.bases.uploads import model_of, model_weights
from tests.lifecycle.test_uploads import FILES, manifest_of, put, reconcile, registered
from trans_peft.bases.manifest import dump_manifest, parse_manifest
from trans_peft.bases.publish import publish
from trans_peft.bases.signatures import SIGNATURE_NAME, sign
from trans_peft.cli import main
from trans_peft.domain.base import Manifest, Upload
from trans_peft.domain.owners import FamilyRule, Owners
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import InvalidSpecError, StoreError, UploadError
from trans_peft.lifecycle.bases import ingest, pending

ROOT = "s3://bases"
HOME = f"{ROOT}/smol/v1"
OTHERS = model_of(model_weights(seed=1))


@pytest.fixture
def platform(tmp_path):
    return replace(memory_platform(tmp_path / "worker"), owners=Owners(ROOT))


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return [write_keys(folder, name, ec.generate_private_key(ec.SECP256R1())) for name in "ab"]


def upload(platform, prefix, key=None, files=FILES, **claimed):
    manifest = manifest_of(files, **claimed)
    signed = {SIGNATURE_NAME: sign(parse_manifest(manifest), key)} if key else {}
    put(platform, files | signed | {Manifest.FILE_NAME: dump_manifest(parse_manifest(manifest))},
        prefix)  # fmt: skip


def keyed(platform, public, **families):
    rules = {"smol": FamilyRule(key=str(public)), **families}
    return replace(platform, owners=Owners(ROOT, rules))


class TestPlaces:
    @pytest.mark.parametrize("name", ["SMOL", "Smol"])
    def test_a_name_that_differs_from_a_ruled_family_in_case_alone_is_refused(
        self, platform, keys, name
    ):
        upload(platform, f"{ROOT}/{name}/v1", family=name)
        ruled = keyed(platform, keys[0][1])
        (refusal,) = reconcile(ruled)
        assert "differs from that of smol in upper and lower case alone" in refusal
        assert registered(ruled) == {}

    def test_a_family_takes_versions_from_below_its_own_prefix(self, platform):
        upload(platform, HOME)
        upload(platform, f"{ROOT}/smol/a/deeper/place", version="v2", files=OTHERS)
        assert reconcile(platform) == []
        assert {base.version for base in registered(platform)["smol"]} == {"v1", "v2"}

    @pytest.mark.parametrize(
        "prefix",
        [
            *(f"{ROOT}/other/v2", f"{ROOT}/other/smol/v2", f"{ROOT}/smol-2/v2", f"{ROOT}/SMOL/v2"),
            *(f"{ROOT}/x", f"{ROOT}/other/../smol/v2", f"{ROOT}/smol/../other", f"{ROOT}//smol/v2"),
            *("s3://bases-2/smol/v2", "s3://data/smol/v2", "/bases/smol/v2", "s3:/bases/smol/v2"),
        ],
    )
    def test_uploads_below_another_prefix_are_refused(self, platform, prefix):
        upload(platform, HOME)
        reconcile(platform)
        before = registered(platform)
        upload(platform, prefix, version="v2", files=OTHERS)
        with pytest.raises(UploadError, match="cannot become a version of the base family smol"):
            ingest(Upload(prefix), platform)
        number = platform.catalog.register_manually("smol", prefix)  # straight in MLflow
        (waiting,) = (b for b in platform.catalog.versions("smol") if b.number == number)
        with pytest.raises(UploadError, match=f"a URI below {ROOT}/smol/"):
            ingest(Upload(prefix, waiting), platform)
        assert [b for b in registered(platform)["smol"] if b.ready] == list(before["smol"])
        assert pending(platform, root_uri=ROOT) == ()  # reported once

    def test_a_copy_elsewhere_does_not_change_the_uri_of_a_version(self, platform):
        upload(platform, f"{ROOT}/other/v1")  # the copy comes first, with the same manifest
        (message,) = reconcile(platform)
        assert "cannot become a version of the base family smol" in message
        assert registered(platform) == {}
        upload(platform, HOME)
        assert reconcile(platform) == []
        assert [base.uri for base in registered(platform)["smol"]] == [HOME]
        upload(platform, f"{ROOT}/other/again")
        number = platform.catalog.register_manually("smol", f"{ROOT}/other/again")
        reconcile(platform)
        ready = [base for base in registered(platform)["smol"] if base.ready]
        assert [base.uri for base in ready] == [HOME]
        assert number not in [base.number for base in ready]

    def test_only_the_manifest_of_a_refused_upload_is_read(self, platform):
        upload(platform, f"{ROOT}/other/v1")
        reads, plain = [], platform.store.read
        platform.store.read = lambda uri, **given: reads.append(uri) or plain(uri, **given)
        reconcile(platform)
        assert {uri.rpartition("/")[2] for uri in reads} == {Manifest.FILE_NAME}

    def test_the_operator_can_configure_other_places(self, platform):
        teams = FamilyRule(prefixes=("s3://team-a/bases/", "file:///mnt/bases"))
        platform = replace(platform, owners=Owners(ROOT, {"smol": teams}))
        for prefix in ("s3://team-a/bases/v1", "s3://team-a/bases", "/mnt/bases/v1"):
            assert platform.owners.objection("smol", prefix) is None
        for prefix in (HOME, "s3://team-a/basesx/v1", "s3://team-a/v1", "file:///mnt/bases/../x",
                       "file:///mnt/bases/%2e%2e/x", "/mnt/basesx/v1"):  # fmt: skip
            assert platform.owners.objection("smol", prefix) is not None
        assert platform.owners.objection("free", f"{ROOT}/free/v1") is None

    def test_a_refused_upload_is_pending_again_when_the_rules_change(self, platform):
        upload(platform, f"{ROOT}/team/v1")
        assert len(reconcile(platform)) == 1
        assert reconcile(platform) == []
        wider = Owners(ROOT, {"smol": FamilyRule(prefixes=(f"{ROOT}/team/",))})
        assert reconcile(replace(platform, owners=wider)) == []
        assert [base.version for base in registered(platform)["smol"]] == ["v1"]

    def test_without_a_root_any_place_is_accepted(self, tmp_path):
        platform = memory_platform(tmp_path)
        upload(platform, "s3://anywhere/x")
        assert ingest(Upload("s3://anywhere/x"), platform).ready

    @pytest.mark.parametrize("root", ["/bases", "file:///bases/", "bases", "s3://bases/"])
    def test_roots_of_every_kind(self, root):
        owners = Owners(root)
        home = root.rstrip("/")
        assert owners.objection("smol", f"{home}/smol/v1") is None
        assert owners.objection("smol", f"{home}/smol/v1/") is None
        assert owners.objection("smol", f"{home}/other/v1") is not None

    @pytest.mark.parametrize(
        "rules",
        [
            {"a b": FamilyRule()},
            {"smol": FamilyRule(prefixes=("",))},
            {"smol": FamilyRule(prefixes=("s3://b/../c",))},
            {"smol": FamilyRule(prefixes=("s3://",))},
        ],
    )
    def test_invalid_rules_are_refused(self, rules):
        with pytest.raises(InvalidSpecError):
            Owners(ROOT, rules)


class TestKeys:
    def test_a_signed_upload_becomes_ready(self, platform, keys):
        platform = keyed(platform, keys[0][1])
        upload(platform, HOME, keys[0][0])
        assert reconcile(platform) == []
        assert [base.version for base in registered(platform)["smol"]] == ["v1"]

    @pytest.mark.parametrize("signer", [None, 1], ids=["no signature", "another key"])
    def test_an_upload_without_the_owners_signature_is_refused_before_it_is_read(
        self, platform, keys, signer
    ):
        platform = keyed(platform, keys[0][1])
        upload(platform, HOME, None if signer is None else keys[signer][0])
        reads, plain = [], platform.store.read
        platform.store.read = lambda uri, **given: reads.append(uri) or plain(uri, **given)
        (message,) = reconcile(platform)
        assert "is not signed" in message or "the signature of the upload" in message
        assert registered(platform) == {}
        names = {uri.rpartition("/")[2] for uri in reads}
        assert names <= {Manifest.FILE_NAME, SIGNATURE_NAME}
        assert reconcile(platform) == []  # reported once
        upload(platform, HOME, keys[0][0])
        assert reconcile(platform) == []
        assert [base.version for base in registered(platform)["smol"]] == ["v1"]

    def test_a_file_that_differs_from_the_signed_manifest_is_refused(self, platform, keys):
        platform = keyed(platform, keys[0][1])
        upload(platform, HOME, keys[0][0])
        config = FILES["config.json"][:-1] + b" "
        platform.store.write(f"{HOME}/config.json", io.BytesIO(config))
        (message,) = reconcile(platform)
        assert "config.json: sha256" in message
        assert registered(platform) == {}

    def test_a_registered_version_needs_the_signature_too(self, platform, keys):
        platform = keyed(platform, keys[0][1])
        put(platform, FILES, HOME)  # files alone, as a person registers them in MLflow
        platform.catalog.register_manually("smol", HOME)
        (message,) = reconcile(platform)
        assert f"no {Manifest.FILE_NAME}" in message
        assert not any(base.ready for base in registered(platform)["smol"])

    def test_families_without_a_key_need_none(self, platform, keys):
        platform = keyed(platform, keys[0][1])
        upload(platform, f"{ROOT}/free/v1", family="free")
        upload(platform, f"{ROOT}/also/v1", keys[1][0], family="also")
        assert reconcile(platform) == []
        assert sorted(registered(platform)) == ["also", "free"]

    def test_a_manifest_that_is_replaced_after_the_check_is_an_error(self, platform, keys):
        platform = keyed(platform, keys[0][1])
        upload(platform, HOME, keys[0][0])
        forged = manifest_of(FILES, version="v9")
        plain, listed = platform.store.list, []

        def swapping(uri):
            found = plain(uri)
            listed.append(uri)
            if len(listed) == 3:  # after the memo's and the check's
                platform.store.write(f"{HOME}/{Manifest.FILE_NAME}", io.BytesIO(forged))
                return plain(uri)
            return found

        platform.store.list = swapping
        with pytest.raises((StoreError, OSError), match="changed while it was being read"):
            ingest(Upload(HOME), platform)
        assert registered(platform) == {}

    def test_a_missing_key_file_is_an_error_for_the_operator(self, platform, keys, tmp_path):
        upload(platform, HOME, keys[0][0])
        broken = keyed(platform, tmp_path / "missing.pem")
        for _ in range(2):  # reported each time: the missing key is not an error of the upload
            (message,) = reconcile(broken)
            assert "TRANS_PEFT_FAMILIES" in message
        assert reconcile(keyed(platform, keys[0][1])) == []
        assert [base.version for base in registered(platform)["smol"]] == ["v1"]

    def test_an_internlm2_upload_is_converted_after_its_signature_was_checked(self, tmp_path, keys):
        folder = tmp_path / "bases" / "lm" / "v1"
        write_internlm2(folder)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        manifest = parse_manifest(manifest_of(files, family="lm"))
        rules = {"lm": FamilyRule(key=str(keys[0][1]))}
        platform = replace(
            memory_platform(tmp_path / "worker"),
            store=FileStore(),
            owners=Owners(str(tmp_path / "bases"), rules),
        )
        (folder / Manifest.FILE_NAME).write_bytes(dump_manifest(manifest))
        with pytest.raises(UploadError, match="is not signed"):
            ingest(Upload(str(folder)), platform)
        assert not Path(f"{folder}.as-llama").exists()
        (folder / SIGNATURE_NAME).write_bytes(sign(manifest, keys[0][0]))
        base = ingest(Upload(str(folder)), platform)
        assert (base.uri, base.ready) == (f"{folder}.as-llama", True)
        assert pending(platform, root_uri=str(tmp_path / "bases")) == ()


def test_the_command_line_signs(tmp_path, keys):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    home = tmp_path / "bases" / "smol" / "v1"
    arguments = ["publish", str(folder), str(home), "--family", "smol", "--version", "v1"]
    assert main([*arguments, "--sign-key", str(keys[0][0])]) == 0
    rules = {"smol": FamilyRule(key=str(keys[0][1]))}
    platform = replace(
        memory_platform(tmp_path / "worker"),
        store=FileStore(),
        owners=Owners(str(tmp_path / "bases"), rules),
    )
    assert ingest(Upload(str(home)), platform).ready


def test_the_settings_of_a_worker_name_prefixes_and_keys(monkeypatch, tmp_path):
    from tasks.settings import Settings

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setenv("TRANS_PEFT_STATE", str(tmp_path))
    monkeypatch.setenv("TRANS_PEFT_BASES_URI", ROOT)
    monkeypatch.delenv("TRANS_PEFT_FAMILIES", raising=False)
    assert Settings().owners == Owners(ROOT)
    monkeypatch.setenv("TRANS_PEFT_FAMILIES", "")
    assert Settings().owners == Owners(ROOT)
    rule = {"prefixes": ["s3://team-a/smol/"], "key": "/etc/smol.pem"}
    monkeypatch.setenv("TRANS_PEFT_FAMILIES", json.dumps({"smol": rule, "free": {}}))
    assert Settings().owners == Owners(
        ROOT,
        {"smol": FamilyRule(("s3://team-a/smol/",), "/etc/smol.pem"), "free": FamilyRule()},
    )
    for odd in ('{"smol": {"keys": "x"}}', '{"smol": {"prefixes": "s3://x"}}', '["smol"]'):
        monkeypatch.setenv("TRANS_PEFT_FAMILIES", odd)
        with pytest.raises(InvalidSpecError, match="TRANS_PEFT_FAMILIES"):
            Settings()


def test_publish_is_the_same_without_a_key(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / SIGNATURE_NAME).write_bytes(b"of the folder, not of this upload")
    platform = memory_platform(tmp_path / "worker")
    publish(folder, HOME, family="smol", version="v1", store=platform.store)
    assert SIGNATURE_NAME not in [file.name for file in platform.store.list(HOME)]
