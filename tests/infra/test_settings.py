import json
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.stack.__main__ import main
from infra.stack.programs import PROGRAMS
from infra.stack.settings import Secrets, StackSettings, without_services
from trans_peft.errors import InvalidSpecError

ports = st.lists(st.integers(1024, 65535), min_size=4, max_size=4, unique=True)


@given(ports, st.integers(1, 64), st.sampled_from(["", "postgresql+psycopg2://u:p%40@h/db"]))
def test_settings_survive_the_way_through_the_environment(chosen, slots, database):
    s3, mlflow, prefect, bridge = chosen
    settings = StackSettings(
        Path("/tmp/s"),
        s3_port=s3,
        mlflow_port=mlflow,
        prefect_port=prefect,
        bridge_port=bridge,
        gpu_slots=slots,
        mlflow_database=database,
    )
    assert StackSettings.from_environment(settings.to_environment()) == settings


def test_without_any_variable_the_state_lies_in_the_checkout():
    settings = StackSettings.from_environment({"MLFLOW_PORT": ""})
    assert settings.state == settings.checkout / ".state"
    assert (settings.checkout / "pyproject.toml").exists()
    assert settings.urls["mlflow"] == "http://127.0.0.1:5500"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"MLFLOW_PORT": "http"}, "MLFLOW_PORT"),
        ({"S3_PORT": "80"}, "S3_PORT is 80"),
        ({"S3_PORT": "70000"}, "S3_PORT is 70000"),
        ({"S3_PORT": "5500"}, "two servers on one port"),
        ({"GPU_SLOTS": "0"}, "GPU_SLOTS"),
        ({"TRANS_PEFT_STATE": "/tmp/" + "x" * 100}, "too long a path"),
        ({"TRANS_PEFT_STATE": "/tmp/50%"}, "has a %"),
    ],
)
def test_what_cannot_work_is_refused_in_words(environ, words):
    with pytest.raises(InvalidSpecError, match=words):
        StackSettings.from_environment(environ)


def test_all_problems_are_told_at_once():
    with pytest.raises(InvalidSpecError, match=r"S3_PORT is 1.*GPU_SLOTS is 0"):
        StackSettings.from_environment({"S3_PORT": "1", "GPU_SLOTS": "0"})


def test_secrets_are_made_once_and_for_the_owner_alone(tmp_path):
    path = tmp_path / "secrets.json"
    assert Secrets.of(path) == Secrets.of(path)
    assert path.stat().st_mode & 0o077 == 0
    assert Secrets.of(path) != Secrets.of(tmp_path / "other.json")


def test_a_state_folder_of_an_earlier_release_keeps_its_secrets_and_gets_the_new_ones(tmp_path):
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


def test_the_bridge_alone_knows_what_its_senders_sign_with(tmp_path):
    settings = StackSettings(tmp_path)
    told = {name: dict(program.environment(settings)) for name, program in PROGRAMS.items()}
    secret = settings.secrets.bridge_mlflow_secret
    assert [name for name, environment in told.items() if secret in environment.values()] == [
        "bridge"
    ]


def test_prefect_s_clients_have_the_password_that_its_server_asks_for(tmp_path):
    settings = StackSettings(tmp_path)
    told = {name: dict(program.environment(settings)) for name, program in PROGRAMS.items()}
    password = told["prefect"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert password == ":".join(settings.prefect_auth)
    for name in ("prefect", "worker", "bridge"):
        assert told[name]["PREFECT_API_AUTH_STRING"] == password
    assert settings.client_environment["PREFECT_API_AUTH_STRING"] == password
    assert settings.secrets.prefect_password not in str(told["s3"]) + str(told["mlflow"])
    origins = told["prefect"]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert origins == ["http://127.0.0.1:4250", "http://localhost:4250"]


def test_the_webhook_key_is_a_fernet_key(tmp_path):
    from cryptography.fernet import Fernet

    key = Fernet(Secrets.of(tmp_path / "secrets.json").webhook_key)
    assert key.decrypt(key.encrypt(b"hint")) == b"hint"


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


def test_a_client_reaches_this_stack_and_writes_below_its_state(tmp_path):
    client = StackSettings(tmp_path, prefect_port=4321).client_environment
    assert client["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    for variable in ("PREFECT_HOME", "PREFECT_PROFILES_PATH"):
        assert Path(client[variable]).is_relative_to(tmp_path)


def test_databases_are_told_to_their_server_alone(tmp_path):
    settings = StackSettings(
        tmp_path,
        mlflow_database="postgresql+psycopg2://mlflow",
        prefect_database="postgresql+asyncpg://prefect",
    )
    told = {name: dict(program.environment(settings)) for name, program in PROGRAMS.items()}
    assert told["mlflow"]["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg2://mlflow"
    assert told["prefect"]["PREFECT_API_DATABASE_CONNECTION_URL"] == "postgresql+asyncpg://prefect"
    assert "postgresql" not in str(told["worker"]) + str(told["s3"])
    assert not any("postgresql" in part for p in PROGRAMS.values() for part in p.command(settings))
