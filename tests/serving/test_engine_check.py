"""What a LoRA server would ignore or fail on is refused before it is loaded."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from tests.serving.fleet import lora_folder
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.edges.stores import SchemeStore
from trans_peft.errors import AdapterError
from trans_peft.serving.engine_check import EngineBase, check_for_engine


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
    ({"rank": 16}, "has rank 16, and the server accepts at most 8"),
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
    assert all(text in str(caught.value) for text in ("use_dora", "rank 16", "layers.2"))
