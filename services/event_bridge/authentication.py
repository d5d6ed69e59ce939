"""Who may send: the bearer of the token, or one who signs with it as Standard Webhooks prescribes.

The signature (https://www.standardwebhooks.com, "Signature scheme") is over `<webhook-id>.<webhook-timestamp>.<body>`.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

TIMESTAMP_TOLERANCE_SECONDS = 300
SECRET_PREFIX = "whsec_"  # noqa: S105
"""What follows it is the key in base64; a secret without it is the key itself, as UTF-8."""


class NotAuthenticated(Exception):
    """`reason` is one word for the counter, the message says what to send."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def check_bearer(headers: Mapping[str, str], token: str) -> None:
    """
    Raises:
        NotAuthenticated: no `Authorization: Bearer <token>`, or a wrong token.
    """
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise NotAuthenticated("unsigned", "send `Authorization: Bearer <MILLSTREAM_BRIDGE_TOKEN>`")
    if not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise NotAuthenticated("wrong token", "the bearer token is not the one of this bridge; check MILLSTREAM_BRIDGE_TOKEN")


def check_bearer_or_signature(headers: Mapping[str, str], body: bytes, token: str, now: float) -> str | None:
    """
    Args:
        now: seconds since the epoch.

    Returns:
        The `webhook-id` of a signed request; None for the bearer of the token.

    Raises:
        NotAuthenticated: neither, a wrong signature, or one of another time.
    """
    signatures = headers.get("webhook-signature", "")
    if not signatures:
        if "authorization" not in headers:
            raise NotAuthenticated(
                "unsigned", "send `Authorization: Bearer <MILLSTREAM_BRIDGE_TOKEN>`, or sign with it (Standard Webhooks)"
            )
        check_bearer(headers, token)
        return None
    webhook_id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not webhook_id or not (timestamp.isascii() and timestamp.isdigit()):
        raise NotAuthenticated(
            "unsigned", "a signed request needs webhook-id, webhook-timestamp (seconds since 1970) and webhook-signature"
        )
    expected = sign(webhook_id, timestamp, body, token).encode()
    if not any(hmac.compare_digest(given.encode(), expected) for given in signatures.split()):
        raise NotAuthenticated("wrong signature", "webhook-signature is not `v1,<base64 hmac-sha256 of id.timestamp.body>` under the token")
    # Last, so that only a right signature learns of our clock.
    age = now - int(timestamp)
    if abs(age) > TIMESTAMP_TOLERANCE_SECONDS:
        raise NotAuthenticated(
            "expired", f"webhook-timestamp is {age:+.0f} s from this clock, at most {TIMESTAMP_TOLERANCE_SECONDS} s are taken; sign anew"
        )
    return webhook_id


def sign(webhook_id: str, timestamp: str, body: bytes, secret: str) -> str:
    """The value of `webhook-signature`."""
    digest = hmac.digest(_key(secret), f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return "v1," + base64.b64encode(digest).decode()


def _key(secret: str) -> bytes:
    if secret.startswith(SECRET_PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except binascii.Error:
            pass
    return secret.encode()
