"""The real stack in a folder of its own, and the command line as a user runs it."""

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny_encoders import write_tiny_bert

MILLSTREAM = Path(sys.executable).with_name("millstream")

# Small enough for seconds, with every step of the real job in it. A random encoder need not beat TF-IDF.
QUICK_SETTINGS = (
    "train.epochs=4",
    "train.learning_rate=0.003",
    "train.checkpoint_every_steps=5",
    "train.batch_size_per_rank=16",
    "evaluate.bootstrap_resamples=100",
    "evaluate.rounds=3",
    "evaluate.calls_per_round=3",
    "evaluate.memory_requests=20",
    "select.min_gain_over_baseline_points=-100",
    "select.max_drop_points=100",
    "deploy.smoke_rows=20",
)


@dataclass
class Workspace:
    """A state folder, an encoder and the environment that points at them."""

    folder: Path

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    @property
    def encoder(self) -> Path:
        return self.folder / "encoder"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "MILLSTREAM_STATE_DIR": str(self.state_dir), "OMP_NUM_THREADS": "1", "HOME": str(self.folder / "home")}

    def command(self, *arguments: str) -> list[str]:
        return [str(MILLSTREAM), *arguments]

    def run_arguments(self, data: Path, *settings: str) -> list[str]:
        options = ["run", "--data", str(data), "--text", "review", "--label", "stars", "--encoder", str(self.encoder)]
        for setting in (*QUICK_SETTINGS, *settings):
            options += ["--set", setting]
        return options

    def call(self, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=timeout, check=False)

    def outcome(self) -> dict:
        return json.loads((self.state_dir / "runs" / "latest" / "outcome.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A stack that is up for the tests of one module."""
    workspace = Workspace(tmp_path_factory.mktemp("e2e"))
    (workspace.folder / "home").mkdir()
    write_tiny_bert(workspace.encoder)
    started = workspace.call("up")
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield workspace
    finally:
        workspace.call("down")


def write_reviews(path: Path, num_rows: int, *, seed: int = 0) -> Path:
    """Reviews with stars 1 and 5: the words lean to one side, as in real ones, and some rows mislead."""
    generator = random.Random(seed)
    words = {"1": ["bad", "dull", "awful", "noise"], "5": ["good", "warm", "bright", "fine"]}
    neutral = ["film", "plot", "cast", "scene", "music", "story", "camera", "ending", "hour", "voice"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "stars"])
        for index in range(num_rows):
            stars = generator.choice(["1", "5"])
            side = stars if generator.random() < 0.95 else {"1": "5", "5": "1"}[stars]
            text = generator.choices(neutral, k=8) + generator.choices(words[side], k=3)
            generator.shuffle(text)
            writer.writerow([f"{' '.join(text)} {index:04d}", stars])
    return path
