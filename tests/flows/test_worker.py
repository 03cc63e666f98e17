"""What a worker checks before a run on a GPU: its GPUs, its code and its clock."""

import json
import re
import time
from contextlib import nullcontext
from email.utils import formatdate
from itertools import count
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
import torch
from pydantic import TypeAdapter

import trans_peft
from tasks import shards, worker
from tasks.settings import Settings
from tests.flows.test_shards import A, B
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import TransferTask
from trans_peft.errors import InvalidSpecError, WorkerError


class Server:
    """Prefect's server with a clock that is this many seconds ahead of the worker's."""

    def __init__(self, ahead_s=0.0, **headers):
        self.ahead_s, self.headers = ahead_s, headers

    def hello(self):
        date = formatdate(time.time() + self.ahead_s, usegmt=True)
        return httpx.Response(200, headers={"Date": date} | self.headers)


@pytest.fixture
def checked(monkeypatch):
    """Run the check on a worker with these GPUs, tags and clock; return what it returns."""

    def check(*, wanted=0, gpus=0, tags=(), server=None):
        log = []
        monkeypatch.setattr(worker, "settings", lambda: SimpleNamespace(gpus=wanted))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(worker, "runtime", SimpleNamespace(flow_run=SimpleNamespace(tags=tags)))
        monkeypatch.setattr(
            worker, "get_client", lambda sync_client: nullcontext(server or Server())
        )
        logger = SimpleNamespace(warning=lambda text, value: log.append(text % value))
        monkeypatch.setattr(worker, "get_run_logger", lambda: logger)
        warnings = worker.check_worker()
        assert log == list(warnings)
        return warnings

    return check


@pytest.mark.parametrize(("wanted", "gpus"), [(1, 0), (4, 3)])
def test_a_worker_without_its_gpus_computes_nothing(checked, wanted, gpus):
    with pytest.raises(WorkerError, match=rf"(?s)at least {wanted} .*found:    {gpus}"):
        checked(wanted=wanted, gpus=gpus)


@pytest.mark.parametrize(("wanted", "gpus"), [(0, 0), (0, 2), (1, 1), (1, 8)])
def test_a_worker_with_its_gpus_is_not_reported(checked, wanted, gpus):
    assert checked(wanted=wanted, gpus=gpus) == ()


WORKER = {"MLFLOW_TRACKING_URI": "http://mlflow", "TRANS_PEFT_STATE": "/state"}


@pytest.mark.parametrize("gpus", ["-1", "all", "0.5"])
def test_a_number_of_gpus_that_is_none_is_refused(monkeypatch, gpus):
    monkeypatch.setenv("TRANS_PEFT_GPUS", gpus)
    with pytest.raises(InvalidSpecError, match="TRANS_PEFT_GPUS"):
        Settings(**WORKER)


@pytest.mark.parametrize(("gpus", "found"), [("", 0), ("4", 4), ("01", 1)])
def test_a_number_of_gpus_may_have_a_leading_zero(monkeypatch, gpus, found):
    """As in the job template of Kubernetes, where it must be a string."""
    monkeypatch.setenv("TRANS_PEFT_GPUS", gpus)
    assert Settings(**WORKER).gpus == found


@pytest.mark.parametrize(
    ("server_ahead_s", "direction"), [(-300, "ahead"), (300, "behind"), (-25, ""), (25, "")]
)
def test_a_clock_that_is_off_is_reported(checked, server_ahead_s, direction):
    warnings = checked(server=Server(server_ahead_s))
    assert len(warnings) == bool(direction)
    for text in warnings:
        assert re.search(rf"clock .* is wrong(?s:.*) (299|300) s {direction}", text)


@pytest.mark.parametrize("date", ["", "yesterday"])
def test_a_server_without_a_date_is_not_compared(checked, date):
    assert checked(server=Server(Date=date)) == ()


def test_a_server_that_does_not_answer_is_not_compared(checked):
    def hello():
        raise httpx.ConnectError("refused")

    assert checked(server=SimpleNamespace(hello=hello)) == ()


@pytest.mark.parametrize(
    ("tags", "is_reported"),
    [((), False), (("family:small",), False), (("code:0",), True), ("own", False)],
)
def test_other_code_than_that_of_the_run_that_started_this_one_is_reported(
    checked, tags, is_reported
):
    warnings = checked(tags=(worker.code_tag(),) if tags == "own" else tags)
    assert len(warnings) == is_reported
    assert all(f"expected: code:0\n  found:    {worker.code_tag()}" in w for w in warnings)


@pytest.fixture
def tag_of(monkeypatch, tmp_path):
    """Return the tag of a package with these files."""
    numbers = count()

    def tag(files):
        folder = tmp_path / str(next(numbers))
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        monkeypatch.setattr(trans_peft, "__file__", str(folder / "__init__.py"))
        return worker.code_tag.__wrapped__()

    return tag


def test_the_tag_of_the_code_changes_with_names_and_contents_of_python_files_alone(tag_of):
    code = {"__init__.py": "", "a/one.py": "1", "a/two.py": "2"}
    assert tag_of(code) == tag_of({**code, "a/one.pyc": "cached", "static/style.css": "p {}"})
    others = [
        {**code, "a/one.py": "2"},
        {**code, "b.py": ""},
        {"__init__.py": "", "a/one.py": "1", "b/two.py": "2"},
        {"__init__.py": "", "a/one.py": "12", "a/two.py": ""},
    ]
    assert len({*map(tag_of, others), tag_of(code)}) == len(others) + 1


def test_a_shard_is_started_with_parameters_that_older_code_can_read(monkeypatch):
    started = []
    made = SimpleNamespace(id=uuid4(), state=None)
    monkeypatch.setattr(shards, "run_deployment", lambda name, **rest: started.append(rest) or made)
    policy = GatePolicy(margin_points=3.0, required_suites=("exceptions",))
    shards.start((A, B), policy, size=2)
    (run,) = started
    assert worker.code_tag() in run["tags"]
    given = json.loads(json.dumps(run["parameters"]))
    assert TypeAdapter(tuple[TransferTask, ...]).validate_python(given["shard"]) == (A, B)
    assert given["policy"] == {
        "margin_points": 3.0, "alpha": 0.05,
        "required_suites": ["exceptions"], "must_beat_bare": True,
    }  # fmt: skip
