"""The draws against an independent Philox, and their rates and independence over fixed seeds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.draws import families
from trans_peft.domain.recipe import Perturbation
from trans_peft.perturbation.draws import TrainingPosition, draw

WORD = 2**64


def philox(counter, key):
    """Philox4x64-10 (Salmon et al. 2011), restated from the paper on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], WORD)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], WORD)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) % WORD, (k[1] + 0xBB67AE8584CAA73B) % WORD]
    return c


def test_the_restated_philox_gives_the_authors_known_answers():
    ones = 2**64 - 1
    assert philox([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
    ]  # fmt: skip
    assert philox([ones] * 4, [ones] * 2) == [
        0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0,
    ]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, WORD - 1), st.integers(0, 2**20), st.integers(0, WORD - 1),
    st.integers(0, 2**20), st.integers(0, 200), st.sampled_from(["ffn", "attention"]),
    st.sampled_from([0.01, 0.1, 0.5]),
)  # fmt: skip
def test_a_draw_is_philox_at_its_place(seed, rank, step, micro_step, layer, kind, p):
    """Word 0 seeds elements, word 1 drops, the others mask: 53 bits of each against p."""
    words = []
    for block in range(1, 13):
        place = [block, 2 * layer + (kind == "attention"), step, micro_step]
        words += philox(place, [seed, rank])
    drawn = draw(
        Perturbation(p, p),
        TrainingPosition(step, micro_step),
        seed=seed,
        rank=rank,
        layer=layer,
        kind=kind,
        neurons=40,
    )
    uniform = [(word >> 11) / 2**53 for word in words]
    assert drawn.element_seed == words[0] >> 1
    assert drawn.dropped == (uniform[1] < p)
    assert drawn.kept.tolist() == [u >= p for u in uniform[2:42]]


FALSE_ALARM = 1e-4
"""Chance that right draws with other seeds would fail the test below, all its z values together."""


def test_rates_and_independence_of_neighbors_are_those_of_fair_coins():
    found = families(range(4), shape=(12, 6, 3, 2, 2))
    count = sum(len(z) for z in found.values())
    bound = stats.norm.isf(FALSE_ALARM / 2 / count)
    assert bound < 6
    worst = {name: float(abs(z).max()) for name, z in found.items()}
    assert max(worst.values()) < bound, worst


@pytest.mark.parametrize("bias", [0.004, 0.05])
def test_the_bound_would_see_a_bias(bias, monkeypatch):
    def biased(*args, **kwargs):
        drawn = draw(*args, **kwargs)
        kept = drawn.kept & (np.arange(len(drawn.kept)) % round(1 / bias) > 0)
        return type(drawn)(drawn.dropped, kept, drawn.element_seed)

    monkeypatch.setattr("benchmarks.draws.draw", biased)
    found = families(range(4), shape=(12, 6, 3, 2, 2))
    assert max(abs(z).max() for z in found.values()) > 6
