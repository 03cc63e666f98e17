"""Settings of the bridge, read from its environment.

MLflow's, Prefect's and AWS's clients read their own variables (`MLFLOW_TRACKING_URI`,
`PREFECT_API_URL`, `AWS_*`).
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import NoDecode

from tasks.environment import EnvironmentSettings

__all__ = ["MLFLOW_PATH", "S3_PATH", "BridgeSettings"]

MLFLOW_PATH, S3_PATH = "/notifications/mlflow", "/notifications/s3"
"""Paths to which MLflow and S3 servers send their notifications."""

_MIN_SECRET_CHARACTERS = 24


def _split(value: Any) -> Any:
    return tuple(value.split()) if isinstance(value, str) else value


_Secrets = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class BridgeSettings(EnvironmentSettings):
    """Address of the bridge, and one secret or token for each endpoint.

    An endpoint without a secret is closed. Where a variable holds two secrets, separated by a
    space, senders get the first one and the second one is still valid.
    """

    host: str = Field(default="127.0.0.1", validation_alias="BRIDGE_HOST")
    """Address to listen on."""

    port: int = Field(default=4260, ge=1, le=65535, validation_alias="BRIDGE_PORT")
    """Port to listen on."""

    public_url: str = Field(
        default_factory=lambda found: f"http://127.0.0.1:{found['port']}",
        validation_alias="BRIDGE_URL",
    )
    """URL under which MLflow's server reaches the bridge."""

    tracking_uri: str = Field(default="", validation_alias="MLFLOW_TRACKING_URI")
    """MLflow server whose registry the bridge reads."""

    mlflow_secrets: _Secrets = Field(
        default=(), repr=False, max_length=2, validation_alias="BRIDGE_MLFLOW_SECRETS"
    )
    """Secrets with which MLflow signs its webhooks."""

    s3_tokens: _Secrets = Field(
        default=(), repr=False, max_length=2, validation_alias="BRIDGE_S3_TOKENS"
    )
    """Bearer tokens of S3 servers."""

    queue_url: str = Field(default="", validation_alias="BRIDGE_QUEUE_URL")
    """SQS queue that receives S3's events. Empty: the bridge reads no queue."""

    bases_uri: str = Field(default="", validation_alias="TRANS_PEFT_BASES_URI")
    """The bridge ignores uploads outside of this prefix. Empty: it accepts all."""

    @field_validator("public_url")
    @classmethod
    def _without_slash(cls, url: str) -> str:
        return url.rstrip("/")

    @field_validator("mlflow_secrets", "s3_tokens")
    @classmethod
    def _long_enough(cls, secrets: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(secret) < _MIN_SECRET_CHARACTERS for secret in secrets):
            raise ValueError(f"a secret has fewer than {_MIN_SECRET_CHARACTERS} characters")
        return secrets

    @model_validator(mode="after")
    def _registry_is_known(self) -> "BridgeSettings":
        if self.mlflow_secrets and not self.tracking_uri:
            raise ValueError(
                "MLFLOW_TRACKING_URI is not set, and the bridge reads the names in MLflow's "
                "webhooks from that server"
            )
        return self
