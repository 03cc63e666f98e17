"""A base in parts on several devices answers as one that is on a single device."""

import logging
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_base
from tests.validation.models import model_of
from trans_peft import placement
from trans_peft.checksums import model_checksums
from trans_peft.errors import OutOfMemoryError, WorkerError
from trans_peft.methods.bottleneck import BottleneckConfig
from trans_peft.methods.registration import register_methods
from trans_peft.models import load_base, release_base
from trans_peft.placement import DeviceMemory, layer_devices, place
from trans_peft.transfer.load_adapter import attached
from trans_peft.transfer.mixed_adapters import MixedModel, _Part, attached_together
from trans_peft.validation.continuous_batching import ContinuousBatchingEngine
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.decoding.prefixes import (
    CacheSupport,
    PrefixReader,
    PromptPart,
    truncate_cache,
)

register_methods()
LORA = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **LORA),
    "dora": LoraConfig(r=2, target_modules=["v_proj", "up_proj"], use_dora=True, **LORA),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
        task_type="CAUSAL_LM",
    ),
}
ALONE = {"bottleneck": BottleneckConfig(init_bottleneck_weights=False, task_type="CAUSAL_LM")}
ARCHITECTURES = ["gpt2", "gemma2, window 24", "mixtral", "falcon, alibi", "lfm2, convolution"]
PROMPTS = [f"{'the start that all prompts share ' * 3}{'?' * n} {n}" for n in range(6)]
TOKENIZER = tiny_tokenizer()
IDS = [TOKENIZER(prompt)["input_ids"] for prompt in PROMPTS]


def sizes(model):
    layers = [placement._size_bytes(layer) for layer in placement._layers(model)]
    return layers, placement._size_bytes(model) - sum(layers)


def streamed(model, kept=0):
    """Place a model on the CPU with room for `kept` of its layers, and the others streamed."""
    layers, outside = sizes(model)
    place(model, [DeviceMemory("cpu", outside + (kept + 1) * layers[0])])
    return model


def answers(model, **options):
    return generate(model, TOKENIZER, IDS, max_new_tokens=8, **options).ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate((ADAPTERS | ALONE).items()):
        torch.manual_seed(seed)
        get_peft_model(model_of("llama"), config).save_pretrained(root / name)
    return {name: root / name for name in ADAPTERS | ALONE}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_layers_give_the_answers_of_a_plain_base(architecture):
    expected = answers(model_of(architecture))
    assert answers(streamed(model_of(architecture))) == expected


@pytest.mark.parametrize("name", ADAPTERS | ALONE)
def test_an_adapter_on_streamed_layers_answers_as_on_a_plain_base(folders, name):
    plain = model_of("llama")
    bare, expected = answers(plain), answers(PeftModel.from_pretrained(plain, folders[name]).eval())
    base = streamed(model_of("llama"))
    before = model_checksums(base)
    with attached(base, folders[name]) as model:
        assert answers(model) == expected
    assert not before.changes(model_checksums(base))
    assert answers(base) == bare != expected


def test_mixed_batches_on_streamed_layers_answer_as_on_a_plain_base(folders):
    names = [*ADAPTERS, *ADAPTERS]
    found = []
    for base in (model_of("llama"), streamed(model_of("llama"))):
        with attached_together(base, {name: folders[name] for name in ADAPTERS}) as mixed:
            assert mixed.left_out == {}
            found.append(answers(mixed, adapters=names))
    assert found[0] == found[1]
    assert len({*map(tuple, found[0])}) == len(IDS)


def test_a_layer_computes_with_copies_that_are_dropped_afterwards():
    model = streamed(tiny_model(layers=3).eval(), kept=1)
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
    home, used = [weight.data_ptr() for weight in weights], []
    for weight, layer in zip(weights, model.model.layers, strict=True):
        layer.mlp.register_forward_pre_hook(lambda *_, w=weight: used.append(w.data_ptr()))
    model(torch.arange(5)[None])
    assert [a == b for a, b in zip(home, used, strict=True)] == [True, False, False]
    assert [weight.data_ptr() for weight in weights] == home


def test_the_weights_are_back_after_an_error():
    model = streamed(tiny_model().eval())
    before = model_checksums(model)
    home = [weight.data_ptr() for weight in model.parameters()]

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    handle = model.model.layers[1].mlp.register_forward_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model(torch.arange(5)[None])
    handle.remove()
    assert [weight.data_ptr() for weight in model.parameters()] == home
    assert not before.changes(model_checksums(model))


def test_layers_that_share_weights_stay_on_the_first_device():
    model = tiny_model(layers=3)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    assert placement._layers(model) == [model.model.layers[1]]


def test_every_tensor_of_a_mixed_batch_is_on_the_device_of_its_layer():
    """Fake tensors raise an error where an operation has tensors of two devices.

    The type "lazy" has a device guard in builds of PyTorch without CUDA, which indexing needs.
    """
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
        with torch.device("lazy:0"):
            model = tiny_model().eval()
        with torch.device("lazy:1"):
            model.model.layers[1] = LlamaDecoderLayer(model.config, 1).eval()
        (size, _), outside = sizes(model)
        place(model, [DeviceMemory("lazy:0", outside + size), DeviceMemory("lazy:1", size)])
        assert str(model.model.layers[1].mlp.up_proj.weight.device) == "lazy:1"
        mixed, (out, width) = MixedModel(model), model.model.layers[1].mlp.up_proj.weight.shape
        part = _Part(torch.ones(width), torch.ones(out), down=torch.ones(width, 2))
        part = _Part(**{**vars(part), "up": torch.ones(2, out)})  # on the CPU, as a streamed layer
        mixed.add("chat", {f"model.layers.{i}.mlp.up_proj": part for i in range(2)})
        names = ["chat", None] * 3
        reader = PrefixReader(mixed, CacheSupport(), (), names)
        cache = None
        for cached, read_ids in ((0, slice(None, -3)), (len(IDS[-1]) - 3, slice(-3, None))):
            parts = [
                PromptPart(cached, ids[read_ids], adapter=name)
                for ids, name in zip(IDS, names, strict=True)
            ]
            read = reader.read(parts, cache, cached)
            cache = read.past_key_values
        truncate_cache(cache, [0, 1] * 3)
        devices = [str(layer.keys.device) for layer in read.past_key_values.layers]
        assert (devices, str(read.logits.device)) == (["lazy:0", "lazy:1"], "lazy:0")


def test_a_base_that_does_not_fit_the_first_gpu_is_placed(tmp_path, monkeypatch, caplog):
    folder = write_tiny_base(tmp_path, layers=3)
    expected = answers(load_base(folder, "float32", "cpu").model)
    layers, outside = sizes(tiny_model(layers=3))
    room = outside + 2 * layers[0]
    monkeypatch.setattr(placement, "gpus", lambda: [DeviceMemory("cpu", room)])
    with caplog.at_level(logging.INFO):
        base = load_base(folder, "float32")
    assert answers(base.model) == expected
    assert "the base does not fit cpu alone; decoder layers: 1 on cpu" in caplog.text
    assert "2 of 3 decoder layers do not fit the GPUs; 0.00 GiB are copied" in caplog.text
    assert load_base(folder, "float32") is base
    release_base()


def test_a_base_that_fits_is_moved_as_a_whole(caplog):
    model = tiny_model()
    with caplog.at_level(logging.INFO):
        place(model, [DeviceMemory("cpu", placement._size_bytes(model)), DeviceMemory("cpu", 0)])
        place(model, [])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert caplog.text == ""


def test_a_gpu_without_room_for_one_layer_is_refused():
    model = tiny_model()
    with pytest.raises(OutOfMemoryError, match="even with one decoder layer at a time"):
        place(model, [DeviceMemory("cpu", sizes(model)[1])])


def test_continuous_batching_needs_one_device():
    model = tiny_model()
    model.model.layers[1].to("meta")
    with pytest.raises(WorkerError, match=r"(?s)whole base on one device.*cpu, meta"):
        ContinuousBatchingEngine(model, TOKENIZER)


class Pair(NamedTuple):
    hidden: torch.Tensor
    weights: torch.Tensor | None


def test_inputs_and_outputs_keep_their_types():
    pair = placement._moved(Pair(torch.ones(2), None), "meta")
    assert isinstance(pair, Pair)
    assert (str(pair.hidden.device), pair.weights) == ("meta", None)


@pytest.mark.parametrize(
    ("layers", "outside", "devices"), [([4], 12, [10, 10]), ([], 12, [10, 10]), ([4], 2, [0, 0])]
)
def test_the_first_device_has_to_hold_what_is_outside_the_layers(layers, outside, devices):
    with pytest.raises(OutOfMemoryError, match="does not fit the GPU"):
        layer_devices(layers, outside, devices)


LAYERS = st.lists(st.integers(1, 50), min_size=1, max_size=12)


@settings(max_examples=50)
@given(LAYERS, st.integers(0, 50), st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_no_device_is_filled_beyond_its_memory(layers, outside, devices):
    total = outside + sum(layers)
    try:
        found = layer_devices(layers, outside, devices)
    except OutOfMemoryError:
        assert devices[0] < outside + max(layers)
        return
    used = [outside, *(0 for _ in devices[1:])]
    for size, number in zip(layers, found, strict=True):
        if number is not None:
            used[number] += size
    if None in found:
        used[0] += max(layers)
    assert all(size <= room for size, room in zip(used, devices, strict=True))
    placed = [number for number in found if number is not None]
    assert placed == sorted(placed)
    if total <= devices[0]:
        assert None not in found
