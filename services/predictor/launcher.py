"""Starts and stops the predictor as a detached process of the local stack."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from services.health import answers, runs_well
from services.processes import choose_port, start_process, stop_process, wait_until_healthy, write_atomically

NAME = "predictor"
START_TIMEOUT_SECONDS = 60


def start_predictor(state_dir: Path, environment: Mapping[str, str]) -> str:
    """Start the predictor, or adopt the one that runs with these settings, and wait until it answers. Returns its URL.

    Args:
        environment: `MILLSTREAM_*` settings of the process. One that runs with others is replaced.

    Raises:
        ServiceError: it does not start; with the end of its log.
    """
    url = predictor_address(state_dir)
    port = choose_port(NAME, state_dir)
    command = [sys.executable, "-m", "services.predictor", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--log-file", str(event_log_path(state_dir))]
    digest = hashlib.sha256(json.dumps(dict(environment), sort_keys=True).encode()).hexdigest().encode()
    digest_path = state_dir / "predictor.settings"

    same_settings = digest_path.is_file() and digest_path.read_bytes() == digest
    if same_settings and runs_well(NAME, command, lambda: is_healthy(state_dir), state_dir=state_dir):
        return url
    stop_predictor(state_dir)
    write_atomically(digest_path, digest)
    start_process(NAME, command, state_dir=state_dir, env=environment)
    wait_until_healthy(NAME, lambda: is_healthy(state_dir), state_dir=state_dir, timeout_seconds=START_TIMEOUT_SECONDS)
    return url


def stop_predictor(state_dir: Path) -> None:
    """End it, requests under way first. Does nothing when there is none."""
    stop_process(NAME, state_dir)


def event_log_path(state_dir: Path) -> Path:
    """What it did, one JSON object a line; what it printed, such as a traceback, is in the log of its process."""
    return state_dir.resolve() / "logs" / "predictor-events.log"


def predictor_address(state_dir: Path) -> str:
    """Where the predictor of this folder listens, or will listen once it is started."""
    return f"http://127.0.0.1:{choose_port(NAME, state_dir)}"


def is_healthy(state_dir: Path) -> bool:
    """Whether the process answers; a model that cannot be loaded is seen at /readyz and is no reason to restart."""
    return answers(f"{predictor_address(state_dir)}/healthz")
