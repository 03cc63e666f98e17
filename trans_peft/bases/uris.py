"""Names below a prefix."""

from urllib.parse import quote

__all__ = ["child_uri"]


def child_uri(prefix_uri: str, name: str) -> str:
    """Return the URI of a file below a prefix; only `file://` URIs are percent-encoded."""
    name = quote(name) if prefix_uri.startswith("file://") else name
    return f"{prefix_uri.rstrip('/')}/{name}"
