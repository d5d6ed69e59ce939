"""The local Prefect server: settings and, by default, SQLite under the state folder; loopback only, telemetry off.

`MILLSTREAM_PREFECT_DATABASE_URL` puts its database on PostgreSQL, `MILLSTREAM_PREFECT_PORT` fixes its port.
A start takes 6 to 30 seconds, so it comes in two halves: `launch_prefect_server`, then `wait_for_prefect_server`.
"""

import sys
from pathlib import Path

import psutil

from ml.settings import TELEMETRY_OFF, Settings, load_settings
from services.health import answers, runs_well
from services.prefect_database import check_database
from services.processes import choose_port, kept_ports, read_process, reserved_port, start_process, stop_process, wait_until_healthy

NAME = "prefect-server"
START_TIMEOUT_SECONDS = 180
DATABASE_VARIABLE = "PREFECT_API_DATABASE_CONNECTION_URL"

ENVIRONMENT = {
    **TELEMETRY_OFF,
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLI_PROMPT": "false",
    # A run holds its deployment's slot by a lease. In memory, the default, a restart of the server forgets them all: each
    # living run is then ended at its next renewal. On disk they outlive it.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # Of a run that a worker has taken and not started yet; nobody renews it until the flow's process is up (a few seconds,
    # a minute on a busy machine). From then on that process renews it by 300 s every 225 s, which Prefect fixes in its code.
    "PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION": "120",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "5",
    # How soon a run that found its deployment's slot taken asks again.
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "10",
    # Old runs with their logs and artifacts, and old events, go by themselves.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(30 * 24 * 3600),
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "P30D",
}


def start_prefect_server(state_dir: Path, settings: Settings | None = None) -> str:
    """Start the server, or adopt the one that is running, and wait until it answers. Returns the URL of its API.

    Raises:
        ServiceError, ConfigError: see `launch_prefect_server`; or it does not come up, with the end of its log.
    """
    api_url = launch_prefect_server(state_dir, settings)
    wait_for_prefect_server(state_dir)
    return api_url


def launch_prefect_server(state_dir: Path, settings: Settings | None = None) -> str:
    """Start the process unless a healthy one runs, without waiting for it. Returns the URL of its API.

    Args:
        settings: its port and database; by default those of the environment.

    Raises:
        ServiceError: the port is taken, or the database cannot be used.
        ConfigError: the database's URL is not one.
    """
    settings = settings or load_settings()
    port = reserved_port(NAME, settings.prefect_port, state_dir)
    api_url = prefect_api_address(state_dir)
    command = [sys.executable, "-m", "services.prefect_process", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    if _uses_database(settings, state_dir) and runs_well(NAME, command, lambda: is_healthy(state_dir), state_dir=state_dir):
        return api_url
    stop_prefect_server(state_dir)
    home = prefect_home(state_dir)
    home.mkdir(parents=True, exist_ok=True)
    database = f"sqlite+aiosqlite:///{home}/prefect.db"
    if settings.prefect_database_url is not None:
        check_database(settings.prefect_database_url)
        database = settings.prefect_database_url.get_secret_value()
    # Of a server that was killed holding it. Prefect looks only whether a process of that pid lives, which may be any by now.
    (home / "concurrency_leases" / "expirations.lock").unlink(missing_ok=True)
    # In the environment, not in the command: only the user of the process can read it there.
    environment = {**ENVIRONMENT, "PREFECT_HOME": str(home), "PREFECT_API_URL": api_url, DATABASE_VARIABLE: database}
    environment["PREFECT_SERVER_UI_STATIC_DIRECTORY"] = str(_only_the_first_ui(home))
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
    port = kept_ports(NAME, state_dir).get(NAME) or choose_port(NAME, state_dir)
    return f"http://127.0.0.1:{port}/api"


def is_healthy(state_dir: Path) -> bool:
    """Whether it answers and reaches its database."""
    return answers(f"{prefect_api_address(state_dir)}/ready")


def _only_the_first_ui(home: Path) -> Path:
    """Where the server puts its web pages, prepared so that it serves the first of its two user interfaces only.

    The second one, the default of a new browser, asks a host on the internet for its tracking settings, also with analytics
    off. Prefect has no switch for it; it leaves out an interface whose folder it cannot make, and says so in its log.
    """
    folder = home / "ui"
    folder.mkdir(exist_ok=True)
    second = folder / "v2"
    if not second.is_symlink():
        second.symlink_to("left-out")
    return folder


def _uses_database(settings: Settings, state_dir: Path) -> bool:
    """Whether the running server uses the database that is asked for. When none is asked for, any will do."""
    running = read_process(NAME, state_dir)
    if running is None or settings.prefect_database_url is None:
        return True
    try:
        return psutil.Process(running.pid).environ().get(DATABASE_VARIABLE) == settings.prefect_database_url.get_secret_value()
    except psutil.Error:
        return False
