"""Bounds on the files of a base and of an adapter, checked before memory is spent on them."""

import json
import time

import pytest

from tests.tiny import write_tiny_base
from trans_peft import safetensors_header
from trans_peft.bases import model_files, upload
from trans_peft.bases.manifest import parse_manifest
from trans_peft.bases.safetensors_stream import tensor_signatures
from trans_peft.bases.upload import verify
from trans_peft.domain.bounds import MAX_HEADER_BYTES
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import MemoryStore
from trans_peft.errors import AdapterError, UploadError
from trans_peft.models import adapter_weights_sha256
from trans_peft.ports import StoredFile
from trans_peft.safetensors_header import MalformedSafetensorsError
from trans_peft.transfer.peft_folder import read_peft_folder


def safetensors(header: dict | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def tensors(count: int, name: str = "t") -> dict:
    return {
        f"{name}{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]}
        for n in range(count)
    }


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_long_header_is_not_read(size):
    def chunks():
        yield safetensors(b"{", size=size)
        pytest.fail("it was read on")

    with pytest.raises(MalformedSafetensorsError, match=f"at most {MAX_HEADER_BYTES}"):
        tensor_signatures(chunks())


def test_too_many_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 3)
    assert len(tensor_signatures(iter([safetensors(tensors(3, "indices"), b"abc")]))) == 3
    with pytest.raises(MalformedSafetensorsError, match="4 tensors; at most 3"):
        tensor_signatures(iter([safetensors(tensors(4, "indices"), b"abcd")]))


def test_the_tensors_of_all_files_count_together(monkeypatch):
    monkeypatch.setattr(model_files, "MAX_TENSORS", 3)
    files = model_files.ModelFiles()
    for name, first in (("a", 0), ("b", 2)):
        header = {
            f"t{first + n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]}
            for n in range(2)
        }
        data = safetensors(header, b"ab")
        files.take(StoredFile(f"{name}.safetensors", len(data), name), iter([data]))
    index = json.dumps(
        {"metadata": {}, "weight_map": {f"t{n}": f"{'ab'[n // 2]}.safetensors" for n in range(4)}}
    )
    files.take(StoredFile(model_files.INDEX, len(index), "i"), iter([index.encode()]))
    assert files.fingerprint() is None
    assert any("4 tensors; at most 3" in problem for problem in files.problems)


def test_too_many_files_are_refused(monkeypatch):
    import io

    monkeypatch.setattr(upload, "MAX_FILES", 3)
    store = MemoryStore()
    for n in range(4):
        store.write(f"memory://x/{n}", io.BytesIO(b""))
    with pytest.raises(UploadError, match="4 files; at most 3"):
        verify("memory://x", store)


def test_a_manifest_may_list_as_many_files_as_an_upload_may_have():
    entry = '{"name": "a", "size": 0, "sha256": "%s"}' % ("0" * 64)
    files = ",".join([entry] * (upload.MAX_FILES + 1))
    with pytest.raises(UploadError, match=f"{upload.MAX_FILES + 1} entries; at most 10000 "):
        parse_manifest(f'{{"files": [{files}]}}'.encode())


@pytest.fixture
def adapter(tmp_path):
    def write(data: bytes, config: str = '{"peft_type": "LORA"}'):
        (tmp_path / "adapter_model.safetensors").write_bytes(data)
        (tmp_path / "adapter_config.json").write_text(config)
        return tmp_path

    return write


HUGE = 10**18


@pytest.mark.parametrize(
    "data",
    [
        safetensors(b"{}", size=HUGE),
        safetensors({"t": {"dtype": "U8", "shape": [HUGE], "data_offsets": [0, HUGE]}}),
        safetensors({"t": {"dtype": "U8", "shape": [1], "data_offsets": [-5, 1]}}, b"x"),
        safetensors({"t": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, b"x"),
        safetensors(b'{"a":' * 50_000),
        safetensors(b" " * (MAX_HEADER_BYTES + 1)),
    ],
)
def test_an_adapters_file_with_a_false_header_is_an_error(adapter, data):
    folder = adapter(data)
    with pytest.raises(AdapterError):
        adapter_weights_sha256(folder)
    with pytest.raises(AdapterError):
        read_peft_folder(folder)


def test_an_adapter_with_too_many_tensors_is_an_error(adapter, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 3)
    assert len(read_peft_folder(adapter(safetensors(tensors(3, "indices"), b"abc"))).tensors) == 3
    with pytest.raises(AdapterError, match="4 tensors; at most 3"):
        read_peft_folder(adapter(safetensors(tensors(4, "indices"), b"abcd")))


def test_the_hash_of_an_adapter_stays_the_same(adapter):
    """Versions are registered under it."""
    folder = adapter(safetensors({"__metadata__": {"a": "b"}} | tensors(5), b"hello"))
    assert adapter_weights_sha256(folder) == (
        "19c7ae59547a84ac0b2d0fa8d4f4539bd02fa4e6c1b5209004455feaf70de8a3"
    )


def test_an_adapters_header_is_not_parsed_beyond_the_bounds(adapter):
    header = b'{"__metadata__":{"x":"' + b"y" * MAX_HEADER_BYTES + b'"}}'
    with pytest.raises(AdapterError, match=f"at most {MAX_HEADER_BYTES} are allowed"):
        read_peft_folder(adapter(safetensors(header)))
    entry = b'"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % n for n in range(500_000)) + b"}"
    assert len(header) < MAX_HEADER_BYTES
    folder = adapter(safetensors(header))
    started = time.process_time()
    with pytest.raises(AdapterError, match="about 499999 tensors; at most"):
        read_peft_folder(folder)
    with pytest.raises(MalformedSafetensorsError, match="at most"):
        tensor_signatures(iter([safetensors(header)]))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("depth", [101, 300, 480, 900])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_deeply_nested_json_is_a_problem_of_the_upload(tmp_path, name, depth):
    write_tiny_base(tmp_path)
    path = tmp_path / name
    text = path.read_text() if path.exists() else "{}"
    deep = "[" * depth + "1" + "]" * depth
    comma = "" if text == "{}" else ","
    path.write_text(f'{text.rstrip()[:-1]}{comma}"x":{deep}}}')
    with pytest.raises(UploadError, match=f"{name}: not JSON: nested more than 100 levels"):
        verify(str(tmp_path), FileStore())


def test_json_with_too_many_values_is_a_problem_of_the_upload(tmp_path):
    write_tiny_base(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"x":[' + "{}," * 2_000_000 + "{}]}")
    with pytest.raises(UploadError, match=r"tokenizer.json: not JSON: about 4000003 values"):
        verify(str(tmp_path), FileStore())
