"""What a text classifier's job reads: an encoder without dropout, and texts of a few tokens."""

import json
from pathlib import Path

import numpy as np

from ml.storage.artifacts import digest_file
from ml.text_classification.training_job import ARRAYS_FILE, PREPARED_FILE, write_token_arrays
from ml.training.job import Split
from tests.tiny_encoders import VOCABULARY


def write_prepared_texts(work_dir: Path, encoder_dir: Path) -> dict:
    """Write `prepared/` into a work folder; the arguments of the job."""
    random = np.random.default_rng(5)
    prepared = work_dir / "prepared"
    prepared.mkdir(parents=True, exist_ok=True)
    config = json.loads((encoder_dir / "config.json").read_text())
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (encoder_dir / "config.json").write_text(json.dumps(config | without_dropout))
    rows: dict[Split, tuple[list[list[int]], np.ndarray]] = {
        split: ([random.integers(5, len(VOCABULARY), random.integers(2, 15)).tolist() for _ in range(size)], random.integers(0, 2, size))
        for split, size in (("train", 60), ("validation", 13))
    }
    write_token_arrays(prepared / ARRAYS_FILE, rows)  # type: ignore[arg-type]
    (prepared / PREPARED_FILE).write_text(json.dumps({"encoder_dir": str(encoder_dir)}))
    return {
        "arrays_sha256": digest_file(prepared / ARRAYS_FILE),
        "model": {"encoder": f"config:{encoder_dir}", "dropout": 0.0},
        "num_labels": 2,
        "vocab_size": len(VOCABULARY),
        "pad_id": 0,
        "class_weights": [1.0, 2.5],
    }
