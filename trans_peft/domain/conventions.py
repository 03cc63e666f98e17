"""Fixed names that several processes share: S3 suffixes, MLflow tags and aliases, Prefect objects.

One process writes such a name and another one reads it, so every module imports it from here.
Renaming one also changes prefect.yaml and the pages in docs/ that show it.
"""

import re
from enum import StrEnum

from trans_peft.domain.identity import content_sha256

__all__ = [
    "ADAPTER_ALIAS",
    "ADAPTER_ALIAS_PREFIX",
    "ALIAS_TAG_PREFIX",
    "BASE_ALIASES",
    "CHAMPION_ALIAS",
    "CONVERTED_SUFFIX",
    "EVENT_PREFIX",
    "GPU_LIMIT",
    "OUTCOME_TAG_PREFIX",
    "OVERRIDE_TAG_PREFIX",
    "OWNER_TAG",
    "RECONCILE_TAG",
    "SERVING_ALIAS",
    "TAG_PREFIX",
    "WORK_POOL",
    "Deployment",
    "Event",
    "artifact_key",
]

CONVERTED_SUFFIX = ".as-llama"
"""Ends the prefix of the Llama form that ingestion publishes beside an InternLM2 upload."""

TAG_PREFIX = "trans_peft."
"""Starts every MLflow tag that this project writes."""

RECONCILE_TAG = f"{TAG_PREFIX}reconcile"
"""A user sets this tag on a registered version to start reconcile from MLflow's page."""

ALIAS_TAG_PREFIX = "alias."
"""Starts the tag (after `TAG_PREFIX`) that records where reconcile last set an alias."""

OVERRIDE_TAG_PREFIX = "manual-override."
"""Starts the tag (after `TAG_PREFIX`) that records the manual override of an alias."""

OWNER_TAG = "owner"
"""Names the owner of an adapter. People set it on the registered model, without `TAG_PREFIX`."""

OUTCOME_TAG_PREFIX = "outcome."
"""Starts the tag (after `TAG_PREFIX`, before the base's alias) with the outcome on a base."""

SERVING_ALIAS, CHAMPION_ALIAS = "serving", "champion"
BASE_ALIASES = (SERVING_ALIAS, CHAMPION_ALIAS)
"""Aliases of a base family. A recipe or a command may name one instead of a version."""

ADAPTER_ALIAS_PREFIX = "on-"
"""Starts the alias of an adapter version that serves on one base (`BaseRef.alias`)."""

ADAPTER_ALIAS = re.compile(rf"{ADAPTER_ALIAS_PREFIX}[0-9a-f]{{12}}")
"""Matches such an alias: the prefix and the first 12 hex digits of the base's fingerprint."""

EVENT_PREFIX = "trans-peft."
"""Starts the names, resources and labels of this project's Prefect events."""


class Event(StrEnum):
    """Names of Prefect events. `RECONCILE_REQUESTED` is received, all others are emitted."""

    BASE_READY = f"{EVENT_PREFIX}base.ready"
    BASE_REFUSED = f"{EVENT_PREFIX}base.refused"
    ADAPTER_JUDGED = f"{EVENT_PREFIX}adapter.judged"
    ADAPTERS_WITHDRAWN = f"{EVENT_PREFIX}adapters.withdrawn"
    FLEET_PROMOTED = f"{EVENT_PREFIX}fleet.promoted"
    PROMOTION_REFUSED = f"{EVENT_PREFIX}promotion.refused"
    RECONCILE_REQUESTED = f"{EVENT_PREFIX}reconcile.requested"


class Deployment(StrEnum):
    """Prefect deployments of prefect.yaml, as FLOW/NAME."""

    INGEST_BASE = "ingest-base/default"
    RECONCILE = "reconcile/default"
    TRAIN_ADAPTER = "train-adapter/default"
    ADOPT_ADAPTER = "adopt-adapter/default"
    TRANSFER_SHARD = "transfer-shard/default"
    EXPERIMENT = "experiment/default"
    EXPERIMENT_CELL = "experiment-cell/default"


WORK_POOL = "trans-peft"
"""Prefect work pool of all deployments."""

WORKER_STOPPED = "The worker was stopped or killed during this run."
"""Message of a flow run that a stopped worker left, and that was marked as crashed after it."""

GPU_LIMIT = "gpu"
"""Prefect's global concurrency limit that holds the GPU slots."""


def artifact_key(prefix: str, family: str) -> str:
    """Return the key of a family's Prefect artifact, such as the fleet report (`fleet-<family>`).

    Keys have lower-case letters, digits and dashes. If that changes the name, a hash is appended,
    so that `a.b` and `a-b` have different keys.
    """
    slug = "".join(sign if sign.isalnum() else "-" for sign in family.lower())
    slug = slug if slug == family else f"{slug}-{content_sha256(family)[:8]}"
    return f"{prefix}-{slug}"
