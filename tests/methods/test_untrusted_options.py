"""Options of an adapter that would hang or exhaust the process that puts it on a model."""

import time

import pytest
import torch

from tests.tiny import tiny_model
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.bounds import MAX_ADAPTER_NUMBER, MAX_PATTERN_LENGTH
from trans_peft.errors import InvalidSpecError, LimitExceededError
from trans_peft.methods import patterns
from trans_peft.methods.allocation import BoundedAllocation
from trans_peft.methods.patterns import check_options
from trans_peft.methods.specs import attach, to_config

NAMES = [f"model.layers.{n}.mlp.{name}_proj" for n in range(4) for name in ("up", "gate", "down")]
SLOW = r"(([a-z_.0-9]+)+)+X"
SUBJECT = "the adapter in s3://x"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(patterns, "_LIMITS", patterns.CallLimits(cpu_s=1))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"modules_to_save": [SLOW]},
        {"rank_pattern": {SLOW: 4}},
        {"layers_pattern": [SLOW], "layers_to_transform": [1]},
        {"layers_pattern": SLOW},
        {"n_frequency_pattern": {SLOW: 4}},
        {"an_option_of_the_future": {"x": [{"y": SLOW}]}},
        {"target_modules": r"(.+)+#"},
    ],
)
def test_a_pattern_that_backtracks_for_ever_is_refused(options):
    started = time.monotonic()
    with pytest.raises(LimitExceededError, match=f"(?s)a pattern of {SUBJECT}.*processor time"):
        check_options(options, NAMES, SUBJECT)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "options",
    [
        {"r": MAX_ADAPTER_NUMBER + 1},
        {"r": -MAX_ADAPTER_NUMBER - 1},
        {"rank_pattern": {"q_proj": 10**18}},
        {"loftq_config": {"loftq_iter": 10**9}},
        {"target_modules": "a" * (MAX_PATTERN_LENGTH + 1)},
        {"target_modules": ["q_proj", "a" * (MAX_PATTERN_LENGTH + 1)]},
        {"target_modules": "(q_proj"},
        {"target_modules": "*"},
        {"exclude_modules": "[z-a]"},
    ],
)
def test_options_out_of_bounds_are_refused_by_name(options):
    field = next(iter(options))
    with pytest.raises(InvalidSpecError, match=f"(?s){SUBJECT} cannot be used.*{field}"):
        check_options(options, NAMES, SUBJECT)


@pytest.mark.parametrize("length", [560, 100_000])
@pytest.mark.parametrize(
    "options",
    [
        lambda pattern: {"target_modules": pattern},
        lambda pattern: {"target_modules": ["q_proj"], "rank_pattern": {pattern: 4}},
        lambda pattern: {"target_modules": ["q_proj"], "layers_pattern": [pattern]},
    ],
)
def test_a_pattern_that_takes_long_to_compile_is_refused_in_a_child_process(options, length):
    given = options("(?i)" + "[\0-\ufffe]" * length)
    started = time.process_time()
    with pytest.raises(InvalidSpecError, match=r"more than 1 s to compile|at most 4000") as caught:
        to_config(AdapterSpec("LORA", given))
    with pytest.raises(InvalidSpecError, match=r"more than 1 s to compile|exceeds 4000"):
        check_options(given, NAMES, SUBJECT)
    assert time.process_time() - started < 1
    assert len(str(caught.value)) < 1000


def test_options_nested_without_end_are_refused():
    deep: dict = {}
    for _ in range(10_000):
        deep = {"x": deep}
    with pytest.raises(InvalidSpecError, match="nested"):
        check_options(deep, NAMES, SUBJECT)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "r": 16, "lora_alpha": 2.5, "bias": "none"},
        {"target_modules": r".*\.(q_proj|v_proj)", "projection_prng_key": 2**31},
        {"target_modules": r"model\.layers\.\d+\.(mlp|self_attn)\.[a-z]+_proj"},
        {"rank_pattern": {r"^model\.layers\.[0-3]\.": 8}, "random_loc_seed": 2**40},
        {"base_model_name_or_path": SLOW, "revision": SLOW},
    ],
)
def test_usual_options_pass(options):
    check_options(options, NAMES, SUBJECT)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 400_000_000},
        {"r": 16_000_000},
        {"r": 4, "rank_pattern": {"q_proj": 16_000_000}},
    ],
)
def test_a_spec_larger_than_its_base_is_refused_before_it_is_allocated(options):
    model = tiny_model()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(InvalidSpecError, match=r"exceeds|larger tensors"):
        attach(model, AdapterSpec("LORA", {"target_modules": ["q_proj"], **options}))
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec("BOTTLENECK", {"bottleneck_dim": 16_000_000}),
        AdapterSpec("DELORA", {"target_modules": ["q_proj"], "r": 16_000_000}),
        AdapterSpec("HIRA", {"target_modules": ["q_proj"], "r": 16_000_000}),
        AdapterSpec("VERA", {"target_modules": ["q_proj"], "r": 16_000_000}),
        AdapterSpec("LOHA", {"target_modules": ["q_proj"], "r": 16_000_000}),
    ],
)
def test_the_bound_holds_for_every_method(spec):
    with pytest.raises(InvalidSpecError, match="larger tensors"):
        attach(tiny_model(), spec)


def test_large_tensors_count_while_they_are_alive():
    with BoundedAllocation(3 << 20, "x"):
        for _ in range(10):
            torch.zeros(2 << 20)
        kept = torch.nn.Parameter(torch.empty(2 << 20))
        with pytest.raises(LimitExceededError, match="at a time"):
            torch.zeros(2 << 20)
        del kept
        torch.zeros(2 << 20)


def test_allocations_are_counted_before_they_happen():
    with BoundedAllocation(100, "x"):
        assert torch.zeros(50).sum() == 0
        torch.nn.Linear(5, 5)
    for allocate in (
        lambda: torch.empty(10**12),
        lambda: torch.randn(10**6, 10**6, generator=torch.Generator()),
        lambda: torch.eye(10**6),
        lambda: torch.arange(10**12),
        lambda: torch.zeros(3).new_zeros(10**12),
        lambda: torch.zeros(3).repeat(10**12),
        lambda: torch.nn.Linear(10**6, 10**6),
        lambda: torch.nn.Embedding(10**6, 10**6),
        lambda: [torch.zeros(60), torch.zeros(60)],
    ):
        with pytest.raises(LimitExceededError, match=r"at most 100 "), BoundedAllocation(100, "x"):
            allocate()
