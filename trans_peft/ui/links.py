"""URLs of pages in MLflow and Prefect."""

from dataclasses import dataclass
from urllib.parse import quote

from trans_peft.domain.conventions import artifact_key

__all__ = ["Links"]


@dataclass(frozen=True)
class Links:
    """Builds links. Every method returns an empty text if the server's URL is not set."""

    mlflow_url: str = ""
    prefect_url: str = ""

    def model(self, name: str) -> str:
        """Return the page of a registered model: a base family or an adapter."""
        return self._mlflow(f"models/{_part(name)}")

    def version(self, name: str, number: int) -> str:
        """Return the page of one version of a registered model."""
        return self._mlflow(f"models/{_part(name)}/versions/{number}")

    def run(self, run_id: str | None) -> str:
        """Return the page of a run, such as a training."""
        return self._mlflow(f"runs/{_part(run_id)}") if run_id else ""

    @property
    def flow_runs(self) -> str:
        """Prefect's page of flow runs."""
        return self._prefect("runs")

    def plan(self, family: str) -> str:
        """Return the artifact with the plan of reconcile (see `tasks.reporting`)."""
        return self._prefect(f"artifacts/key/{artifact_key('plan', family)}")

    def report(self, family: str) -> str:
        """Return the artifact with the fleet report."""
        return self._prefect(f"artifacts/key/{artifact_key('fleet', family)}")

    def _mlflow(self, path: str) -> str:
        return f"{self.mlflow_url.rstrip('/')}/#/{path}" if self.mlflow_url else ""

    def _prefect(self, path: str) -> str:
        return f"{self.prefect_url.rstrip('/')}/{path}" if self.prefect_url else ""


def _part(text: str) -> str:
    return quote(text, safe="")
