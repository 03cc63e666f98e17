"""Reports and figures of constructed scores: places, names and texts of users."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from trans_peft.cli.files import read_experiment
from trans_peft.domain.data import DataSource
from trans_peft.domain.experiment import PLAIN, BaseFamily, Experiment, Sweep
from trans_peft.domain.recipe import Perturbation
from trans_peft.domain.spec import AdapterSpec
from trans_peft.experiment import figures
from trans_peft.experiment.cells import Score
from trans_peft.experiment.comparison import Scores
from trans_peft.experiment.outline import Outline
from trans_peft.experiment.report import write_report

EXAMPLE = replace(
    read_experiment(Path(__file__).with_name("repeats.yaml")), data_seeds=(), sweeps=()
)
NOTHING_MISSING = Outline((), (), 0.0, None, ())
SUITE = EXAMPLE.suites[0].name


def scores_of(experiment: Experiment, right) -> list[Score]:
    """Return a score for each training and base; `right` returns the answers."""
    return [
        Score(
            repr((planned, label)), planned.family, planned.method, asdict(planned.perturbation),
            planned.seed, planned.data_seed, planned.base, label, SUITE, right(planned, label),
        )
        for planned in experiment.trainings()
        for label in planned.scored_on
    ]  # fmt: skip


def test_each_family_and_base_has_a_figure_of_its_own(tmp_path):
    """The names of both families and bases, joined by a dash, are the same text."""
    families = {"a-b": BaseFamily("x", {"c": "y"}), "a": BaseFamily("x", {"b-c": "y"})}
    example = replace(EXAMPLE, families=families)
    found = scores_of(example, lambda planned, label: "01" if planned.family == "a" else "11")
    report = write_report(example, example, NOTHING_MISSING, found, (), tmp_path)
    transfers = [path for path in report.figures if path.name.startswith("transfer-")]
    assert transfers == [
        tmp_path / "figures" / "a-b" / "transfer-c.svg",
        tmp_path / "figures" / "a" / "transfer-b-c.svg",
    ]
    first, second = (path.read_text() for path in transfers)
    assert first != second
    assert report.page.read_text().count("data:image/svg+xml") == len(report.figures)


def test_texts_of_the_file_are_shown_as_they_are(tmp_path):
    uri = "/data/<b>a|b`*c*![x](y.svg)\nz.jsonl"
    spec = AdapterSpec("LORA", {"r": 2, "target_modules": ".*_(q|v)_proj"})
    training = replace(EXAMPLE.training, data=DataSource(uri))
    families = {"tiny": BaseFamily("<i>|old", {"v2": "s3://a|b/__v2__"})}
    example = replace(EXAMPLE, training=training, methods={"LoRA": spec}, families=families)
    report = write_report(example, example, NOTHING_MISSING, (), (), tmp_path)
    page = report.page.read_text()
    rows = re.findall(r"<tr>\n<td>(.*?)</td>\n<td>(.*?)</td>\n</tr>", page)
    shown = {name: re.sub("</?code>", "", value) for name, value in rows}
    assert shown["training rows"] == "/data/&lt;b&gt;a|b'*c*![x](y.svg) z.jsonl"
    assert shown["methods"] == "LoRA: LORA r 2, target_modules .*_(q|v)_proj"
    assert shown["bases"] == "tiny: &lt;i&gt;|old -&gt; v2 (s3://a|b/__v2__)"
    assert "<b>" not in page and "<i>" not in page and "<img" not in page
    assert report.figures == ()


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Call a function that draws, and return its axes."""

    def draw(function, *arguments):
        kept = []
        monkeypatch.setattr(plt, "close", kept.append)
        function(*arguments, tmp_path / "figure.svg")
        (figure,) = kept
        figure.canvas.draw()
        return figure.axes[0]

    yield draw
    monkeypatch.undo()
    plt.close("all")


def test_all_seeds_and_lines_of_the_transfer_figure_are_in_view_and_named(drawn):
    methods = dict.fromkeys(("LoRA", "DoRA"), EXAMPLE.methods["LoRA"])
    arms = {f"arm-{n}": Perturbation(0.01 * n) for n in range(1, 9)}
    example = replace(EXAMPLE, seeds=(1, 2), methods=methods, arms=arms)

    def right(planned, label):
        return "1" * 20 if (planned.seed, label) == (1, "old") else "0" * 20

    scores = Scores.of(example, "tiny", scores_of(example, right))
    axes = drawn(figures.transfer_figure, scores, "v2")
    low, high = axes.get_xlim()
    assert low < 0 and high > 100
    handles, names = axes.get_legend_handles_labels()
    assert names == [
        f"{method}, {arm}"
        for method in methods
        for arm in ("Direct Transfer", *arms, "Fine-tune(new)")
    ]
    looks = {(handle.get_color(), handle.get_marker()) for handle in handles}
    assert len(looks) == len(names)


def test_values_of_a_sweep_have_equal_distances_and_are_sorted(drawn):
    sweep = Sweep("masking_p", (0.3, 0, 0.01, 0.02), "tiny", "LoRA", PLAIN)
    example = replace(EXAMPLE, sweeps=(sweep,), arms={"a": Perturbation(0.5)})

    def right(planned, label):
        return "".join("1" if n < 100 * planned.perturbation.masking_p else "0" for n in range(100))

    scores = Scores.of(example, "tiny", scores_of(example, right))
    axes = drawn(figures.sweep_figure, scores, sweep)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "0.01", "0.02", "0.3"]
    assert list(axes.get_xticks()) == [0, 1, 2, 3]
    points = [bars.lines[0].get_xydata() for bars in axes.containers]
    for of_base in points:
        assert of_base[:, 1] == pytest.approx([0, 1, 2, 30])
    assert len({x for of_base in points for x, _ in of_base}) == 8, "error bars lie side by side"


@pytest.mark.parametrize(("labels", "angle"), [(("v2", "v3"), 0), (("x" * 30, "y" * 30), 20)])
def test_long_names_of_bases_do_not_overlap(drawn, labels, angle):
    families = {"tiny": BaseFamily("old", dict.fromkeys(labels, "new"))}
    example = replace(EXAMPLE, families=families)
    found = scores_of(example, lambda planned, label: "0110")
    axes = drawn(figures.bases_figure, Scores.of(example, "tiny", found))
    ticks = axes.get_xticklabels()
    assert [tick.get_text() for tick in ticks] == list(labels)
    assert {tick.get_rotation() for tick in ticks} == {angle}


def test_a_table_of_one_family_has_its_scores_alone(tmp_path):
    found = scores_of(EXAMPLE, lambda planned, label: "0111" if label == "old" else "0011")
    other = [replace(one, family="other", right="0000") for one in found]
    write_report(EXAMPLE, EXAMPLE, NOTHING_MISSING, [*other, *found], (), tmp_path)
    rows = (tmp_path / "report.md").read_text().split("### tiny, v2")[1].splitlines()[4:12]
    cells = {tuple(row.split(" | ")[0:2]): row.split(" | ")[2] for row in rows if "LoRA" in row}
    assert cells[("| LoRA", "Fine-tune(old)")] == "75.0"
    assert cells[("| LoRA", "Direct Transfer")] == "50.0"
    assert len(cells) == 5
