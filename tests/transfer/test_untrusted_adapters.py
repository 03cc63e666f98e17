"""Adapter folders that would block or exhaust a process that checks or attaches them."""

import json
import time

import pytest

from tests.tiny import tiny_model
from tests.transfer.conftest import edit_config, fingerprint_of
from trans_peft.errors import AdapterError, IsolationError, TransPeftError
from trans_peft.methods import patterns
from trans_peft.transfer import load_adapter
from trans_peft.transfer.compatibility import compare
from trans_peft.transfer.load_adapter import attach

SLOW = r"(([a-z_.0-9]+)+)+X"
SLOW_PATTERNS = [
    {"target_modules": SLOW},
    {"modules_to_save": [SLOW]},
    {"rank_pattern": {SLOW: 4}},
    {"layers_to_transform": [0], "layers_pattern": SLOW},
]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(patterns, "_LIMITS", patterns.CallLimits(cpu_s=1))


@pytest.mark.parametrize("changes", SLOW_PATTERNS)
def test_slow_patterns_are_refused_when_an_adapter_is_attached(write_adapter, changes):
    folder = edit_config(write_adapter(), **changes)
    with pytest.raises(AdapterError, match="processor time"):
        attach(tiny_model(), folder)


@pytest.mark.parametrize("changes", SLOW_PATTERNS)
def test_slow_patterns_are_refused_when_bases_are_compared(write_adapter, changes):
    folder = edit_config(write_adapter(), **changes)
    base = fingerprint_of(tiny_model())
    started = time.monotonic()
    with pytest.raises(TransPeftError, match="processor time"):
        compare(base, base, folder)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("pattern", ["(q_proj", "*", "[z-a]"])
def test_an_invalid_regular_expression_is_reported(write_adapter, pattern):
    folder = edit_config(write_adapter(), target_modules=pattern)
    base = fingerprint_of(tiny_model())
    with pytest.raises(TransPeftError, match="not a regular expression"):
        compare(base, base, folder)
    with pytest.raises(AdapterError, match="not a regular expression"):
        attach(tiny_model(), folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 400_000_000},
        {"r": 16_000_000},
        {"rank_pattern": {"q_proj": 16_000_000}},
    ],
)
def test_ranks_larger_than_in_the_file_are_refused_before_allocation(write_adapter, changes):
    with pytest.raises(AdapterError, match=r"exceeds|larger tensors"):
        attach(tiny_model(), edit_config(write_adapter(), **changes))


@pytest.mark.parametrize("text", ['{"a":' * 100_000, " " * (2 << 20), "[" * 1000])
def test_a_config_too_large_or_too_deep_is_an_error(write_adapter, text):
    folder = write_adapter()
    (folder / "adapter_config.json").write_text(text)
    base = fingerprint_of(tiny_model())
    with pytest.raises(AdapterError, match=r"not JSON|more than"):
        compare(base, base, folder)
    with pytest.raises(AdapterError, match=r"not JSON|more than"):
        attach(tiny_model(), folder)


def test_a_killed_check_is_an_isolation_error(write_adapter, monkeypatch):
    def killed(*_):
        raise IsolationError("killed")

    monkeypatch.setattr(load_adapter, "check_options", killed)
    with pytest.raises(IsolationError):
        attach(tiny_model(), write_adapter())


def test_a_common_pattern_is_accepted(write_adapter):
    folder = edit_config(write_adapter(), target_modules=r".*\.(q_proj|v_proj)")
    base = fingerprint_of(tiny_model())
    assert compare(base, base, folder).ok
    attach(tiny_model(), folder)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
