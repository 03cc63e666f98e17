"""Analyses of whole updates: terms of the theorem, rankings, refusals and reports."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_base
from tests.ui.html import Page
from trans_peft.analysis import (
    AnalysisSettings,
    BaseSide,
    analyse,
    draw_figures,
    public_rows,
    tables,
    write_report,
)
from trans_peft.analysis.figures import _drawings
from trans_peft.analysis.theorem import bound_terms
from trans_peft.bases.drift import weight_drift
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import DataError, InvalidSpecError, UnsupportedModelError
from trans_peft.perturbation.draws import TrainingPosition, draw

ROWS = public_rows()[:3]
SHORT = AnalysisSettings(tokens=12)


def updated(folder, change):
    """Write a tiny base with `change(name)` added to each weight, relative to its own size."""
    model = tiny_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1 + change(name))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return BaseSide(folder.name, folder)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """v1, and updates that scale one FFN, all FFNs, and all attention."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "v1": BaseSide("v1", write_tiny_base(folder / "v1")),
        "one": updated(folder / "one", lambda name: 0.1 if "layers.1.mlp" in name else 0),
        "ffn": updated(folder / "ffn", lambda name: 0.3 if ".mlp." in name else 0),
        "attention": updated(folder / "attention", lambda name: 0.3 if "self_attn" in name else 0),
    }


@pytest.fixture(scope="module")
def found(sides):
    old, *news = sides.values()
    return analyse(old, news[::-1], ROWS, SHORT)


def test_updates_are_ordered_by_the_shift_of_their_ffns(found):
    assert [update.name for update in found.updates] == ["attention", "one", "ffn"]
    layers = tiny_model().model.layers
    norms = [
        torch.cat([w.detach().flatten() for w in layer.mlp.parameters()]).norm() for layer in layers
    ]
    attention, one, ffn = (update.terms for update in found.updates)
    assert attention.ffn_shift == 0
    assert one.ffn_shift_by_layer == pytest.approx([0, 0.1 * norms[1].item()], rel=1e-5)
    assert ffn.ffn_shift == pytest.approx(0.3 * math.hypot(*map(float, norms)), rel=1e-5)


def test_the_regularizer_is_the_mean_norm_of_the_weights_that_the_draws_leave_out(sides):
    """p_m |W_m|^2 + p_d |W_d|^2 against the draws of a training, for one layer of the base."""
    perturbation = Perturbation(masking_p=0.2, dropping_p=0.1)
    terms = bound_terms(weight_drift(sides["v1"].folder, sides["one"].folder), perturbation)
    mlp = tiny_model().model.layers[1].mlp
    of_neuron = (
        mlp.up_proj.weight.square().sum(1)
        + mlp.gate_proj.weight.square().sum(1)
        + mlp.down_proj.weight.square().sum(0)
    ).detach()
    left_out = 0.0
    steps = 4000
    for step in range(steps):
        drawn = [
            draw(p, TrainingPosition(step, 0), seed=1, rank=0, layer=1, kind="ffn", neurons=64)
            for p in (replace(perturbation, dropping_p=0.0), replace(perturbation, masking_p=0.0))
        ]
        left_out += of_neuron[torch.from_numpy(~drawn[0].kept)].sum().item()
        left_out += of_neuron.sum().item() * drawn[1].dropped
    assert terms.regularizer_by_layer[1] == pytest.approx(left_out / steps, rel=0.05)
    spared = bound_terms(
        weight_drift(sides["v1"].folder, sides["one"].folder),
        replace(perturbation, spared_layers=(0,)),
    )
    assert spared.regularizer_by_layer == (0, terms.regularizer_by_layer[1])
    assert spared.regularizer == terms.regularizer_by_layer[1]


def test_activations_before_a_changed_ffn_are_equal(found):
    """Scaling the FFN of layer 1 moves its neurons, and nothing before them."""
    distances = found.updates[1].distances
    assert [interval.value for interval in distances.attention] == [0, 0]
    assert distances.ffn[0].value == 0 < distances.ffn[1].low
    assert distances.difference.low > 0
    before, after = found.measured.influence, found.updates[1].measured.influence
    assert before[0] == after[0] and before[1] != after[1]


def test_adapters_are_part_of_the_bases(sides, tmp_path):
    model = get_peft_model(
        tiny_model(),
        LoraConfig(target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "adapter")
    tuned = replace(sides["v1"], name="tuned", adapter=tmp_path / "adapter")
    distances = analyse(sides["v1"], [tuned], ROWS, SHORT).updates[0].distances
    assert distances.attention[0].value == 0 < distances.ffn[0].value
    assert distances.attention[1].value > 0


def test_other_bases_are_refused_before_a_model_is_loaded(sides, tmp_path, monkeypatch):
    monkeypatch.setattr("trans_peft.analysis.updates.load_base", None)
    unrelated = BaseSide("unrelated", write_tiny_base(tmp_path / "unrelated", seed=7))
    with pytest.raises(UnsupportedModelError, match="the weights are unrelated"):
        analyse(sides["v1"], [unrelated], ROWS)
    tiny_model(layers=1).save_pretrained(tmp_path / "small")
    tiny_tokenizer(("<new>",)).save_pretrained(tmp_path / "small")
    with pytest.raises(UnsupportedModelError) as error:
        analyse(sides["v1"], [BaseSide("small", tmp_path / "small")], ROWS)
    assert "num_hidden_layers: 2, then 1" in str(error.value)
    assert "contain different tensors" in str(error.value)


def test_too_few_texts_and_equal_names_are_refused(sides):
    with pytest.raises(DataError, match="at least two texts"):
        analyse(sides["v1"], [sides["one"]], ROWS[:1])
    with pytest.raises(InvalidSpecError, match=r"tokens must be .* dtype must be one of"):
        AnalysisSettings(tokens=1, dtype="int8")
    for news in ([], [sides["v1"]]):
        with pytest.raises(InvalidSpecError, match="each with its own name"):
            analyse(sides["v1"], news, ROWS)


def test_the_report_has_every_figure_and_value(found, tmp_path):
    one = replace(found, updates=found.updates[1:2])
    json_file, markdown, html = write_report(one, tmp_path)
    (written,) = json.loads(json_file.read_text())["updates"]
    assert written["terms"]["ffn_shift"] == one.updates[0].terms.ffn_shift
    page, text = Page(html.read_text()), markdown.read_text()
    rows = [row for table in tables(one) for row in (table.header, *table.rows)]
    assert page.rows == [list(row) for row in rows]
    assert all(f"| {' | '.join(row)} |" in text for row in rows)
    assert page.tags.count("img") == 4
    gaps = replace(one.measured, attention=(None, None), ffn=(None, one.measured.ffn[1][:7]))
    hybrid = replace(one.updates[0], measured=gaps)
    drawn = draw_figures(replace(one, measured=gaps, updates=(hybrid,)), tmp_path / "hybrid")
    assert len(drawn["one"]) == 3  # no heat map of attention
    assert not re.search(r'(src|href)="(?!data:)', html.read_text())
    for name in re.findall(r"\((figures/.*?)\)", text):
        assert (tmp_path / name).stat().st_size > 1000


def test_a_mark_is_drawn_on_each_figure(found, tmp_path):
    one = replace(found, updates=found.updates[:1], measured=None)
    plain, marked = (
        draw_figures(one, tmp_path / name, mark)["attention"].values()
        for name, mark in (("plain", ""), ("marked", "not a result"))
    )
    assert [path.name for path in plain] == [path.name for path in marked]
    for before, after in zip(plain, marked, strict=True):
        assert before.read_bytes() != after.read_bytes()


def test_names_of_folders_are_shown_as_they_are(found, tmp_path):
    """`$` begins a formula of matplotlib, `_` hides a label of its legends, `<b>` is HTML."""
    update = replace(found.updates[0], name="_new <b>$^$")
    odd = replace(found, old="$_{", updates=(update,))
    _, markdown, html = write_report(odd, tmp_path)
    assert "$_{ to _new &lt;b&gt;$^$" in html.read_text()
    assert "$_{ to _new &lt;b>$^$" in markdown.read_text()

    (draw,) = [draw for name, _, draw in _drawings(odd, update) if name == "influence"]
    figure = Figure()
    draw(figure)
    texts = figure.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in texts] == [r"\$_{", r" _new <b>\$^\$"]


def test_layers_are_whole_numbers(found):
    """With one layer, matplotlib would write fractions of it."""
    update = found.updates[0]
    first = {
        name: getattr(update.drift, name)[:1] for name in ("attention_by_layer", "ffn_by_layer")
    }
    one = replace(update, drift=replace(update.drift, **first), distances=None)
    figure = Figure()
    FigureCanvasAgg(figure)
    (draw,) = [draw for name, _, draw in _drawings(found, one) if name == "layers"]
    draw(figure)
    figure.canvas.draw()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low < tick < high] == [0]
