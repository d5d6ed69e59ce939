"""A predictor inside the test process, over any artifact store, and tiny models to serve with it."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
import uvicorn

from ml.predictor import load_predictor
from ml.registry import Registry
from ml.storage.artifacts import ArtifactStore
from services.predictor.app import create_app
from services.predictor.inference import InferencePool
from services.predictor.models import Models
from services.predictor.prediction_log import PredictionLog
from tests.tiny_bundles import build_tiny_bundle, tiny_version

T = TypeVar("T")
LABELS = ("negative", "positive")


def wait_until(condition: Callable[[], T], timeout_seconds: float = 20) -> T:
    """The first true value of the condition."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)
    return value


class Served:
    """A running predictor and the registry that it follows."""

    def __init__(self, store: ArtifactStore, folder: Path, *, log_share: float = 1.0, rows_per_hour: int = 10_000):
        self.store = store
        self.prediction_log = PredictionLog(store, share=log_share, rows_per_hour=rows_per_hour, flush_seconds=0.05)
        self.registry = Registry(store)
        self.folder = folder / "models"
        self.models = Models(store, self.folder, poll_seconds=0.05)
        self._bundles = folder / "bundles"
        self._num_versions = 0
        app = create_app(self.models, InferencePool(2), self.prediction_log)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> "Served":
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def add_version(self, *, seed: int, name: str = "sentiment", labels: Sequence[str] = LABELS) -> str:
        """Write a version without moving any alias."""
        folder = self._bundle_folder(seed, labels)
        self._num_versions += 1
        version = tiny_version(self.store, folder, name=name, second=self._num_versions)
        self.registry.add_version(version)
        return version.version

    def move_champion(self, version: str, name: str = "sentiment") -> None:
        self.registry.promote(name, version, "test", "because")

    def make_champion(self, version: str, name: str = "sentiment") -> None:
        """Move the alias and wait until the version is live."""
        self.move_champion(version, name)
        wait_until(lambda: (live := self.models.snapshot.live.get(name)) and live.version == version)

    def promote(self, *, seed: int, name: str = "sentiment", labels: Sequence[str] = LABELS) -> str:
        version = self.add_version(seed=seed, name=name, labels=labels)
        self.make_champion(version, name)
        return version

    def get(self, path: str) -> dict:
        return self.client.get(path).json()

    def ask(self, name: str, items: list[dict]) -> dict:
        response = self.client.post(f"/v1/{name}/predict", json={"items": items})
        assert response.status_code == 200, response.text
        return response.json()

    def offline_replies(self, *, seed: int, items: list[dict], labels: Sequence[str] = LABELS) -> list[dict]:
        return load_predictor(self._bundle_folder(seed, labels)).predict(items)

    def _bundle_folder(self, seed: int, labels: Sequence[str]) -> Path:
        folder = self._bundles / f"{seed}-{'-'.join(labels)}"
        if not folder.exists():
            build_tiny_bundle(folder, seed=seed, labels=labels)
        return folder
