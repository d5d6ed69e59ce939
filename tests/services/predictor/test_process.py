"""The predictor as a process of its own, over the real embedded object store."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import httpx
import psutil
import pytest

from ml.errors import ServiceError
from ml.predictor import load_predictor
from ml.registry import Registry
from services.predictor.launcher import NAME, event_log_path, start_predictor, stop_predictor
from services.processes import read_process
from tests.services.predictor.serving import wait_until
from tests.tiny_bundles import build_tiny_bundle, tiny_version

ITEMS = [{"text": "a great film"}, {"text": "awful and boring"}]


@pytest.fixture
def environment(object_store_endpoint, bucket_prefix, tmp_path):
    return {
        "MILLSTREAM_STATE_DIR": str(tmp_path),
        "MILLSTREAM_S3_ENDPOINT": object_store_endpoint.endpoint,
        "MILLSTREAM_S3_ACCESS_KEY": object_store_endpoint.access_key,
        "MILLSTREAM_S3_SECRET_KEY": object_store_endpoint.secret_key,
        "MILLSTREAM_BUCKET_PREFIX": bucket_prefix,
    }


@pytest.fixture
def predictor(s3_artifact_store, environment, tmp_path):
    """URL of a predictor that serves one version, and the replies that it should give."""
    build_tiny_bundle(tmp_path / "bundle", seed=1)
    registry, version = Registry(s3_artifact_store), tiny_version(s3_artifact_store, tmp_path / "bundle")
    registry.add_version(version)
    registry.promote("sentiment", version.version, "test", "because")
    url = start_predictor(tmp_path, environment)
    yield url, load_predictor(tmp_path / "bundle").predict(ITEMS)
    stop_predictor(tmp_path)


def wait_until_ready(url: str) -> None:
    wait_until(lambda: httpx.get(f"{url}/readyz", trust_env=False).status_code == 200)


def ask(url: str) -> list[dict]:
    response = httpx.post(f"{url}/v1/sentiment/predict", json={"items": ITEMS}, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()["replies"]


def test_a_killed_predictor_serves_again_and_one_that_is_well_is_adopted(predictor, environment, tmp_path):
    url, replies = predictor
    wait_until_ready(url)
    assert ask(url) == replies
    first = read_process(NAME, tmp_path)
    assert first is not None
    listeners = [item.laddr.ip for item in psutil.Process(first.pid).net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    assert listeners == ["127.0.0.1"]
    assert start_predictor(tmp_path, environment) == url
    assert read_process(NAME, tmp_path) == first

    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: read_process(NAME, tmp_path) is None)
    time.sleep(0.5)  # its socket is closed a moment after it shows as dead
    assert start_predictor(tmp_path, environment) == url
    wait_until_ready(url)
    assert ask(url) == replies
    assert '"event": "live"' in event_log_path(tmp_path).read_text()


def test_requests_under_way_are_answered_when_it_is_told_to_end(predictor, tmp_path):
    """Under way is what the predictor has begun to read: it says "100 Continue" when it does."""
    url, _ = predictor
    wait_until_ready(url)
    body = json.dumps({"items": ITEMS}).encode()
    host, port = url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/sentiment/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    ).encode()
    connections = [socket.create_connection((host, int(port)), timeout=30) for _ in range(3)]
    for connection in connections:
        connection.sendall(head)
        assert connection.recv(1024).startswith(b"HTTP/1.1 100")
    stopping = threading.Thread(target=stop_predictor, args=(tmp_path,))
    stopping.start()
    wait_until(lambda: _refuses(url))
    for connection in connections:
        connection.sendall(body)
        with connection.makefile("rb") as reply:
            assert reply.readline().startswith(b"HTTP/1.1 200")
            assert b'"label"' in reply.read()
        connection.close()
    stopping.join(30)
    assert not stopping.is_alive()
    assert '"event": "stopped"' in event_log_path(tmp_path).read_text()


def _refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/healthz", trust_env=False, timeout=5)
    except httpx.TransportError:
        return True
    return False


def test_what_was_answered_last_is_logged_when_it_is_told_to_end(predictor, s3_artifact_store, tmp_path):
    url, replies = predictor
    wait_until_ready(url)
    assert ask(url) == replies
    stop_predictor(tmp_path)
    store = s3_artifact_store
    (info,) = store.objects.list(store.monitoring_bucket)
    logged = [json.loads(line) for line in store.objects.get(store.monitoring_bucket, info.key).splitlines()]
    assert [(row["request"], row["reply"]) for row in logged] == list(zip(ITEMS, replies, strict=True))


def test_a_predictor_without_an_object_store_says_what_to_set(tmp_path):
    with pytest.raises(ServiceError, match="MILLSTREAM_S3_ENDPOINT is not set"):
        start_predictor(tmp_path, {"MILLSTREAM_STATE_DIR": str(tmp_path)})


@pytest.mark.slow  # waits out the ten seconds that a process gets to end by itself
def test_a_stuck_predictor_is_replaced(predictor, environment, tmp_path, monkeypatch):
    monkeypatch.setattr("services.health.PATIENCE_SECONDS", 1)
    url, replies = predictor
    stuck = read_process(NAME, tmp_path)
    assert stuck is not None
    os.kill(stuck.pid, signal.SIGSTOP)
    assert start_predictor(tmp_path, environment) == url
    now = read_process(NAME, tmp_path)
    assert now is not None and now.pid != stuck.pid
    assert not psutil.pid_exists(stuck.pid) or psutil.Process(stuck.pid).status() == psutil.STATUS_ZOMBIE
    wait_until_ready(url)
    assert ask(url) == replies


def test_serving_imports_neither_training_nor_orchestration_libraries(tmp_path):
    build_tiny_bundle(tmp_path, seed=1)
    code = f"""
        import sys
        from pathlib import Path
        import services.predictor.__main__
        from ml.predictor import load_predictor
        load_predictor(Path({str(tmp_path)!r})).predict([{{"text": "a great film"}}])
        heavy = {{"torch", "transformers", "prefect", "pandas", "sklearn", "matplotlib", "great_expectations", "scipy", "pyarrow", "onnx"}}
        print(sorted(heavy & set(sys.modules)))
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
