"""Authentication of senders: MLflow's signature over the raw body, bearer tokens of S3 servers.

Comparisons take constant time, and every configured secret is compared. Two secrets may be valid at
the same time, so that a secret can be rotated without losing a notification.

MLflow signs `{delivery id}.{timestamp}.{body}` with HMAC-SHA256 (`mlflow.webhooks.delivery`, after
standardwebhooks.com). Its retries carry the id and timestamp of the first attempt.
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
"""Largest difference between the timestamp of a delivery and now: five minutes, as
standardwebhooks recommends. It must be longer than the sender's retries take."""


class AuthenticationError(Exception):
    """A request that is not authenticated. Its text may be sent to the client."""


def mlflow_delivery(
    headers: Mapping[str, str], body: bytes, *, secrets: Sequence[str], now_s: float
) -> str:
    """Return the delivery id of a request that MLflow signed within the window.

    AuthenticationError if the signature, the timestamp or the id is not valid.
    """
    delivery_id = headers.get("x-mlflow-delivery-id", "")
    timestamp = headers.get("x-mlflow-timestamp", "")
    found = headers.get("x-mlflow-signature", "")
    expected = [sign(secret, delivery_id, timestamp, body) for secret in secrets]
    if not _is_any_of(found, expected):
        raise AuthenticationError("the signature is missing or wrong")
    check_window(timestamp, now_s)
    if not is_delivery_id(delivery_id):
        raise AuthenticationError("the delivery id is not valid")
    return delivery_id


def check_window(timestamp: str, now_s: float) -> None:
    """Raise AuthenticationError unless the timestamp (seconds since 1970) lies in the window."""
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
        raise AuthenticationError("the timestamp is not a number of seconds")
    if abs(int(timestamp) - now_s) > WINDOW_S:
        raise AuthenticationError(f"the timestamp differs from now by more than {WINDOW_S} s")


def check_token(headers: Mapping[str, str], *, tokens: Sequence[str]) -> None:
    """Raise AuthenticationError unless the request carries one of the bearer tokens."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if not _is_any_of(token, tokens) or scheme.lower() != "bearer":
        raise AuthenticationError("the bearer token is missing or wrong")


def sign(secret: str, delivery_id: str, timestamp: str, body: bytes) -> str:
    """Return the signature as MLflow writes it: `v1,<base64>`."""
    signed = f"{delivery_id}.{timestamp}.".encode() + body
    digest = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _is_any_of(found: str, expected: Sequence[str]) -> bool:
    matches = [hmac.compare_digest(found.encode(), secret.encode()) for secret in expected]
    return any(matches)
