"""Settings of the fleet page."""

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address
from urllib.parse import urlsplit

from trans_peft.errors import InvalidSpecError

__all__ = ["DEFAULT_PORT", "UiSettings"]

DEFAULT_PORT = 4270
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_LONGEST_INTERVAL_S = 86_400.0
_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")


@dataclass(frozen=True)
class UiSettings:
    """Where the fleet page listens, which names it answers to, and which pages it links to.

    Attributes:
        host: Address or name to listen on. An IPv6 address may be in brackets.
        port: Port to listen on.
        allowed_hosts: Further names and IPv6 addresses that the Host header may have, without port;
            `*.NAME` allows all names below NAME. The local names and `host` are always allowed.
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
        if not 1 <= self.refresh_s <= _LONGEST_INTERVAL_S:
            problems.append(
                f"the interval must lie in [1, {_LONGEST_INTERVAL_S:,.0f}] s, not {self.refresh_s}"
            )
        if not _is_host(self.host):
            problems.append(f"the host must be an address or a name, not {self.host!r}")
        for name, url in (("MLflow", self.mlflow_url), ("Prefect", self.prefect_url)):
            if url and not _is_web_address(url):
                problems.append(f"the URL of {name}'s pages must be http(s)://..., not {url!r}")
        problems += [
            f"allowed hosts are names without port, *.NAME or IPv6 addresses, not {host!r}"
            for host in self.allowed_hosts
            if not _is_host(host.removeprefix("*."), names_only=host.startswith("*."))
        ]
        if problems:
            raise InvalidSpecError(f"the settings of the fleet page: {'; '.join(problems)}")

    @property
    def accepted_hosts(self) -> list[str]:
        """All values that the Host header may have, without port."""
        named = map(_in_url, (self.host, *self.allowed_hosts))
        return list(dict.fromkeys([*_LOCAL, *named]))

    @property
    def url(self) -> str:
        """URL of the fleet page on this machine."""
        return f"http://{_in_url(self.host)}:{self.port}"

    @property
    def listening_address(self) -> str:
        """`host` as a socket expects it: an IPv6 address without brackets."""
        return self.host.removeprefix("[").removesuffix("]")


def _is_host(text: str, *, names_only: bool = False) -> bool:
    return bool(_NAME.fullmatch(text)) or (not names_only and _ipv6(text) is not None)


def _ipv6(text: str) -> IPv6Address | None:
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        found = IPv6Address(inner)
    except AddressValueError:
        return None
    return None if found.scope_id else found  # no browser sends a scope in the Host header


def _in_url(host: str) -> str:
    """Return a host as clients write it in a URL and in the Host header."""
    address = _ipv6(host)
    return host if address is None else f"[{address.compressed}]"


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
