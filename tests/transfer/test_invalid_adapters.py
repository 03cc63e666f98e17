"""An invalid adapter folder raises a TransPeftError that names the folder, and no other error."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model
from tests.transfer.conftest import edit_config, fingerprint_of
from trans_peft.checksums import model_checksums
from trans_peft.domain.adapter_config import parse_adapter_config
from trans_peft.errors import AdapterError, TransPeftError, replacing_paths_in_errors
from trans_peft.models import adapter_weights_sha256
from trans_peft.transfer.compatibility import compare
from trans_peft.transfer.load_adapter import attached, rebind_adapter
from trans_peft.transfer.scaling import rescaled

WEIGHTS = "adapter_model.safetensors"


def errors_of(folder, tmp_path):
    """Run every operation of the library on a folder; return the TransPeftErrors by operation."""
    base = fingerprint_of(tiny_model())
    model = tiny_model()
    before = model_checksums(model)

    def attach():
        with attached(model, folder) as adapted, torch.no_grad():
            adapted(input_ids=torch.arange(5)[None])

    found = {}
    for name, operation in {
        "hash": lambda: adapter_weights_sha256(folder),
        "compare": lambda: compare(base, base, folder),
        "attach": attach,
        "rebind": lambda: rebind_adapter(
            folder, tmp_path / "moved", base_name="b", base_revision="r"
        ),
        "rescale": lambda: rescaled(folder, tmp_path / "scaled", 2.0),
    }.items():
        try:
            operation()
        except TransPeftError as error:
            str(error).encode()
            found[name] = error
    assert not before.changes(model_checksums(model))
    return found


def fp8(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, folder / WEIGHTS)


def cast_to(dtype):
    def write(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file({k: v.to(dtype) for k, v in tensors.items()}, folder / WEIGHTS)

    return write


def beyond_float32(folder):
    tensors = {k: v.double() for k, v in load_file(folder / WEIGHTS).items()}
    next(iter(tensors.values()))[0, 0] = 1e39
    save_file(tensors, folder / WEIGHTS)


def complex_numbers(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v.to(torch.complex64) for k, v in tensors.items()}, folder / WEIGHTS)


def not_finite(value):
    def write(folder):
        tensors = load_file(folder / WEIGHTS)
        next(iter(tensors.values()))[0, 0] = value
        save_file(tensors, folder / WEIGHTS)

    return write


def header(text):
    def write(folder):
        data = text.encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(data)) + data)

    return write


def config(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


INVALID = {
    "fp8": (fp8, "attach", r"unsupported dtype: .*lora_A.*F8_E4M3"),
    "complex numbers": (complex_numbers, "attach", "unsupported dtype: .*C64"),
    **{
        str(dtype): (cast_to(dtype), "attach", "unsupported dtype: .*lora_A")
        for dtype in (torch.int32, torch.uint8, torch.bool)
    },
    "beyond float32": (beyond_float32, "attach", "lora_A.* exceed the range of the dtype"),
    "nan": (not_finite(float("nan")), "attach", "not finite: .*lora_A"),
    "infinity": (not_finite(float("inf")), "attach", "not finite: .*lora_A"),
    "a text for alpha": (
        lambda f: edit_config(f, lora_alpha="16"),
        "attach",
        "lora_alpha must be int, not '16'",
    ),
    "a list for r": (lambda f: edit_config(f, r=[4]), "attach", r"r must be int, not \[4\]"),
    "an alpha of a module": (
        lambda f: edit_config(f, alpha_pattern={"q_proj": "2"}),
        "attach",
        "alpha_pattern: 'q_proj' must have a number",
    ),
    "a scale that is a text": (lambda f: edit_config(f, lora_alpha="16"), "rescale", "'16'"),
    "no scale": (lambda f: edit_config(f, lora_alpha=None), "rescale", "lora_alpha: None"),
    "a module that is a number": (
        lambda f: edit_config(f, target_modules=[3]),
        "compare",
        r"target_modules must be text or a list of texts, not \[3\]",
    ),
    "one module to save": (
        lambda f: edit_config(f, modules_to_save="norm"),
        "compare",
        "modules_to_save must be a list",
    ),
    "an expression": (
        lambda f: edit_config(f, target_modules="(q_proj"),
        "compare",
        "not a regular expression",
    ),
    "a rank's expression": (
        lambda f: edit_config(f, rank_pattern={"(": 4}),
        "attach",
        "cannot be loaded on|not a regular",
    ),
    "an unknown method": (lambda f: edit_config(f, peft_type="WARP"), "attach", "WARP"),
    "a method in small letters": (lambda f: edit_config(f, peft_type="lora"), "attach", "lora"),
    "a method that is a number": (lambda f: edit_config(f, peft_type=3), "hash", "peft_type.*3"),
    "a method that loads others": (
        lambda f: config(json.dumps({"peft_type": "XLORA", "adapters": {"0": "/etc"}}))(f),
        "attach",
        "XLORA is not supported: it loads other adapters",
    ),
    "a method by batch": (config('{"peft_type": "LILY"}'), "attach", "LILY is not supported"),
    "a base that is rewritten": (lambda f: edit_config(f, kasa_config={}), "attach", "kasa_config"),
    "another task": (lambda f: edit_config(f, task_type="SING"), "attach", "SING"),
    "a lone surrogate": (config('{"peft_type": "LORA", "r": "\\ud800"}'), "hash", "surrogate"),
    "a surrogate for a key": (config('{"peft_type": "LORA", "\\udfff": 1}'), "attach", "surrogate"),
    "a key twice": (config('{"peft_type": "LORA", "r": 4, "r": 8}'), "hash", "repeated keys: 'r'"),
    "not a number": (config('{"peft_type": "LORA", "lora_alpha": NaN}'), "hash", "NaN"),
    "beyond every float": (
        config('{"peft_type": "LORA", "lora_alpha": 1e999}'),
        "hash",
        "1e999 is not a finite number",
    ),
    "deep": (
        config('{"peft_type": "LORA", "a": ' + "[" * 50_000),
        "hash",
        "nested more than 100 levels",
    ),
    "a list": (config("[]"), "attach", "not a list"),
    "nothing": (config("null"), "compare", "NoneType"),
    "an empty file": (config(""), "hash", "not JSON"),
    "other letters": (
        lambda f: (f / "adapter_config.json").write_bytes(b'{"peft_type": "\xff"}'),
        "hash",
        "not JSON",
    ),
    "a header without end": (header("{"), "hash", "not a safetensors file"),
    "a header that is a list": (header("[]"), "hash", "not a safetensors file"),
    "a header too deep": (header('{"a":' * 50_000), "hash", "not a safetensors file"),
    "weights of no length": (
        lambda f: (f / WEIGHTS).write_bytes(b""),
        "attach",
        "cannot be read",
    ),
    "weights cut off": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        "hash",
        "ends 9 bytes too early",
    ),
    "weights that are a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        "attach",
        "no adapter_model",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_folder_is_an_error_with_folder_and_reason(case, write_adapter, tmp_path):
    damage, where, message = INVALID[case]
    folder = write_adapter()
    damage(folder)
    error = errors_of(folder, tmp_path)[where]
    assert str(folder) in str(error)
    with pytest.raises(TransPeftError, match=f"(?s){message}"):
        raise error


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["q_proj", "(", "*", "all-linear", "LORA", "pissa", "\ud800", ".*"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["q_proj", "(", "r", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
LM = {"task_type": "CAUSAL_LM"}
FIELDS = [*sorted(LoraConfig(**LM).to_dict()), "init_weights", "unknown"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **LM)
    get_peft_model(tiny_model(), lora).save_pretrained(folder)
    return folder, json.loads((folder / "adapter_config.json").read_text())


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
@example({"lora_alpha": 2**1023 * 1.0})
@example({"r": -4})
@example({"use_dora": "yes"})
@example({"runtime_config": {"x": 1}})
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_any_config_loads_or_raises_a_trans_peft_error(saved, tmp_path_factory, changes):
    folder, fields = saved
    (folder / "adapter_config.json").write_text(json.dumps(fields | changes))
    errors_of(folder, tmp_path_factory.mktemp("out"))


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_config_or_a_value_error(data):
    try:
        config = parse_adapter_config(data)
    except ValueError as error:
        str(error).encode()
    else:
        assert isinstance(config["peft_type"], str)


def test_errors_about_a_copy_name_the_original(tmp_path):
    with (
        pytest.raises(AdapterError, match=r"^s3://team/lora/adapter_config\.json is wrong$"),
        replacing_paths_in_errors({tmp_path / "copy": "s3://team/lora"}),
    ):
        raise AdapterError(f"{tmp_path / 'copy'}/adapter_config.json is wrong")
    with pytest.raises(AdapterError, match=r"^other$"), replacing_paths_in_errors({tmp_path: "x"}):
        raise AdapterError("other")
