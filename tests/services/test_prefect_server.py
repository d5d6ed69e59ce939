import os
import signal
import time

import httpx
import psutil
import pytest

from services.prefect_server import NAME, is_healthy, prefect_home, start_prefect_server, stop_prefect_server
from services.processes import read_process


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefect")
    yield folder
    stop_prefect_server(folder)


@pytest.mark.slow  # two starts; the test of the whole local stack has two more
def test_the_server_starts_is_adopted_and_is_restarted_when_killed(state_dir):
    api_url = start_prefect_server(state_dir)
    first = read_process(NAME, state_dir)
    assert first is not None
    assert httpx.get(f"{api_url}/health", trust_env=False).json() is True
    assert (prefect_home(state_dir) / "prefect.db").is_file()

    listeners = [item.laddr for item in psutil.Process(first.pid).net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    assert listeners and {address.ip for address in listeners} == {"127.0.0.1"}
    environment = psutil.Process(first.pid).environ()
    assert (environment["PREFECT_SERVER_ANALYTICS_ENABLED"], environment["DO_NOT_TRACK"]) == ("false", "1")

    assert start_prefect_server(state_dir) == api_url
    assert read_process(NAME, state_dir) == first

    name = {"name": "kept-over-restarts"}
    created = httpx.post(f"{api_url}/variables/", json={**name, "value": 7}, trust_env=False)
    assert created.status_code == 201
    os.kill(first.pid, signal.SIGKILL)
    while read_process(NAME, state_dir):
        time.sleep(0.01)
    time.sleep(0.5)  # its sockets are closed a moment after it shows as dead
    assert start_prefect_server(state_dir) == api_url
    second = read_process(NAME, state_dir)
    assert second is not None and second.pid != first.pid
    assert httpx.get(f"{api_url}/variables/name/kept-over-restarts", trust_env=False).json()["value"] == 7

    stop_prefect_server(state_dir)
    assert read_process(NAME, state_dir) is None
    assert not is_healthy(state_dir)
    stop_prefect_server(state_dir)  # stopping what does not run is no error
