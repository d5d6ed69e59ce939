"""What a caller may send: a JSON body of bounded size whose items keep the model's own input schema."""

import json
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from jsonschema import Draft202012Validator, ValidationError

from services.request_body import BODY_TIMEOUT_SECONDS, BodyTooLarge, BodyTooSlow, read_bounded

MAX_BODY_BYTES = 2**20
MAX_ITEMS = 256
MAX_PROBLEMS_SHOWN = 20
MAX_FOUND_CHARACTERS = 80


class RequestRefused(Exception):
    """A request that is answered with an error: the caller's fault, or no room right now."""

    def __init__(self, status: int, detail: str, *, problems: Sequence[dict] = (), retry_after_seconds: int | None = None):
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.problems = list(problems)
        self.retry_after_seconds = retry_after_seconds


async def read_body(request: Request) -> bytes:
    """The body, read no further than the limit.

    Raises:
        RequestRefused: 413 when it is larger than MAX_BODY_BYTES, 408 when it does not arrive in time.
    """
    try:
        return await read_bounded(request, MAX_BODY_BYTES)
    except BodyTooLarge:
        raise RequestRefused(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send the items in several requests") from None
    except BodyTooSlow:
        raise RequestRefused(408, f"the body did not arrive within {BODY_TIMEOUT_SECONDS} s; send it again") from None


def parse_items(body: bytes) -> list:
    """The list under `items`, of 1 to MAX_ITEMS entries; the entries themselves are not yet checked.

    Raises:
        RequestRefused: 422, saying what was found instead.
    """
    example = 'send {"items": [{...}, ...]}'
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(422, f"the body is not JSON ({error}); {example}") from error
    if not isinstance(content, dict) or set(content) != {"items"}:
        found = f"an object with the keys {sorted(content)[:10]}" if isinstance(content, dict) else describe(content)
        raise RequestRefused(422, f'the body must be an object with the one key "items", found {found}; {example}')
    items = content["items"]
    if not isinstance(items, list):
        raise RequestRefused(422, f'"items" must be a list, found {describe(items)}; {example}')
    if not 1 <= len(items) <= MAX_ITEMS:
        raise RequestRefused(422, f'"items" must hold 1 to {MAX_ITEMS} entries, found {len(items)}; send them in several requests')
    return items


class ItemChecker:
    """Checks values against a JSON Schema (draft 2020-12) and words what is wrong."""

    def __init__(self, schema: dict):
        Draft202012Validator.check_schema(schema)
        self._validator = Draft202012Validator(schema)

    def check(self, items: Sequence[Any]) -> None:
        """
        Raises:
            RequestRefused: 422 with one problem per broken rule: item index, field, value found, what to do.
        """
        problems = []
        for index, item in enumerate(items):
            problems += [_problem(index, error) for error in self._validator.iter_errors(item)]
            if len(problems) >= MAX_PROBLEMS_SHOWN:
                break
        if problems:
            first = problems[0]
            where = f"item {first['item']}" + (f", field {first['field']!r}" if first["field"] else "")
            raise RequestRefused(422, f"{where}: {first['message']}", problems=problems[:MAX_PROBLEMS_SHOWN])


def describe(value: object) -> str:
    """A value, short enough for an error message."""
    if isinstance(value, str):
        # Enough to recognise the value; whole texts do not belong into error messages.
        shown = json.dumps(value[:MAX_FOUND_CHARACTERS], ensure_ascii=False)
        return shown if len(value) <= MAX_FOUND_CHARACTERS else f"{shown}... ({len(value)} characters)"
    if isinstance(value, dict):
        return f"an object with the keys {sorted(value)[:10]}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return json.dumps(value)


def _problem(index: int, error: ValidationError) -> dict:
    field = ".".join(str(part) for part in error.absolute_path)
    found = describe(error.instance)
    return {"item": index, "field": field, "found": found, "message": _message(error, found)}


def _message(error: ValidationError, found: str) -> str:
    limit = error.validator_value
    match error.validator:
        case "required":
            missing = [name for name in limit if name not in error.instance]  # type: ignore[operator, union-attr]
            return f"must have {', '.join(map(repr, missing))}, found {found}; add it"
        case "additionalProperties":
            known = sorted(error.schema.get("properties", {}))  # type: ignore[union-attr]
            unknown = sorted(set(error.instance) - set(known))  # type: ignore[arg-type]
            return f"has unknown fields {unknown[:10]}; leave them out, known fields: {known}"
        case "type":
            return f"must be of type {limit}, found {found}"
        case "minLength":
            return f"must have at least {limit} characters, found {found}"
        case "maxLength":
            return f"must have at most {limit} characters, found {found}; shorten it"
        case "enum":
            return f"must be one of {limit}, found {found}"
        case _:
            return f"breaks the rule {error.validator} = {json.dumps(limit)[:200]}, found {found}; see the schema at /v1/<name>"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
