"""What a person may choose about the stack, and what follows from it: URLs, secrets, environments.

The only module of the stack that reads the environment. Each variable is named as the program that
it configures names it, where that program has a name for it.
"""

import json
import os
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
_FAMILIES = ("AWS_", "BRIDGE_", "MLFLOW_", "PREFECT_")


@dataclass(frozen=True)
class Secrets:
    """Made once for each state folder, so that every restart finds the same ones."""

    s3_access_key: str
    s3_secret_key: str
    webhook_key: str  # Fernet: 32 bytes, URL-safe base64
    bridge_mlflow_secret: str
    bridge_s3_token: str
    prefect_password: str

    @classmethod
    def of(cls, path: Path) -> "Secrets":
        """Read the secrets in this file, which only its owner may; make those that are missing.

        A state folder of an earlier release keeps those that it has. InvalidSpecError where there
        is no folder.
        """
        if not path.parent.is_dir():
            raise InvalidSpecError(
                "This state folder has no stack.",
                expected="a folder that `make up` made",
                found=str(path.parent),
                do="run make up, or set TRANS_PEFT_STATE to the folder of another stack",
            )
        kept = json.loads(path.read_text()) if path.exists() else {}
        made = {
            "s3_access_key": "tp" + secrets.token_hex(9).upper(),
            "s3_secret_key": secrets.token_urlsafe(30),
            "webhook_key": urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            "bridge_mlflow_secret": secrets.token_urlsafe(30),
            "bridge_s3_token": secrets.token_urlsafe(30),
            "prefect_password": secrets.token_urlsafe(30),
        }
        if made.keys() - kept.keys():
            kept = {**made, **kept}
            atomic_write(path, json.dumps(kept, indent=2), mode=0o600)
        return cls(**kept)


@dataclass(frozen=True)
class StackSettings:
    """Where the state lies, which ports are taken, how many GPU slots and which databases."""

    state: Path
    checkout: Path = _CHECKOUT
    mlflow_port: int = 5500
    prefect_port: int = 4250
    s3_port: int = 8350
    bridge_port: int = 4260
    gpu_slots: int = 1
    mlflow_database: str = ""  # empty: SQLite below the state folder
    prefect_database: str = ""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {port}, not a port from 1024 to 65535"
            for name, port in self.ports.items()
            if not 1024 <= port <= 65535
        ]
        if len(set(self.ports.values())) < len(self.ports):
            problems.append(f"two servers on one port: {self.ports}")
        if self.gpu_slots < 1:
            problems.append(f"GPU_SLOTS is {self.gpu_slots}, not a positive number")
        if len(os.fsencode(self.socket)) > 100:  # 104 on macOS, 108 on Linux
            problems.append(f"TRANS_PEFT_STATE is too long a path for a socket: {self.socket}")
        if "%" in str(self.state):  # supervisor expands %(...)s, some values twice
            problems.append(f"TRANS_PEFT_STATE has a % in it: {self.state}")
        if problems:
            raise InvalidSpecError("This stack cannot start: " + "; ".join(problems))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "StackSettings":
        """Read the settings from environment variables. InvalidSpecError."""

        def number(name: str, default: int) -> int:
            text = environ.get(name, "") or str(default)
            if not text.isdecimal():
                raise InvalidSpecError(f"{name} is not a number.", expected="digits", found=text)
            return int(text)

        checkout = Path(environ.get("TRANS_PEFT_CHECKOUT") or _CHECKOUT).resolve()
        return cls(
            state=Path(environ.get("TRANS_PEFT_STATE") or checkout / ".state").resolve(),
            checkout=checkout,
            mlflow_port=number("MLFLOW_PORT", cls.mlflow_port),
            prefect_port=number("PREFECT_PORT", cls.prefect_port),
            s3_port=number("S3_PORT", cls.s3_port),
            bridge_port=number("BRIDGE_PORT", cls.bridge_port),
            gpu_slots=number("GPU_SLOTS", cls.gpu_slots),
            mlflow_database=environ.get("MLFLOW_BACKEND_STORE_URI", ""),
            prefect_database=environ.get("PREFECT_API_DATABASE_CONNECTION_URL", ""),
        )

    def to_environment(self) -> dict[str, str]:
        """Return the variables from which `from_environment` reads these settings again."""
        return {
            "TRANS_PEFT_STATE": str(self.state),
            "TRANS_PEFT_CHECKOUT": str(self.checkout),
            "MLFLOW_PORT": str(self.mlflow_port),
            "PREFECT_PORT": str(self.prefect_port),
            "S3_PORT": str(self.s3_port),
            "BRIDGE_PORT": str(self.bridge_port),
            "GPU_SLOTS": str(self.gpu_slots),
            "MLFLOW_BACKEND_STORE_URI": self.mlflow_database,
            "PREFECT_API_DATABASE_CONNECTION_URL": self.prefect_database,
        }

    @property
    def ports(self) -> dict[str, int]:
        """The ports that a person chose, by the variable that chooses each."""
        return {
            "S3_PORT": self.s3_port,
            "MLFLOW_PORT": self.mlflow_port,
            "PREFECT_PORT": self.prefect_port,
            "BRIDGE_PORT": self.bridge_port,
        }

    @property
    def urls(self) -> dict[str, str]:
        """The page or endpoint of each server, by program."""
        return {
            "s3": f"http://{HOST}:{self.s3_port}",
            "mlflow": f"http://{HOST}:{self.mlflow_port}",
            "prefect": f"http://{HOST}:{self.prefect_port}",
            "bridge": f"http://{HOST}:{self.bridge_port}",
        }

    @property
    def socket(self) -> Path:
        """Where the process manager listens."""
        return self.state / "supervisor.sock"

    @property
    def logs(self) -> Path:
        """One log per program."""
        return self.state / "logs"

    @property
    def secrets(self) -> Secrets:
        """The secrets of this state folder."""
        return Secrets.of(self.state / "secrets.json")

    @property
    def prefect_auth(self) -> tuple[str, str]:
        """User and password for Prefect's API (HTTP basic authentication)."""
        return _PREFECT_USER, self.secrets.prefect_password

    @property
    def client_environment(self) -> dict[str, str]:
        """What any client of the stack needs: a shell, a notebook, the worker."""
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
        }

    @property
    def bridge_environment(self) -> dict[str, str]:
        """What the bridge needs: a client of everything, and the senders' secrets."""
        return {
            **self.client_environment,
            "BRIDGE_HOST": HOST,
            "BRIDGE_PORT": str(self.bridge_port),
            "BRIDGE_URL": self.urls["bridge"],
            "BRIDGE_MLFLOW_SECRETS": self.secrets.bridge_mlflow_secret,
            "BRIDGE_S3_TOKENS": self.secrets.bridge_s3_token,
            "TRANS_PEFT_BASES_URI": BASES_URI,
            # A sender waits for the answer: it is told to come again rather than kept waiting.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        }


def without_services(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what points at other servers; no proxy for 127.0.0.1."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_FAMILIES)}
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = ",".join(filter(None, [kept.get(name), HOST, "localhost"]))
    return kept
