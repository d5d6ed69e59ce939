"""Progress bars: what is drawn, and that a server that is away stops nothing. How they look: tests/e2e/test_prefect_ui.py."""

import logging
import uuid
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks import progress
from tasks.progress import ProgressBar
from tasks.training_progress import TrainingProgress


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every position that a bar took, instead of on a server."""
    positions: list[float] = []

    def create(percent: float, key: str, description: str) -> uuid.UUID:
        assert positions == [], f"a second bar {key}: {description}"
        positions.append(percent)
        return uuid.uuid4()

    monkeypatch.setattr(progress, "create_progress_artifact", create)
    monkeypatch.setattr(progress, "update_progress_artifact", lambda artifact_id, percent: positions.append(percent))
    return positions


def test_a_bar_is_drawn_once_and_moved_then(drawn: list[float]):
    bar = ProgressBar("compression", "variants made")
    for done in (1, 2, 3):
        bar.show(done, 3)
    bar.show(4, 3)
    bar.show(0, 0)
    assert drawn == [pytest.approx(100 / 3), pytest.approx(200 / 3), 100, 100, 100]


@pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow")
def test_a_server_that_is_away_stops_nothing(caplog: pytest.LogCaptureFixture):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), caplog.at_level(logging.WARNING, logger="tasks.progress"):
        ProgressBar("training", "steps").show(1, 2)
    assert "the progress bar training could not be drawn" in caplog.text


def test_the_training_bar_follows_the_history_to_its_end(drawn: list[float], tmp_path: Path):
    tell = TrainingProgress("reviews", tmp_path, tmp_path)
    tell({"kind": "validation", "step": 1, "loss": 0.7})
    assert drawn == []  # of how many steps is not known yet
    tell({"kind": "event", "message": "4 epochs", "num_steps": 40})
    for step in range(1, 41):
        tell({"kind": "step", "step": step, "loss": 0.5, "rows_per_second": 10.0})
    tell({"kind": "validation", "step": 40, "loss": 0.4, "accuracy": 0.9})
    assert drawn[-1] == 100
    assert len(drawn) == 2  # one for the first step, none for the ten seconds after it
