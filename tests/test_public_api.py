"""The public API: its names, the time to import it, and resolving an adapter."""

import doctest
import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trans_peft as tp
from tests.lifecycle.fleet import MemoryFleet
from trans_peft.cli import main
from trans_peft.domain.evaluation import Verdict
from trans_peft.errors import InvalidSpecError, NotFoundError, NotServedError
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
    with pytest.raises(NotFoundError, match="unknown"):
        tp.resolve("unknown", fleet.platform)


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
    written = Path(json.loads(capsys.readouterr().out)["folder"])
    assert (written / "adapter_model.safetensors").read_bytes() == b"w"
    assert main(["resolve", chat, "--download", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_missing_extra_is_named_with_its_command():
    with (
        pytest.raises(ModuleNotFoundError, match=r"pip install 'trans-peft\[train\]'"),
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
