"""What may be sent: a JSON body of bounded size."""

import hashlib
import json
import re
from typing import Any

from fastapi import Request
from pydantic import ValidationError

from ml.events import Event
from services.request_body import BODY_TIMEOUT_SECONDS, BodyTooLarge, BodyTooSlow, read_bounded

MAX_EVENT_BYTES = 2**20
# A store lists every chunk of an object, and on a change those of the old one too: 100 bytes per 4 MiB of data.
MAX_STORE_EVENT_BYTES = 16 * 2**20
MAX_PROBLEMS_SHOWN = 20
MAX_FOUND_CHARACTERS = 80


class EventRefused(Exception):
    """A request that is answered with an error. `reason` is one word or two, for the counter."""

    def __init__(self, status: int, reason: str, detail: str, **fields: object):
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.fields = fields


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, read no further than the limit.

    Raises:
        EventRefused: 413 when it is larger, 408 when it does not arrive in time.
    """
    try:
        return await read_bounded(request, max_bytes)
    except BodyTooLarge:
        detail = f"the body is larger than {max_bytes} bytes; name fewer objects, or send several events"
        raise EventRefused(413, "too large", detail) from None
    except BodyTooSlow:
        raise EventRefused(408, "too slow", f"the body did not arrive within {BODY_TIMEOUT_SECONDS} s; send it again") from None


def parse_json(body: bytes) -> dict[str, Any]:
    """
    Raises:
        EventRefused: 422, not a JSON object.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise EventRefused(422, "not an event", f"the body is not JSON ({error}); send one JSON object") from error
    if not isinstance(content, dict):
        raise EventRefused(422, "not an event", f"the body must be a JSON object, found {describe(content)}")
    return content


def parse_event(body: bytes, webhook_id: str | None) -> Event:
    """One Event.

    Args:
        webhook_id: of a signed request. It names the event that has no id of its own, so that a replay of the request
            is a replay of the event.

    Raises:
        EventRefused: 422 with one problem per field: field, value found, what is allowed.
    """
    content = parse_json(body)
    if "id" not in content and webhook_id is not None:
        content["id"] = (
            webhook_id if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", webhook_id) else hashlib.sha256(webhook_id.encode()).hexdigest()
        )
    try:
        return Event.model_validate_json(json.dumps(content))
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors()[:MAX_PROBLEMS_SHOWN]]
        detail = "; ".join(f"{item['field']}: {item['message']}, found {item['found']}" for item in problems[:3])
        raise EventRefused(422, "not an event", detail, problems=problems) from error


def describe(value: object) -> str:
    """A value, short enough for an error message."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= MAX_FOUND_CHARACTERS else f"{shown[:MAX_FOUND_CHARACTERS]}... ({len(shown)} characters)"


def _problem(error: Any) -> dict[str, str]:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        message = f"is no field of an event; leave it out, the fields are {', '.join(Event.model_fields)}"
    elif error["type"] == "missing":
        message = "is missing; add it"
    else:
        message = error["msg"]
    return {"field": field, "found": "nothing" if error["type"] == "missing" else describe(error["input"]), "message": message}
