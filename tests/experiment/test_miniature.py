"""Each table and figure of the paper on the tiny model, by the command."""

import json
import re

import pytest
import yaml

from trans_peft.cli import main
from trans_peft.experiment import cells

TITLES = {
    "tables": ["Selected rates", "Scores (tables 1 and 2)", "Domain updates (fig. 5)",
               "GPU hours (fig. 7)",
               "Analyses of the bases (fig. 1, 2, 3, 8, 9, theorem 1)"],
    "repeats": ["Scores (tables 1 and 2)", "At an equal score on the old base",
                "Significance (table 3)", "Seeds (table 4)",
                "Sweep of `dropping_p` (fig. 6)", "Sweep of `masking_p` (fig. 6)",
                "Sweep of `where` (fig. 10)", "GPU hours (fig. 7)"],
}  # fmt: skip
FIGURES = {
    "tables": ["domains", "hours", "transfer-v2", "transfer-v3"],
    "repeats": ["hours", "sweep-1-dropping_p", "sweep-2-masking_p", "sweep-3-where",
                "transfer-v2"],
}  # fmt: skip
ANALYZED = {"tables": 2 * 4, "repeats": 0}
TRAININGS = {"tables": 2 + 3 * (2 + 2), "repeats": 2 * (2 + 1) + 1 + 2 + 2 * 2 + 2 * 2}


@pytest.fixture
def command(bases, tmp_path, capsys):
    def run(name: str, *options: str) -> tuple[int, str, str]:
        code = main(
            ["experiment", str(bases / f"{name}.yaml"), "--out", str(tmp_path / name),
             "--state", str(tmp_path / "state"), *options]
        )  # fmt: skip
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["tables", "repeats"])
def test_every_table_and_figure(command, trained, tmp_path, name):
    code, text, _ = command(name, "--dry-run")
    assert code == 0 and text.count("\nnew ") + text.startswith("new ") == TRAININGS[name]
    assert not trained and not (tmp_path / name).exists()

    code, _, text = command(name)
    assert code == 0, text
    assert len(trained) == TRAININGS[name]
    assert f"experiment: {TRAININGS[name]} of {TRAININGS[name]} trainings" in text
    folder = tmp_path / name
    report = (folder / "report.md").read_text()
    assert [title for title in TITLES[name] if f"\n## {title}\n" not in report] == []
    assert sorted(path.stem for path in folder.glob("figures/tiny/*.svg")) == FIGURES[name]
    assert "missing" not in report and "not a result" not in report
    page = (folder / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert page.count("data:image/svg+xml") == len(FIGURES[name])
    heat_maps = [path.stem for path in folder.glob("figures/tiny/analysis/*.png")]
    assert page.count("data:image/png") == len(heat_maps) == ANALYZED[name]
    assert ("### tiny, with plain LoRA adapters" in report) == bool(ANALYZED[name])
    assert {len(line["right"]) for line in lines_of(folder / "scores.jsonl")} <= {0, 20}


@pytest.fixture
def small(bases):
    """Write `small.yaml`: three trainings of a family with its own rows and two suites."""
    example = yaml.safe_load((bases / "repeats.yaml").read_text())
    more = {"name": "more", "data": {"uri": "more.jsonl"}, "max_new_tokens": 1}
    example["families"]["tiny"] |= {"data": example["training"].pop("data")}
    example["families"]["tiny"] |= {"suites": [*example.pop("suites"), more]}
    example |= {
        "seeds": [42],
        "data_seeds": [],
        "sweeps": [],
        "longer": [],
        "quick": {"steps": 2, "items": 5},
    }
    (bases / "small.yaml").write_text(yaml.safe_dump(example))


def test_a_run_that_was_killed_continues_and_repeats_nothing(
    command, small, trained, tmp_path, monkeypatch
):
    path, whole = tmp_path / "small" / "scores.jsonl", cells.fit

    def killed(job, *, on_event):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return whole(job, on_event=on_event)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "fit", killed)
        with pytest.raises(SystemExit, match="130"):
            command("small")
    first = path.read_text()
    report = (tmp_path / "small" / "report.md").read_text()
    assert "**1 trainings are missing; what needs them is empty.**" in report
    assert json.loads(command("small", "--dry-run", "--json")[1])["missing"] == 1

    assert command("small")[0] == 0
    assert len({job.work_dir for job in trained}) == len(trained) == 3
    scored = path.read_text()
    assert scored.startswith(first) and len(scored) > len(first)

    assert command("small")[0] == 0
    assert len(trained) == 3 and path.read_text() == scored
    plan = json.loads(command("small", "--dry-run", "--json")[1])
    assert plan["missing"] == 0 and plan["gpu_hours"] == 0


def test_quick_files_are_no_results(command, small, trained, tmp_path):
    assert command("small", "--quick")[0] == 0
    (folder,) = (tmp_path / "small").iterdir()
    assert folder.name == "not-a-result"
    figures = sorted(path.name for path in folder.glob("figures/tiny/*"))
    assert figures == ["hours-not-a-result.svg", "transfer-v2-not-a-result.svg"]
    report = (folder / "report-not-a-result.md").read_text()
    assert "> **Not a result.**" in report
    assert all(line["is_quick"] for line in lines_of(folder / "scores.jsonl"))
    assert {len(line["right"]) for line in lines_of(folder / "scores.jsonl")} == {5}
