"""Keeps the parameters of reconcile that were changed in Prefect, while prefect.yaml is the same.

`prefect deploy` replaces the parameters of a deployment by those of prefect.yaml. Without this
module, each `up` would undo a policy that was set in Prefect, for example by the demo, and adapters
that passed by it would no longer serve.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import httpx

from infra.stack.settings import StackSettings
from trans_peft.domain.conventions import Deployment

__all__ = ["KeptParameters"]

_TIMEOUT_S = 60.0
_NAME = f"/api/deployments/name/{Deployment.RECONCILE}"


@dataclass(frozen=True)
class KeptParameters:
    """The parameters of reconcile before a deployment. `found` is None without a deployment."""

    settings: StackSettings
    found: dict[str, Any] | None

    @classmethod
    def read(cls, settings: StackSettings) -> "KeptParameters":
        """Read them from Prefect. Raises httpx.HTTPError."""
        with settings.prefect_client(_TIMEOUT_S) as prefect:
            answer = prefect.get(_NAME)
            if answer.status_code == httpx.codes.NOT_FOUND:
                return cls(settings, None)
            return cls(settings, answer.raise_for_status().json()["parameters"])

    def restore(self) -> str:
        """Restore them after `prefect deploy`, unless prefect.yaml changed since the last one.

        Returns a line for the user; empty if the deployment did not change them. Raises
        httpx.HTTPError.
        """
        mark = self.settings.state / "deployed"
        digest = hashlib.sha256((self.settings.checkout / "prefect.yaml").read_bytes()).hexdigest()
        is_same_file = mark.is_file() and mark.read_text() == digest
        mark.write_text(digest)
        with self.settings.prefect_client(_TIMEOUT_S) as prefect:
            deployed = prefect.get(_NAME).raise_for_status().json()
            before = self.found
            if before is None or before == deployed["parameters"]:
                return ""
            names = sorted(
                name
                for name in {*before, *deployed["parameters"]}
                if before.get(name) != deployed["parameters"].get(name)
            )
            changed = f"{', '.join(names)} of {Deployment.RECONCILE}"
            if not is_same_file:
                return f"prefect.yaml changed and replaced {changed}"
            body = {"parameters": before}
            prefect.patch(f"/api/deployments/{deployed['id']}", json=body).raise_for_status()
            return f"kept {changed}, which differ from prefect.yaml"
