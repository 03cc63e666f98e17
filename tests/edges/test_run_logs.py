"""One contract for every run log: in memory and in MLflow."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from trans_peft.domain.data import DataSource
from trans_peft.edges.memory import MemoryRunLog
from trans_peft.ports import RunLog


@dataclass
class RecordedRun:
    """A run as a client reads it from the run log."""

    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]
    files: set[str]
    datasets: set[tuple[str, str]]


class MemoryReader:
    def __init__(self, log: MemoryRunLog) -> None:
        self.log = log

    def read(self, run_id: str) -> RecordedRun:
        (run,) = [run for run in self.log.runs if run.id == run_id]
        params = {name: str(value) for name, value in run.recorded_params.items()}
        datasets = {(name, data.sha256[:36]) for name, data in run.datasets.items()}
        return RecordedRun(
            run.status, run.tags, params, run.recorded_metrics, set(run.files), datasets
        )


class MlflowReader:
    def __init__(self) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()

    def read(self, run_id: str) -> RecordedRun:
        run = self.client.get_run(run_id)
        own = {k.removeprefix("trans_peft."): v for k, v in run.data.tags.items()
               if k.startswith("trans_peft.")}  # fmt: skip
        metrics = {
            name: [(m.step, m.value) for m in self.client.get_metric_history(run_id, name)]
            for name in run.data.metrics
            if not name.startswith("system/")
        }
        files = {
            file.path
            for folder in (None, "plots")
            for file in self.client.list_artifacts(run_id, folder)
            if not file.is_dir
        }
        datasets = {(use.dataset.name, use.dataset.digest) for use in run.inputs.dataset_inputs}
        return RecordedRun(run.info.status.lower(), own, run.data.params, metrics, files, datasets)


@pytest.fixture(params=["memory", pytest.param("mlflow", marks=pytest.mark.servers)])
def log_and_reader(request: pytest.FixtureRequest):
    if request.param == "memory":
        log = MemoryRunLog()
        return log, MemoryReader(log)
    servers = request.getfixturevalue("servers")
    from trans_peft.edges.mlflow_runs import MlflowRunLog

    return MlflowRunLog(servers.mlflow_url), MlflowReader()


class TestEveryRunLog:
    def test_a_run_can_be_read_while_it_runs_and_later(self, log_and_reader, tmp_path: Path):
        log, reader = log_and_reader
        path = tmp_path / "recipe.json"
        path.write_text("{}")
        with log.run("train tone", tags={"adapter": "tone"}) as run:
            run.params({"optimizer.learning_rate": 0.001, "suites": ("a", "b")})
            for step in (1, 2):
                run.metrics({"loss": 2.0 / step, "score/held-out": step}, step)
            assert reader.read(run.id).status == "running"
            assert reader.read(run.id).metrics["loss"] == [(1, 2.0), (2, 1.0)]
            run.dataset("tone", DataSource("s3://data/tone.jsonl", "ab" * 32))
            run.file(path)
            run.file(path, "plots")
        found = reader.read(run.id)
        assert found.status == "finished"
        assert found.tags == {"adapter": "tone"}
        assert found.params["optimizer.learning_rate"] == "0.001"
        assert found.metrics["score/held-out"] == [(1, 1.0), (2, 2.0)]
        assert found.files == {"recipe.json", "plots/recipe.json"}
        assert found.datasets == {("tone", "ab" * 18)}

    def test_a_run_whose_block_raises_is_failed(self, log_and_reader):
        log: RunLog
        log, reader = log_and_reader
        with pytest.raises(KeyboardInterrupt), log.run("train", tags={}) as run:
            raise KeyboardInterrupt
        assert reader.read(run.id).status == "failed"


@pytest.mark.servers
class TestMlflow:
    def test_metrics_of_the_machine_are_recorded(self, servers, monkeypatch):
        import time

        from trans_peft.edges.mlflow_runs import MlflowRunLog

        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
        reader = MlflowReader()
        with MlflowRunLog(servers.mlflow_url).run("train", tags={}) as run:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                found = reader.client.get_run(run.id).data.metrics
                if "system/cpu_utilization_percentage" in found:
                    break
                time.sleep(0.2)
        assert found["system/system_memory_usage_megabytes"] > 0

    def test_values_are_cut_to_the_limits_of_mlflow(self, servers):
        from trans_peft.edges.mlflow_runs import MlflowRunLog

        with MlflowRunLog(servers.mlflow_url).run("train", tags={}) as run:
            run.params({f"p{i}": "x" * 9000 for i in range(101)})
            run.metrics({"score (%)": float("nan"), "a/b": float("inf")}, 0)
        data = MlflowReader().client.get_run(run.id).data
        assert len(data.params) == 101
        assert set(data.metrics) >= {"score ___", "a/b"}

    def test_one_process_uses_two_servers(self, servers, monkeypatch):
        from trans_peft.edges.mlflow_runs import MlflowRunLog

        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with MlflowRunLog(servers.mlflow_url).run("train", tags={}) as run:
            run.metrics({"loss": 1.0}, 0)
        monkeypatch.undo()
        assert MlflowReader().read(run.id).metrics == {"loss": [(0, 1.0)]}
