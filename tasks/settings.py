"""Settings of a worker, read from its environment."""

from functools import cache
from pathlib import Path

from pydantic import Field

from tasks.environment import EnvironmentSettings
from trans_peft.domain.owners import FamilyRule, Owners
from trans_peft.domain.places import Places

__all__ = ["METRICS_FOLDER", "Settings", "settings"]

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client reads this variable when it is imported, and the folder must exist then."""


class Settings(EnvironmentSettings):
    """Settings of one worker. boto3 reads the S3 credentials and endpoint from `AWS_*` itself."""

    mlflow_tracking_uri: str = Field(validation_alias="MLFLOW_TRACKING_URI")
    """URI of the MLflow server."""

    state_dir: Path = Field(validation_alias="TRANS_PEFT_STATE")
    """Folder of this worker alone: copies of bases and checkpoints of unfinished training."""

    bases_uri: str = Field(default="", validation_alias="TRANS_PEFT_BASES_URI")
    """Prefix below which uploads of base versions arrive. Empty: only registered versions count."""

    checkpoints_uri: str = Field(default="", validation_alias="TRANS_PEFT_CHECKPOINTS_URI")
    """Prefix for the checkpoints of unfinished training, such as `s3://data/checkpoints`. Empty:
    they stay on the disk, and a training continues on the same worker only."""

    suites_uri: str = Field(default="", validation_alias="TRANS_PEFT_SUITES_URI")
    """Prefix for the items of suites that are tasks of lm-evaluation-harness, such as
    `s3://data/suites`. All workers read it. Empty: such suites must be pinned elsewhere."""

    vllm: Path | None = Field(default=None, validation_alias="TRANS_PEFT_VLLM")
    """Python environment with vLLM, for gate policies that choose that engine. None: the
    environment of the worker."""

    cache_gib: float | None = Field(default=None, gt=0, validation_alias="TRANS_PEFT_CACHE_GIB")
    """Bound of the copies of bases. The worker deletes copies that no process uses, the least
    recently used first, before their sum exceeds it. None: the disk is the bound."""

    gpus: int = Field(default=0, ge=0, validation_alias="TRANS_PEFT_GPUS")
    """GPUs that this worker must have. A run of the queue `gpu` fails at once if PyTorch sees
    fewer. 0: such runs compute on the CPU where there is no GPU."""

    readable: str = Field(default="", validation_alias="TRANS_PEFT_READABLE")
    """Local folders and hub data sets (`hub:NAME`) that recipes, suites and adapters may name,
    separated by commas. Empty: none."""

    sandbox_may_lack: str = Field(default="", validation_alias="TRANS_PEFT_SANDBOX_MAY_LACK")
    """Guards of the sandbox for generated code that this worker may lack, separated by commas.
    Empty: none."""

    families: dict[str, FamilyRule] = Field(
        default_factory=dict, validation_alias="TRANS_PEFT_FAMILIES"
    )
    """Base families with prefixes or a public key of their own, as a JSON object (docs/uploads.md):
    `{"smol": {"prefixes": ["s3://team-a/smol/"], "key": "/etc/trans-peft/smol.pem"}}`. A family
    without prefixes takes its versions from below `TRANS_PEFT_BASES_URI`/NAME/. With a key, each
    upload must carry a valid signature."""

    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, validation_alias="TRANS_PEFT_METRICS_PORT"
    )
    """Port on which a flow run serves its metrics, if it is alone in its container. Where several
    runs share a host, `PROMETHEUS_MULTIPROC_DIR` is set, and the exporter serves them. None: no
    server."""

    @property
    def owners(self) -> Owners:
        """The prefixes and keys by which each base family accepts versions."""
        return Owners(self.bases_uri, self.families)

    @property
    def places(self) -> Places:
        """The places that may be read, and local prefixes of bases, checkpoints and suites."""
        own = (self.bases_uri, self.checkpoints_uri, self.suites_uri)
        return Places.named(self.readable, also=own)

    @property
    def may_lack(self) -> tuple[str, ...]:
        """The names of the guards that may be missing."""
        return tuple(name.strip() for name in self.sandbox_may_lack.split(",") if name.strip())

    @property
    def cache_bytes(self) -> int | None:
        """The bound of the copies of bases in bytes, None without one."""
        return None if self.cache_gib is None else int(self.cache_gib * (1 << 30))


@cache
def settings() -> Settings:
    """Return this process's settings. Raises InvalidSpecError, which names what is not set."""
    return Settings()  # type: ignore[call-arg]  # its values come from the environment
