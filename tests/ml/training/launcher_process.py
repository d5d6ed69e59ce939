"""Runs a launcher in a process of its own, to be killed: `python -m tests.ml.training.launcher_process <spec.json>`."""

import sys
from pathlib import Path

from ml.training.launcher import run_training
from ml.training.spec import TrainSpec

if __name__ == "__main__":
    run_training(TrainSpec.from_json(Path(sys.argv[1]).read_bytes()))
