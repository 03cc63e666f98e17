"""Settings of the fleet page."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from trans_peft.errors import InvalidSpecError

__all__ = ["DEFAULT_PORT", "UiSettings"]

DEFAULT_PORT = 4270
_LOCAL = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class UiSettings:
    """Where the fleet page listens, which names it answers to, and which pages it links to.

    Attributes:
        host: Address to listen on.
        port: Port to listen on.
        allowed_hosts: Further names that the Host header may have, without port. The local names
            and `host` are always allowed.
        person_header: Name of the header in which a proxy passes the name of the person who is
            logged in. Empty: no name is shown. The page takes it from any client that connects.
        mlflow_url: URL of MLflow's pages. Empty: no links.
        prefect_url: URL of Prefect's pages. Empty: no links.
        refresh_s: Seconds after which a family that is open in a browser is read again.

    Raises:
        InvalidSpecError: fields are invalid. The message lists all problems.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    allowed_hosts: tuple[str, ...] = ()
    person_header: str = ""
    mlflow_url: str = ""
    prefect_url: str = ""
    refresh_s: float = 30.0

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.port <= 65535:
            problems.append(f"the port must lie in [1, 65535], not {self.port}")
        if not self.refresh_s >= 1:
            problems.append(f"the interval must be at least 1 s, not {self.refresh_s}")
        for name, url in (("MLflow", self.mlflow_url), ("Prefect", self.prefect_url)):
            if url and not _is_web_address(url):
                problems.append(f"the URL of {name}'s pages must be http(s)://..., not {url!r}")
        if any("*" in host.removeprefix("*.") or ":" in host for host in self.allowed_hosts):
            problems.append("allowed hosts are names without port, or *.NAME")
        if problems:
            raise InvalidSpecError(f"the settings of the fleet page: {'; '.join(problems)}")

    @property
    def accepted_hosts(self) -> list[str]:
        """All values that the Host header may have, without port."""
        return list(dict.fromkeys([*_LOCAL, self.host, *self.allowed_hosts]))


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
