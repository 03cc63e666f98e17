"""What the bridge is told by its environment. The only module of it that reads the environment.

MLflow, Prefect and AWS are found by their own variables (`MLFLOW_TRACKING_URI`, `PREFECT_API_URL`,
`AWS_*`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from trans_peft.errors import InvalidSpecError

__all__ = ["BridgeSettings"]

_SHORTEST_SECRET = 24


@dataclass(frozen=True)
class BridgeSettings:
    """Where the bridge listens, and which entrances it has: one without a secret is closed.

    Of two secrets the first is the one that senders get; the second is still good. `public_url` is
    where MLflow's server reaches the bridge.
    """

    host: str = "127.0.0.1"
    port: int = 4260
    public_url: str = "http://127.0.0.1:4260"
    tracking_uri: str = ""
    mlflow_secrets: tuple[str, ...] = field(default=(), repr=False)
    s3_tokens: tuple[str, ...] = field(default=(), repr=False)
    queue_url: str = ""
    bases_uri: str = ""

    def __post_init__(self) -> None:
        problems = [] if 0 < self.port < 65536 else [f"BRIDGE_PORT is {self.port}, not a port"]
        for name, secrets in (
            ("BRIDGE_MLFLOW_SECRETS", self.mlflow_secrets),
            ("BRIDGE_S3_TOKENS", self.s3_tokens),
        ):
            if len(secrets) > 2:
                problems.append(f"{name} holds {len(secrets)} words: two are valid at a time")
            if any(len(secret) < _SHORTEST_SECRET for secret in secrets):
                problems.append(f"{name} has fewer than {_SHORTEST_SECRET} characters in a word")
        if self.mlflow_secrets and not self.tracking_uri:
            problems.append("MLFLOW_TRACKING_URI is missing: names in hints are looked up there")
        if problems:
            raise InvalidSpecError("The bridge cannot start: " + "; ".join(problems))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "BridgeSettings":
        """Read the settings. InvalidSpecError."""
        port = environ.get("BRIDGE_PORT") or str(cls.port)
        if not (port.isascii() and port.isdecimal()):
            raise InvalidSpecError("BRIDGE_PORT is not a number.", expected="digits", found=port)
        return cls(
            host=environ.get("BRIDGE_HOST") or cls.host,
            port=int(port),
            public_url=(environ.get("BRIDGE_URL") or f"http://127.0.0.1:{port}").rstrip("/"),
            tracking_uri=environ.get("MLFLOW_TRACKING_URI", ""),
            mlflow_secrets=tuple(environ.get("BRIDGE_MLFLOW_SECRETS", "").split()),
            s3_tokens=tuple(environ.get("BRIDGE_S3_TOKENS", "").split()),
            queue_url=environ.get("BRIDGE_QUEUE_URL", ""),
            bases_uri=environ.get("TRANS_PEFT_BASES_URI", ""),
        )
