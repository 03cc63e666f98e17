import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model, tiny_tokenizer
from tests.transfer.conftest import edit_config, fingerprint_of
from trans_peft.domain.base import TensorSignature
from trans_peft.errors import AdapterError, InvalidSpecError, UnsupportedModelError
from trans_peft.methods.bottleneck.config import BottleneckConfig
from trans_peft.methods.registration import register_methods
from trans_peft.transfer.compatibility import UNRELATED_COSINE, compare, weight_cosine
from trans_peft.transfer.target_modules import module_of

OLD = fingerprint_of(tiny_model())


def drifted(relative: float, seed: int = 0) -> torch.nn.Module:
    """Return the tiny model after random changes of this size relative to each weight."""
    model = tiny_model()
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight += noise * (relative * weight.norm() / noise.norm())
    return model


def keep_lora_alone(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if "lora" in key}
    save_file(kept, folder / "adapter_model.safetensors")


def mismatches(new, folder, old=OLD) -> str:
    return "\n".join(compare(old, new, folder).mismatches)


def test_an_update_of_every_weight_is_compatible(write_adapter):
    found = compare(OLD, fingerprint_of(drifted(0.3)), write_adapter())
    assert found.ok
    assert found.notes == ()


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        (
            {"layers": 1},
            [
                "had 2 layers and has 1",
                "target model.layers.1.self_attn.q_proj exists in the old base, but not",
            ],
        ),
        (
            {"layers": 3},
            ["had 2 layers and has 3", "has 2 additional target modules", "layers.2.self_attn"],
        ),
        (
            {"hidden": 64},
            [
                "layers.0.self_attn.q_proj.weight had shape (32, 32) and has (64, 64)",
                "layers.1.self_attn.v_proj.weight had shape (16, 32) and has (32, 64)",
            ],
        ),
    ],
)
def test_another_shape_is_reported_with_both_values(shape, parts, write_adapter):
    found = mismatches(fingerprint_of(tiny_model(**shape)), write_adapter())
    for part in parts:
        assert part in found


def test_another_architecture_is_reported_with_both_names(write_adapter):
    found = mismatches(replace(OLD, architecture="GPT2LMHeadModel"), write_adapter())
    assert found == "the architecture was LlamaForCausalLM and is GPT2LMHeadModel"


def test_all_mismatches_are_reported_at_once(write_adapter):
    new = fingerprint_of(tiny_model(seed=1, layers=3, hidden=64), architecture="Other")
    assert len(compare(OLD, new, write_adapter()).mismatches) == 2 + 4 + 1


def test_shapes_of_modules_without_an_adapter_are_ignored(write_adapter):
    new = fingerprint_of(drifted(0.1))
    tensors = dict(new.tensors)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = replace(tensors[name], shape=(80, 32))
    new = replace(new, tensors=tensors)
    assert compare(OLD, new, write_adapter()).ok
    on_ffn = write_adapter("ffn", target_modules=["up_proj"])
    assert "(64, 32) and has (80, 32)" in mismatches(new, on_ffn)


def test_added_vocabulary_rows_matter_only_if_the_adapter_targets_them(write_adapter):
    longer = {
        name: replace(tensor, shape=(270, 32)) if tensor.shape == (258, 32) else tensor
        for name, tensor in OLD.tensors.items()
    }
    new = replace(OLD, tensors=longer)
    assert compare(OLD, new, write_adapter()).ok
    prompt = PromptTuningConfig(
        num_virtual_tokens=2,
        num_layers=2,
        token_dim=32,
        num_attention_heads=4,
        task_type="CAUSAL_LM",
    )
    assert compare(OLD, new, write_adapter("prompt", config=prompt)).ok
    assert not compare(
        OLD, fingerprint_of(tiny_model(hidden=64)), write_adapter("prompt", config=prompt)
    ).ok
    head = write_adapter("head", target_modules=["lm_head"])
    assert "lm_head.weight had shape (258, 32) and has (270, 32)" in mismatches(new, head)


def test_a_tied_head_exists_although_files_omit_it(write_adapter):
    tied = replace(
        OLD, tensors={name: t for name, t in OLD.tensors.items() if name != "lm_head.weight"}
    )
    head = write_adapter("head", target_modules=["lm_head"])
    keep_lora_alone(head)
    assert compare(tied, tied, head).ok


def test_a_module_that_the_adapter_replaces_is_a_note(write_adapter):
    folder = write_adapter(modules_to_save=["norm"])
    found = compare(OLD, fingerprint_of(drifted(0.1)), folder)
    assert found.ok
    (note,) = found.notes
    assert "the adapter replaces" in note
    assert "model.norm.weight" in note


@pytest.mark.filterwarnings("ignore")
def test_a_weight_of_the_old_base_in_the_file_is_a_mismatch(write_adapter):
    # PEFT saves the embedding together with an adapter that targets it.
    folder = write_adapter(target_modules=["embed_tokens"])
    assert "would overwrite those of the new base" in mismatches(
        fingerprint_of(drifted(0.1)), folder
    )
    keep_lora_alone(folder)
    assert compare(OLD, fingerprint_of(drifted(0.1)), folder).ok


def test_an_unconverted_pissa_adapter_is_a_mismatch(write_adapter):
    folder = edit_config(write_adapter(), init_lora_weights="pissa_niter_4")
    assert "init_lora_weights='pissa_niter_4'" in mismatches(OLD, folder)


def test_keys_without_a_module_in_the_old_base_are_reported(write_adapter):
    folder = write_adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"] = torch.ones(2, 2)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    found = mismatches(OLD, folder)
    assert "the adapter's target transformer does not exist in the base" in found
    assert "target model.layers.9.self_attn.q_proj does not exist" in found


def test_a_folder_that_is_not_peft_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match="no adapter_config"):
        compare(OLD, OLD, tmp_path)


@pytest.mark.parametrize(
    ("path", "targets", "module"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", ["q_proj"], "...q_proj"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", None, "...q_proj"),
        ("model.layers.0.mlp.bottleneck.up.weight", ["mlp"], "model.layers.0.mlp"),
        ("model.layers.0.mlp.bottleneck.up.weight", None, "model.layers.0.mlp"),
        ("model.layers.0.mlp.bottleneck.up.weight", r".*\.mlp", "model.layers.0.mlp"),
        ("model.layers.0.self_attn.qkv.lora_A.weight", ["qkv"], "model.layers.0.self_attn.qkv"),
        ("model.layers.5.ln.weight", None, "model.layers.5"),
        ("h.0.attn.lora_A.weight", None, "h"),
    ],
)
def test_the_module_of_a_key(path, targets, module):
    q_proj = "model.layers.0.self_attn.q_proj"
    modules = {"model", "model.layers", "model.layers.0", "model.layers.0.mlp", q_proj}
    modules |= {"model.layers.0.self_attn"}
    assert module_of(path, modules, targets) == module.replace("...q_proj", q_proj)


def test_a_changed_config_and_template_are_notes(write_adapter):
    new = replace(OLD, config_sha256="d", chat_template_sha256="")
    found = compare(OLD, new, write_adapter())
    assert found.ok
    assert [note.split(" changed")[0] for note in found.notes] == [
        "the base's config",
        "the base's chat template",
    ]


# Weight cosines: compared with numpy, then on both sides of the threshold.


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_weight_cosine_is_the_median_over_matrices(seed):
    random = np.random.default_rng(seed)
    old, new = (
        {
            name: TensorSignature(shape, "F32", "", tuple(random.normal(size=9)))
            for name, shape in (("a", (3, 3)), ("b", (9, 1)), ("c", (3, 1, 3)), ("norm", (9,)))
        }
        for _ in range(2)
    )
    cosines = [
        np.dot(old[n].sketch, new[n].sketch)
        / np.linalg.norm(old[n].sketch)
        / np.linalg.norm(new[n].sketch)
        for n in "abc"
    ]
    assert weight_cosine(old, new) == pytest.approx(np.median(cosines))


@pytest.mark.parametrize("seed", range(1, 6))
def test_equal_shapes_with_unrelated_weights_are_a_mismatch(seed, write_adapter):
    new = fingerprint_of(tiny_model(seed=seed))
    cosine = weight_cosine(OLD.tensors, new.tensors)
    assert abs(cosine) < UNRELATED_COSINE * 0.7
    assert mismatches(new, write_adapter()) == (
        "the weights are unrelated, as after pretraining from scratch: the median cosine between"
        f" old and new matrices is {cosine:.3f}; an update has at least 0.2"
    )


@pytest.mark.parametrize("relative", [0.01, 0.3, 1.0, 2.0])
def test_a_change_of_twice_the_weights_is_still_an_update(relative, write_adapter):
    new = fingerprint_of(drifted(relative))
    expected = 1 / (1 + relative**2) ** 0.5
    assert weight_cosine(OLD.tensors, new.tensors) == pytest.approx(expected, abs=0.1)
    assert compare(OLD, new, write_adapter()).ok


def test_fingerprints_without_sampled_values_are_a_note(write_adapter):
    bare = {name: replace(tensor, sketch=()) for name, tensor in OLD.tensors.items()}
    found = compare(replace(OLD, tensors=bare), OLD, write_adapter())
    assert found.ok
    assert "cannot be compared" in found.notes[0]


# Tokens.


def retokenised(folder: Path, change) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    return folder


def swap_two(state):
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def forget_one(state):
    del state["model"]["vocab"]["a"]


def add_two(state):
    state["model"]["vocab"] |= {"<tool>": 258, "<think>": 259}


def merge_two(state):
    state["model"]["vocab"] |= {"he": 258}
    state["model"]["merges"] = [["h", "e"]]


def prefix_space(state):
    state["pre_tokenizer"]["add_prefix_space"] = True


@pytest.mark.parametrize(
    ("change", "mismatch", "note"),
    [
        (lambda state: None, None, None),
        (swap_two, "2 of 258 tokens have another id: 'a' was 64 and is 65, 'b' was 65", None),
        (forget_one, "1 of 258 tokens have another id: 'a' was 64 and is missing", None),
        (add_two, None, "tokens were added: '<tool>', '<think>'"),
        (merge_two, "2 of 15 probe texts have other tokens", "tokens were added: 'he'"),
        (prefix_space, "13 of 15 probe texts have other tokens", None),
    ],
)
def test_changes_of_a_tokenizer_are_mismatches_or_notes(
    change, mismatch, note, write_adapter, tmp_path
):
    found = compare(
        OLD,
        replace(OLD, tokenizer_sha256="other"),
        write_adapter(),
        old_tokenizer=retokenised(tmp_path / "old", lambda state: None),
        new_tokenizer=retokenised(tmp_path / "new", change),
    )
    assert found.ok == (mismatch is None)
    assert mismatch is None or mismatch in found.mismatches[0]
    assert note is None or note in found.notes[0]
    assert len(found.mismatches) == (mismatch is not None)


def test_different_tokenizers_need_both_folders(write_adapter, tmp_path):
    new = replace(OLD, vocabulary_sha256="other")
    with pytest.raises(InvalidSpecError, match="pass both folders"):
        compare(OLD, new, write_adapter())
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer.json"):
        compare(OLD, new, write_adapter(), old_tokenizer=tmp_path, new_tokenizer=tmp_path)


def test_a_bottleneck_adapter_targets_whole_sub_layers(write_adapter):
    register_methods()
    folder = write_adapter(config=BottleneckConfig(init_bottleneck_weights=False))
    assert compare(OLD, fingerprint_of(drifted(0.1)), folder).ok
    assert "has 4 additional target modules" in mismatches(
        fingerprint_of(tiny_model(layers=4)), folder
    )


def test_lora_on_everything_is_compatible_with_an_update(write_adapter):
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    assert compare(OLD, fingerprint_of(drifted(0.1)), write_adapter(config=config)).ok
