"""The Prefect worker of the local stack: it starts each flow run in a process of its own.

The flow processes are not the worker's: when it dies they go on, and the next worker or the watchdog looks after them.
"""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from services.health import runs_well
from services.prefect_rest import open_prefect
from services.prefect_server import prefect_api_address
from services.processes import start_process, stop_process, wait_until_healthy
from services.web_service import PREFECT_SERVER_ONLY

NAME = "worker"
WORK_POOL = "millstream"
START_TIMEOUT_SECONDS = 90

ENVIRONMENT = {
    # From "run created" to "worker has seen it"; the default is 10 s.
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    # A run that waits for its deployment's slot is planned ten seconds ahead; taken that early, it would be tried each second.
    "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    "PREFECT_WORKER_HEARTBEAT_SECONDS": "10",
    # Where a cancel request is looked for when the websocket is down; the default is two minutes.
    "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "10",
    # Of every flow run, so that the server notices a host that is gone (see services/registration.py).
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}


def start_worker(state_dir: Path, environment: Mapping[str, str]) -> None:
    """Start the worker, or adopt the one that runs, and wait until the server knows it. The work pool must be there.

    Raises:
        ServiceError: it does not start; with the end of its log.
    """
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process", "--name", worker_name()]
    # `python` in the deployments' command is this very interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if runs_well(NAME, command, lambda: is_healthy(state_dir), state_dir=state_dir):
        return
    stop_worker(state_dir)
    start_process(NAME, command, state_dir=state_dir, env={**environment, **ENVIRONMENT, "PATH": path}, without=PREFECT_SERVER_ONLY)
    wait_until_healthy(NAME, lambda: is_healthy(state_dir), state_dir=state_dir, timeout_seconds=START_TIMEOUT_SECONDS)


def stop_worker(state_dir: Path) -> None:
    """End the worker; flow runs go on. Does nothing when there is none."""
    stop_process(NAME, state_dir)


def worker_name() -> str:
    return socket.gethostname()


def is_healthy(state_dir: Path) -> bool:
    """Whether the server has heard of this worker lately."""
    api_url = os.environ.get("PREFECT_API_URL") or prefect_api_address(state_dir)
    try:
        with open_prefect(api_url, timeout_seconds=5) as client:
            answer = client.post(f"/work_pools/{WORK_POOL}/workers/filter", json={}).raise_for_status()
    except httpx.HTTPError:
        return False
    return any(worker["name"] == worker_name() and worker["status"] == "ONLINE" for worker in answer.json())
