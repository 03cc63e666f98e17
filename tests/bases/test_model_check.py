"""The model check accepts checkpoints that match their model, and reports all differences."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.bases.internlm2_uploads import write_internlm2
from tests.bases.uploads import MODEL_CONFIG, model_of
from tests.perturbation.architectures import ARCHITECTURES
from tests.tiny import tiny_model, tiny_tokenizer
from trans_peft.bases import meta_model, model_check
from trans_peft.bases.checkpoint import Checkpoint, folder_checkpoint
from trans_peft.bases.converters import convert
from trans_peft.bases.internlm2 import config as internlm2
from trans_peft.bases.meta_model import inspect_checkpoint
from trans_peft.bases.model_check import check_checkpoint
from trans_peft.bases.publish import publish
from trans_peft.domain.base import TensorSignature, Upload
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import MemoryStore, memory_platform
from trans_peft.errors import UploadError
from trans_peft.isolation import CallLimits
from trans_peft.lifecycle.bases import ingest, pending
from trans_peft.models import load_base

TEXT = {
    "vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 256,
    "bos_token_id": None, "eos_token_id": 257, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def read(folder: Path, with_tokenizer: bool = True) -> Checkpoint:
    found = folder_checkpoint(folder)
    return found if with_tokenizer else Checkpoint(found.config, found.tensors, {})


def inspected(checkpoint: Checkpoint) -> tuple[str, dict]:
    """Inspect in this process; return the problems, and name in the model -> name in the files."""
    tensors = [(n, t.dtype, t.shape, t.sha256) for n, t in checkpoint.tensors.items()]
    found = inspect_checkpoint(
        checkpoint.config, tensors, checkpoint.tokenizer, checkpoint.generation
    )
    return "\n".join(found["problems"]), {name: source for name, _, source in found["weights"]}


def edited(checkpoint: Checkpoint, add=(), drop=(), **fields) -> Checkpoint:
    tensors = {n: t for n, t in checkpoint.tensors.items() if n not in drop} | dict(add)
    config = json.dumps(json.loads(checkpoint.config) | fields)
    return Checkpoint(config, tensors, checkpoint.tokenizer, checkpoint.generation)


def tensor(*shape: int, dtype: str = "F32", sha256: str = "") -> TensorSignature:
    return TensorSignature(shape, dtype, sha256)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return read(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_every_architecture_passes_as_saved_and_each_edit_is_reported(architecture, tmp_path):
    model = architecture.model()
    model.save_pretrained(tmp_path)
    saved = read(tmp_path, with_tokenizer=False)
    problems, sources = inspected(saved)
    assert problems == ""
    assert sources.keys() == model.state_dict().keys()

    plain = {file: name for name, file in reversed(sources.items()) if file is not None}
    for file in sorted(plain)[:: max(1, len(plain) // 2)]:
        shape = saved.tensors[file].shape
        assert plain[file] in inspected(edited(saved, drop=[file]))[0]
        problems, _ = inspected(
            edited(saved, drop=[file], add={"somewhere.else": saved.tensors[file]})
        )
        assert plain[file] in problems
        assert "somewhere.else" in problems
        larger = tensor(*shape[:-1], shape[-1] + 1)
        assert plain[file] in inspected(edited(saved, add={file: larger}))[0]


def test_a_missing_expert_is_reported(tmp_path):
    (moe,) = (a for a in ARCHITECTURES if a.name == "mixtral")
    moe.model().save_pretrained(tmp_path)
    saved = read(tmp_path, with_tokenizer=False)
    expert = "model.layers.1.block_sparse_moe.experts.1.w1.weight"
    assert expert in saved.tensors
    assert "model.layers.1.mlp.experts.gate_up_proj" in inspected(edited(saved, drop=[expert]))[0]
    wider = edited(saved, add={expert: tensor(25, 16)})
    assert "model.layers.1.mlp.experts.gate_up_proj" in inspected(wider)[0]


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAME, OTHER = tensor(258, 32, sha256="a" * 64), tensor(258, 32, sha256="b" * 64)


@pytest.mark.parametrize(
    ("tied", "stored", "refused"),
    [
        (True, {EMBEDDING: SAME}, ""),
        (True, {EMBEDDING: SAME, HEAD: SAME}, ""),
        (True, {HEAD: SAME}, ""),
        (True, {EMBEDDING: SAME, HEAD: OTHER}, f"ties {HEAD} to {EMBEDDING}"),
        (True, {}, f"{HEAD}, {EMBEDDING}"),
        (False, {EMBEDDING: SAME, HEAD: SAME}, ""),
        (False, {EMBEDDING: SAME, HEAD: OTHER}, ""),
        (False, {EMBEDDING: SAME}, f"random: {HEAD}"),
        (False, {HEAD: SAME}, f"random: {EMBEDDING}"),
    ],
)
def test_every_combination_of_tied_and_stored_heads(llama, tied, stored, refused):
    upload = edited(llama, drop=[EMBEDDING, HEAD], add=stored, tie_word_embeddings=tied)
    problems, _ = inspected(upload)
    assert (refused in problems) if refused else problems == ""


def test_all_differences_are_reported_at_once(llama):
    layer = "model.layers.0"
    problems, _ = inspected(
        edited(
            llama,
            drop=["model.norm.weight"],
            add={
                "model.final_norm.weight": tensor(32),
                f"{layer}.mlp.up_proj.weight": tensor(64, 33),
                f"{layer}.mlp.down_proj.weight": tensor(32, 64, dtype="I8"),
            },
            vocab_size=257,
        )
    )
    for part in (
        "random: model.norm.weight",
        "does not have: model.final_norm.weight",
        f"{layer}.mlp.up_proj.weight is (64, 33), the model needs (64, 32)",
        f"{layer}.mlp.down_proj.weight: the files contain integers (I8)",
        "model.embed_tokens.weight is (258, 32), the model needs (257, 32)",
        "tokens without a row in the embedding, which has 257 rows: '<eos>' (257)",
    ):
        assert part in problems


@pytest.mark.parametrize("tokens", [(), ("<|tool|>",), ("<a>", "<b>")])
@pytest.mark.parametrize("rows", [258, 259, 320])
def test_every_token_needs_a_row_and_more_rows_are_padding(tmp_path, tokens, rows):
    tiny_model(vocabulary=rows).save_pretrained(tmp_path)
    tiny_tokenizer(tokens).save_pretrained(tmp_path)
    problems, _ = inspected(read(tmp_path))
    beyond = [token for i, token in enumerate(tokens, start=258) if i >= rows]
    assert bool(problems) == bool(beyond)
    assert all(f"{token!r}" in problems for token in beyond)


def test_a_special_token_that_only_the_settings_name_needs_a_row(llama):
    settings = json.loads(llama.tokenizer["tokenizer_config.json"]) | {"bos_token": "<|begin|>"}
    files = llama.tokenizer | {"tokenizer_config.json": json.dumps(settings)}
    assert "'<|begin|>' (258)" in inspected(Checkpoint(llama.config, llama.tensors, files))[0]


def test_a_tokenizer_that_does_not_load_is_reported(llama):
    files = llama.tokenizer | {"tokenizer.json": '{"model": {"type": "BPE", "vocab": {}}}'}
    problems, _ = inspected(Checkpoint(llama.config, llama.tensors, files))
    assert "the tokenizer cannot be used" in problems


def test_a_chat_template_that_never_ends_is_refused(llama, monkeypatch):
    monkeypatch.setattr(model_check, "LIMITS", CallLimits(cpu_s=2, file_bytes=128 << 20))
    loops = "".join(f"{{% for a{i} in range(99999) %}}" for i in range(3))
    template = loops + "x" + "{% endfor %}" * 3
    files = llama.tokenizer | {"chat_template.jinja": template}
    with pytest.raises(UploadError, match="more processor time"):
        check_checkpoint(Checkpoint(llama.config, llama.tensors, files), "the upload")


MULTIMODAL = {
    "llama4": lambda: transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(
            text_config=TEXT | {"intermediate_size_mlp": 24, "num_local_experts": 2},
            vision_config=VISION
            | {
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "pixel_shuffle_ratio": 0.5,
            },
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    ),
}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_multimodal_checkpoints_fit_and_a_foreign_tensor_does_not(name, tmp_path):
    MULTIMODAL[name]().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    saved = read(tmp_path)
    problems, sources = inspected(saved)
    assert problems == ""
    assert set(sources) == set(load_base(tmp_path, "float32", "cpu").model.state_dict())
    problems, _ = inspected(edited(saved, add={"vision_model.extra.weight": tensor(3)}))
    assert "vision_model.extra.weight" in problems
    (query,) = (file for file in saved.tensors if file.endswith("layers.0.self_attn.q_proj.weight")
                and "vision" not in file)  # fmt: skip
    assert "layers.0.self_attn.q_proj.weight" in inspected(edited(saved, drop=[query]))[0]


def test_names_of_the_hub_and_masks_of_old_checkpoints_fit(tmp_path):
    (gpt2,) = (a for a in ARCHITECTURES if a.name == "gpt2")
    gpt2.model().save_pretrained(tmp_path)
    saved = read(tmp_path, with_tokenizer=False)
    hub = {name.removeprefix("transformer."): t for name, t in saved.tensors.items()}
    hub |= {"h.0.attn.bias": tensor(1, 1, 64, 64), "h.0.attn.masked_bias": tensor()}
    problems, sources = inspected(Checkpoint(saved.config, hub, {}))
    assert problems == ""
    assert sources["transformer.h.1.mlp.c_fc.weight"] == "h.1.mlp.c_fc.weight"


def test_a_weight_is_not_taken_for_a_mask_of_old_checkpoints(tmp_path):
    config = transformers.GPTJConfig(
        vocab_size=258,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=257,
    )
    transformers.GPTJForCausalLM(config).save_pretrained(tmp_path)
    saved, name = read(tmp_path, with_tokenizer=False), "transformer.h.0.attn.bias"
    assert inspected(edited(saved, add={name: tensor(1, 1, 64, 64, dtype="BOOL")}))[0] == ""
    assert name in inspected(edited(saved, add={name: tensor(48)}))[0]


QUANTIZED = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 3_000_000}, "num_hidden_layers is 3,000,000, but the files hold"),
        ({"text_config": {"num_hidden_layers": 1 << 70}}, "text_config.num_hidden_layers is"),
        ({"quantization_config": QUANTIZED}, "quantization_config declares a quantized"),
        ({"text_config": {"quantization_config": QUANTIZED}}, "text_config.quantization_config"),
        ({"num_labels": 1_000_000}, "num_labels is 1,000,000"),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config"),
        (
            {"transformers_weights": "../other.safetensors"},
            "transformers_weights names weights",
        ),
        ({"_attn_implementation": "someone/kernel"}, "names code on a hub"),
        ({"add": {"model.norm.weight": tensor(32, dtype="F8_E4M3")}}, "1 tensors are quantized"),
    ],
)
def test_some_uploads_are_refused_before_anything_is_built(llama, monkeypatch, change, reason):
    monkeypatch.setattr(model_check, "call_isolated", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(UploadError) as refused:
        check_checkpoint(edited(llama, **change), "the upload")
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "unheard_of"},
        {"hidden_size": 1 << 62},
        {"hidden_size": -1},
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "no such type"}},
        {"hidden_act": "import os"},
    ],
)
def test_a_config_that_builds_no_model_is_reported_without_temporary_paths(llama, change):
    problems, _ = inspected(edited(llama, **change))
    assert problems
    assert "/tmp" not in problems


@pytest.mark.parametrize(
    ("generation", "problem"),
    [
        ({"watermarking_config": {"x": 1}}, "generation_config.json cannot be loaded"),
        ({"cache_implementation": "foo"}, "generation_config.json cannot be loaded"),
        ({"max_new_tokens": -1}, "generation_config.json cannot be loaded"),
        ({"compile_config": {"a": 1}}, "generation_config.json cannot be loaded"),
        ({"eos_token_id": "a"}, "eos_token_id in generation_config.json must be a token id"),
        ({"eos_token_id": [[1]]}, "eos_token_id in generation_config.json must be a token id"),
        ({"eos_token_id": 257.0}, "eos_token_id in generation_config.json must be a token id"),
        ({"eos_token_id": [257, 99999]}, "from 0 to 257, or a list of them, and is [257, 99999]"),
        ({"eos_token_id": [257, 3]}, ""),
    ],
)
def test_a_generation_config_that_does_not_load_is_reported(llama, generation, problem):
    problems, _ = inspected(replace(llama, generation=json.dumps(generation)))
    assert problem in problems
    assert bool(problems) == bool(problem)
    assert "/tmp" not in problems


@pytest.mark.parametrize("end", [99999, [257, 99999], -1])
def test_an_end_token_of_the_config_that_does_not_exist_is_reported(llama, end):
    assert "eos_token_id in config.json" in inspected(edited(llama, eos_token_id=end))[0]


def test_position_tables_above_the_limit_are_refused(llama, monkeypatch):
    monkeypatch.setattr(meta_model, "MAX_BUFFER_BYTES", 8)
    assert "position tables and masks of this size need" in inspected(llama)[0]


def test_a_model_that_exceeds_a_limit_is_refused(llama, monkeypatch):
    # A child whose memory is used up may also stop responding; the time limit then ends it.
    monkeypatch.setattr(model_check, "LIMITS", CallLimits(memory_bytes=1 << 20, wall_s=15))
    with pytest.raises(UploadError, match=r"more (memory|time) than an evaluation may take"):
        check_checkpoint(edited(llama, of_its_own=True), "the upload")


# Where the check applies.

BROKEN = model_of(config_json=MODEL_CONFIG | {"tie_word_embeddings": False})


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_publish_refuses_it_before_anything_is_sent(tmp_path):
    store, folder = MemoryStore(), write(tmp_path / "model", BROKEN)
    with pytest.raises(UploadError, match=r"(?s)random: lm_head\.weight"):
        publish(folder, "s3://bases/x", family="smol", version="v1", store=store)
    assert store.list("s3://bases") == ()


@pytest.mark.parametrize("registered", [False, True])
def test_ingestion_refuses_it_once(tmp_path, registered):
    platform = memory_platform(tmp_path)
    for name, data in BROKEN.items():
        platform.store.write(f"s3://bases/smol/v1/{name}", io.BytesIO(data))
    if registered:
        platform.catalog.register_manually("smol", "s3://bases/smol/v1")
        (upload,) = pending(platform, root_uri="")
    else:
        upload = Upload("s3://bases/smol/v1")
    with pytest.raises(UploadError, match=r"(?s)random: lm_head\.weight"):
        ingest(upload, platform)
    assert not any(
        b.ready for f in platform.catalog.families() for b in platform.catalog.versions(f)
    )
    assert pending(platform, root_uri="s3://bases") == ()


def test_convert_checks_the_converted_model(tmp_path, monkeypatch):
    source = tmp_path / "internlm2"
    write_internlm2(source)
    convert(str(source), FileStore(), tmp_path / "good")
    original = internlm2.llama_config
    monkeypatch.setattr(
        internlm2, "llama_config", lambda config: original(config) | {"hidden_size": 48}
    )
    with pytest.raises(UploadError, match=r"embed_tokens\.weight is .*, the model needs .*48"):
        convert(str(source), FileStore(), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_the_command_line_refuses_it(tmp_path, capsys):
    from trans_peft.cli.show import progress
    from trans_peft.cli.workspace import LOCAL, Workspace

    folder = write(tmp_path / "model", BROKEN)
    with progress() as shown, pytest.raises(UploadError, match=r"random: lm_head\.weight"):
        Workspace.at(tmp_path / "state", shown).base(str(folder), LOCAL)
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    tensors = load_file(whole / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones(4, 4)
    save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    with progress() as shown:
        assert Workspace.at(tmp_path / "state", shown).base(str(whole), LOCAL).ready
