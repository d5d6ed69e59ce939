"""The live card: when it is drawn, in how many versions, and that a server that is away stops nothing."""

import json
import logging
import uuid
from pathlib import Path
from types import TracebackType

import numpy as np
import pytest
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.settings import PREFECT_API_URL, temporary_settings

from ml.training.meters import metrics_file
from tasks import training_card
from tasks.training_card import MAX_STEPS_KEPT, SECONDS_BETWEEN_CARDS, KeptHistory, TrainingCard
from tasks.training_progress import TrainingProgress
from tests.ml.training.metric_lines import healthy_ranks, learning_curve, loss_lines


class Server:
    """Keeps the one artifact that it was given, and the clock that the card goes by."""

    def __init__(self):
        self.key: str | None = None
        self.versions: list[str] = []
        self.seconds = 0.0

    def create(self, markdown: str, key: str, description: str) -> uuid.UUID:
        assert self.key is None, "a second artifact"
        self.key = key
        self.versions.append(markdown)
        return uuid.UUID(int=7)

    def update_artifact(self, artifact_id: uuid.UUID, artifact: ArtifactUpdate) -> None:
        assert artifact_id == uuid.UUID(int=7)
        self.versions.append(str(artifact.data))

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    fake = Server()
    monkeypatch.setattr(training_card, "create_markdown_artifact", fake.create)
    monkeypatch.setattr(training_card, "get_client", lambda sync_client: fake)
    monkeypatch.setattr(training_card, "monotonic", lambda: fake.seconds)
    monkeypatch.setattr(training_card, "thread_time", lambda: fake.seconds)
    return fake


@pytest.fixture
def metrics_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "metrics"
    folder.mkdir()
    for rank, lines in healthy_ranks(np.random.default_rng(0)).items():
        metrics_file(folder, rank).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_card_is_one_artifact_drawn_every_ten_seconds(server: Server, metrics_dir: Path):
    card = TrainingCard("my_reviews", metrics_dir)
    for line in loss_lines(learning_curve(np.random.default_rng(0), 200)):
        server.seconds += 0.1
        card.add(line)
    assert server.key == "my-reviews-live-training"
    assert len(server.versions) == 2  # of twenty seconds, the first after five
    assert "| 1 | " in server.versions[-1]
    card.draw()
    assert "step 200 of 200" in server.versions[-1]


def test_a_slow_card_is_drawn_less_often(server: Server, metrics_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def slow(*arguments: object, **options: object) -> str:
        server.seconds += 1.0
        return "card"

    monkeypatch.setattr(training_card, "render_card", slow)
    card = TrainingCard("reviews", metrics_dir)
    for line in loss_lines(np.full(500, 0.5)):
        server.seconds += 1.0
        card.add(line)
    assert len(server.versions) == 5  # one second in a hundred


def test_the_training_progress_draws_the_card_where_there_are_meters(server: Server, metrics_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tasks.progress.create_progress_artifact", lambda percent, key, description: uuid.uuid4())
    monkeypatch.setattr("tasks.progress.update_progress_artifact", lambda artifact_id, percent: None)
    tell = TrainingProgress("reviews", metrics_dir.parent, metrics_dir.parent / "prometheus")
    for line in loss_lines(np.full(4, 0.5)):
        server.seconds += SECONDS_BETWEEN_CARDS
        tell(line)
    with tell:
        pass
    assert server.key == "reviews-live-training"
    assert "step 4 of 4" in server.versions[-1]


@pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow")
def test_a_server_that_is_away_stops_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), caplog.at_level(logging.WARNING, logger="tasks.training_card"):
        TrainingCard("reviews", tmp_path).draw()
    assert "the card of the training could not be drawn" in caplog.text


def test_a_long_history_is_thinned_out_but_keeps_its_means_and_its_start():
    kept = KeptHistory()
    losses = learning_curve(np.random.default_rng(0), 50_000)
    for line in loss_lines(losses):
        kept.add(line)
    steps = [line for line in kept.lines if line["kind"] == "step"]
    assert MAX_STEPS_KEPT / 3 < len(steps) <= MAX_STEPS_KEPT
    assert [line["loss"] for line in steps[:40]] == pytest.approx(losses[:40])
    assert steps[-1]["step"] >= 49_000
    assert np.mean([line["loss"] for line in steps[-100:]]) == pytest.approx(np.mean(losses[-5000:]), rel=0.05)
    assert kept.num_steps == 50_000


def test_steps_that_are_done_again_replace_what_was_there():
    kept = KeptHistory()
    for step in (1, 2, 3, 4):
        kept.add({"kind": "step", "step": step, "loss": 1.0})
    kept.add({"kind": "validation", "step": 4, "loss": 1.0})
    kept.add({"kind": "step", "step": 3, "loss": 0.5})
    kept.add({"kind": "validation", "step": 3, "loss": 0.4})
    assert [(line["kind"], line["step"], line["loss"]) for line in kept.lines] == [
        ("step", 1, 1.0),
        ("step", 2, 1.0),
        ("step", 3, 0.5),
        ("validation", 3, 0.4),
    ]


def test_batches_that_were_left_out_and_losses_that_are_none_are_told_of(caplog: pytest.LogCaptureFixture, server: Server, tmp_path: Path):
    tell = TrainingProgress("reviews", tmp_path, tmp_path / "prometheus")
    with caplog.at_level(logging.INFO, logger="tasks.training_progress"):
        tell({"kind": "poisoned", "step": 7, "rows": [3], "loss": None, "gradient_norm": None, "message": "step 7: the batch is left out"})
        tell({"kind": "resumed", "step": 5, "lost": 2, "message": "going on from step 5"})
        tell({"kind": "validation", "step": 8, "loss": None, "accuracy": None})
    with tell:
        pass
    assert "the batch is left out" in caplog.text
    assert "validation loss not finite" in caplog.text
    assert "loss not finite** (warning): in 1 of 8 steps" in server.versions[-1]


def test_the_figures_for_prometheus_are_there_while_the_training_runs(server: Server, metrics_dir: Path, tmp_path: Path):
    with TrainingProgress("reviews", metrics_dir.parent, tmp_path / "prometheus") as tell:
        tell({"kind": "step", "step": 3, "loss": 0.25, "learning_rate": 1e-3, "rows_per_second": 9.0})
        text = (tmp_path / "prometheus" / "training-reviews.prom").read_text()
    assert 'millstream_training_loss{training="reviews"} 0.25' in text
    assert not list((tmp_path / "prometheus").iterdir())
