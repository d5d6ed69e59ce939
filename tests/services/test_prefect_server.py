import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from pydantic import SecretStr

from ml.errors import ConfigError, ServiceError
from ml.settings import Settings
from services.prefect_server import NAME, is_healthy, launch_prefect_server, prefect_home, start_prefect_server, stop_prefect_server
from services.processes import read_process
from tests.services.prefect_runs import (
    ask,
    make_deployment,
    make_run,
    make_scheduled_deployment,
    scheduled_runs,
    set_state,
    wait_for,
)

DAYS_30 = 30 * 24 * 3600


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("prefect")
    yield folder
    stop_prefect_server(folder)


@pytest.fixture
def api_url(state_dir: Path) -> str:
    """Of one server for the whole module; started again when a test killed it."""
    return start_prefect_server(state_dir)


def kill_server(state_dir: Path) -> None:
    record = read_process(NAME, state_dir)
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    while read_process(NAME, state_dir):
        time.sleep(0.01)
    time.sleep(0.5)  # its sockets are closed a moment after it shows as dead


def test_it_listens_on_loopback_with_its_files_in_the_state_folder_and_is_adopted(api_url: str, state_dir: Path):
    process = read_process(NAME, state_dir)
    assert process is not None
    assert (prefect_home(state_dir) / "prefect.db").is_file()
    listeners = [item.laddr for item in psutil.Process(process.pid).net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    assert listeners and {address.ip for address in listeners} == {"127.0.0.1"}
    environment = psutil.Process(process.pid).environ()
    assert (environment["PREFECT_SERVER_ANALYTICS_ENABLED"], environment["DO_NOT_TRACK"]) == ("false", "1")
    assert start_prefect_server(state_dir) == api_url
    assert read_process(NAME, state_dir) == process


def test_a_scheduled_run_appears(api_url: str):
    """Nothing else shows when a dependency breaks the scheduler: the server is healthy and runs no schedule."""
    deployment = make_scheduled_deployment(api_url)
    runs = wait_for(lambda: scheduled_runs(api_url, deployment), "a scheduled run")
    assert runs[0]["auto_scheduled"]


def test_the_server_took_the_settings(api_url: str):
    server = ask(api_url, "/admin/settings", method="GET")["server"]
    assert server["concurrency"]["lease_storage"].endswith(".filesystem")
    assert server["services"]["db_vacuum"]["retention_period"] in (DAYS_30, float(DAYS_30), "P30D")
    assert set(server["services"]["db_vacuum"]["enabled"]) == {"events", "flow_runs"}
    assert server["events"]["retention_period"] in (DAYS_30, float(DAYS_30), "P30D")
    assert server["analytics_enabled"] is False


def test_requests_at_once_are_served_not_refused(api_url: str):
    """With SQLite, transactions that write wait for each other (services/prefect_process.py)."""
    deployment = make_deployment(api_url)

    def create(_: int) -> int:
        return httpx.post(f"{api_url}/deployments/{deployment}/create_flow_run", json={}, timeout=60, trust_env=False).status_code

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(create, range(80))) == {201}


def test_a_slot_survives_the_server_and_is_given_back_by_the_end_of_its_run(api_url: str, state_dir: Path):
    limit = {"concurrency_limit": 1, "concurrency_options": {"collision_strategy": "ENQUEUE"}}
    deployment = make_deployment(api_url, **limit)
    holder, waiter = make_run(api_url, deployment), make_run(api_url, deployment)
    lease = set_state(api_url, holder, "PENDING")["state_details"]["deployment_concurrency_lease_id"]
    assert set_state(api_url, waiter, "PENDING")["name"] == "AwaitingConcurrencySlot"
    # As a server leaves it that is killed at the wrong moment; its pid is that of a living process by now.
    lock = prefect_home(state_dir) / "concurrency_leases" / "expirations.lock"
    lock.write_text(str(os.getpid()))

    kill_server(state_dir)
    assert start_prefect_server(state_dir) == api_url
    # The process of a living run renews its lease; refused, it would end the run.
    renewed = httpx.post(f"{api_url}/v2/concurrency_limits/leases/{lease}/renew", json={"lease_duration": 300}, timeout=30, trust_env=False)
    assert renewed.status_code == 204
    assert set_state(api_url, waiter, "PENDING")["name"] == "AwaitingConcurrencySlot"
    set_state(api_url, holder, "CRASHED", force=True)
    assert set_state(api_url, waiter, "PENDING")["type"] == "PENDING"


def test_a_killed_server_comes_back_with_its_state_where_it_was(api_url: str, state_dir: Path):
    ask(api_url, "/variables/", {"name": "kept-over-restarts", "value": 7})
    first = read_process(NAME, state_dir)
    kill_server(state_dir)
    assert not is_healthy(state_dir)
    assert start_prefect_server(state_dir) == api_url
    second = read_process(NAME, state_dir)
    assert first is not None and second is not None and second.pid != first.pid
    assert ask(api_url, "/variables/name/kept-over-restarts", method="GET")["value"] == 7


def test_a_stopped_server_is_gone(tmp_path: Path, state_dir: Path, api_url: str):
    stop_prefect_server(state_dir)
    assert read_process(NAME, state_dir) is None
    assert not is_healthy(state_dir)
    stop_prefect_server(state_dir)  # stopping what does not run is no error


def test_a_port_of_somebody_else_is_refused_with_his_name(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"127\.0\.0\.1:{port}.*process {os.getpid()} \(.*pytest") as caught:
            launch_prefect_server(tmp_path, Settings(prefect_port=port))
    assert not caught.value.retryable
    assert read_process(NAME, tmp_path) is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgres", "not a database URL"),
        ("postgresql+asyncpg://u:sesame@host:port/db", "not a database URL"),
        ("postgresql://u:sesame@127.0.0.1/db", "begins with 'postgresql'"),
        ("sqlite+aiosqlite:////tmp/prefect.db", "begins with 'sqlite"),
        ("postgresql+asyncpg:///db", "names no host"),
        ("postgresql+asyncpg://u:sesame@127.0.0.1", "names no database"),
    ],
)
def test_what_is_no_database_url_is_refused_without_showing_it(url: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"MILLSTREAM_PREFECT_DATABASE_URL.*{message}.*|{message}") as caught:
        launch_prefect_server(tmp_path, Settings(prefect_database_url=SecretStr(url)))
    assert "sesame" not in str(caught.value)
    assert "postgresql+asyncpg://user:password@host:port/database" in str(caught.value)


def test_a_database_that_is_not_there_is_told_before_the_start(tmp_path: Path):
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        url = SecretStr(f"postgresql+asyncpg://prefect:sesame@{address}/prefect")
        with pytest.raises(ServiceError, match=f"prefect at {address}.*cannot be reached.*start PostgreSQL") as caught:
            launch_prefect_server(tmp_path, Settings(prefect_database_url=url))
    assert "sesame" not in str(caught.value)
    assert read_process(NAME, tmp_path) is None
