"""One contract for every store of evaluations: in memory and in MLflow."""

import threading
from dataclasses import replace

import pytest

from tests.edges.examples import evaluation
from trans_peft.edges.memory import MemoryEvaluations


@pytest.fixture(params=["memory", pytest.param("mlflow", marks=pytest.mark.servers)])
def evaluations(request: pytest.FixtureRequest):
    if request.param == "memory":
        return MemoryEvaluations()
    servers = request.getfixturevalue("servers")
    from trans_peft.edges.mlflow_evaluations import MlflowEvaluations

    return MlflowEvaluations(servers.mlflow_url)


class TestEveryStoreOfEvaluations:
    def test_an_unknown_key_returns_none(self, evaluations, unique):
        assert evaluations.get(evaluation(unique).key) is None
        assert evaluations.summary(evaluation(unique).key) is None

    def test_a_summary_equals_the_evaluation(self, evaluations, unique):
        known = replace(evaluation(unique, right=3), seconds=1.25)
        evaluations.put(known)
        assert evaluations.summary(known.key) == (known.score, 1.25) == (75.0, 1.25)

    def test_an_evaluation_comes_back_item_by_item(self, evaluations, unique):
        known = evaluation(unique)
        evaluations.put(known, labels={"adapter": unique})
        assert evaluations.get(known.key) == known
        assert evaluations.get(evaluation(f"{unique}-other").key) is None

    def test_an_answer_that_is_kept_comes_back(self, evaluations, unique):
        known = evaluation(unique)
        items = (replace(known.items[0], answer="ValueError \u00e4\n"), *known.items[1:])
        evaluations.put(replace(known, items=items))
        assert evaluations.get(known.key).items == items

    def test_the_same_key_again_changes_nothing(self, evaluations, unique):
        evaluations.put(evaluation(unique, right=3))
        evaluations.put(evaluation(unique, right=1))
        assert evaluations.get(evaluation(unique).key).score == 75.0


@pytest.mark.servers
def test_evaluations_that_were_read_are_kept_in_memory(servers, unique, monkeypatch):
    from trans_peft.edges import mlflow_evaluations as module

    store, known = module.MlflowEvaluations(servers.mlflow_url), evaluation(unique)
    read, reads = module.Tracking.read_text, []
    monkeypatch.setattr(
        module.Tracking, "read_text", lambda *given: reads.append(given[2]) or read(*given)
    )
    store.put(known)
    assert store.get(known.key) == store.get(known.key) == known
    assert reads == ["evaluation.json"]
    newer = evaluation(f"{unique}-newer")
    store.put(newer)
    monkeypatch.setattr(module, "_MAX_ITEMS", len(known.items))
    assert store.get(newer.key) == newer
    assert store.get(known.key) == known
    assert len(reads) == 3


@pytest.mark.servers
def test_an_interrupted_run_is_not_used(servers, unique, monkeypatch):
    from trans_peft.edges.mlflow_client import Tracking
    from trans_peft.edges.mlflow_evaluations import MlflowEvaluations

    evaluations, known = MlflowEvaluations(servers.mlflow_url), evaluation(unique)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(*arguments):
            raise KeyboardInterrupt

        patch.setattr(Tracking, "write_text", killed)
        evaluations.put(known)
    assert evaluations.get(known.key) is None
    evaluations.put(known)
    assert evaluations.get(known.key) == known


@pytest.mark.servers
@pytest.mark.parametrize("left", [None, "", "{", '{"suite": "x"}', "another"])
def test_an_evaluation_with_a_damaged_file_is_stored_again(servers, unique, tmp_path, left):
    from mlflow import MlflowClient
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    from trans_peft.edges.json_codec import to_json
    from trans_peft.edges.mlflow_client import Tracking
    from trans_peft.edges.mlflow_evaluations import MlflowEvaluations

    evaluations, known = MlflowEvaluations(servers.mlflow_url), evaluation(unique)
    evaluations.put(known)
    run_id = Tracking(servers.mlflow_url).oldest_run("evaluations", {"evaluation_key": known.key})
    client = MlflowClient(servers.mlflow_url)
    files = get_artifact_repository(
        client.get_run(run_id).info.artifact_uri, tracking_uri=servers.mlflow_url
    )
    if left is None:
        files.delete_artifacts("evaluation.json")
    else:
        other = to_json(evaluation(f"{unique}-other"))
        (tmp_path / "evaluation.json").write_text(other if left == "another" else left)
        files.log_artifact(str(tmp_path / "evaluation.json"))
    assert evaluations.get(known.key) is None
    evaluations.put(known)
    evaluations.put(evaluation(unique, right=1))
    assert evaluations.get(known.key) == known


@pytest.mark.servers
def test_of_two_parallel_evaluations_the_older_one_is_returned(servers, unique, monkeypatch):
    from trans_peft.edges.mlflow_client import Tracking
    from trans_peft.edges.mlflow_evaluations import MlflowEvaluations

    both_looked = threading.Barrier(2)
    finished_runs = Tracking.finished_runs

    def look(self, *arguments):
        found = finished_runs(self, *arguments)
        both_looked.wait(timeout=60)
        return found

    stores = [MlflowEvaluations(servers.mlflow_url) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(Tracking, "finished_runs", look)
        threads = [
            threading.Thread(target=store.put, args=(evaluation(unique, right=right),))
            for right, store in enumerate(stores, start=1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    first, second = (store.get(evaluation(unique).key) for store in stores)
    assert first == second
    assert first is not None
