"""Settings of the stack, read from its environment, with the URLs and environments they imply.

Where the configured program has a name for a variable, that name is used here too. Ports that no
variable names are those of the last `up` of the state folder, or else the defaults.
"""

import json
import os
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import httpx
from pydantic import (
    AfterValidator,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from tasks.environment import EnvironmentSettings
from trans_peft.domain.owners import FamilyRule, Owners
from trans_peft.errors import InvalidSpecError
from trans_peft.files import atomic_write

__all__ = [
    "BASES_URI",
    "BUCKETS",
    "HOST",
    "LOCAL_NAMES",
    "Secrets",
    "StackSettings",
    "without_services",
]

HOST = "127.0.0.1"
LOCAL_NAMES = (HOST, "localhost")
BUCKETS = ("bases", "data", "mlflow")
BASES_URI = "s3://bases/"
_PREFECT_USER = "trans-peft"
_CHECKOUT = Path(__file__).resolve().parents[2]
_SERVICE_PREFIXES = ("AWS_", "BRIDGE_", "MLFLOW_", "PREFECT_")
_SOCKET = "supervisor.sock"
_MAX_SOCKET_BYTES = 100  # 104 on macOS, 108 on Linux


@dataclass(frozen=True)
class Secrets:
    """Keys and passwords of one state folder, generated once and kept across restarts."""

    s3_access_key: str
    s3_secret_key: str
    webhook_key: str  # Fernet: 32 bytes, URL-safe base64
    bridge_mlflow_secret: str
    bridge_s3_token: str
    prefect_password: str

    @classmethod
    def of(cls, path: Path) -> "Secrets":
        """Read the secrets from a file that only its owner may read; generate those that it lacks.

        InvalidSpecError where the folder of the file does not exist.
        """
        if not path.parent.is_dir():
            raise InvalidSpecError(
                "no stack was started with this state folder",
                expected="a folder that `make up` created",
                found=str(path.parent),
                do="run make up, or set TRANS_PEFT_STATE to the folder of another stack",
            )
        kept = json.loads(path.read_text()) if path.exists() else {}
        generated = {
            "s3_access_key": "tp" + secrets.token_hex(9).upper(),
            "s3_secret_key": secrets.token_urlsafe(30),
            "webhook_key": urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            "bridge_mlflow_secret": secrets.token_urlsafe(30),
            "bridge_s3_token": secrets.token_urlsafe(30),
            "prefect_password": secrets.token_urlsafe(30),
        }
        if generated.keys() - kept.keys():
            kept = {**generated, **kept}
            atomic_write(path, json.dumps(kept, indent=2), mode=0o600)
        return cls(**kept)


_Port = Annotated[int, Field(ge=1024, le=65535)]
_Folder = Annotated[Path, AfterValidator(Path.resolve)]
_LAST_UP = "running-with"


def _port(variable: str, default: int) -> Any:
    """Return a field with the port of the last `up` as its default, or else `default`."""
    return Field(
        default_factory=lambda found: _ports_of_last_up(found["state"]).get(variable, default),
        validate_default=True,
        validation_alias=variable,
    )


def _ports_of_last_up(state: Path) -> dict[str, str]:
    """Return the ports that `up` wrote into the state folder: the first words of one line."""
    path = state / _LAST_UP
    words = path.read_text().split() if path.is_file() else []
    pairs = (word.partition("=") for word in words)
    ports = takewhile(lambda pair: pair[0].endswith("_PORT"), pairs)
    return {variable: port for variable, _, port in ports}


class StackSettings(EnvironmentSettings):
    """State folder, ports, GPU slots and databases of one stack, and what its worker may use."""

    checkout: _Folder = Field(default=_CHECKOUT, validation_alias="TRANS_PEFT_CHECKOUT")
    """Checkout whose prefect.yaml is deployed and whose flows the worker runs."""

    state: _Folder = Field(
        default_factory=lambda found: found["checkout"] / ".state",
        validation_alias="TRANS_PEFT_STATE",
    )
    """Folder that holds all state of the stack."""

    mlflow_port: _Port = _port("MLFLOW_PORT", 5500)
    prefect_port: _Port = _port("PREFECT_PORT", 4250)
    s3_port: _Port = _port("S3_PORT", 8350)
    bridge_port: _Port = _port("BRIDGE_PORT", 4260)
    ui_port: _Port = _port("UI_PORT", 4270)
    metrics_port: _Port = _port("METRICS_PORT", 9464)

    gpu_slots: int = Field(default=1, ge=1, validation_alias="GPU_SLOTS")
    """Flow runs on the `gpu` queue at a time."""

    mlflow_database: str = Field(
        default="", repr=False, validation_alias="MLFLOW_BACKEND_STORE_URI"
    )
    """Database of MLflow. Empty: SQLite below the state folder."""

    prefect_database: str = Field(
        default="", repr=False, validation_alias="PREFECT_API_DATABASE_CONNECTION_URL"
    )
    """Database of Prefect. Empty: SQLite below the state folder."""

    families: str = Field(default="", validation_alias="TRANS_PEFT_FAMILIES")
    """Passed to the worker: base families with prefixes or keys of their own, as JSON."""

    readable: str = Field(default="", validation_alias="TRANS_PEFT_READABLE")
    """Passed to the worker: local folders and hub data sets that recipes may name."""

    worker_gpus: int = Field(default=0, ge=0, validation_alias="TRANS_PEFT_GPUS")
    """Passed to the worker: GPUs that it must have. 0: it computes on the CPU without one."""

    sandbox_may_lack: str = Field(default="", validation_alias="TRANS_PEFT_SANDBOX_MAY_LACK")
    """Passed to the worker: guards of the sandbox that may be missing."""

    @field_validator("state")
    @classmethod
    def _state_can_be_used(cls, state: Path) -> Path:
        socket = state / _SOCKET
        if (size := len(os.fsencode(socket))) > _MAX_SOCKET_BYTES:
            raise ValueError(
                f"the path of the socket {socket} is too long: {size} bytes, at most "
                f"{_MAX_SOCKET_BYTES}; choose a shorter folder"
            )
        if "%" in str(state):  # supervisor expands %(...)s, some values twice
            raise ValueError(f"{state} contains %; choose a folder without %")
        return state

    @field_validator("families")
    @classmethod
    def _families_can_be_read(cls, families: str) -> str:
        if families:
            try:
                Owners("", TypeAdapter(dict[str, FamilyRule]).validate_json(families))
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                raise ValueError(
                    f"no JSON object of families, at {place!r}: {first['msg']}"
                ) from None
        return families

    @model_validator(mode="after")
    def _ports_differ(self) -> "StackSettings":
        if len(set(self.ports.values())) < len(self.ports):
            shown = ", ".join(f"{name}={port}" for name, port in self.ports.items())
            raise ValueError(f"two servers have the same port: {shown}; set other ports")
        return self

    def to_environment(self) -> dict[str, str]:
        """Return the variables from which `StackSettings()` reads these settings again."""
        return {
            str(field.validation_alias): str(getattr(self, name))
            for name, field in type(self).model_fields.items()
        }

    @property
    def worker_choices(self) -> dict[str, str]:
        """The variables that configure the worker alone; an empty value is the default."""
        return {
            "TRANS_PEFT_FAMILIES": self.families,
            "TRANS_PEFT_GPUS": str(self.worker_gpus or ""),
            "TRANS_PEFT_READABLE": self.readable,
            "TRANS_PEFT_SANDBOX_MAY_LACK": self.sandbox_may_lack,
        }

    @property
    def ports(self) -> dict[str, int]:
        """The configured ports, by environment variable."""
        return {
            "S3_PORT": self.s3_port,
            "MLFLOW_PORT": self.mlflow_port,
            "PREFECT_PORT": self.prefect_port,
            "BRIDGE_PORT": self.bridge_port,
            "UI_PORT": self.ui_port,
            "METRICS_PORT": self.metrics_port,
        }

    @property
    def chosen_at_up(self) -> str:
        """The ports, and what else an `up` of a running stack must not change, as one line."""
        compared: dict[str, object] = {
            **self.ports,
            "TRANS_PEFT_CHECKOUT": self.checkout,
            **self.worker_choices,
        }
        return " ".join(f"{name}={value}" for name, value in compared.items() if value)

    @property
    def last_up(self) -> Path:
        """File with `chosen_at_up` of the last `up`. It stays after `down`."""
        return self.state / _LAST_UP

    @property
    def has_ports_of_last_up(self) -> bool:
        """Whether no variable names another port than the last `up` had. True before any `up`."""
        ports = {name: str(port) for name, port in self.ports.items()}
        return _ports_of_last_up(self.state).items() <= ports.items()

    @property
    def urls(self) -> dict[str, str]:
        """URL of each server, by program."""
        return {
            "s3": f"http://{HOST}:{self.s3_port}",
            "mlflow": f"http://{HOST}:{self.mlflow_port}",
            "prefect": f"http://{HOST}:{self.prefect_port}",
            "bridge": f"http://{HOST}:{self.bridge_port}",
            "ui": f"http://{HOST}:{self.ui_port}",
            "exporter": f"http://{HOST}:{self.metrics_port}",
        }

    @property
    def socket(self) -> Path:
        """Unix socket of the process manager."""
        return self.state / _SOCKET

    @property
    def logs(self) -> Path:
        """Folder with one log per program."""
        return self.state / "logs"

    @property
    def secrets(self) -> Secrets:
        """The secrets of this state folder."""
        return Secrets.of(self.state / "secrets.json")

    @property
    def prefect_auth(self) -> tuple[str, str]:
        """User and password for Prefect's API (HTTP basic authentication)."""
        return _PREFECT_USER, self.secrets.prefect_password

    def prefect_client(self, timeout_s: float) -> httpx.Client:
        """Return a client of Prefect's REST API that uses no proxy."""
        return httpx.Client(
            base_url=self.urls["prefect"],
            auth=self.prefect_auth,
            timeout=timeout_s,
            trust_env=False,
        )

    @property
    def client_environment(self) -> dict[str, str]:
        """Environment of any client of the stack: a shell, a notebook, the worker."""
        secrets = self.secrets
        return {
            "MLFLOW_TRACKING_URI": self.urls["mlflow"],
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PREFECT_API_URL": f"{self.urls['prefect']}/api",
            "PREFECT_API_AUTH_STRING": ":".join(self.prefect_auth),
            "PREFECT_HOME": str(self.state / "prefect"),
            "PREFECT_PROFILES_PATH": str(self.state / "prefect" / "profiles.toml"),
            "AWS_ENDPOINT_URL": self.urls["s3"],
            "AWS_ACCESS_KEY_ID": secrets.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": secrets.s3_secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "DO_NOT_TRACK": "1",
            "TRANS_PEFT_BASES_URI": BASES_URI,
        }

    @property
    def bridge_environment(self) -> dict[str, str]:
        """Environment of the bridge: that of a client, and the secrets of its senders."""
        return {
            **self.client_environment,
            "BRIDGE_HOST": HOST,
            "BRIDGE_PORT": str(self.bridge_port),
            "BRIDGE_URL": self.urls["bridge"],
            "BRIDGE_MLFLOW_SECRETS": self.secrets.bridge_mlflow_secret,
            "BRIDGE_S3_TOKENS": self.secrets.bridge_s3_token,
            # A sender waits for the response: a quick 503 is better than retries here.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        }


def without_services(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without variables that name other servers, and with no proxy for them.

    Requests to 127.0.0.1 and localhost then never go through a proxy.
    """
    kept = {
        name: value for name, value in environ.items() if not name.startswith(_SERVICE_PREFIXES)
    }
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = ",".join(filter(None, [kept.get(name), HOST, "localhost"]))
    return kept
