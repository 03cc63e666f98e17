"""The tables of docs/label-free.md on figures made by hand, and the measures on a tiny model."""

import json
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from scipy.stats import mannwhitneyu, spearmanr

from study.label_free import MEASURED, PROMPTS, Adapter, Measured, measured, prompts_of, results
from study.label_free_report import PAGE, area, joined, page_with, rank_correlation
from study.plan import TASKS
from study.triage import record_activations, risks
from tests.tiny import tiny_model
from trans_peft.data import Example
from trans_peft.domain.experiment import OLD

ITEMS = 100


def measured_by_hand(seed, equal, kl):
    return Measured(f"k{seed}", "signatures", "plain", 120, seed, "ffn", 64, equal, kl, {})


def scored(losses):
    """The marks of adapters by seed: all items right on v1, fewer on the new base."""
    return {
        Adapter("signatures", "plain", 120, seed): {
            OLD: "1" * ITEMS,
            "ffn": "1" * (ITEMS - lost) + "0" * lost,
        }
        for seed, lost in enumerate(losses)
    }


def example_rows(kls=(0.1, 0.2, 0.4), losses=(0, 20, 50)):
    lines = [measured_by_hand(seed, 60 - seed, kl) for seed, kl in enumerate(kls)]
    return joined(lines, scored(losses), {"signatures": []})


def once(rows):
    return np.ones((1, len(rows)))


def test_a_risk_that_rises_with_the_loss_has_correlation_one():
    up, down = example_rows(), example_rows(kls=(0.4, 0.2, 0.1))
    assert rank_correlation(up, once(up), "KL") == pytest.approx([1])
    assert rank_correlation(up, once(up), "disagreement") == pytest.approx([1])
    assert rank_correlation(down, once(down), "KL") == pytest.approx([-1])


def test_the_area_counts_pairs_of_one_that_passes_and_one_that_fails():
    rows, mixed = example_rows(), example_rows(kls=(0.3, 0.2, 0.4))
    assert [row.passed[5.0] for row in rows] == [True, False, False]
    assert area(rows, once(rows), "KL", 5.0) == [1]
    assert area(mixed, once(mixed), "KL", 5.0) == [0.5]


def test_what_cannot_be_told_is_nan():
    flat, broken = example_rows(kls=(0.1, 0.1, 0.1)), example_rows(losses=(20, 30, 50))
    assert np.isnan(rank_correlation(flat, once(flat), "KL"))
    assert np.isnan(area(broken, once(broken), "KL", 5.0))


def test_both_measures_are_scipys_on_the_rows_that_were_drawn_with_ties_too():
    draw = random.Random(0)
    for _ in range(20):
        losses = [0, *(draw.randrange(6) for _ in range(12))]
        rows = example_rows(kls=[draw.randrange(4) / 10 for _ in losses], losses=losses)
        counts = np.array([[1 + draw.randrange(2), *draw.choices(range(4), k=12)] for _ in losses])
        found = zip(
            counts,
            rank_correlation(rows, counts, "KL"),
            area(rows, counts, "KL", 5.0),
            strict=True,
        )
        for times, coefficient, chance in found:
            drawn = [row for row, n in zip(rows, times, strict=True) for _ in range(n)]
            risks, lost = [row.risks["KL"] for row in drawn], [row.lost for row in drawn]
            assert coefficient == pytest.approx(spearmanr(risks, lost).statistic)
            failed, passed = (
                [row.risks["KL"] for row in drawn if row.passed[5.0] is kind]
                for kind in (False, True)
            )
            u = mannwhitneyu(failed, passed).statistic
            assert chance == pytest.approx(u / len(failed) / len(passed))


def test_items_that_were_asked_do_not_count_for_the_loss():
    line = [measured_by_hand(0, 60, 0.1)]
    (row,) = joined(line, scored([20]), {"signatures": list(range(80, 100))})
    assert row.lost == 0


def test_the_prompts_are_a_fixed_choice_whatever_the_order_of_the_rows():
    rows = [Example(str(i), "p", "c") for i in range(200)]
    chosen = {rows[i].id for i in prompts_of(rows)}
    assert len(chosen) == PROMPTS
    turned = rows[::-1]
    assert {turned[i].id for i in prompts_of(turned)} == chosen


def test_the_page_in_the_docs_equals_the_measurements():
    excluded = json.loads(MEASURED.with_name("label_free_prompts.json").read_text())
    assert set(excluded) == set(TASKS)
    page = PAGE.read_text()
    assert page_with(page, results(), measured(), excluded) == page


@pytest.fixture
def adapter(tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "adapter")
    tiny_model().save_pretrained(tmp_path / "v1")
    return tmp_path


def test_a_base_that_did_not_move_is_no_risk(adapter):
    inputs = record_activations(tiny_model(), [[65, 66, 67]])
    found = risks(adapter / "adapter", adapter / "v1", adapter / "v1", inputs, inputs)
    assert (found["weights"], found["inputs"]) == (0, 0)
    assert found["size"] > 0


def test_the_inputs_are_those_of_the_projections_and_scale_out(adapter):
    inputs = record_activations(tiny_model(), [[65, 66, 67], [68] * 20])
    assert {x.shape[0] for x in inputs.values()} == {3 + 8}
    doubled = {name: 2 * x for name, x in inputs.items()}
    found = risks(adapter / "adapter", adapter / "v1", adapter / "v1", inputs, doubled)
    assert found["inputs"] == pytest.approx(1, rel=1e-5)


def test_a_weight_that_moved_only_outside_the_adapters_directions_is_no_risk(adapter):
    model = tiny_model()
    lora = load_file(adapter / "adapter" / "adapter_model.safetensors")
    for index, layer in enumerate(model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            a = lora[f"base_model.model.model.layers.{index}.self_attn.{name}.lora_A.weight"]
            reads = torch.linalg.qr(a.T).Q
            weight = getattr(layer.self_attn, name).weight
            away = torch.randn_like(weight)
            weight.data += away - away @ reads @ reads.T
    model.save_pretrained(adapter / "v2")
    inputs = record_activations(tiny_model(), [[65, 66]])
    found = risks(adapter / "adapter", adapter / "v1", adapter / "v2", inputs, inputs)
    assert found["weights"] == pytest.approx(0, abs=1e-4)
