import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.bridge.authentication import (
    WINDOW_S,
    AuthenticationError,
    check_token,
    mlflow_delivery,
    sign,
)

SECRET, OLD = "s" * 30, "o" * 30
NOW = 1_700_000_000


def headers(body, *, secret=SECRET, at=NOW, delivery_id="5b2c-1"):
    return {
        "x-mlflow-delivery-id": delivery_id,
        "x-mlflow-timestamp": str(at),
        "x-mlflow-signature": sign(secret, delivery_id, str(at), body),
    }


def delivery(found, body, secrets=(SECRET,)):
    return mlflow_delivery(found, body, secrets=secrets, now_s=NOW)


@given(st.binary())
def test_the_signature_is_hmac_sha256_over_id_timestamp_and_raw_body(body):
    digest = hmac.new(SECRET.encode(), b"5b2c-1.1700000000." + body, hashlib.sha256).digest()
    assert sign(SECRET, "5b2c-1", "1700000000", body) == "v1," + base64.b64encode(digest).decode()
    assert delivery(headers(body), body) == "5b2c-1"


def test_the_signature_equals_mlflows():
    from mlflow.webhooks.delivery import _generate_hmac_signature as by_mlflow

    body = '{"name": "größe"}'
    assert by_mlflow(SECRET, "d", "1", body) == sign(SECRET, "d", "1", body.encode())


def test_two_secrets_are_valid_during_a_rotation():
    for secret in (SECRET, OLD):
        assert delivery(headers(b"{}", secret=secret), b"{}", (SECRET, OLD)) == "5b2c-1"
    with pytest.raises(AuthenticationError, match="signature"):
        delivery(headers(b"{}", secret=OLD), b"{}")


@pytest.mark.parametrize(
    "change",
    [
        {"x-mlflow-signature": ""},
        {"x-mlflow-signature": "v1,"},
        {"x-mlflow-signature": "v1,w\xf6rd"},
        {"x-mlflow-signature": sign("", "5b2c-1", str(NOW), b"{}")},
        {"x-mlflow-delivery-id": "other"},
        {"x-mlflow-timestamp": str(NOW + 1)},
    ],
)
def test_a_missing_or_wrong_signature_is_refused(change):
    with pytest.raises(AuthenticationError, match="signature"):
        delivery({**headers(b"{}"), **change}, b"{}")
    with pytest.raises(AuthenticationError, match="signature"):
        delivery(headers(b"{}"), b"{ }")
    with pytest.raises(AuthenticationError, match="signature"):
        delivery({}, b"{}")


@pytest.mark.parametrize("off", [WINDOW_S, -WINDOW_S, 0])
def test_a_timestamp_within_the_window_is_accepted(off):
    assert delivery(headers(b"{}", at=NOW + off), b"{}")


@pytest.mark.parametrize("at", [NOW + WINDOW_S + 1, NOW - WINDOW_S - 1, "", "now", "-1", "9" * 13])
def test_a_timestamp_outside_of_the_window_is_refused(at):
    with pytest.raises(AuthenticationError, match="timestamp"):
        delivery(headers(b"{}", at=at), b"{}")


@pytest.mark.parametrize("delivery_id", ["", "a b", "a\nb", "x" * 200, "../x", "{{ x }}"])
def test_an_invalid_delivery_id_is_refused(delivery_id):
    with pytest.raises(AuthenticationError, match="delivery id"):
        delivery(headers(b"{}", delivery_id=delivery_id), b"{}")


@pytest.mark.parametrize("token", [SECRET, OLD])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_a_valid_bearer_token_is_accepted(token, scheme):
    check_token({"authorization": f"{scheme} {token}"}, tokens=(SECRET, OLD))


@pytest.mark.parametrize(
    "found",
    ["", "Bearer", "Bearer ", f"Basic {SECRET}", SECRET, f"Bearer {SECRET}x", "Bearer \xf6"],
)
def test_a_missing_or_wrong_bearer_token_is_refused(found):
    with pytest.raises(AuthenticationError, match="token"):
        check_token({"authorization": found}, tokens=(SECRET,))
    with pytest.raises(AuthenticationError, match="token"):
        check_token({}, tokens=(SECRET,))
