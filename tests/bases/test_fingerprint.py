"""What changes a fingerprint and what does not."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bases.uploads import (
    CONFIG,
    SETTINGS,
    TOKENIZER,
    URI,
    folder_of,
    sharded,
    store_of,
    weights,
)
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.domain.base import Fingerprint
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import NotFoundError, UploadError


def fingerprint_of(files: dict[str, bytes], chunk_bytes: int = 1 << 20) -> Fingerprint:
    return fingerprint(URI, store_of(files, chunk_bytes=chunk_bytes))


ORIGINAL = fingerprint_of(folder_of())


@settings(deadline=None, max_examples=40)
@given(
    st.permutations(sorted(weights())),
    st.lists(st.integers(1, 4), min_size=5, max_size=5),
    st.integers(1, 64),
)
def test_sharding_order_and_chunks_do_not_change_the_fingerprint(names, numbers, chunk_bytes):
    tensors = weights()
    split = sharded(tensors, dict(zip(names, numbers, strict=True)))
    files = {**folder_of(), **split}
    del files["model.safetensors"]
    found = fingerprint_of(files, chunk_bytes)
    assert found == ORIGINAL
    assert found.digest == ORIGINAL.digest
    assert {n: t.sketch for n, t in found.tensors.items()} == {
        n: t.sketch for n, t in ORIGINAL.tensors.items()
    }


@given(st.data())
def test_one_changed_element_is_another_fingerprint(data):
    tensors = weights()
    name = data.draw(st.sampled_from(sorted(tensors)))
    flat = tensors[name].reshape(-1)
    at = data.draw(st.integers(0, flat.size - 1))
    flat[at] = np.nextafter(flat[at], np.float32(9))
    tensors[name] = flat.reshape(tensors[name].shape)
    found = fingerprint_of(folder_of(tensors))
    assert found.digest != ORIGINAL.digest
    assert {n for n in tensors if found.tensors[n] != ORIGINAL.tensors[n]} == {name}


def test_a_model_saved_in_one_file_and_in_shards_has_one_fingerprint(
    tmp_path: Path, tiny_base: Path
):
    from tests.tiny import tiny_model, tiny_tokenizer

    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    whole = fingerprint(str(tiny_base), FileStore())
    assert fingerprint(tmp_path.as_uri(), FileStore(chunk_bytes=1000)) == whole
    assert (whole.architecture, whole.layer_count) == ("LlamaForCausalLM", 2)
    assert whole.tensors["model.embed_tokens.weight"].shape == (258, 32)
    assert whole.chat_template_sha256


MERGES = TOKENIZER | {"model": TOKENIZER["model"] | {"merges": ["a b"]}}
CALLED = TOKENIZER | {"padding": {"strategy": "BatchLongest"}, "truncation": {"max_length": 9}}


@pytest.mark.parametrize(
    "files",
    [
        {"config_json": CONFIG | {"_name_or_path": "x", "transformers_version": "5.99"}},
        {"config_json": CONFIG | {"torch_dtype": "bfloat16", "use_cache": False}},
        {"tokenizer_json": CALLED},
        {"tokenizer_json": MERGES},
        {"tokenizer_config_json": SETTINGS | {"name_or_path": "x", "backend": "tokenizers"}},
        {"tokenizer_config_json": SETTINGS | {"chat_template": []}},
        {"special_tokens_map_json": {"eos_token": "<eos>"}},
        {"README.md": b"hello"},
        {"generation_config_json": {"transformers_version": "5.99"}},
    ],
    ids=lambda files: next(iter(files)),
)
def test_output_neutral_changes_keep_the_fingerprint(files):
    assert fingerprint_of(folder_of(**files)).digest == ORIGINAL.digest


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"config_json": CONFIG | {"rms_norm_eps": 1e-06}}, {"config_sha256"}),
        ({"config_json": CONFIG | {"rope_parameters": {"rope_theta": 1e6}}}, {"config_sha256"}),
        ({"generation_config_json": {"repetition_penalty": 1.05}}, {"config_sha256"}),
        (
            {"config_json": CONFIG | {"num_hidden_layers": 3}},
            {"config_sha256", "layer_count"},
        ),
        (
            {"config_json": CONFIG | {"architectures": ["Qwen2ForCausalLM"]}},
            {"config_sha256", "architecture"},
        ),
        (
            {"tokenizer_json": TOKENIZER | {"added_tokens": []}},
            {"vocabulary_sha256", "tokenizer_sha256"},
        ),
        ({"tokenizer_json": TOKENIZER | {"normalizer": {"type": "NFC"}}}, {"tokenizer_sha256"}),
        ({"tokenizer_config_json": SETTINGS | {"add_bos_token": True}}, {"tokenizer_sha256"}),
        ({"chat_template.jinja": b"{{ x }}"}, {"chat_template_sha256"}),
        (
            {"tokenizer_config_json": SETTINGS | {"chat_template": "{{ x }}"}},
            {"chat_template_sha256"},
        ),
        ({"additional_chat_templates/rag.jinja": b"{{ x }}"}, {"chat_template_sha256"}),
    ],
)  # fmt: skip
def test_relevant_changes_change_their_field_and_the_digest(files, parts):
    found = fingerprint_of(folder_of(**files))
    names = [field.name for field in fields(Fingerprint) if field.compare]
    assert {name for name in names if getattr(found, name) != getattr(ORIGINAL, name)} == parts
    assert found.digest != ORIGINAL.digest


def test_a_template_has_the_same_hash_in_every_place():
    alone = fingerprint_of(folder_of(**{"chat_template.jinja": b"{{ x }}"}))
    inside = fingerprint_of(
        folder_of(tokenizer_config_json=SETTINGS | {"chat_template": "{{ x }}"})
    )
    listed = SETTINGS | {"chat_template": [{"name": "default", "template": "{{ x }}"}]}
    both = folder_of(
        **{"tokenizer_config_json": SETTINGS | {"chat_template": "{{ old }}"},
           "chat_template.jinja": b"{{ x }}"}
    )  # fmt: skip
    assert alone.digest == inside.digest
    assert alone.digest == fingerprint_of(folder_of(tokenizer_config_json=listed)).digest
    assert alone.digest == fingerprint_of(both).digest


def test_ids_of_a_unigram_vocabulary_are_list_positions():
    model = {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0], ["ab", -2.0]]}
    found = fingerprint_of(folder_of(tokenizer_json=TOKENIZER | {"model": model}))
    assert found.vocabulary_sha256 == ORIGINAL.vocabulary_sha256
    assert found.tokenizer_sha256 != ORIGINAL.tokenizer_sha256


def test_the_layer_count_may_be_in_text_config():
    config = {"architectures": ["Gemma3ForConditionalGeneration"],
              "text_config": {"num_hidden_layers": 18}}  # fmt: skip
    assert fingerprint_of(folder_of(config_json=config)).layer_count == 18


TWO = sharded(weights(), {"embed": 1, "layer.0": 1, "layer.1": 2, "norm": 2, "scale": 2})
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


def two(**changes: bytes | None) -> dict[str, bytes]:
    return folder_of(**{"model.safetensors": None, **TWO, **changes})


def index_without(name: str) -> bytes:
    index = json.loads(TWO[INDEX])
    del index["weight_map"][name]
    return json.dumps(index).encode()


@pytest.mark.parametrize(
    ("files", "reasons"),
    [
        (folder_of(config_json=None), ["config.json: missing"]),
        (folder_of(tokenizer_json=None), ["tokenizer.json: missing"]),
        (folder_of(**{"model.safetensors": None}), ["model.safetensors: missing"]),
        (folder_of(config_json=b"{"), ["config.json: not JSON"]),
        (folder_of(config_json=b"[]"), ["config.json: not a JSON object"]),
        (folder_of(config_json=b"\xff"), ["config.json: .*decode"]),
        (folder_of(config_json={}), ["architectures", "no layer count"]),
        (folder_of(config_json=CONFIG | {"num_hidden_layers": "2"}), ["no layer count"]),
        (folder_of(tokenizer_json={"model": {}}), ["tokenizer.json: no vocabulary"]),
        (folder_of(**{"model.safetensors": b"x"}), ["model.safetensors: it ends 7 bytes"]),
        (folder_of(**{"extra.safetensors": TWO[SECOND]}), ["extra.safetensors: unused weights"]),
        (folder_of(**TWO), ["remove one of them"]),
        (two(**{SECOND: None}), [f"{SECOND}: missing"]),
        (two(**{SECOND: TWO[SECOND][:-1]}), [f"{SECOND}: it ends 1 bytes"]),
        (two(**{INDEX: index_without("norm")}), ["does not match the files for norm"]),
        (two(**{INDEX: b'{"weight_map": {"x": 1}}'}), ["no `weight_map`"]),
        (two(**{INDEX: b'{"metadata": [], "weight_map": {}}'}), ["no `metadata`"]),
        (
            two(**{"model-00001-of-00002.safetensors": TWO[SECOND]}),
            ["also in another file: layer.1", "does not match the files for embed"],
        ),
        (
            folder_of(config_json={}, tokenizer_json=b"", **{"model.safetensors": b""}),
            ["architectures", "layer count", "tokenizer.json: not JSON", "model.safetensors: it"],
        ),
    ],
)
def test_all_problems_of_a_folder_are_reported_at_once(files, reasons):
    with pytest.raises(UploadError) as caught:
        fingerprint_of(files)
    for reason in reasons:
        assert caught.match(reason)


def test_an_empty_prefix_is_not_found():
    with pytest.raises(NotFoundError):
        fingerprint_of({})


def test_progress_counts_every_byte():
    files, seen = folder_of(), []
    store = store_of(files, chunk_bytes=100)
    fingerprint(URI, store, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(map(len, files.values()))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_infinite_number_is_hashed_as_text():
    """Mamba 2 has one: `time_step_limit`."""
    found = [
        fingerprint(URI, store_of(folder_of(config_json=CONFIG | {"time_step_limit": limit})))
        for limit in ([0.0, float("inf")], [0.0, 1.0])
    ]
    assert found[0].config_sha256 != found[1].config_sha256
