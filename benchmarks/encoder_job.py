"""The encoder as a job of `ml.training`, whose ranks stop at a gate (`benchmarks.interleaved`) before each block of steps."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.encoder import build_encoder, random_texts
from benchmarks.interleaved import Gate
from ml.training.job import RowLosses, Split

# Validation is not what is measured; there must be some.
NUM_VALIDATION_ROWS = 32


class EncoderJob:
    """
    Args:
        num_rows: for training.
        batches: JSON file of the rows of each step, as `ml.training.batches.Sampler` deals them. Only a pass over the next one's
            counts as a step: what else is run, to measure something, goes through no gate.
        gate: folder of the pipes.
        num_threads: that each rank computes with; as the launcher says when None.
    """

    find_unused_parameters = False

    def __init__(
        self,
        work_dir: Path,
        *,
        num_rows: int,
        seed: int,
        batches: str,
        gate: str,
        block_steps: int,
        sizes: dict[str, Any],
        num_threads: int | None = None,
    ):
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._texts = {"train": random_texts(num_rows, seed), "validation": random_texts(NUM_VALIDATION_ROWS, seed + 1)}
        self.lengths: dict[Split, np.ndarray] = {"train": self._texts["train"].lengths, "validation": self._texts["validation"].lengths}
        self.train_strata = self._texts["train"].targets
        self._sizes = sizes
        self._batches = [set(rows) for rows in json.loads(Path(batches).read_bytes())]
        self._step = 0
        self._gate = Gate(Path(gate), int(os.environ.get("RANK", "0")), block_steps)

    def build_model(self, seed: int) -> nn.Module:
        return build_encoder(seed, **self._sizes)

    def batch(self, split: Split, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {**self._texts[split].batch(rows), "rows": torch.from_numpy(np.asarray(rows))}

    def row_weights(self, split: Split, rows: np.ndarray) -> np.ndarray:
        return np.ones(len(rows))

    def row_losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> RowLosses:
        if model.training and self._step < len(self._batches) and self._batches[self._step].issuperset(batch["rows"].tolist()):
            self._gate.pass_through()
            self._step += 1
        logits = model(batch["input_ids"], batch["is_padding"])
        return RowLosses(nn.functional.cross_entropy(logits, batch["targets"], reduction="none"), logits.argmax(1), batch["targets"])
