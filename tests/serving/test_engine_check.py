"""What a LoRA server would ignore or fail on is refused before it is loaded."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.serving.compensated import base_and_update, compensated
from tests.serving.fleet import lora_folder
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.edges.stores import SchemeStore
from trans_peft.errors import AdapterError
from trans_peft.transfer.engine_check import EngineBase, check_for_engine, ranks
from trans_peft.transfer.peft_folder import read_peft_folder


@pytest.fixture(scope="module")
def engine(tiny_base):
    return EngineBase(fingerprint(str(tiny_base), SchemeStore()), max_rank=8)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], "all-linear", ["embed_tokens", "down_proj"], ["lm_head"]]
)
def test_an_adapter_that_peft_saved_on_this_base_is_accepted(engine, tiny_base, tmp_path, targets):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM", use_rslora=True)
    get_peft_model(model, config).save_pretrained(tmp_path, save_embedding_layers=False)
    check_for_engine(tmp_path, engine)


CONFIGS = [
    ({"use_dora": True}, "the option use_dora=True would be ignored"),
    ({"bias": "all"}, "the option bias='all' would be ignored"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern="),
    ({"layer_replication": [[0, 2]]}, "layer_replication="),
    ({"an_option_of_next_year": 1}, "an_option_of_next_year=1 would be ignored"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
    ({"peft_type": "IA3"}, "its method is IA3"),
    ({"r": None}, "adapter_config.json has no r"),
    ({"revision": "a" * 64}, "it was made for the base aaaaaaaaaaaa"),
]


@pytest.mark.parametrize(("config", "problem"), CONFIGS, ids=lambda value: str(value)[:24])
def test_options_that_a_server_would_ignore_are_refused(engine, tmp_path, config, problem):
    folder = lora_folder(tmp_path / "adapter", **{"rank": 4})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(AdapterError) as caught:
        check_for_engine(folder, engine)
    assert problem in str(caught.value)


def test_patterns_are_accepted_if_the_server_reads_them(engine, tmp_path):
    folder = lora_folder(tmp_path / "adapter", alpha_pattern={"q_proj": 2})
    check_for_engine(folder, EngineBase(engine.fingerprint, 8, has_patterns=True))


SHAPES = [
    ({"layers": 3}, "the base has no module model.layers.2.mlp.down_proj"),
    ({"hidden": 64}, "has shape (32, 32) in the base, and the adapter is for (64, 64)"),
    ({"rank": 16}, "and the server accepts at most 8"),
]


@pytest.mark.parametrize(("options", "problem"), SHAPES, ids=["layers", "hidden", "rank"])
def test_tensors_that_do_not_fit_are_refused(engine, tmp_path, options, problem):
    with pytest.raises(AdapterError) as caught:
        check_for_engine(lora_folder(tmp_path / "adapter", **options), engine)
    assert problem in str(caught.value)


def renamed(tensors):
    key = next(iter(tensors))
    return {**tensors, key.replace("lora_A", "lora_magnitude_vector"): tensors[key]}


def halved(tensors):
    key = next(key for key in tensors if "lora_B" in key)
    return {name: value for name, value in tensors.items() if name != key}


def with_base(tensors):
    value = next(iter(tensors.values()))
    return {**tensors, "base_model.model.model.embed_tokens.base_layer.weight": value}


def mismatched(tensors):
    key = next(key for key in tensors if "lora_B" in key)
    return {**tensors, key: tensors[key][:, :2].copy()}


TENSORS = [
    (renamed, "no server reads these tensors"),
    (halved, "has only one of lora_A and lora_B"),
    (with_base, "is a weight of the base"),
    (mismatched, "has lora_A of shape"),
]


@pytest.mark.parametrize(("change", "problem"), TENSORS, ids=lambda value: str(value)[:12])
def test_tensors_that_a_server_would_ignore_are_refused(engine, tmp_path, change, problem):
    folder = lora_folder(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(AdapterError) as caught:
        check_for_engine(folder, engine)
    assert problem in str(caught.value)


def test_every_problem_is_reported(engine, tmp_path):
    folder = lora_folder(tmp_path / "adapter", layers=3, rank=16, use_dora=True)
    with pytest.raises(AdapterError) as caught:
        check_for_engine(folder, engine)
    texts = ("use_dora", "the rank is 16 in", "layers.2", "plain LoRA", "--max-lora-rank")
    assert all(text in str(caught.value) for text in texts)


@pytest.fixture(scope="module")
def updated(tmp_path_factory):
    """A base and its update, and what a vLLM server on the update loads."""
    bases = base_and_update(tmp_path_factory.mktemp("updated"))
    return bases, EngineBase(fingerprint(str(bases[1]), SchemeStore()), max_rank=8, is_vllm=True)


def on(engine, architecture):
    return replace(engine, fingerprint=replace(engine.fingerprint, architecture=architecture))


@pytest.mark.parametrize("output_layer", [True, False], ids=["output layer", "none"])
def test_vllm_loads_a_compensated_output_layer_on_some_architectures(
    updated, tmp_path, output_layer
):
    bases, engine = updated
    adapter = lora_folder(tmp_path / "adapter")
    folder = compensated(adapter, bases, tmp_path / "compensated", output_layer=output_layer)
    check_for_engine(folder, engine)
    for name in ("Qwen2ForCausalLM", "MistralForCausalLM", "AModelOfNextYear"):
        check_for_engine(folder, replace(on(engine, name), is_vllm=False))
        if not output_layer:
            check_for_engine(folder, on(engine, name))
            continue
        with pytest.raises(AdapterError) as caught:
            check_for_engine(folder, on(engine, name))
        found, advice = str(caught.value).split("  do:")
        assert f"lm_head, and vLLM applies no LoRA matrices to that of {name}" in found
        assert "output_layer: false" in advice
        assert "plain LoRA" not in advice and "rank" not in advice


def test_vllm_loads_an_adapter_of_the_input_embedding_on_some_architectures(updated, tmp_path):
    _, engine = updated
    folder = lora_folder(tmp_path / "adapter")
    vocabulary, hidden = engine.fingerprint.tensors["model.embed_tokens.weight"].shape
    name = "base_model.model.model.embed_tokens.lora_embedding"
    matrices = {f"{name}_A": (4, vocabulary), f"{name}_B": (hidden, 4)}
    save_file(
        {key: np.ones(shape, np.float32) for key, shape in matrices.items()},
        folder / "adapter_model.safetensors",
    )
    assert ranks(read_peft_folder(folder)) == {"model.embed_tokens": 4}
    for name in ("LlamaForCausalLM", "CohereForCausalLM"):
        check_for_engine(folder, on(engine, name))
    for name in ("Qwen2ForCausalLM", "MistralForCausalLM"):
        check_for_engine(folder, replace(on(engine, name), is_vllm=False))
        with pytest.raises(AdapterError, match=r"(?s)embed_tokens, and vLLM.*linear modules alone"):
            check_for_engine(folder, on(engine, name))


def test_the_rank_of_all_modules_is_one_problem_with_its_own_advice(updated, tmp_path):
    bases, engine = updated
    folder = compensated(lora_folder(tmp_path / "adapter"), bases, tmp_path / "compensated")
    with pytest.raises(AdapterError) as caught:
        check_for_engine(folder, replace(engine, max_rank=4))
    found, advice = str(caught.value).split("  do:")
    assert "the rank is 8 in lm_head, model.layers.0" in found
    assert found.count("the rank is") == 1 and "and 4 more" in found
    assert "--max-lora-rank" in advice and "plain LoRA" not in advice


def test_a_compensated_dora_adapter_is_refused(updated, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    bases, engine = updated
    model = AutoModelForCausalLM.from_pretrained(bases[0])
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    folder = compensated(tmp_path / "adapter", bases, tmp_path / "compensated")
    with pytest.raises(AdapterError, match="the option use_dora=True would be ignored") as caught:
        check_for_engine(folder, engine)
    assert "lora_magnitude_vector" in str(caught.value)
