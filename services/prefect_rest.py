"""A plain HTTP client of Prefect's REST API, for processes that must not import Prefect: that takes seconds and memory."""

import base64
import os

import httpx


def open_prefect(api_url: str, timeout_seconds: float) -> httpx.Client:
    """A client that signs in as Prefect's own does. May be shared between threads.

    Args:
        api_url: with the /api at its end, as PREFECT_API_URL.
    """
    # trust_env off: a proxy that the environment names has nothing to do with a server on this machine.
    return httpx.Client(base_url=api_url.rstrip("/"), timeout=timeout_seconds, trust_env=False, headers=_authorization())


def _authorization() -> dict[str, str]:
    """PREFECT_API_KEY, or user:password in PREFECT_API_AUTH_STRING."""
    if key := os.environ.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    if user_and_password := os.environ.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": "Basic " + base64.b64encode(user_and_password.encode()).decode()}
    return {}
