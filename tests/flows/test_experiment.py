"""The flow `experiment`: what it starts, that it resumes, and the report that it publishes.

The tasks run as functions, in this process and without Prefect's server. Cells run by the function
of their flow; the trainings themselves are replaced, as `tests/experiment` runs them.
"""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows import experiment as flow_module
from flows import experiment_cell as cell_module
from tasks import experiments
from tests.experiment.conftest import bases  # noqa: F401
from trans_peft import analysis
from trans_peft.cli.files import read_experiment
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.experiment import OLD, BaseFamily
from trans_peft.domain.recipe import Perturbation
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import InvalidSpecError, TrainingError
from trans_peft.experiment import cells, figures
from trans_peft.experiment.prepare import Prepared
from trans_peft.experiment.prepare import prepare as prepare_now


def write_empty(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


class Platform:
    """Ingested bases v1 and v2 of the family tiny, the cells that ran, and trainings that fail."""

    def __init__(self, folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from trans_peft.bases.fingerprint import fingerprint

        self.ran: list[str] = []
        self.failing = ""
        self.artifacts: list[str] = []
        self.uri = str(folder / "results")
        store = FileStore()
        self.platform = replace(memory_platform(folder / "work"), store=store)
        for version in ("v1", "v2"):
            self.platform.catalog.make_ready(
                BaseVersion("tiny", version, str(files / version), 0),
                fingerprint=fingerprint(str(files / version), store),
                source="test",
            )
        example = read_experiment(files / "tables.yaml")
        family = BaseFamily("tiny/v1", {"v2": "tiny/v2"})
        methods = {"LoRA": example.methods["LoRA"]}
        self.experiment = replace(example, families={"tiny": family}, methods=methods)
        monkeypatch.setattr(experiments, "platform", lambda: self.platform)
        monkeypatch.setattr(experiments, "get_run_logger", lambda: logging.getLogger("test"))
        monkeypatch.setattr(experiments, "training_progress", lambda name: lambda event: None)
        monkeypatch.setattr(experiments, "work_progress", lambda: lambda reached: None)
        monkeypatch.setattr(
            experiments, "create_markdown_artifact",
            lambda key, markdown: self.artifacts.append(markdown),
        )  # fmt: skip
        monkeypatch.setattr(cell_module, "gpu_slots", lambda count: nullcontext())
        monkeypatch.setattr(cell_module, "check_worker", tuple)
        monkeypatch.setattr(
            cell_module, "experiments", SimpleNamespace(score_cell=experiments.score_cell.fn)
        )
        monkeypatch.setattr(
            flow_module,
            "experiments",
            SimpleNamespace(
                find_missing=experiments.find_missing.fn,
                run_cells=self._run_cells,
                publish_report=experiments.publish_report.fn,
            ),
        )
        checked: dict[str, Prepared] = {}

        def prepare(experiment, *given):
            key = repr(experiment)  # each start checks the experiment again, which takes a second
            if key not in checked:
                checked[key] = prepare_now(experiment, *given)
            return checked[key]

        monkeypatch.setattr(experiments, "prepare", prepare)
        monkeypatch.setattr(experiments, "pinned", prepare)
        rows = analysis.public_rows()[:2]
        monkeypatch.setattr(analysis, "public_rows", lambda: rows)
        monkeypatch.setattr(analysis, "draw_figures", lambda *_: {})
        monkeypatch.setattr(figures, "_draw", lambda path, *_, **__: write_empty(path))
        monkeypatch.setattr(cells, "_trained", self._trained)
        monkeypatch.setattr(
            cells, "_held_out_loss", lambda planned, *_: planned.perturbation.masking_p
        )
        monkeypatch.setattr(cells, "evaluate_on", self._evaluated)

    def run(self, **parameters):
        return flow_module.experiment.fn(self.experiment, self.uri, **parameters)

    def _run_cells(self, experiment, cells, results_uri, *, is_quick):
        failed = []
        for cell in cells:
            try:
                cell_module.experiment_cell.fn(experiment, results_uri, cell.training, is_quick)
                self.ran.append(str(cell.training or "bare bases"))
            except TrainingError as error:
                failed.append(f"{cell.training}: {error}")
        return tuple(failed)

    def _trained(self, planned, *_):
        if self.failing and self.failing in str(planned):
            raise TrainingError("stopped by the test")
        return SimpleNamespace(device_seconds=2.0, folder=Path("none"), weights_sha256=str(planned))

    def _evaluated(self, base, suites, *_, **__):
        items = [SimpleNamespace(correct=number % 2 == 0) for number in range(20)]
        return {suites[0].name: SimpleNamespace(items=items, seconds=1.0)}


@pytest.fixture
def ready(tmp_path, bases, monkeypatch):  # noqa: F811
    return Platform(tmp_path, bases, monkeypatch)


def test_rates_are_selected_first_and_every_cell_runs_once(ready):
    state = ready.run()
    assert (state.name, state.message) == ("Completed", f"the report is at {ready.uri}")
    at = [position for position, name in enumerate(ready.ran) if "rates to select" in name]
    assert at == [0, 1] and len(ready.ran) == 2 + 1 + 2 + 1
    assert "tiny/old, LoRA, p_m 0.1, p_d 0.1, seed 42" in ready.ran  # the lowest loss
    assert "bare bases" in ready.ran


def test_a_second_run_starts_nothing(ready):
    ready.run()
    before = list(ready.ran)
    assert ready.run().name == "Completed"
    assert ready.ran == before


def test_a_failed_cell_fails_the_run_and_the_next_run_continues(ready):
    ready.failing = "tiny/v2, LoRA, plain"
    state = ready.run()
    assert state.name == "Failed" and "1 cells failed" in state.message
    assert "stopped by the test" in state.message
    assert "**1 trainings are missing" in ready.artifacts[-1]
    before, ready.failing = list(ready.ran), ""
    assert ready.run().name == "Completed"
    assert ready.ran == [*before, "tiny/v2, LoRA, plain, seed 42"]


def test_the_report_is_an_artifact_and_its_files_are_results(ready):
    ready.run()
    assert "# Experiment tables" in ready.artifacts[-1] and "![" not in ready.artifacts[-1]
    names = {file.name for file in ready.platform.store.list(ready.uri)}
    assert {"report.md", "report.html", "figures/tiny/hours.svg"} <= names
    assert len([name for name in names if name.startswith("analyses/")]) == 1
    assert "### tiny, without adapters" in ready.artifacts[-1]
    (run,) = ready.platform.runs.runs
    assert run.name == "experiment tables"


def test_a_quick_run_is_marked(ready):
    ready.run(is_quick=True)
    assert "> **Not a result.**" in ready.artifacts[-1]


@pytest.mark.parametrize("place", ["/models/v1", "s3://bases/v1", "hub:Qwen/Qwen2-7B", "v1"])
def test_a_base_that_is_not_ingested_is_refused(ready, place):
    ready.experiment = replace(
        ready.experiment, families={"tiny": BaseFamily(place, {"v2": "tiny/v2"})}
    )
    with pytest.raises(InvalidSpecError, match="FAMILY/VERSION"):
        ready.run()


class TestRunCell:
    """A cell's flow run, with Prefect's client replaced."""

    @pytest.fixture
    def started(self, monkeypatch):
        keys: list[str] = []
        self.states = {}

        def run_deployment(name, *, idempotency_key, **_):
            keys.append(idempotency_key)
            return self._run(idempotency_key)

        monkeypatch.setattr(experiments, "run_deployment", run_deployment)
        monkeypatch.setattr(experiments, "inherited_tags", lambda: [])
        monkeypatch.setattr(experiments, "_POLL_S", 0.0)
        client = SimpleNamespace(read_flow_run=lambda run_id: self._run(run_id))
        monkeypatch.setattr(experiments, "get_client", lambda sync_client: nullcontext(client))
        return keys

    def _run(self, key):
        name = self.states.get(key[-1], ["Completed"])
        state = name.pop(0) if len(name) > 1 else name[0]
        return SimpleNamespace(
            id=key,
            name="cell",
            state=SimpleNamespace(
                name=state,
                message="",
                is_final=lambda: state not in ("Pending", "Running"),
                is_completed=lambda: state == "Completed",
            ),
        )

    @pytest.mark.parametrize(
        ("states", "attempts"),
        [
            ({"0": ["Running", "Running", "Completed"]}, 1),
            ({"0": ["Failed"], "1": ["Pending", "Completed"]}, 2),
            ({"0": ["Completed"], "1": ["Crashed"], "2": ["Running", "Completed"]}, 3),
        ],
    )
    def test_an_active_run_is_joined_and_an_ended_one_is_followed_by_another(
        self, ready, started, states, attempts
    ):
        self.states = {key: list(names) for key, names in states.items()}
        cell = experiments.Cell("k", None)
        experiments._run_cell.fn(ready.experiment, cell, ready.uri, is_quick=False)
        assert [key[-1] for key in started] == [str(n) for n in range(attempts)]

    def test_a_failed_run_fails_the_task(self, ready, started):
        self.states = {"0": ["Running", "Failed"]}
        with pytest.raises(TrainingError, match="flow run cell: Failed"):
            experiments._run_cell.fn(
                ready.experiment, experiments.Cell("k", None), ready.uri, is_quick=False
            )


def test_the_training_of_a_cell_survives_json():
    """The parameter of the flow run of a cell is JSON."""
    from pydantic import TypeAdapter

    from trans_peft.domain.experiment import Experiment, PlannedTraining

    planned = PlannedTraining("tiny", OLD, "LoRA", Perturbation(0.1, spared_layers=(1,)), 1, (OLD,))
    kind = TypeAdapter(PlannedTraining)
    assert kind.validate_json(kind.dump_json(planned)) == planned
    example = read_experiment(Path(__file__).parents[1] / "experiment" / "repeats.yaml")
    whole = TypeAdapter(Experiment)
    assert whole.validate_json(whole.dump_json(example)) == example
