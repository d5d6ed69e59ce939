"""Asks a local service whether it is well."""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from ml.errors import ServiceError
from services.processes import read_process, wait_until_healthy

# A machine that trains on all of its cores answers late; what runs well must not be restarted for that.
PATIENCE_SECONDS = 15


def answers(url: str, timeout_seconds: float = 5) -> bool:
    """Whether a GET is answered with 200, asked directly and never through a proxy that the environment names."""
    try:
        return httpx.get(url, timeout=timeout_seconds, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def accepts_connections(url: str, timeout_seconds: float = 2) -> bool:
    """Whether somebody listens at the host and port of a URL."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=timeout_seconds):
            return True
    except OSError:
        return False


def runs_well(name: str, command: Sequence[str], check: Callable[[], bool], *, state_dir: Path) -> bool:
    """Whether the process of this name runs this very command and answers, now or within PATIENCE_SECONDS.

    False at once when there is none, or when it runs another command.
    """
    running = read_process(name, state_dir)
    if running is None or running.command != tuple(command):
        return False
    try:
        wait_until_healthy(name, check, state_dir=state_dir, timeout_seconds=PATIENCE_SECONDS)
    except ServiceError:
        return False
    return True
