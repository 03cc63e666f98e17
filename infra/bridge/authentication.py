"""Who may send a hint: MLflow by its signature over the raw body, S3 servers by a bearer token.

Every comparison takes the same time wherever the difference is, and every secret is tried. Two
secrets are valid at once, so that one can be changed without losing a hint.

MLflow signs `{delivery id}.{timestamp}.{body}` with HMAC-SHA256 (`mlflow.webhooks.delivery`, after
standardwebhooks.com) and sends its retries with the id and timestamp of the first attempt.
"""

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence

from infra.bridge.notifications import is_delivery_id

__all__ = [
    "WINDOW_S",
    "AuthenticationError",
    "check_token",
    "check_window",
    "mlflow_delivery",
    "sign",
]

WINDOW_S = 300
"""How old, or how far in the future, the timestamp of a delivery may be: standardwebhooks' five
minutes. It must outlast the sender's retries."""


class AuthenticationError(Exception):
    """A sender that is not who it must be; the text may be told to it."""


def mlflow_delivery(
    headers: Mapping[str, str], body: bytes, *, secrets: Sequence[str], now_s: float
) -> str:
    """Return the id of a delivery that MLflow signed within the window. RefusedError."""
    delivery_id = headers.get("x-mlflow-delivery-id", "")
    timestamp = headers.get("x-mlflow-timestamp", "")
    found = headers.get("x-mlflow-signature", "")
    wanted = [sign(secret, delivery_id, timestamp, body) for secret in secrets]
    if not _one_of(found, wanted):
        raise AuthenticationError("the signature is missing or wrong")
    check_window(timestamp, now_s)
    if not is_delivery_id(delivery_id):
        raise AuthenticationError("the delivery id is none")
    return delivery_id


def check_window(timestamp: str, now_s: float) -> None:
    """RefusedError unless the timestamp (whole seconds since 1970) lies within the window."""
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
        raise AuthenticationError("the timestamp is no number of seconds")
    if abs(int(timestamp) - now_s) > WINDOW_S:
        raise AuthenticationError("the timestamp is too far from now")


def check_token(headers: Mapping[str, str], *, tokens: Sequence[str]) -> None:
    """RefusedError unless the request carries one of the bearer tokens."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if not _one_of(token, tokens) or scheme.lower() != "bearer":
        raise AuthenticationError("the bearer token is missing or wrong")


def sign(secret: str, delivery_id: str, timestamp: str, body: bytes) -> str:
    """Return the signature as MLflow writes it: `v1,<base64>`."""
    signed = f"{delivery_id}.{timestamp}.".encode() + body
    digest = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _one_of(found: str, wanted: Sequence[str]) -> bool:
    matches = [hmac.compare_digest(found.encode(), secret.encode()) for secret in wanted]
    return any(matches)
