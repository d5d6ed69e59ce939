import base64
import hashlib
import hmac

import pytest

from services.event_bridge.authentication import NotAuthenticated, check_bearer, check_bearer_or_signature, sign

TOKEN = "a-secret"
BODY = b'{"kind": "retrain.asked"}'
NOW = 1_800_000_000.0


def signed(timestamp: float = NOW, body: bytes = BODY, secret: str = TOKEN, webhook_id: str = "msg_1") -> dict[str, str]:
    text = str(int(timestamp))
    return {"webhook-id": webhook_id, "webhook-timestamp": text, "webhook-signature": sign(webhook_id, text, body, secret)}


def test_the_bearer_of_the_token_is_let_in():
    check_bearer({"authorization": f"Bearer {TOKEN}"}, TOKEN)
    assert check_bearer_or_signature({"authorization": f"bearer {TOKEN}"}, BODY, TOKEN, NOW) is None


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "unsigned"),
        ({"authorization": "Basic YTpi"}, "unsigned"),
        ({"authorization": "Bearer "}, "wrong token"),
        ({"authorization": f"Bearer {TOKEN}x"}, "wrong token"),
        ({"authorization": "Bearer \u00fc\u00ff"}, "wrong token"),
    ],
)
def test_everybody_else_is_refused(headers, reason):
    with pytest.raises(NotAuthenticated) as refused:
        check_bearer(headers, TOKEN)
    assert refused.value.reason == reason
    with pytest.raises(NotAuthenticated) as refused:
        check_bearer_or_signature(headers, BODY, TOKEN, NOW)
    assert refused.value.reason == reason


def test_the_signature_is_that_of_the_standard():
    """The example of the specification's reference libraries (standard-webhooks/libraries, python/tests)."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert sign("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", body, secret) == expected


def test_a_secret_that_is_no_base64_is_the_key_itself():
    digest = hmac.new(TOKEN.encode(), b"msg_1.5." + BODY, hashlib.sha256).digest()
    assert sign("msg_1", "5", BODY, TOKEN) == "v1," + base64.b64encode(digest).decode()


@pytest.mark.parametrize("age", [0, 299, -299])
def test_a_signed_request_is_let_in_and_named(age):
    assert check_bearer_or_signature(signed(NOW - age), BODY, TOKEN, NOW) == "msg_1"


def test_one_of_several_signatures_is_enough():
    """As sent while a secret is being replaced."""
    headers = signed()
    headers["webhook-signature"] = f"v1,b3RoZXI= {headers['webhook-signature']}"
    assert check_bearer_or_signature(headers, BODY, TOKEN, NOW) == "msg_1"


@pytest.mark.parametrize("change", ["body", "secret", "id", "timestamp", "version"])
def test_a_wrong_signature_is_refused(change):
    headers, body = signed(secret="another" if change == "secret" else TOKEN), BODY
    if change == "body":
        body += b" "
    if change == "id":
        headers["webhook-id"] = "msg_2"
    if change == "timestamp":
        headers["webhook-timestamp"] = str(int(NOW) + 1)
    if change == "version":
        headers["webhook-signature"] = headers["webhook-signature"].replace("v1,", "v1a,")
    with pytest.raises(NotAuthenticated) as refused:
        check_bearer_or_signature(headers, body, TOKEN, NOW)
    assert refused.value.reason == "wrong signature"


@pytest.mark.parametrize("age", [301, -301, 10**9])
def test_a_signature_of_another_time_is_refused(age):
    with pytest.raises(NotAuthenticated) as refused:
        check_bearer_or_signature(signed(NOW - age), BODY, TOKEN, NOW)
    assert refused.value.reason == "expired"
    assert "sign anew" in str(refused.value)


@pytest.mark.parametrize("missing", ["webhook-id", "webhook-timestamp"])
def test_half_a_signature_is_refused(missing):
    headers = signed()
    del headers[missing]
    with pytest.raises(NotAuthenticated, match="webhook-timestamp"):
        check_bearer_or_signature(headers, BODY, TOKEN, NOW)


def test_a_right_token_does_not_save_a_wrong_signature():
    headers = signed(secret="another") | {"authorization": f"Bearer {TOKEN}"}
    with pytest.raises(NotAuthenticated):
        check_bearer_or_signature(headers, BODY, TOKEN, NOW)
