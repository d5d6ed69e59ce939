import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from pydantic import SecretStr, ValidationError

from ml.errors import BadInputError, ConfigError, MillstreamError
from ml.event_client import BridgeUnavailableError, send_event
from ml.events import Cause, Event, resource_id
from ml.settings import Settings


class Answering:
    """A bridge that gives one answer, and keeps what it was sent."""

    def __init__(self, status: int, body: bytes = b'{"detail": "said why"}'):
        self.received: list[tuple[str, str | None, bytes]] = []
        answering = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                answering.received.append((self.path, self.headers["authorization"], content))
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Answering":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


EVENT = Event(id="drift-1", kind="drift.detected", name="sentiment", summary="texts are longer")


def settings(url: str | None) -> Settings:
    return Settings(bridge_url=url, bridge_token=SecretStr("the-token"))


@pytest.mark.parametrize("status", [202, 409])
def test_an_event_that_the_bridge_has_is_sent(status):
    with Answering(status) as bridge:
        send_event(EVENT, settings(f"{bridge.url}/"))
    ((path, authorization, content),) = bridge.received
    assert (path, authorization) == ("/v1/events", "Bearer the-token")
    assert Event.model_validate_json(content) == EVENT


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with Answering(202) as bridge:
        send_event(EVENT, settings(bridge.url))
    assert len(bridge.received) == 1


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (500, BridgeUnavailableError, True),
        (503, BridgeUnavailableError, True),
        (429, BridgeUnavailableError, True),
        (401, ConfigError, False),
        (404, BadInputError, False),
        (413, BadInputError, False),
        (422, BadInputError, False),
    ],
)
def test_what_the_bridge_refuses_says_whether_to_try_again(status, kind, retryable):
    with Answering(status) as bridge, pytest.raises(kind) as refused:
        send_event(EVENT, settings(bridge.url))
    assert refused.value.retryable is retryable
    assert f"drift.detected of sentiment was answered with {status}: said why" in str(refused.value)
    assert "the-token" not in str(refused.value)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}"])
def test_an_answer_of_another_kind_is_quoted(body):
    with Answering(404, body) as bridge, pytest.raises(BadInputError, match=f"404: .*{body.decode()[1:-1]}"):
        send_event(EVENT, settings(bridge.url))


def test_a_bridge_that_does_not_answer_is_asked_again_later():
    with Answering(202) as gone:
        pass
    with pytest.raises(BridgeUnavailableError, match="no answer") as failed:
        send_event(EVENT, settings(gone.url))
    assert isinstance(failed.value, MillstreamError) and failed.value.retryable


def test_without_a_bridge_it_says_how_to_get_one():
    with pytest.raises(ConfigError, match="make up"):
        send_event(EVENT, settings(None))


def test_every_event_has_an_id_of_its_own_and_a_time_zone():
    events = [Event(kind="retrain.asked", name="sentiment") for _ in range(100)]
    assert len({event.id for event in events}) == 100
    assert all(event.occurred.utcoffset() is not None for event in events)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "Sentiment"},
        {"name": "../x"},
        {"kind": "retrain.requested"},
        {"id": ""},
        {"id": "a b"},
        {"occurred": "2026-01-01T00:00:00"},
        {"summary": "x" * 501},
        {"objects": ["s3://b/k"] * 1001},
        {"colour": "red"},
    ],
)
def test_what_is_no_event_is_refused(fields):
    with pytest.raises(ValidationError):
        Event.model_validate({"kind": "retrain.asked", "name": "sentiment", **fields})


def test_events_and_causes_survive_json():
    assert Event.model_validate_json(EVENT.model_dump_json()) == EVENT
    cause = Cause(kind="data.arrived", summary="new object", request_id="r", event_ids=("a", "b"), data_digest="d")
    assert Cause.model_validate_json(cause.model_dump_json()) == cause


def test_each_model_is_a_resource_of_its_own():
    assert resource_id("sentiment") == "millstream.model.sentiment"
