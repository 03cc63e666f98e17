"""The one place that reads the environment."""

from functools import cache
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from trans_peft.domain.owners import FamilyRule, Owners
from trans_peft.domain.places import Places

__all__ = ["Settings", "settings"]


class Settings(BaseSettings):
    """What a worker must be told. S3 credentials and endpoint: boto3's own `AWS_*` variables.

    `TRANS_PEFT_STATE` is a folder of this worker's alone: base copies that can be fetched again and
    checkpoints of unfinished training. `TRANS_PEFT_BASES_URI` is the prefix below which uploads of
    base versions are looked for; empty means that only registered versions are. Copies of bases
    that no process uses go, oldest use first, where all would take more than
    `TRANS_PEFT_CACHE_GIB` (not set: more than the disk holds).

    `TRANS_PEFT_READABLE` lists the local folders and the hub data sets (`hub:NAME`) that recipes,
    suites and adapters may name, separated by commas; empty means none.
    `TRANS_PEFT_SANDBOX_MAY_LACK` lists the guards of the sandbox for generated code that this
    worker may lack, separated by commas; empty means none.

    `TRANS_PEFT_FAMILIES` is a JSON object of the base families that have rules of their own:
    `{"smol": {"prefixes": ["s3://team-a/smol/"], "key": "/etc/trans-peft/smol.pem"}}`. The versions
    of a family come from below its prefixes; without any, from below `TRANS_PEFT_BASES_URI`/NAME/.
    With a key, each upload must be signed for it (docs/uploads.md).
    """

    model_config = SettingsConfigDict(populate_by_name=True, env_ignore_empty=True)

    mlflow_tracking_uri: str = Field(alias="MLFLOW_TRACKING_URI")
    state_dir: Path = Field(alias="TRANS_PEFT_STATE")
    bases_uri: str = Field(default="", alias="TRANS_PEFT_BASES_URI")
    cache_gib: float | None = Field(default=None, gt=0, alias="TRANS_PEFT_CACHE_GIB")

    readable: str = Field(default="", alias="TRANS_PEFT_READABLE")
    sandbox_may_lack: str = Field(default="", alias="TRANS_PEFT_SANDBOX_MAY_LACK")

    families: dict[str, FamilyRule] = Field(default_factory=dict, alias="TRANS_PEFT_FAMILIES")

    @property
    def owners(self) -> Owners:
        """From where, and with whose signature, each base family takes its versions."""
        return Owners(self.bases_uri, self.families)

    @property
    def places(self) -> Places:
        """The places that may be read; a local `TRANS_PEFT_BASES_URI` is one of them."""
        return Places.named(self.readable, also=(self.bases_uri,))

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
    """Return this process's settings; a pydantic ValidationError names what is not set."""
    return Settings()  # type: ignore[call-arg]  # its values come from the environment
