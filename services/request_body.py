"""Reads the body of a request, no further than a limit and no longer than a while."""

import asyncio

from fastapi import Request

BODY_TIMEOUT_SECONDS = 30


class BodyTooLarge(Exception):
    """It is larger than the limit."""


class BodyTooSlow(Exception):
    """It did not arrive within BODY_TIMEOUT_SECONDS."""


async def read_bounded(request: Request, max_bytes: int) -> bytes:
    """
    Raises:
        BodyTooLarge, BodyTooSlow
    """
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise BodyTooLarge
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise BodyTooLarge
    except TimeoutError:
        raise BodyTooSlow from None
    return bytes(body)
