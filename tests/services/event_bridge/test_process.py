"""The bridge as a process of its own: started by its launcher, told by the real object store, killed at any moment."""

import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from http.server import HTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from ml.errors import ServiceError
from ml.event_client import send_event
from ml.events import Event
from ml.settings import Settings, load_settings
from ml.storage.s3 import S3Store
from services.event_bridge.event_queue import EventQueue
from services.event_bridge.launcher import (
    NAME,
    bridge_token,
    event_bridge_address,
    event_log_path,
    is_healthy,
    start_event_bridge,
    stop_event_bridge,
)
from services.object_store import start_object_store, stop_object_store
from services.processes import log_path, read_process
from tests.services.event_bridge.fake_prefect import FakePrefect
from tests.services.event_bridge.serving import CSV, metric
from tests.services.predictor.serving import wait_until


@pytest.fixture
def prefect():
    fake = FakePrefect(time.time)
    fake.deploy("sentiment")
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def environment(object_store_endpoint, bucket_prefix, prefect, tmp_path):
    return {
        "MILLSTREAM_STATE_DIR": str(tmp_path),
        "MILLSTREAM_S3_ENDPOINT": object_store_endpoint.endpoint,
        "MILLSTREAM_S3_ACCESS_KEY": object_store_endpoint.access_key,
        "MILLSTREAM_S3_SECRET_KEY": object_store_endpoint.secret_key,
        "MILLSTREAM_BUCKET_PREFIX": bucket_prefix,
        "PREFECT_API_URL": prefect.api_url,
    }


@pytest.fixture
def started(environment, tmp_path, s3_artifact_store):
    """URL of a running bridge; its buckets are removed at the end."""
    yield start_event_bridge(tmp_path, environment)
    stop_event_bridge(tmp_path)


def kill(state_dir: Path) -> None:
    record = read_process(NAME, state_dir)
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: read_process(NAME, state_dir) is None)


def settings(state_dir: Path) -> Settings:
    return Settings.model_validate({"bridge_url": event_bridge_address(state_dir), "bridge_token": bridge_token(state_dir)})


def test_it_starts_on_loopback_is_adopted_and_goes_on_when_killed(started, environment, tmp_path, prefect):
    first = read_process(NAME, tmp_path)
    assert first is not None
    listeners = [item.laddr.ip for item in psutil.Process(first.pid).net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    assert listeners == ["127.0.0.1"]
    assert start_event_bridge(tmp_path, environment) == started
    assert read_process(NAME, tmp_path) == first
    event = Event(kind="retrain.asked", name="sentiment")
    send_event(event, settings(tmp_path))
    send_event(event, settings(tmp_path))  # a replay is no error to its sender
    wait_until(lambda: prefect.events)

    kill(tmp_path)
    assert not is_healthy(tmp_path)
    assert start_event_bridge(tmp_path, environment) == started
    headers = {"Authorization": f"Bearer {bridge_token(tmp_path)}"}
    (kept,) = httpx.get(f"{started}/v1/events", headers=headers, trust_env=False).json()["events"]
    assert (kept["id"], kept["num_received"]) == (event.id, 2)
    assert start_event_bridge(tmp_path, environment | {"MILLSTREAM_COOL_DOWN_SECONDS": "7"}) == started  # replaced: other settings
    stop_event_bridge(tmp_path)
    assert '"event": "stopped"' in event_log_path(tmp_path).read_text()
    stop_event_bridge(tmp_path)  # stopping what does not run is no error


def test_the_token_is_made_once_kept_from_others_and_never_shown(started, tmp_path):
    token = bridge_token(tmp_path)
    assert token == bridge_token(tmp_path) and token.startswith("whsec_") and len(token) > 40
    assert token != bridge_token(tmp_path / "another")
    path = tmp_path / NAME / "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    httpx.get(f"{started}/v1/events", headers={"Authorization": f"Bearer {token}x"}, trust_env=False)
    stop_event_bridge(tmp_path)
    assert token not in event_log_path(tmp_path).read_text() + log_path(NAME, tmp_path).read_text()
    assert token not in " ".join(record.read_text() for record in (tmp_path / "processes").glob("*"))


def test_a_port_of_ones_own_is_used_and_its_holder_named(environment, tmp_path, monkeypatch, s3_artifact_store):
    holder = HTTPServer(("127.0.0.1", 0), None)  # type: ignore[arg-type]
    monkeypatch.setenv("MILLSTREAM_BRIDGE_PORT", str(holder.server_port))
    load_settings.cache_clear()
    try:
        with pytest.raises(ServiceError, match=rf"127.0.0.1:{holder.server_port}, which cannot be opened: .*{os.getpid()}"):
            start_event_bridge(tmp_path, environment)
        holder.server_close()
        assert start_event_bridge(tmp_path, environment) == f"http://127.0.0.1:{holder.server_port}"
    finally:
        stop_event_bridge(tmp_path)
        monkeypatch.undo()
        load_settings.cache_clear()


@pytest.mark.parametrize("missing", ["PREFECT_API_URL", "MILLSTREAM_S3_ENDPOINT"])
def test_what_is_not_set_is_named(environment, tmp_path, missing, monkeypatch):
    monkeypatch.delenv(missing, raising=False)
    del environment[missing]
    with pytest.raises(ServiceError, match=f"{missing} is not set"):
        start_event_bridge(tmp_path, environment)
    stop_event_bridge(tmp_path)


def test_events_are_taken_while_neither_prefect_nor_the_object_store_is_there(environment, tmp_path, prefect):
    prefect.stop()
    start_event_bridge(tmp_path, environment | {"MILLSTREAM_S3_ENDPOINT": "http://127.0.0.1:9"})
    try:
        send_event(Event(kind="retrain.asked", name="sentiment"), settings(tmp_path))
        assert is_healthy(tmp_path)
    finally:
        stop_event_bridge(tmp_path)


def test_it_imports_neither_training_nor_orchestration_libraries():
    code = """
        import sys
        import services.event_bridge.__main__
        heavy = {"torch", "transformers", "prefect", "pandas", "sklearn", "matplotlib", "great_expectations", "scipy", "pyarrow", "onnx"}
        print(sorted(heavy & set(sys.modules)))
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_whatever_was_acknowledged_is_there_exactly_once_after_a_kill_at_any_moment(started, environment, tmp_path):
    """Ten kills at random moments of a stream of events; each sender repeats what was not acknowledged."""
    seed = int(os.environ.get("MILLSTREAM_TEST_SEED", time.time_ns() % 2**31))
    print(f"seed {seed}")  # shown when the test fails
    moments = random.Random(seed)
    headers = {"Authorization": f"Bearer {bridge_token(tmp_path)}"}
    acknowledged: set[str] = set()
    sent: set[str] = set()
    for round_number in range(10):
        stop_sending = threading.Event()

        def stream(sender: int, round_number: int = round_number, stop_sending: threading.Event = stop_sending) -> None:
            number = 0
            with httpx.Client(headers=headers, trust_env=False, timeout=10) as client:
                while not stop_sending.is_set():
                    event_id = f"{round_number}-{sender}-{number}"
                    sent.add(event_id)
                    body = {"id": event_id, "kind": "data.arrived", "name": "sentiment"}
                    try:
                        response = client.post(f"{started}/v1/events", json=body)
                    except httpx.HTTPError:
                        return
                    assert response.status_code in (202, 409)
                    acknowledged.add(event_id)
                    number += 1

        senders = [threading.Thread(target=stream, args=(sender,)) for sender in range(3)]
        before = len(acknowledged)
        for thread in senders:
            thread.start()
        wait_until(lambda before=before: len(acknowledged) > before)
        time.sleep(moments.uniform(0, 0.15))
        kill(tmp_path)
        stop_sending.set()
        for thread in senders:
            thread.join(20)
        assert start_event_bridge(tmp_path, environment) == started
        # What was not acknowledged may be there or not; sent again it counts once.
        for event_id in sorted(sent - acknowledged):
            body = {"id": event_id, "kind": "data.arrived", "name": "sentiment"}
            response = httpx.post(f"{started}/v1/events", json=body, headers=headers, trust_env=False)
            assert response.status_code in (202, 409)
            acknowledged.add(event_id)
    stop_event_bridge(tmp_path)
    queue = EventQueue(tmp_path / NAME)
    kept = [values["id"] for values in queue.recent_events(None, 10**6)]
    queue.close()
    assert len(kept) == len(set(kept))
    assert set(kept) == acknowledged == sent
    print(f"{len(kept)} events over 10 kills")


@pytest.fixture
def store_that_tells(environment, tmp_path, monkeypatch, bucket_prefix):
    """An embedded object store of its own whose webhook posts to the bridge of this folder."""
    monkeypatch.setenv("MILLSTREAM_BUCKET_PREFIX", bucket_prefix)
    load_settings.cache_clear()
    endpoint = start_object_store(tmp_path)
    environment |= {
        "MILLSTREAM_S3_ENDPOINT": endpoint.endpoint,
        "MILLSTREAM_S3_ACCESS_KEY": endpoint.access_key,
        "MILLSTREAM_S3_SECRET_KEY": endpoint.secret_key,
        "MILLSTREAM_DATASET_POLL_SECONDS": "3600",  # so that only the webhook can tell
    }
    start_event_bridge(tmp_path, environment)
    yield S3Store(endpoint.endpoint, endpoint.access_key, endpoint.secret_key)
    stop_event_bridge(tmp_path)
    stop_object_store(tmp_path)
    monkeypatch.undo()
    load_settings.cache_clear()


def test_an_object_that_lands_in_the_real_store_becomes_a_run(store_that_tells, tmp_path, prefect, bucket_prefix):
    url, bucket = event_bridge_address(tmp_path), f"{bucket_prefix}datasets"

    def count(name: str, **labels: str) -> float:
        return metric(httpx.get(f"{url}/metrics", trust_env=False).text, name, **labels)

    store_that_tells.ensure_bucket(bucket)
    store_that_tells.ensure_bucket(f"{bucket_prefix}runs")
    store_that_tells.put(f"{bucket_prefix}runs", "sentiment/other.csv", CSV)
    store_that_tells.put(bucket, "sentiment/notes.txt", b"no data")
    large = tmp_path / "large.csv"
    large.write_bytes(CSV * (20 * 2**20 // len(CSV)))
    store_that_tells.put(bucket, "sentiment/large.csv", large)  # in parts
    wait_until(lambda: prefect.events)
    request = prefect.events[0]["payload"]["request"]
    assert request["data"] == f"s3://{bucket}/sentiment/"
    assert request["cause"]["summary"] == f"new object s3://{bucket}/sentiment/large.csv"
    store_that_tells.put(bucket, "sentiment/week_1/b.csv", CSV)
    wait_until(lambda: count("events_accepted", kind="data.arrived") == 2)
    assert count("store_events_ignored", reason="another bucket") == 0  # the store sends only what lies in the datasets bucket
    assert count("store_events_ignored", reason="not readable") == 1
    assert count("events_refused") == 0

    stop_event_bridge(tmp_path)
    queue = EventQueue(tmp_path / NAME)
    # The webhook's etags are those of the listing, else each object would count twice.
    assert queue.seen_objects("sentiment") == {
        info.key: info.etag for info in store_that_tells.list(bucket, "sentiment/") if info.key.endswith(".csv")
    }
    queue.close()
