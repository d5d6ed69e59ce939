"""The local Prefect server: SQLite and settings under the state folder, loopback only, telemetry off.

A start takes 6 to 30 seconds, so it comes in two halves: `launch_prefect_server`, then `wait_for_prefect_server`.
"""

import sys
from pathlib import Path

from ml.settings import TELEMETRY_OFF
from services.health import answers, runs_well
from services.processes import choose_port, start_process, stop_process, wait_until_healthy

NAME = "prefect-server"
START_TIMEOUT_SECONDS = 180


def start_prefect_server(state_dir: Path) -> str:
    """Start the server, or adopt the one that is running, and wait until it answers. Returns the URL of its API.

    Raises:
        ServiceError: it does not start; with the end of its log.
    """
    api_url = launch_prefect_server(state_dir)
    wait_for_prefect_server(state_dir)
    return api_url


def launch_prefect_server(state_dir: Path) -> str:
    """Start the process unless a healthy one runs, without waiting for it. Returns the URL of its API."""
    api_url = prefect_api_address(state_dir)
    port = choose_port(NAME, state_dir)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    if runs_well(NAME, command, lambda: is_healthy(state_dir), state_dir=state_dir):
        return api_url
    stop_prefect_server(state_dir)
    home = prefect_home(state_dir)
    home.mkdir(parents=True, exist_ok=True)
    environment = {
        **TELEMETRY_OFF,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": api_url,
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home}/prefect.db",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_CLI_PROMPT": "false",
    }
    start_process(NAME, command, state_dir=state_dir, env=environment)
    return api_url


def wait_for_prefect_server(state_dir: Path) -> None:
    """
    Raises:
        ServiceError: the process died or did not become healthy; with the end of its log.
    """
    wait_until_healthy(NAME, lambda: is_healthy(state_dir), state_dir=state_dir, timeout_seconds=START_TIMEOUT_SECONDS)


def stop_prefect_server(state_dir: Path) -> None:
    """End it, and whatever its process group has left behind. Does nothing when there is none."""
    stop_process(NAME, state_dir)


def prefect_home(state_dir: Path) -> Path:
    """The server's database, and the settings of clients that the local stack configures."""
    return state_dir.resolve() / "prefect"


def prefect_api_address(state_dir: Path) -> str:
    """Where the server of this folder listens, or will listen once it is started."""
    return f"http://127.0.0.1:{choose_port(NAME, state_dir)}/api"


def is_healthy(state_dir: Path) -> bool:
    return answers(f"{prefect_api_address(state_dir)}/health")
