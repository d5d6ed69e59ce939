"""The embedded server: private, adopted when healthy, replaced when not, and keeping its data."""

import json
import os
import platform
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

import services.object_store as object_store_module
from ml.errors import ServiceError, StorageError
from ml.storage.s3 import S3Store
from services.object_store import (
    NAME,
    ObjectStoreEndpoint,
    find_binary,
    is_healthy,
    start_object_store,
    stop_object_store,
)
from services.processes import choose_port, kept_ports, read_process


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """A server of its own, for tests that end it."""
    # Longer than the path of a Unix socket may be.
    folder = tmp_path / ("deep-" + "x" * 100)
    yield folder
    stop_object_store(folder)


def connect(endpoint: ObjectStoreEndpoint) -> S3Store:
    return S3Store(endpoint.endpoint, endpoint.access_key, endpoint.secret_key)


def pid_of(state_dir: Path) -> int:
    record = read_process(NAME, state_dir)
    assert record is not None
    return record.pid


def test_data_survive_a_kill_and_a_restart(state_dir: Path):
    endpoint = start_object_store(state_dir)
    store = connect(endpoint)
    store.ensure_bucket("kept")
    large = os.urandom(20 * 2**20)
    for number in range(50):
        store.put("kept", f"small/{number}", f"value {number}".encode())
    store.put("kept", "large", large)
    os.kill(pid_of(state_dir), signal.SIGKILL)
    assert start_object_store(state_dir) == endpoint
    store = connect(endpoint)
    assert [store.get("kept", f"small/{number}") for number in range(50)] == [f"value {number}".encode() for number in range(50)]
    assert store.get("kept", "large") == large
    store.put("kept", "after", b"the restart")
    stop_object_store(state_dir)
    assert not is_healthy(state_dir)
    assert [path for port in kept_ports(NAME, state_dir).values() for path in Path("/tmp").glob(f"*-{port}.sock")] == []
    assert start_object_store(state_dir) == endpoint
    assert connect(endpoint).get("kept", "after") == b"the restart"


def test_a_port_taken_while_it_was_down_is_replaced_and_data_stay(state_dir: Path):
    endpoint = start_object_store(state_dir)
    connect(endpoint).ensure_bucket("kept")
    connect(endpoint).put("kept", "key", b"value")
    stop_object_store(state_dir)
    ports = [choose_port(f"{NAME}.{listener}", state_dir) for listener in ("s3.port", "master.port", "volume.port")]
    listen = f"sockets = [socket.create_server(('127.0.0.1', port)) for port in {ports}]"
    code = f"import socket, time; {listen}; print('listening', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        moved = start_object_store(state_dir)
        stranger.kill()
    assert moved.endpoint != endpoint.endpoint
    assert connect(moved).get("kept", "key") == b"value"


def all_threads_stopped(pid: int) -> bool:
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


def test_an_unhealthy_one_is_ended_and_replaced(state_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(object_store_module, "ADOPTION_TIMEOUT_SECONDS", 0.5)
    endpoint = start_object_store(state_dir)
    frozen = pid_of(state_dir)
    os.kill(frozen, signal.SIGSTOP)
    while not all_threads_stopped(frozen):
        time.sleep(0.01)
    monkeypatch.setattr(object_store_module, "PROBE_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(object_store_module, "STOP_GRACE_SECONDS", 0.5)
    assert start_object_store(state_dir) == endpoint
    assert pid_of(state_dir) != frozen
    assert not psutil.pid_exists(frozen) or psutil.Process(frozen).status() == psutil.STATUS_ZOMBIE


def test_a_healthy_one_is_adopted(object_store_endpoint: ObjectStoreEndpoint, object_store_state_dir: Path):
    before = pid_of(object_store_state_dir)
    assert start_object_store(object_store_state_dir) == object_store_endpoint
    assert pid_of(object_store_state_dir) == before
    assert is_healthy(object_store_state_dir)


def test_two_commands_at_once_start_one_server(state_dir: Path):
    code = (
        "import sys; from pathlib import Path; from services.object_store import *; print(start_object_store(Path(sys.argv[1])).endpoint)"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(state_dir)], stdout=subprocess.PIPE) for _ in range(3)]
    answers = {process.communicate()[0] for process in started}
    assert len(answers) == 1
    assert start_object_store(state_dir).endpoint == answers.pop().decode().strip()
    servers = [
        process.pid for process in psutil.process_iter(["cmdline"]) if f"-dir={state_dir}" in " ".join(process.info["cmdline"] or ())
    ]
    assert servers == [pid_of(state_dir)]


def test_stopping_what_never_ran_does_nothing(tmp_path: Path):
    stop_object_store(tmp_path)
    assert not is_healthy(tmp_path)


def test_it_listens_on_loopback_and_on_chosen_ports_only(object_store_endpoint: ObjectStoreEndpoint, object_store_state_dir: Path):
    server = psutil.Process(pid_of(object_store_state_dir))
    ports = json.loads((object_store_state_dir / "ports.json").read_text())
    chosen = {name: port for name, port in ports.items() if name.startswith(NAME)}  # not the bridge, whom it tells of new objects
    deadline = time.monotonic() + 20  # the last of them opens a moment after the store is healthy
    while True:
        connections = server.net_connections(kind="inet")
        listening = {tuple(item.laddr) for item in connections if item.status == psutil.CONN_LISTEN}
        if len(listening) >= len(chosen) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert listening == {("127.0.0.1", port) for port in chosen.values()}
    assert len(listening) == 10
    assert object_store_endpoint.endpoint == f"http://127.0.0.1:{chosen[f'{NAME}.s3.port']}"
    assert all(item.raddr[0] == "127.0.0.1" for item in connections if item.raddr)


def test_credentials_are_random_kept_and_private(object_store_endpoint: ObjectStoreEndpoint, object_store_state_dir: Path, tmp_path: Path):
    path = object_store_state_dir / NAME / "credentials.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = json.loads(path.read_text())
    assert (kept["access_key"], kept["secret_key"]) == (object_store_endpoint.access_key, object_store_endpoint.secret_key)
    assert len(set(kept.values())) == len(kept)
    another = object_store_module.object_store_endpoint(tmp_path)
    assert another.secret_key != object_store_endpoint.secret_key
    assert object_store_module.object_store_endpoint(tmp_path) == another
    command = psutil.Process(pid_of(object_store_state_dir)).cmdline()
    assert not any(secret in argument for secret in kept.values() for argument in command)


def test_telemetry_is_off(object_store_endpoint: ObjectStoreEndpoint, object_store_state_dir: Path):
    assert "-master.telemetry=false" in psutil.Process(pid_of(object_store_state_dir)).cmdline()


@pytest.fixture
def secret_object(s3_store: S3Store) -> Iterator[str]:
    s3_store.ensure_bucket("private-bucket")
    s3_store.put("private-bucket", "secret", b"a secret")
    yield "private-bucket/secret"
    s3_store.delete("private-bucket", "secret")
    s3_store._client.remove_bucket("private-bucket")


def test_no_port_gives_or_takes_an_object_without_credentials(
    secret_object: str, s3_store: S3Store, object_store_endpoint: ObjectStoreEndpoint, object_store_state_dir: Path
):
    def url(listener: str) -> str:
        return f"http://127.0.0.1:{choose_port(f'{NAME}.{listener}', object_store_state_dir)}"

    attempts = {
        "GET s3": httpx.get(f"{object_store_endpoint.endpoint}/{secret_object}"),
        "PUT s3": httpx.put(f"{object_store_endpoint.endpoint}/{secret_object}", content=b"overwritten"),
        "DELETE s3": httpx.delete(f"{object_store_endpoint.endpoint}/{secret_object}"),
        "GET filer": httpx.get(f"{url('filer.port')}/buckets/{secret_object}"),
        "LIST filer": httpx.get(f"{url('filer.port')}/buckets/", headers={"Accept": "application/json"}),
        "PUT filer": httpx.put(f"{url('filer.port')}/buckets/{secret_object}", content=b"overwritten"),
        "POST filer": httpx.post(f"{url('filer.port')}/buckets/{secret_object}", files={"file": b"overwritten"}),
        "DELETE filer": httpx.delete(f"{url('filer.port')}/buckets/{secret_object}"),
        "assign master": httpx.get(f"{url('master.port')}/dir/assign"),
        "drop collection": httpx.get(f"{url('master.port')}/col/delete", params={"collection": "private-bucket"}),
    }
    assert {name: reply.status_code for name, reply in attempts.items() if reply.status_code not in (401, 403, 404, 405)} == {}
    assert not any(b"a secret" in reply.content for reply in attempts.values())
    assert s3_store.get("private-bucket", "secret") == b"a secret"


def test_wrong_credentials_are_refused_with_advice(secret_object: str, object_store_endpoint: ObjectStoreEndpoint):
    for access_key, secret_key in ((object_store_endpoint.access_key, "wrong"), ("wrong", object_store_endpoint.secret_key)):
        intruder = S3Store(object_store_endpoint.endpoint, access_key, secret_key)
        with pytest.raises(StorageError, match="MILLSTREAM_S3_SECRET_KEY") as caught:
            intruder.get("private-bucket", "secret")
        assert not caught.value.retryable


def test_a_missing_bucket_is_not_made_by_writing(s3_store: S3Store):
    with pytest.raises(StorageError, match="no such bucket"):
        s3_store.put("never-made", "key", b"x")


def test_two_servers_live_side_by_side(object_store_endpoint: ObjectStoreEndpoint, s3_store: S3Store, state_dir: Path):
    other = connect(start_object_store(state_dir))
    other.ensure_bucket("only-here")
    other.put("only-here", "key", b"x")
    with pytest.raises(StorageError, match="no such bucket"):
        s3_store.get("only-here", "key")


def test_an_untried_platform_is_an_error_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ServiceError, match=r"riscv64; set MILLSTREAM_S3_ENDPOINT"):
        find_binary()


def test_a_changed_binary_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(object_store_module, "WEED_SHA256", {(platform.system(), platform.machine()): "0" * 64})
    with pytest.raises(ServiceError, match="sha256") as caught:
        start_object_store(tmp_path)
    assert "MILLSTREAM_S3_ENDPOINT" in str(caught.value)
    assert read_process(NAME, tmp_path) is None
