"""A bridge inside the test process: stepped by hand under a clock of the test, or served over HTTP with its thread."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from ml.events import Event
from ml.storage.artifacts import ArtifactStore
from services.event_bridge.app import create_app
from services.event_bridge.decision import Limits
from services.event_bridge.dispatcher import Dispatcher, Pace
from services.event_bridge.event_queue import EventQueue
from services.event_bridge.metrics import BridgeMetrics
from services.event_bridge.prefect_api import PrefectApi
from tests.services.event_bridge.fake_prefect import FakePrefect
from tests.services.predictor.serving import wait_until

TOKEN = "a-token-of-the-test"
CSV = b"text,label\na fine film,positive\n"
LIMITS = Limits(debounce_seconds=30, cool_down_seconds=600, retrain_minutes_per_day=240)


class Clock:
    """Stands still until told otherwise."""

    def __init__(self, now: float):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Bridge:
    """The parts of one bridge over a queue folder."""

    def __init__(
        self,
        folder: Path,
        prefect_url: str,
        open_store: Callable[[], ArtifactStore],
        clock: Callable[[], float],
        *,
        limits: Limits = LIMITS,
        dataset_poll: float = 1e9,
    ):
        self.queue = EventQueue(folder)
        self.metrics = BridgeMetrics()
        self.prefect = PrefectApi(prefect_url, timeout_seconds=5, clock=clock)
        pace = Pace(dataset_poll=dataset_poll, first_retry=0.05, longest_retry=0.1)
        self.dispatcher = Dispatcher(self.queue, self.prefect, open_store, limits, self.metrics, pace=pace, clock=clock)
        self._clock = clock

    def close(self) -> None:
        self.prefect.close()
        self.queue.close()

    def send(self, kind: str, name: str = "sentiment", **fields: object) -> Event:
        event = Event.model_validate({"kind": kind, "name": name, **fields})
        assert self.queue.add_event(event, self._clock())
        return event

    def step(self) -> float:
        return self.dispatcher.step()

    def count(self, name: str, **labels: str) -> float:
        """The value of a counter at /metrics."""
        return metric(self.metrics.render(*self.queue.count_open()).decode(), name, **labels)


class ServedBridge:
    """A bridge that answers HTTP, its dispatcher's thread running."""

    def __init__(self, bridge: Bridge, datasets_bucket: str, clock: Callable[[], float]):
        self.bridge = bridge
        app = create_app(bridge.queue, bridge.dispatcher, bridge.metrics, token=TOKEN, datasets_bucket=datasets_bucket, clock=clock)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> "ServedBridge":
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, trust_env=False, headers={"Authorization": f"Bearer {TOKEN}"})
        self.stranger = httpx.Client(base_url=self.url, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.stranger.close()
        self._server.should_exit = True
        self._thread.join(timeout=20)

    def count(self, name: str, **labels: str) -> float:
        return metric(self.stranger.get("/metrics").text, name, **labels)


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of the samples of a metric that have these labels."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = [sample for sample in samples if sample.name in (f"millstream_bridge_{name}_total", f"millstream_bridge_{name}")]
    return sum(sample.value for sample in found if labels.items() <= sample.labels.items())


def state_of(bridge: Bridge, event: Event) -> tuple[str, str | None]:
    """Of an event, and of the request that it led to."""
    found = bridge.queue.find_event(event.id)
    assert found is not None
    return found["state"], found["request_state"]


def finish(prefect: FakePrefect, bridge: Bridge, clock: Clock, state: str = "COMPLETED", **details: Any) -> None:
    """End the last run, and let the bridge see it."""
    bridge.step()
    clock.advance(1)
    bridge.step()
    prefect.set_state(prefect.runs[-1], state, **details)
    clock.advance(5)
    bridge.step()
