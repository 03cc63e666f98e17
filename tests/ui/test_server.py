"""The process: it starts without machine learning, and refuses settings that cannot be used."""

import subprocess
import sys

from trans_peft.cli import main


def test_the_server_imports_no_machine_learning():
    code = (
        "import sys; import trans_peft.cli.app, trans_peft.client, trans_peft.ui.server; "
        "print(*{'torch', 'transformers', 'numpy', 'mlflow', 'prefect', 'scipy'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_the_command_takes_options_from_the_environment(monkeypatch):
    served = []
    monkeypatch.setattr("trans_peft.ui.server.serve", lambda *arguments: served.append(arguments))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@mlflow.test:5500")
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.test:4250/api")
    monkeypatch.setenv("TRANS_PEFT_UI_ALLOWED_HOSTS", "a.example.com, *.b.example.com")
    monkeypatch.setenv("TRANS_PEFT_UI_REFRESH_S", "12")
    assert main(["ui", "--port", "4999", "--person-header", "X-User"]) == 0
    ((_, settings),) = served
    assert settings.mlflow_url == "http://mlflow.test:5500"  # without the credentials
    assert settings.prefect_url == "http://prefect.test:4250"
    assert settings.allowed_hosts == ("a.example.com", "*.b.example.com")
    assert (settings.port, settings.refresh_s, settings.person_header) == (4999, 12.0, "X-User")
    assert settings.host == "127.0.0.1"


def test_the_command_without_a_server_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["ui"]) == 2
    assert "no MLflow tracking URI is configured" in capsys.readouterr().err
