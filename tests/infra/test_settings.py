import json
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.stack.__main__ import main
from infra.stack.programs import PROGRAMS
from infra.stack.settings import Secrets, StackSettings, without_services
from trans_peft.errors import InvalidSpecError

ports = st.lists(st.integers(1024, 65535), min_size=6, max_size=6, unique=True)


def settings_from(environment):
    """Read the settings from these variables alone."""
    with pytest.MonkeyPatch.context() as patch:
        for field in StackSettings.model_fields.values():
            patch.delenv(field.validation_alias, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        return StackSettings()


@pytest.fixture(autouse=True)
def no_settings_of_the_shell(monkeypatch):
    for field in StackSettings.model_fields.values():
        monkeypatch.delenv(field.validation_alias, raising=False)


@given(ports, st.integers(1, 64), st.sampled_from(["", "postgresql+psycopg2://u:p%40@h/db"]))
def test_settings_are_read_back_from_their_own_environment(chosen, slots, database):
    s3, mlflow, prefect, bridge, ui, metrics = chosen
    settings = StackSettings(
        state=Path("/tmp/s"),
        s3_port=s3,
        mlflow_port=mlflow,
        prefect_port=prefect,
        bridge_port=bridge,
        ui_port=ui,
        metrics_port=metrics,
        gpu_slots=slots,
        mlflow_database=database,
    )
    assert settings_from(settings.to_environment()) == settings


def test_the_default_state_folder_is_in_the_checkout():
    settings = settings_from({"MLFLOW_PORT": ""})
    assert settings.state == settings.checkout / ".state"
    assert (settings.checkout / "pyproject.toml").exists()
    assert settings.urls["mlflow"] == "http://127.0.0.1:5500"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MLFLOW_PORT": "http"}, "MLFLOW_PORT"),
        ({"S3_PORT": "80"}, "S3_PORT: .* found '80'"),
        ({"S3_PORT": "70000"}, "S3_PORT: .* found '70000'"),
        ({"S3_PORT": "5500"}, "two servers have the same port: S3_PORT=5500, MLFLOW_PORT=5500"),
        ({"GPU_SLOTS": "0"}, "GPU_SLOTS"),
        (
            {"TRANS_PEFT_STATE": "/tmp/" + "x" * 100},
            r"is too long: 121 bytes, at most 100; choose a shorter folder",
        ),
        (
            {"TRANS_PEFT_STATE": "/tmp/50%"},
            "TRANS_PEFT_STATE: /tmp/50% contains %; choose a folder without %",
        ),
        ({"TRANS_PEFT_FAMILIES": "{"}, "TRANS_PEFT_FAMILIES: no JSON object"),
        ({"TRANS_PEFT_FAMILIES": '{"smol": {"prefix": ""}}'}, "smol.prefix"),
        ({"TRANS_PEFT_FAMILIES": '{"a b": {}}'}, "TRANS_PEFT_FAMILIES: .*'a b'"),
    ],
)
def test_invalid_settings_are_refused(environ, message):
    with pytest.raises(InvalidSpecError, match=message):
        settings_from(environ)


def test_all_invalid_settings_are_reported_at_once():
    with pytest.raises(InvalidSpecError, match=r"S3_PORT: .*; GPU_SLOTS: "):
        settings_from({"S3_PORT": "1", "GPU_SLOTS": "0"})


def test_secrets_are_generated_once_and_readable_by_the_owner_only(tmp_path):
    path = tmp_path / "secrets.json"
    assert Secrets.of(path) == Secrets.of(path)
    assert path.stat().st_mode & 0o077 == 0
    assert Secrets.of(path) != Secrets.of(tmp_path / "other.json")


def test_existing_secrets_are_kept_and_missing_ones_are_added(tmp_path):
    path = tmp_path / "secrets.json"
    old = {"s3_access_key": "a", "s3_secret_key": "s", "webhook_key": "w"}
    path.write_text(json.dumps(old))
    found = Secrets.of(path)
    assert {name: getattr(found, name) for name in old} == old
    assert len(found.bridge_mlflow_secret) >= 24 <= len(found.bridge_s3_token)
    assert Secrets.of(path) == found
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("verb", ["login", "env"])
def test_without_a_stack_there_is_no_password(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRANS_PEFT_STATE", str(tmp_path / "nothing"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    assert main([verb]) == 1
    assert "make up" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


CHOSEN = {
    "S3_PORT": "8801",
    "MLFLOW_PORT": "8802",
    "PREFECT_PORT": "8803",
    "BRIDGE_PORT": "8804",
    "UI_PORT": "8805",
    "METRICS_PORT": "8806",
}


def after_up(state, **chosen):
    """Leave the state folder as `up` leaves it, and return its variable."""
    state.mkdir(exist_ok=True)
    here = {"TRANS_PEFT_STATE": str(state)}
    settings = settings_from({**here, **chosen})
    settings.last_up.write_text(settings.chosen_at_up)
    return here


def test_the_ports_of_the_last_up_are_known(tmp_path):
    here = after_up(tmp_path / "a", **CHOSEN, TRANS_PEFT_READABLE="x UI_PORT=1 S3_PORT=2")
    assert settings_from(here).ports == {name: int(port) for name, port in CHOSEN.items()}
    explicit = settings_from({**here, "MLFLOW_PORT": "9900"})
    assert explicit.ports["MLFLOW_PORT"] == 9900 and explicit.ports["UI_PORT"] == 8805
    assert not explicit.has_ports_of_last_up and settings_from(here).has_ports_of_last_up
    other = settings_from({"TRANS_PEFT_STATE": str(tmp_path / "b")})
    assert other.ports["MLFLOW_PORT"] == 5500 and other.has_ports_of_last_up


def test_a_port_that_was_damaged_in_the_state_folder_is_reported(tmp_path):
    (tmp_path / "running-with").write_text("S3_PORT=8801 MLFLOW_PORT=x")
    with pytest.raises(InvalidSpecError, match=r"mlflow_port: .*found 'x'"):
        settings_from({"TRANS_PEFT_STATE": str(tmp_path)})


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command with these variables, and return its code, output and errors."""

    def run(verb, environment):
        monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = main([verb])
        for name in environment:
            monkeypatch.delenv(name)
        return code, *capsys.readouterr()

    return run


def test_a_client_gets_the_addresses_of_the_stack_of_its_state_folder(tmp_path, run):
    here = after_up(tmp_path / "state", **CHOSEN)
    code, shown, _ = run("env", here)
    assert code == 0
    assert "export MLFLOW_TRACKING_URI=http://127.0.0.1:8802\n" in shown
    assert "export PREFECT_API_URL=http://127.0.0.1:8803/api\n" in shown
    assert "export AWS_ENDPOINT_URL=http://127.0.0.1:8801\n" in shown
    assert "http://127.0.0.1:8805" in run("status", here)[1]


@pytest.mark.parametrize("verb", ["env", "status", "up"])
def test_other_ports_than_those_of_the_running_stack_are_refused(tmp_path, run, verb, monkeypatch):
    here = after_up(tmp_path / "state", **CHOSEN)
    monkeypatch.setattr("infra.stack.supervisor.Supervisor.is_running", lambda self: True)
    code, shown, problem = run(verb, {**here, "MLFLOW_PORT": "9900"})
    assert (code, shown) == (1, "")
    assert "already runs with other settings" in problem
    assert "MLFLOW_PORT=9900" in problem and "MLFLOW_PORT=8802" in problem


def test_only_the_bridge_gets_the_secrets_of_its_senders(tmp_path):
    settings = StackSettings(state=tmp_path)
    environments = {name: dict(program.environment(settings)) for name, program in PROGRAMS.items()}
    secret = settings.secrets.bridge_mlflow_secret
    assert [
        name for name, environment in environments.items() if secret in environment.values()
    ] == ["bridge"]


def test_prefects_clients_have_the_password_of_its_server(tmp_path):
    settings = StackSettings(state=tmp_path)
    environments = {name: dict(program.environment(settings)) for name, program in PROGRAMS.items()}
    password = environments["prefect"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert password == ":".join(settings.prefect_auth)
    for name in ("prefect", "worker", "bridge"):
        assert environments[name]["PREFECT_API_AUTH_STRING"] == password
    assert settings.client_environment["PREFECT_API_AUTH_STRING"] == password
    assert settings.secrets.prefect_password not in str(environments["s3"]) + str(
        environments["mlflow"]
    )
    origins = environments["prefect"]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert origins == ["http://127.0.0.1:4250", "http://localhost:4250"]


def test_the_webhook_key_is_a_fernet_key(tmp_path):
    from cryptography.fernet import Fernet

    key = Fernet(Secrets.of(tmp_path / "secrets.json").webhook_key)
    assert key.decrypt(key.encrypt(b"notification")) == b"notification"


def test_other_servers_of_the_shell_are_not_inherited():
    shell = {
        "PATH": "/bin",
        "PREFECT_API_URL": "https://elsewhere",
        "MLFLOW_TRACKING_URI": "https://elsewhere",
        "AWS_PROFILE": "work",
        "no_proxy": "corp",
    }
    assert without_services(shell) == {
        "PATH": "/bin",
        "no_proxy": "corp,127.0.0.1,localhost",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def test_a_client_uses_this_stack_and_its_state_folder(tmp_path):
    client = StackSettings(state=tmp_path, prefect_port=4321).client_environment
    assert client["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    for variable in ("PREFECT_HOME", "PREFECT_PROFILES_PATH"):
        assert Path(client[variable]).is_relative_to(tmp_path)


def test_only_the_servers_get_their_database_urls(tmp_path):
    settings = StackSettings(
        state=tmp_path,
        mlflow_database="postgresql+psycopg2://mlflow",
        prefect_database="postgresql+asyncpg://prefect",
    )
    environments = {name: dict(program.environment(settings)) for name, program in PROGRAMS.items()}
    assert environments["mlflow"]["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg2://mlflow"
    assert (
        environments["prefect"]["PREFECT_API_DATABASE_CONNECTION_URL"]
        == "postgresql+asyncpg://prefect"
    )
    assert "postgresql" not in str(environments["worker"]) + str(environments["s3"])
    assert not any("postgresql" in part for p in PROGRAMS.values() for part in p.command(settings))


def test_up_passes_the_settings_of_the_worker_on(tmp_path):
    families = '{"smol": {"key": "/etc/trans-peft/smol.pem"}}'
    chosen = {
        "TRANS_PEFT_FAMILIES": families,
        "TRANS_PEFT_GPUS": "1",
        "TRANS_PEFT_READABLE": "hub:openai/*",
        "TRANS_PEFT_SANDBOX_MAY_LACK": "user",
    }
    settings = settings_from({**chosen, "TRANS_PEFT_STATE": str(tmp_path)})
    worker = PROGRAMS["worker"].environment(settings)
    assert {name: worker[name] for name in chosen} == chosen
    assert settings.to_environment().items() >= chosen.items()  # the process manager passes these


def test_variables_after_make_reach_the_recipe():
    """Variables after `make` become environment variables of the recipe."""
    shown = subprocess.run(
        ["make", "--no-print-directory", "--file", "-", "show", "TRANS_PEFT_READABLE=hub:a/b"],
        input="show:\n\t@echo $$TRANS_PEFT_READABLE\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "hub:a/b"
