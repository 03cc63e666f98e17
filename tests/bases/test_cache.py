"""The worker's cache of bases: copies are verified, shared and complete."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from tests.bases.uploads import URI, folder_of, store_of, weights
from trans_peft.bases.cache import download
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import IntegrityError, NotFoundError


def test_a_copy_is_named_by_its_fingerprint_and_has_only_covered_files(tmp_path):
    store = store_of(folder_of() | {"README.md": b"hello", "trans_peft_manifest.json": b"{}"})
    expected = fingerprint(URI, store)
    copy = download(URI, store, tmp_path / "cache", fingerprint=expected)
    assert copy == tmp_path / "cache" / expected.digest
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == folder_of()
    assert fingerprint(str(copy), FileStore()) == expected


def test_a_copy_loads_as_the_same_model(tmp_path, tiny_base):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = FileStore()
    copy = download(str(tiny_base), store, tmp_path, fingerprint=fingerprint(str(tiny_base), store))
    tokens = AutoTokenizer.from_pretrained(copy)("hello there", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
            for folder in (copy, tiny_base)
        )
    assert torch.equal(ours, theirs)


def test_a_second_caller_reads_nothing(tmp_path):
    store = store_of(folder_of())
    expected = fingerprint(URI, store)
    first = download(URI, store, tmp_path, fingerprint=expected)
    assert download("s3://gone", store_of({}), tmp_path, fingerprint=expected) == first


def test_parallel_callers_download_once(tmp_path):
    store, reads, together = store_of(folder_of()), [], threading.Barrier(4)
    expected = fingerprint(URI, store)

    class Counting:
        list = store.list

        def read(self, uri, **how):
            reads.append(uri)
            return store.read(uri, **how)

    def call(_):
        together.wait()
        return download(URI, Counting(), tmp_path, fingerprint=expected)

    with ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(call, range(4)))
    assert copies == {tmp_path / expected.digest}
    assert len(reads) == len(folder_of())


@pytest.mark.parametrize("seed", range(3))
def test_an_upgrade_downloads_each_base_once_a_host_wherever_its_shards_run(tmp_path, seed):
    random, found = Random(seed), []
    bases = {version: store_of(folder_of(weights(version))) for version in range(2)}
    known = {version: fingerprint(URI, store) for version, store in bases.items()}
    hosts = [f"host-{number}" for number in range(4)]
    placed = [(random.choice(hosts), random.choice([*bases])) for _ in range(40)]
    for host, version in placed:
        download(
            URI, bases[version], tmp_path / host, fingerprint=known[version], on_found=found.append
        )
    assert found.count(False) == len({*placed}) <= len(hosts) * len(bases)


def test_changed_files_in_the_prefix_are_an_integrity_error(tmp_path):
    expected = fingerprint(URI, store_of(folder_of()))
    exchanged = store_of(folder_of(weights(seed=1), config_json={"num_hidden_layers": 2,
                         "architectures": ["LlamaForCausalLM"]}))  # fmt: skip
    with pytest.raises(IntegrityError, match=r"config_sha256; 5 weights, the first is embed"):
        download(URI, exchanged, tmp_path, fingerprint=expected)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock", ".use"}


def test_a_prefix_with_a_missing_file_is_an_integrity_error(tmp_path):
    store = store_of(folder_of())
    expected = fingerprint(URI, store)
    store.remove(f"{URI}/config.json")
    with pytest.raises(IntegrityError, match=r"config\.json: missing"):
        download(URI, store, tmp_path, fingerprint=expected)


def test_an_empty_prefix_is_not_found(tmp_path):
    expected = fingerprint(URI, store_of(folder_of()))
    with pytest.raises(NotFoundError):
        download(URI, store_of({}), tmp_path, fingerprint=expected)


def test_a_download_of_a_killed_worker_is_not_used_as_a_copy(tmp_path):
    store = store_of(folder_of())
    expected = fingerprint(URI, store)
    left = tmp_path / f"{expected.digest}.part"
    left.mkdir()
    (left / "junk.safetensors").write_bytes(b"half")
    copy = download(URI, store, tmp_path, fingerprint=expected)
    assert not (copy / "junk.safetensors").exists()
    assert not left.exists()


def test_a_name_that_leaves_the_prefix_is_never_written(tmp_path):
    store = store_of(folder_of())
    expected = fingerprint(URI, store)
    store.write(f"{URI}/../evil.safetensors", io.BytesIO(b"x"))
    download(URI, store, tmp_path / "cache", fingerprint=expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
