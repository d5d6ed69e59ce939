"""What the S3 client makes of a network and a server that fail: scripted replies from a real HTTP server."""

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ml.errors import ConfigError, ObjectNotFoundError, StorageError, StorageUnavailableError, WriteConflictError
from ml.storage import s3
from ml.storage.s3 import S3Store

Handler = http.server.BaseHTTPRequestHandler
Reply = Callable[[Handler], None]


def xml_error(status: int, code: str) -> Reply:
    return reply(status, f"<Error><Code>{code}</Code><Message>as scripted</Message></Error>".encode(), "application/xml")


def reply(status: int, body: bytes = b"", content_type: str = "text/plain", *, claimed_bytes: int | None = None) -> Reply:
    def send(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(body) if claimed_bytes is None else claimed_bytes))
        handler.send_header("ETag", '"etag"')
        handler.send_header("Last-Modified", "Wed, 04 Mar 2026 05:06:07 GMT")
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)
        handler.close_connection = True

    return send


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def stay_silent(handler: Handler) -> None:
    time.sleep(1.5)
    handler.close_connection = True


@dataclass
class ScriptedServer:
    """Gives its replies in turn, the last one for ever; counts what it was asked."""

    endpoint: str = ""
    replies: list[Reply] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    script = ScriptedServer()

    class Scripted(Handler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            script.requests.append(self.command)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            (script.replies.pop(0) if len(script.replies) > 1 else script.replies[0])(self)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

        def log_message(self, format: str, *args: object) -> None: ...

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    script.endpoint = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield script
    listener.shutdown()
    listener.server_close()
    thread.join()


@pytest.fixture
def store(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setattr(s3, "FIRST_BACKOFF_SECONDS", 0.01)
    return S3Store(server.endpoint, "access", "very-secret", timeout_seconds=0.4, num_attempts=3)


PASSING_FAULTS = {
    "slow down": xml_error(503, "SlowDown"),
    "internal error": xml_error(500, "InternalError"),
    "a proxy's page": reply(502, b"<html>Bad gateway</html>", "text/html"),
    "too many requests": reply(429, b"wait", "text/plain"),
    "hang up": hang_up,
    "silence": stay_silent,
    "half a body": reply(200, b"half", claimed_bytes=8),
}


@pytest.mark.parametrize("fault", PASSING_FAULTS)
def test_a_passing_fault_is_not_noticed(server: ScriptedServer, store: S3Store, fault: str, tmp_path: Path):
    server.replies = [PASSING_FAULTS[fault], reply(200, b"the object")]
    assert store.get("bucket", "key") == b"the object"
    server.replies = [PASSING_FAULTS[fault], reply(200, b"the object")]
    store.download("bucket", "key", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"the object"
    assert server.requests == ["GET"] * 4


@pytest.mark.parametrize("fault", PASSING_FAULTS)
def test_a_lasting_fault_is_unavailable_in_finite_time(server: ScriptedServer, store: S3Store, fault: str, tmp_path: Path):
    server.replies = [PASSING_FAULTS[fault]]
    started = time.monotonic()
    with pytest.raises(StorageUnavailableError, match=r"could not download bucket/key at http://127\.0\.0\.1") as caught:
        store.download("bucket", "key", tmp_path / "file")
    assert caught.value.retryable
    assert time.monotonic() - started < 5
    assert server.requests == ["GET"] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_write_is_repeated_whole(server: ScriptedServer, store: S3Store):
    server.replies = [xml_error(503, "SlowDown"), hang_up, reply(200)]
    assert store.put("bucket", "key", b"bytes").etag == "etag"
    assert server.requests == ["PUT"] * 3


@pytest.mark.parametrize("fault", ["slow down", "hang up", "silence"])
def test_a_conditional_write_in_doubt_is_not_repeated(server: ScriptedServer, store: S3Store, fault: str):
    server.replies = [PASSING_FAULTS[fault]]
    with pytest.raises(StorageUnavailableError):
        store.put("bucket", "key", b"bytes", if_none_match=True)
    assert server.requests == ["PUT"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (xml_error(412, "PreconditionFailed"), WriteConflictError),
        (reply(412), WriteConflictError),
        (xml_error(409, "ConditionalRequestConflict"), WriteConflictError),
        (xml_error(404, "NoSuchKey"), WriteConflictError),
        (xml_error(501, "NotImplemented"), StorageError),
        (reply(400, b"no"), StorageError),
    ],
)
def test_refusals_of_a_conditional_write(server: ScriptedServer, store: S3Store, answer: Reply, error: type[StorageError]):
    server.replies = [answer]
    with pytest.raises(StorageError) as caught:
        store.put("bucket", "key", b"bytes", if_match="etag")
    assert type(caught.value) is error
    assert server.requests == ["PUT"]


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (xml_error(403, "SignatureDoesNotMatch"), "MILLSTREAM_S3_SECRET_KEY"),
        (xml_error(403, "InvalidAccessKeyId"), "MILLSTREAM_S3_ACCESS_KEY"),
        (xml_error(403, "RequestTimeTooSkewed"), "clock"),
        (xml_error(404, "NoSuchBucket"), "MILLSTREAM_BUCKET_PREFIX"),
        (reply(200, b"<html>", "text/html"), "MILLSTREAM_S3_ENDPOINT"),
        (reply(404, b"<html>no S3 here</html>", "text/html"), "MILLSTREAM_S3_ENDPOINT"),
    ],
)
def test_what_would_repeat_is_said_once_with_advice(server: ScriptedServer, store: S3Store, answer: Reply, advice: str):
    server.replies = [answer]
    with pytest.raises(StorageError, match=advice) as caught:
        list(store.list("bucket", "prefix/"))
    assert not caught.value.retryable
    assert not isinstance(caught.value, ObjectNotFoundError)
    assert server.requests == ["GET"]
    assert "very-secret" not in str(caught.value)


def test_no_access_is_not_taken_for_no_object(server: ScriptedServer, store: S3Store):
    server.replies = [reply(403)]
    with pytest.raises(StorageError, match="access refused"):
        store.stat("bucket", "key")


def test_nobody_listening_is_unavailable_and_names_the_endpoint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3, "FIRST_BACKOFF_SECONDS", 0.01)
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        for call in (
            lambda store: store.get("bucket", "key"),
            lambda store: store.ensure_bucket("bucket"),
            lambda store: store.put("bucket", "key", b"", if_none_match=True),
        ):
            with pytest.raises(StorageUnavailableError, match=f"{endpoint}.*MILLSTREAM_S3_ENDPOINT"):
                call(S3Store(endpoint, "access", "secret", num_attempts=2))


def test_plain_http_behind_an_https_endpoint_is_a_tls_error(server: ScriptedServer):
    server.replies = [reply(200)]
    with pytest.raises(StorageError, match="MILLSTREAM_S3_CA_FILE") as caught:
        S3Store(server.endpoint.replace("http:", "https:"), "access", "secret").get("bucket", "key")
    assert not caught.value.retryable


@pytest.mark.parametrize("endpoint", ["", "http://", "ftp://host:1", "http://host:1/path", "host:not-a-port", "s3://bucket"])
def test_an_odd_endpoint_is_refused(endpoint: str):
    with pytest.raises(ConfigError, match="MILLSTREAM_S3_ENDPOINT"):
        S3Store(endpoint, "access", "secret")


def test_an_invalid_bucket_name_is_an_error(server: ScriptedServer, store: S3Store):
    with pytest.raises(StorageError, match="invalid bucket name x"):
        store.ensure_bucket("x")
    assert server.requests == []
