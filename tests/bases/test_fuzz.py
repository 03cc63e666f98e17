"""Random bytes give a manifest, a fingerprint or an UploadError, with little memory."""

import json
import resource
import tracemalloc

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.bases.uploads import CONFIG, SETTINGS, TOKENIZER, URI, folder_of, store_of
from trans_peft.bases.manifest import MAX_MANIFEST_BYTES, dump_manifest, parse_manifest
from trans_peft.bases.upload import verify
from trans_peft.domain.base import Fingerprint, Manifest
from trans_peft.errors import UploadError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["\ud800", "1" * 5000, 10**400, 1e999, -0.0, "a b", "", "model.safetensors"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip

MANIFEST = {
    "format": Manifest.FORMAT,
    "family": "smol",
    "version": "v1",
    "parent": None,
    "files": [{"name": "config.json", "size": 2, "sha256": "0" * 64}],
}


def places(value, path=()):
    """Every place in a JSON value, from the whole to the leaves."""
    yield path
    if not isinstance(value, (dict, list)):
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from places(item, (*path, key))


def exchanged(value, path, by):
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = exchanged(value[path[0]], path[1:], by)
    return copy


def mutations(value):
    """The value with something else in one or two places."""
    once = st.builds(exchanged, st.just(value), st.sampled_from([*places(value)]), JSON)
    added = st.dictionaries(st.text(max_size=6), JSON, max_size=2).map(
        lambda more: {**value, **more}
    )
    return once | added


def dumped(value):
    return json.dumps(value).encode()


@given(st.binary(max_size=300) | JSON.map(dumped) | mutations(MANIFEST).map(dumped))
@example(b"\xff\xfe{")
@example(b"[" * 100_000)
@example(b'{"a":' * 50_000)
@example(dumped(MANIFEST).replace(b"2,", b"9" * 10_000 + b","))
@settings(max_examples=600, deadline=None)
def test_any_bytes_give_a_manifest_or_an_upload_error(data):
    try:
        manifest = parse_manifest(data)
    except UploadError as error:
        str(error).encode("utf-8", "backslashreplace")
        assert len(str(error)) < 10_000
    else:
        assert parse_manifest(dump_manifest(manifest)).sha256 == manifest.sha256


WORST = {
    "many errors": b'{"files":[' + b"{}," * ((MAX_MANIFEST_BYTES - 40) // 3) + b"{}]}",
    "many lists": b"[" + b"[]," * ((MAX_MANIFEST_BYTES - 40) // 3) + b"[]]",
    "one name twice, often": dumped(MANIFEST | {"files": MANIFEST["files"] * 19_000}),
    "one long name": dumped(MANIFEST | {"version": "v" * 4_000_000}),
    "many names": dumped(
        MANIFEST | {"files": [MANIFEST["files"][0] | {"name": f"{i}"} for i in range(19_000)]}
    ),
}


@pytest.mark.parametrize("data", WORST.values(), ids=WORST)
def test_the_largest_manifest_needs_little_memory_and_gives_a_short_error(data):
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        parse_manifest(data[:MAX_MANIFEST_BYTES])
    except UploadError as error:
        assert len(str(error)) < 10_000
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 160 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 400 << 10


def header(value):
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


TENSORS = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]},
}
HUGE = {"a": {"dtype": "F32", "shape": [10**18] * 400, "data_offsets": [0, 24]}}

DOCUMENTS = {
    "config.json": CONFIG | {"text_config": {"n_layer": 2}, "auto_map": {}},
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": SETTINGS | {"chat_template": [{"name": "a", "template": "b"}]},
    "special_tokens_map.json": {"eos_token": {"content": "<eos>"}},
    "generation_config.json": {"eos_token_id": [1, 2]},
    "model.safetensors.index.json": {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}},
}


def outcome(files):
    try:
        found = verify(URI, store_of(files))
    except UploadError as error:
        str(error).encode("utf-8", "backslashreplace")
    else:
        assert isinstance(found.fingerprint, Fingerprint)
        assert len(found.fingerprint.digest) == 64


@pytest.mark.parametrize("name", DOCUMENTS)
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_model_file_gives_a_fingerprint_or_an_upload_error(name, data):
    content = data.draw(st.binary(max_size=60) | mutations(DOCUMENTS[name]).map(dumped))
    outcome(folder_of() | {name: content})


@given(
    st.binary(max_size=200)
    | mutations(TENSORS).map(header).map(lambda text: text + bytes(28))
    | st.binary(max_size=40).map(lambda text: len(text).to_bytes(8, "little") + text)
)
@example(header(HUGE))
@example((1 << 63).to_bytes(8, "little"))
@settings(max_examples=400, deadline=None)
def test_any_weights_give_a_fingerprint_or_an_upload_error(content):
    outcome(folder_of() | {"model.safetensors": content})


@given(st.lists(st.text(st.characters(), min_size=1, max_size=12), max_size=5, unique=True))
@settings(max_examples=200, deadline=None)
def test_any_names_give_a_fingerprint_or_an_upload_error(names):
    outcome(folder_of() | dict.fromkeys(names, b"x"))
