"""Conversion of InternLM2 to Llama, compared with a reference implementation."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from tests.bases.internlm2_uploads import (
    CONFIG,
    TOKENIZER_SETTINGS,
    internlm2_logits,
    random_weights,
    write_internlm2,
)
from trans_peft.bases.conversion import CONVERTED_FROM
from trans_peft.bases.converters import convert, needs_conversion
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.bases.internlm2.weights import WeightLayout, llama_shard
from trans_peft.bases.upload import verify
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import IntegrityError, NotFoundError, UploadError
from trans_peft.models import load_base, load_tokenizer

STORE = FileStore()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def converted(folder, out):
    convert(str(folder), STORE, out)
    return out


# What it computes.


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(
    "shape",
    [(4, 2), (4, 4), (6, 2), (6, 1)],
    ids=lambda shape: "{}-heads-{}-kv".format(*shape),
)
def test_logits_match_the_reference_implementation(tmp_path, shape, bias):
    heads, kv_heads = shape
    config = CONFIG | {
        "bias": bias,
        "hidden_size": 8 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_scaling": None,
    }
    assert_equal_answers(tmp_path, config, 24)


@pytest.mark.parametrize("count", [32, 33, 70])
@pytest.mark.parametrize("kind", ["dynamic", "linear"])
def test_scaled_positions_match_the_reference_implementation(tmp_path, kind, count):
    config = CONFIG | {"rope_scaling": {"type": kind, "factor": 2.5}, "rope_theta": 10000.0}
    assert_equal_answers(tmp_path, config, count)


def test_tied_embeddings_stay_tied(tmp_path):
    assert_equal_answers(tmp_path, CONFIG | {"tie_word_embeddings": True}, 24)


def assert_equal_answers(tmp_path, config, count):
    weights = random_weights(config)
    ids = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(1))
    folder = converted(write_internlm2(tmp_path / "internlm2", config, weights), tmp_path / "llama")
    model = load_base(folder, "float32", "cpu").model
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        expected = internlm2_logits(config, weights, ids)
        assert expected.std() > 0.5
        torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=1e-5, atol=2e-5)


def test_generations_match_recorded_tokens_of_the_release(tmp_path):
    weights = random_weights(CONFIG)
    folder = converted(write_internlm2(tmp_path / "internlm2", weights=weights), tmp_path / "llama")
    model, ids = load_base(folder, "float32", "cpu").model, torch.arange(65, 75)
    expected = ids
    for _ in range(16):
        following = internlm2_logits(CONFIG, weights, expected)[-1].argmax()
        expected = torch.cat([expected, following[None]])
    found = model.generate(ids[None], do_sample=False, max_new_tokens=16, eos_token_id=-1)
    assert found[0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("stated", "start", "end"),
    [
        ({}, [259], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [259], [260]),
        ({"bos_token": {"__type": "AddedToken", "content": "<eos>", "special": True}}, [257], []),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": None}, [], []),
    ],
    ids=["as-released", "no-start", "both", "another-start", "no-code-asked-for"],
)
def test_start_and_end_tokens_match_the_release(tmp_path, stated, start, end):
    settings = {n: v for n, v in (TOKENIZER_SETTINGS | stated).items() if n != "auto_map" or v}
    folder = write_internlm2(tmp_path / "internlm2", tokenizer_config_json=settings)
    tokenizer = load_tokenizer(converted(folder, tmp_path / "llama"))
    assert tokenizer("ab").input_ids == [*start, 64, 65, *end]
    assert tokenizer("a", "b").input_ids == [*start, 64, *end, *start, 65, *end]
    assert tokenizer("ab", add_special_tokens=False).input_ids == [64, 65]
    assert len(tokenizer) == CONFIG["vocab_size"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")
    assert tokenizer.chat_template == TOKENIZER_SETTINGS["chat_template"]


def test_defaults_of_the_release_are_written_to_the_settings(tmp_path):
    settings = {"tokenizer_class": "InternLM2TokenizerFast"}
    folder = write_internlm2(
        tmp_path / "internlm2",
        tokenizer_config_json=settings,
        special_tokens_map_json={"eos_token": "<eos>"},
    )
    tokenizer = load_tokenizer(converted(folder, tmp_path / "llama"))
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert named == ("<s>", "<eos>", "</s>", "<unk>")
    assert tokenizer("ab").input_ids == [259, 64, 65]


# Where the numbers go.

LAYOUTS = st.builds(
    lambda kv, group, head, layers, bias, tied: {
        "hidden_size": kv * group * head,
        "intermediate_size": 3,
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "num_hidden_layers": layers,
        "vocab_size": 5,
        "bias": bias,
        "tie_word_embeddings": tied,
    },
    st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 4, 6]), st.integers(1, 2),
    st.booleans(), st.booleans(),
)  # fmt: skip


def chunked(data, size):
    return iter([data[at : at + size] for at in range(0, len(data), size)])


@given(LAYOUTS, st.integers(1, 5000), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=40)
def test_every_value_is_copied_exactly_once(tmp_path_factory, config, chunk_bytes, dtype):
    """Each element of wqkv is its own number: in q, k and v together each stands once."""
    from safetensors.torch import load

    weights = random_weights(config, dtype=dtype)
    for name, tensor in weights.items():
        if "wqkv" in name and dtype == torch.float32:
            weights[name] = torch.arange(tensor.numel(), dtype=dtype).view(tensor.shape)
    data = save(weights)
    found = load(b"".join(llama_shard(chunked(data, chunk_bytes), WeightLayout.of(config))))
    assert sum(t.numel() for t in found.values()) == sum(t.numel() for t in weights.values())
    head = config["hidden_size"] // config["num_attention_heads"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    for name, tensor in weights.items():
        if "wqkv" not in name:
            continue
        prefix, part = name.split("attention.wqkv.")
        q, k, v = (found[f"{prefix}self_attn.{p}_proj.{part}"].split(head) for p in "qkv")
        again = [
            head_rows
            for g in range(config["num_key_value_heads"])
            for head_rows in (*q[g * group : (g + 1) * group], k[g], v[g])
        ]
        assert torch.equal(torch.cat(again), tensor)
        if dtype == torch.float32:
            landed = torch.cat([t.flatten() for t in (*q, *k, *v)])
            assert sorted(landed.tolist()) == list(range(tensor.numel()))


def test_a_shard_is_streamed():
    config = CONFIG | {"vocab_size": 4096}
    data = save(random_weights(config))
    took = gave = most = 0

    def chunks():
        nonlocal took
        for chunk in chunked(data, 1024):
            took += len(chunk)
            yield chunk

    for piece in llama_shard(chunks(), WeightLayout.of(config)):
        gave += len(piece)
        most = max(most, took - gave)
    fused = random_weights(config)["model.layers.0.attention.wqkv.weight"].nbytes
    assert most < fused + 4096 < len(data) / 10


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_do_not_change_the_fingerprint(tmp_path, shards):
    whole = converted(write_internlm2(tmp_path / "one"), tmp_path / "one-llama")
    parts = converted(write_internlm2(tmp_path / "many", shards=shards), tmp_path / "many-llama")
    assert len([*parts.glob("*.safetensors")]) == shards
    assert fingerprint(str(parts), STORE) == fingerprint(str(whole), STORE)


def test_the_fingerprint_equals_that_of_a_save_by_transformers(tmp_path):
    folder = converted(write_internlm2(tmp_path / "internlm2"), tmp_path / "llama")
    load_base(folder, "float32", "cpu").model.save_pretrained(tmp_path / "saved")
    ours, theirs = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "saved" / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# What is in the folder.


def test_the_folder_lists_its_source_files(tmp_path):
    source = write_internlm2(tmp_path / "internlm2", shards=2)
    recorded = json.loads((converted(source, tmp_path / "llama") / CONVERTED_FROM).read_text())
    assert (recorded["layout"], recorded["uri"]) == ("InternLM2ForCausalLM", str(source))
    assert {file["name"]: file["sha256"] for file in recorded["files"]} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.iterdir()
    }


def test_no_code_is_copied_or_run(tmp_path):
    source = write_internlm2(tmp_path / "internlm2")
    folder = converted(source, tmp_path / "llama")
    load_base(folder, "float32", "cpu")
    assert [*tmp_path.rglob("EXECUTED")] == []
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "converted_from.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert "auto_map" not in "".join(path.read_text() for path in folder.glob("*config.json"))
    assert verify(str(folder), STORE).verified == "structure"


def test_the_same_upload_gives_the_same_bytes(tmp_path):
    source = write_internlm2(tmp_path / "internlm2", shards=2)
    first, second = (converted(source, tmp_path / name) for name in ("first", "second"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


class Interrupted:
    """A store that is killed while the nth file is read for the second time: headers come first."""

    list = STORE.list

    def __init__(self):
        self.opened = []

    def read(self, uri, *, etag=None):
        self.opened.append(uri)
        if uri.endswith("2-of-00002.safetensors") and self.opened.count(uri) == 2:
            raise KeyboardInterrupt
        return STORE.read(uri, etag=etag)


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    source = write_internlm2(tmp_path / "internlm2", shards=2)
    before = STORE.list(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), Interrupted(), tmp_path / "llama")
    assert STORE.list(str(tmp_path)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["internlm2"]


@pytest.mark.parametrize("changed", ["model.safetensors", "notes.txt"])
def test_files_that_change_while_they_are_read_are_an_error(tmp_path, changed):
    source = write_internlm2(tmp_path / "internlm2")
    (source / "notes.txt").write_text("before")

    class Changing:
        list = STORE.list

        def read(self, uri, *, etag=None):
            if uri.endswith("tokenizer.model"):  # the last file: weights and notes were read
                (source / changed).write_text("after")
            return STORE.read(uri, etag=etag)

    with pytest.raises(IntegrityError, match="changed while it was being read"):
        convert(str(source), Changing(), tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


def test_weights_are_converted_from_the_version_whose_header_was_checked(tmp_path):
    source = write_internlm2(tmp_path / "internlm2")
    other = save(random_weights(CONFIG, seed=1))

    class Changing(FileStore):
        def read(self, uri, *, etag=None):
            if uri.endswith("generation_config.json"):  # after the headers, before the weights
                (source / "model.safetensors").write_bytes(other)
            return super().read(uri, etag=etag)

    with pytest.raises(IntegrityError, match=r"a new version of model\.safetensors"):
        convert(str(source), Changing(), tmp_path / "llama")


# What is refused.


def upload_error(folder):
    out = folder.with_name("out")
    with pytest.raises(UploadError) as caught:
        convert(str(folder), STORE, out)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["InternLM2ForRewardModel"]}, "InternLM2ForRewardModel"),
        ({"architectures": None}, "`architectures` must be"),
        ({"sliding_window": 4096}, "without an equivalent in Llama: sliding_window"),
        ({"knowledge_masking": 0.0}, "without an equivalent in Llama: knowledge_masking"),
        ({"quantization_config": {}}, "without an equivalent in Llama: quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "beta": 1}}, "rope_scaling"),
        ({"rope_scaling": 2.0}, "rope_scaling"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3 key/value heads"),
        ({"hidden_size": 30}, "give no even head size"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be a positive integer"),
        ({"num_hidden_layers": True}, "`num_hidden_layers` must be a positive integer"),
        ({"rms_norm_eps": "1e-5"}, "`rms_norm_eps` must be a positive number"),
        ({"bias": "no"}, "`bias` must be true or false"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_without_a_llama_equivalent_is_refused(tmp_path, changes, reason):
    weights = random_weights(CONFIG)
    assert reason in upload_error(write_internlm2(tmp_path / "upload", CONFIG | changes, weights))


@pytest.mark.parametrize("field", ["bias", "rope_theta", "rms_norm_eps", "tie_word_embeddings"])
def test_fields_with_a_default_in_the_release_are_required(tmp_path, field):
    config = {name: value for name, value in CONFIG.items() if name != field}
    folder = write_internlm2(tmp_path / "upload", config, random_weights(CONFIG))
    assert f"missing fields: {field}" in upload_error(folder)


def test_all_problems_are_reported_at_once(tmp_path):
    weights = random_weights(CONFIG)
    weights["model.layers.0.attention.wqkv.weight"] = torch.zeros(64, 31)
    weights["model.layers.1.attention.wo.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    weights["model.layers.0.attention.wqkv.qweight"] = torch.zeros(3)
    del weights["model.layers.1.ffn_norm.weight"], weights["output.weight"]
    settings = TOKENIZER_SETTINGS | {"tokenizer_class": "TheirTokenizer"}
    folder = write_internlm2(
        tmp_path / "upload", weights=weights, tokenizer_json=None, tokenizer_config_json=settings
    )
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "model-extra.safetensors").write_bytes(b"short")
    message = upload_error(folder)
    for reason in (
        "wqkv.weight has the shape [64, 31], but config.json requires [64, 32]",
        "model.layers.1.attention.wo.weight has dtype I8",
        "not tensors of InternLM2: model.layers.0.attention.wqkv.qweight",
        "missing tensors: model.layers.1.ffn_norm.weight, output.weight",
        "tokenizer.json: missing; only the release's InternLM2TokenizerFast can create it",
        "'TheirTokenizer'",
        "pytorch_model.bin: pickle",
        "adapter_config.json: transformers would load",
        "model-extra.safetensors: it ends 3 bytes too early",
    ):
        assert reason in message


def test_a_start_token_without_an_id_is_refused(tmp_path):
    settings = TOKENIZER_SETTINGS | {"bos_token": "<begin>"}
    assert "no id for the start or end token '<begin>'" in upload_error(
        write_internlm2(tmp_path / "upload", tokenizer_config_json=settings)
    )


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write_internlm2(tmp_path / "upload")
    (folder / "copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "also in another file" in upload_error(folder)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    folder = write_internlm2(tmp_path / "upload")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    assert "ends 1 bytes too early" in upload_error(folder)


def test_layouts_with_code_and_without_a_converter_are_refused(tmp_path):
    folder = write_internlm2(tmp_path / "upload", CONFIG | {"model_type": "internlm3"}, {})
    assert not needs_conversion(str(folder), STORE)
    assert "model_type internlm3" in upload_error(folder)
    with pytest.raises(UploadError, match=r"trans-peft convert"):
        verify(str(folder), STORE)


def test_an_empty_prefix_is_not_found(tmp_path):
    assert not needs_conversion(str(tmp_path / "nothing"), STORE)
    with pytest.raises(NotFoundError):
        convert(str(tmp_path / "nothing"), STORE, tmp_path / "out")


# From the command line.


def test_one_command_converts_a_folder(tmp_path, capsys):
    from trans_peft.cli import main

    source, out = write_internlm2(tmp_path / "internlm2"), tmp_path / "llama"
    assert (
        main(["publish", str(source), str(tmp_path / "x"), "--family", "f", "--version", "v"]) == 2
    )
    assert "trans-peft convert" in capsys.readouterr().err
    assert main(["convert", str(source), str(out)]) == 0
    assert "Llama form" in capsys.readouterr().out
    assert main(["fingerprint", str(out), "--json", "--state", str(tmp_path / "state")]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "LlamaForCausalLM"
    assert main(["convert", str(source), str(out)]) == 2
