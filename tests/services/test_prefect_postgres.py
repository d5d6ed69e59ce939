"""The Prefect server on a real PostgreSQL: `make test-postgres`, or `pytest -m postgres`."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from ml.errors import ServiceError
from ml.settings import Settings
from services.prefect_database import check_database
from services.prefect_server import NAME, is_healthy, launch_prefect_server, prefect_home, start_prefect_server, stop_prefect_server
from services.processes import log_path, read_process
from tests.services.postgres import Postgres, find_binaries, running_postgres
from tests.services.prefect_runs import ask, make_scheduled_deployment, scheduled_runs, wait_for

BINARIES = find_binaries()
pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(BINARIES is None, reason="there is no PostgreSQL server here; on Debian: apt-get install postgresql"),
]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    assert BINARIES is not None
    with running_postgres(BINARIES) as server:
        server.sql("CREATE DATABASE prefect")
        yield server


def test_what_is_wrong_with_a_database_is_told(postgres: Postgres):
    postgres.sql("CREATE DATABASE locked")
    postgres.sql("CREATE ROLE guest LOGIN PASSWORD 'sesame'")
    cases = (
        (postgres.url("prefect", password="wrong"), "refused the user 'prefect'.*check user and password"),
        (postgres.url("nowhere"), "does not exist.*createdb"),
        (postgres.url("locked", user="guest", password="sesame"), "'guest' may not create tables.*ALTER DATABASE \"locked\" OWNER"),
        (postgres.url("prefect") + "?ssl=require", "SSL"),
    )
    for url, message in cases:
        with pytest.raises(ServiceError, match=f"127.0.0.1:{postgres.port} .MILLSTREAM_PREFECT_DATABASE_URL.*{message}") as caught:
            check_database(SecretStr(url))
        assert not any(secret in str(caught.value) for secret in ("wrong", "sesame", postgres.password))
    check_database(SecretStr(postgres.url("prefect")))


def test_the_server_keeps_its_state_in_postgres_whatever_is_killed(postgres: Postgres, tmp_path: Path):
    settings = Settings(prefect_database_url=SecretStr(postgres.url("prefect")))
    try:
        api_url = start_prefect_server(tmp_path, settings)
        deployment = make_scheduled_deployment(api_url)
        runs = wait_for(lambda: scheduled_runs(api_url, deployment), "a scheduled run")
        assert not (prefect_home(tmp_path) / "prefect.db").exists()
        shown = httpx.get(f"{api_url}/admin/settings", trust_env=False).text
        assert postgres.password not in shown

        process = read_process(NAME, tmp_path)
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        while read_process(NAME, tmp_path):
            time.sleep(0.01)
        assert start_prefect_server(tmp_path, settings) == api_url
        assert scheduled_runs(api_url, deployment)[0]["id"] == runs[0]["id"]

        # A server on another database is not taken for this one; with none named, whatever runs will do.
        postgres.sql("CREATE DATABASE other")
        process = read_process(NAME, tmp_path)
        assert start_prefect_server(tmp_path) == api_url
        assert read_process(NAME, tmp_path) == process
        start_prefect_server(tmp_path, Settings(prefect_database_url=SecretStr(postgres.url("other"))))
        assert ask(api_url, "/deployments/filter", {}) == []
        start_prefect_server(tmp_path, settings)

        postgres.kill()
        wait_for(lambda: not is_healthy(tmp_path), "the end of health without a database")
        with pytest.raises(ServiceError, match=f"127.0.0.1:{postgres.port}.*cannot be reached.*start PostgreSQL"):
            launch_prefect_server(tmp_path, settings)
        postgres.start()
        assert start_prefect_server(tmp_path, settings) == api_url
        assert [run["id"] for run in scheduled_runs(api_url, deployment)] == [run["id"] for run in runs]
        assert postgres.password not in log_path(NAME, tmp_path).read_text()
    finally:
        stop_prefect_server(tmp_path)
