"""Starts and stops the event bridge as a detached process of the local stack."""

import base64
import hashlib
import json
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from ml.errors import ServiceError
from ml.settings import load_settings
from services.event_bridge.authentication import SECRET_PREFIX
from services.health import answers, runs_well
from services.processes import POLL_SECONDS, choose_port, service_lock, start_process, stop_process, wait_until_healthy, write_atomically

NAME = "event-bridge"
START_TIMEOUT_SECONDS = 60
PORT_RELEASE_SECONDS = 2


def start_event_bridge(state_dir: Path, environment: Mapping[str, str]) -> str:
    """Start the bridge, or adopt the one that runs with these settings, and wait until it answers. Returns its URL.

    Args:
        environment: `MILLSTREAM_*` settings of the process, and PREFECT_API_URL. One that runs with others is replaced.

    Raises:
        ServiceError: it does not start, with the end of its log; or MILLSTREAM_BRIDGE_PORT is taken, with its holder.
    """
    url, port = event_bridge_address(state_dir), _port(state_dir)
    command = [sys.executable, "-m", "services.event_bridge", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--log-file", str(event_log_path(state_dir))]
    environment = {**environment, "MILLSTREAM_BRIDGE_TOKEN": bridge_token(state_dir)}
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest().encode()
    digest_path = state_dir / f"{NAME}.settings"

    same_settings = digest_path.is_file() and digest_path.read_bytes() == digest
    if same_settings and runs_well(NAME, command, lambda: is_healthy(state_dir), state_dir=state_dir):
        return url
    stop_event_bridge(state_dir)
    # The socket of a killed process is closed a moment after it shows as dead.
    deadline = time.monotonic() + PORT_RELEASE_SECONDS
    while holder := _holder(port):
        if time.monotonic() > deadline:
            raise ServiceError(f"{NAME}: port {port} is taken by {holder}; end it, or set MILLSTREAM_BRIDGE_PORT to another port")
        time.sleep(POLL_SECONDS)
    write_atomically(digest_path, digest)
    start_process(NAME, command, state_dir=state_dir, env=environment)
    wait_until_healthy(NAME, lambda: is_healthy(state_dir), state_dir=state_dir, timeout_seconds=START_TIMEOUT_SECONDS)
    return url


def stop_event_bridge(state_dir: Path) -> None:
    """End it; its queue stays. Does nothing when there is none."""
    stop_process(NAME, state_dir)


def event_log_path(state_dir: Path) -> Path:
    """What it did, one JSON object a line; what it printed, such as a traceback, is in the log of its process."""
    return state_dir.resolve() / "logs" / "event-bridge-events.log"


def event_bridge_address(state_dir: Path) -> str:
    """Where the bridge of this folder listens, or will listen once it is started."""
    return f"http://127.0.0.1:{_port(state_dir)}"


def bridge_token(state_dir: Path) -> str:
    """The secret of this folder's bridge, made once and readable by its owner only.

    In the form that libraries of Standard Webhooks take: `whsec_` and the key in base64.
    """
    path = state_dir / NAME / "token"
    with service_lock(f"{NAME}.token", state_dir):
        if not path.exists():
            write_atomically(path, (SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()).encode())
        return path.read_text(encoding="utf-8")


def is_healthy(state_dir: Path) -> bool:
    """Whether it takes events and can keep them; Prefect or the object store being away is no reason to restart it."""
    return answers(f"{event_bridge_address(state_dir)}/healthz")


def _port(state_dir: Path) -> int:
    return load_settings().bridge_port or choose_port(NAME, state_dir)


def _holder(port: int) -> str | None:
    """Who listens on a loopback port, in words; None when nobody does."""
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", None) == port:
            if connection.pid is None:
                return "a process of another user"
            try:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
            except psutil.Error:
                return f"process {connection.pid}"
    return None
