"""docs/architectures.md is complete, and correct for the architectures that are tested here."""

import re

import pytest

from benchmarks.architectures.outcomes import DROPPED, MASKED, check_architecture, distance
from benchmarks.architectures.page import read
from benchmarks.architectures.tiny import ARCHITECTURES, UNBUILT, tiny
from trans_peft.perturbation import Layout

COMMAND = "run python -m benchmarks.architectures"
FAST = (
    "bitnet", "deepseek_v3", "falcon", "gemma4_text", "gpt_oss", "llama4_text", "mamba", "opt",
    "qwen3_next",
)  # fmt: skip

SLOWER = (
    "bloom", "gemma3n_text", "granitemoeshared", "jamba", "jetmoe", "mpt", "nemotron_h", "rwkv",
    "xlnet", "zamba2",
)  # fmt: skip


def test_the_page_lists_every_architecture_of_transformers():
    page = read()
    assert list(page) == list(ARCHITECTURES), COMMAND
    assert {v.outcome for v in page.values()} <= {"equal", "multiplied", "refused", "not built"}
    assert {n for n, v in page.items() if v.outcome == "not built"} == set(UNBUILT)
    assert len(UNBUILT) <= 2


@pytest.mark.parametrize("architecture", FAST)
def test_the_outcome_of_a_fast_architecture_equals_the_page(architecture):
    assert check_architecture(architecture) == read()[architecture], COMMAND


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SLOWER)
def test_the_outcome_of_a_slower_architecture_equals_the_page(architecture):
    assert check_architecture(architecture) == read()[architecture], COMMAND


@pytest.mark.architectures
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(FAST) - set(SLOWER)))
def test_the_outcome_of_every_architecture_equals_the_page(architecture):
    assert check_architecture(architecture) == read()[architecture], COMMAND


@pytest.mark.parametrize(
    "architecture",
    [name for name, verdict in read().items() if "layout=" in verdict.detail],
)
def test_a_suggested_layout_works(architecture):
    text = re.search(r"layout=(Layout\(.*\))\)", read()[architecture].detail)[1]
    layout = eval(text, {"Layout": Layout})
    model = tiny(architecture)
    stack = layout.layers.removesuffix(".layers")
    for perturbation in (MASKED, DROPPED):
        off = distance(model, architecture, perturbation, layout, stack)
        # HRM runs a stack several times in one forward, and each time has its own draws.
        assert off < 1e-4 or architecture == "hrm_text"


def test_every_unsupported_architecture_has_a_workaround():
    assert read()["gpt_oss"].outcome == "multiplied"
    refused = [verdict for verdict in read().values() if verdict.outcome == "refused"]
    assert refused
    for verdict in refused:
        assert re.search(r"do: (train without|perturb the attention|name the)", verdict.detail)
