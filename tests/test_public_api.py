"""The public API: its names, the time to import it, and resolving an adapter."""

import doctest
import json
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trans_peft as tp
from tests.lifecycle.fleet import MemoryFleet
from trans_peft.cli import main
from trans_peft.domain.evaluation import Verdict
from trans_peft.errors import (
    AccessError,
    InvalidSpecError,
    NotFoundError,
    NotServedError,
    StoreError,
)
from trans_peft.extras import EXTRA_OF, explaining_missing_extras

ROOT = Path(__file__).parents[1]


def test_every_public_name_exists_and_nothing_else_is_public():
    assert sorted(tp.__all__) == tp.__all__
    assert set(tp.__all__) == set(tp._MODULE_OF)
    for name in tp.__all__:
        assert getattr(tp, name).__name__ == name
        assert getattr(tp, name).__doc__
        assert name in dir(tp)
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = tp.unknown


def test_importing_is_fast_and_loads_no_heavy_module():
    program = (
        "import sys, time; started = time.perf_counter(); import trans_peft as tp; "
        "tp.GatePolicy, tp.Suite, tp.AdapterSpec, tp.Perturbation; "
        "print(time.perf_counter() - started); print(*sys.modules)"
    )
    seconds = []
    for _ in range(3):
        ran = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        )
        duration_s, modules = ran.stdout.splitlines()
        seconds.append(float(duration_s))
        assert not {"torch", "transformers", "peft", "mlflow", "numpy"} & set(modules.split())
    assert min(seconds) < 0.3


def test_doctests_of_the_entry_points():
    assert doctest.testmod(tp).attempted > 0
    assert doctest.testmod(tp).failed == 0


def test_connect_needs_a_tracking_uri(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InvalidSpecError, match="MLFLOW_TRACKING_URI"):
        tp.connect()


def test_connect_makes_no_request_and_creates_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    platform = tp.connect(work_dir=tmp_path / "work", cache_bytes=7)
    assert platform.work_dir == tmp_path / "work"
    assert platform.cache_bytes == 7
    assert not platform.work_dir.exists()


MALFORMED = ["nonsense", "./mlruns", "127.0.0.1:5500", "http://", "http://[bad", "http://a:b", "ftp://a",
             "http:/one-slash", 5500]  # fmt: skip


@pytest.mark.parametrize("uri", MALFORMED)
def test_a_malformed_tracking_uri_is_refused_at_once(uri):
    with pytest.raises(InvalidSpecError, match="tracking URI is malformed") as caught:
        tp.connect(uri)
    assert repr(uri) in str(caught.value)
    assert "expected:" in str(caught.value) and "do:" in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["http://mlflow:5000", "https://mlflow.example.org/team", "sqlite:///mlflow.db",
            "postgresql+psycopg2://user:password@host/db"],
)  # fmt: skip
def test_urls_of_servers_and_databases_are_accepted(uri, tmp_path):
    assert tp.connect(uri, work_dir=tmp_path).work_dir == tmp_path


@pytest.fixture
def other_server():
    """A web server that answers every path with a page, as servers of single-page programs do."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            body = type(self).body.encode()
            self.send_response(type(self).status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Page, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, "<html>"), (404, '{"detail": "Not Found"}'), (200, "[]"), (200, '{"status": "up"}')],
)
def test_a_server_that_is_not_mlflow_is_reported(other_server, status, body):
    page, url = other_server
    page.status, page.body = status, body
    with pytest.raises(StoreError, match="is not an MLflow server") as caught:
        tp.resolve("chat", tp.connect(url))
    assert f"status {status}" in str(caught.value)


def test_a_server_that_denies_access_is_reported(other_server):
    page, url = other_server
    page.status, page.body = 403, "Invalid Host header"
    with pytest.raises(AccessError, match="Invalid Host header"):
        tp.resolve("chat", tp.connect(url))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://mlflow.invalid:5500", "Name or service not known|name resolution"),
    ],
)
def test_the_command_reports_an_unreachable_server_within_seconds(url, found, capsys):
    started = time.monotonic()
    assert main(["resolve", "chat", "--tracking-uri", url]) == 3
    assert time.monotonic() - started < 20  # about 5 s on an idle machine
    err = capsys.readouterr().err
    assert f"StoreError: MLflow at {url} failed or cannot be reached" in err
    assert re.search(f"found:    .*({found})", err)
    assert "do:       check that the server runs" in err
    assert "Max retries" not in err


@pytest.mark.parametrize("wrong", ["swapped", "no name", "no platform", "base"])
def test_resolve_with_arguments_of_another_type_says_which_it_takes(wrong, tmp_path):
    platform = MemoryFleet(tmp_path, "f").platform
    arguments = {
        "swapped": (platform, "chat"),
        "no name": (None, platform),
        "no platform": ("chat", "http://mlflow:5000"),
        "base": ("chat", platform),
    }[wrong]
    with pytest.raises(InvalidSpecError, match="adapter: str, platform: Platform, base: str"):
        tp.resolve(*arguments, base=2 if wrong == "base" else "serving")


@pytest.fixture(params=["memory", pytest.param("mlflow", marks=pytest.mark.servers)])
def consumer(request, unique, tmp_path, monkeypatch):
    """Two base versions; `chat` serves on v1 and was judged `inconclusive` on v2."""
    if request.param == "memory":
        fleet = MemoryFleet(tmp_path, unique)
        monkeypatch.setattr("trans_peft.client.connect", lambda uri, **_: fleet.platform)
    else:
        url = request.getfixturevalue("servers").mlflow_url
        fleet = MemoryFleet.on_mlflow(tmp_path, unique, url)
        fleet.platform = replace(tp.connect(url), evaluations=fleet.platform.evaluations)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    v1 = fleet.add_base("v1")
    fleet.add_adapter(f"{unique}-chat", v1)
    fleet.promote(v1)
    fleet.apply_verdicts()
    fleet.add_base("v2")
    for task in fleet.tasks():
        fleet.judge(task, Verdict.INCONCLUSIVE)
    return fleet, f"{unique}-chat"


def test_resolve_returns_the_serving_version_or_raises_the_reason(consumer):
    fleet, chat = consumer
    assert tp.resolve(chat, fleet.platform).base.version == "v1"
    assert tp.resolve(chat, fleet.platform, base="v1").number == 1
    with pytest.raises(NotServedError, match="verdict inconclusive"):
        tp.resolve(chat, fleet.platform, base="v2")
    with pytest.raises(NotFoundError, match="v9"):
        tp.resolve(chat, fleet.platform, base="v9")
    with pytest.raises(NotFoundError, match=f"there is no adapter '{chat}s'") as caught:
        tp.resolve(f"{chat}s", fleet.platform)
    assert f"expected: one of {chat}" in str(caught.value)
    assert "do:       check the spelling" in str(caught.value)


def test_a_retired_adapter_does_not_serve(tmp_path):
    fleet = MemoryFleet(tmp_path, "mine")
    v1 = fleet.add_base("v1")
    fleet.add_adapter("chat", v1)
    fleet.promote(v1)
    fleet.apply_verdicts()
    assert tp.resolve("chat", fleet.platform).number == 1
    fleet.platform.registry.retire_manually("chat")
    with pytest.raises(NotServedError, match="the adapter is retired"):
        tp.resolve("chat", fleet.platform)


def test_the_command_resolves_and_fails_closed(consumer, capsys):
    fleet, chat = consumer
    assert main(["resolve", chat, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["adapter"], found["number"], found["base"]["version"]) == (chat, 1, "v1")
    assert main(["resolve", chat]) == 0
    assert f"{fleet.family}/v1" in capsys.readouterr().out
    assert main(["resolve", chat, "--base", "v2"]) == 2
    assert "NotServedError" in capsys.readouterr().err


@pytest.mark.parametrize("consumer", ["memory"], indirect=True)
def test_the_command_downloads_into_a_new_folder(consumer, tmp_path, capsys):
    _, chat = consumer
    folder = tmp_path / "downloaded"
    assert main(["resolve", chat, "--download", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["folder"] == str(folder)
    assert printed.err == ""
    assert (folder / "adapter_model.safetensors").read_bytes() == b"w"
    assert main(["resolve", chat, "--download", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_command_shows_no_progress_bars_of_libraries(monkeypatch):
    for name in ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    main(["--version"])
    assert os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] == "false"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_a_missing_extra_is_named_with_its_command():
    with (
        pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[train\]'"),
        explaining_missing_extras(),
    ):
        raise ModuleNotFoundError("No module named 'trl'", name="trl.trainer")
    with (
        pytest.raises(ModuleNotFoundError, match="No module named 'mine'"),
        explaining_missing_extras(),
    ):
        raise ModuleNotFoundError("No module named 'mine'", name="mine")


def test_the_table_of_extras_equals_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    distributions = packages_distributions()
    for module, extra in EXTRA_OF.items():
        names = {name.lower().replace("_", "-") for name in distributions[module]}
        declared = {Requirement(line).name.lower().replace("_", "-") for line in extras[extra]}
        needed_by = {"botocore": "boto3"}.get(module)
        assert (names | {needed_by}) & declared, (module, extra)
