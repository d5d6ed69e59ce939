"""What every training rank runs for a text classifier: texts come tokenized, once, as flat arrays.

Imported in the ranks only; torch and transformers are loaded with it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from ml.errors import TrainingError
from ml.storage.artifacts import digest_file
from ml.text_classification.encoders import read_config
from ml.text_classification.model import build_classifier
from ml.text_classification.parallel_plan import parallel_plan
from ml.text_classification.settings import TextClassifierConfig
from ml.training.job import ParallelPlan, RowLosses, Split

ARRAYS_FILE = "tokens.safetensors"
PREPARED_FILE = "prepared.json"


def write_token_arrays(path: Path, rows: dict[Split, tuple[Sequence[Sequence[int]], np.ndarray]]) -> None:
    """Write token ids and targets: per split `ids` (all rows, one after the other), `offsets` (N + 1,) and `targets` (N,).

    Args:
        rows: split -> (token ids of each row, target of each row).
    """
    arrays: dict[str, np.ndarray] = {}
    for split, (ids, targets) in rows.items():
        arrays[f"{split}.ids"] = np.fromiter((token for row in ids for token in row), dtype=np.int32)
        arrays[f"{split}.offsets"] = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
        arrays[f"{split}.targets"] = np.asarray(targets, dtype=np.int64)
    save_file(arrays, path)


class TextClassificationJob:
    """Cross-entropy over classes; implements `ml.training.job.TrainingJob`.

    Args:
        work_dir: holds `prepared/` with the arrays and where the encoder lies on this machine.
        arrays_sha256: of the arrays; part of what identifies the training.
        model: settings of the text classifier.
        vocab_size: rows of the embedding table.
        class_weights: what a row of each class counts in the loss.

    Raises:
        TrainingError: the arrays are not those that were prepared.
    """

    # Some encoders have parts that not every batch reaches.
    find_unused_parameters = True

    def __init__(
        self,
        work_dir: Path,
        *,
        arrays_sha256: str,
        model: dict,
        num_labels: int,
        vocab_size: int,
        pad_id: int,
        class_weights: Sequence[float],
    ):
        prepared = work_dir / "prepared"
        arrays_path = prepared / ARRAYS_FILE
        if digest_file(arrays_path) != arrays_sha256:
            raise TrainingError(f"{arrays_path} is not the file that was prepared (sha256 differs); delete {prepared} and run again")
        # Mapped into memory: rows are read when they are needed, by all ranks from the same pages.
        arrays: Any = safe_open(arrays_path, "np")
        splits: tuple[Split, ...] = ("train", "validation")
        self._ids = {split: arrays.get_slice(f"{split}.ids") for split in splits}
        self._offsets = {split: arrays.get_tensor(f"{split}.offsets") for split in splits}
        self._targets = {split: arrays.get_tensor(f"{split}.targets") for split in splits}
        self.lengths = {split: np.diff(self._offsets[split]) for split in splits}
        self.train_strata = self._targets["train"]
        self._encoder_dir = Path(json.loads((prepared / PREPARED_FILE).read_bytes())["encoder_dir"])
        self._model_settings = TextClassifierConfig.model_validate(model)
        self._num_labels = num_labels
        self._vocab_size = vocab_size
        self._pad_id = pad_id
        self._class_weights = np.asarray(class_weights, dtype=np.float64)

    def build_model(self, seed: int) -> nn.Module:
        return build_classifier(self._encoder_dir, self._num_labels, self._model_settings, vocab_size=self._vocab_size, seed=seed).train()

    def parallel_plan(self) -> ParallelPlan:
        return parallel_plan(read_config(self._encoder_dir), self._pad_id)

    def batch(self, split: Split, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B, T) int64, padded on the right to the longest row; `targets` (B,) int64."""
        lengths = self.lengths[split][rows]
        longest = max(int(lengths.max()), 1)
        input_ids = np.full((len(rows), longest), self._pad_id, dtype=np.int64)
        for index, row in enumerate(rows):
            start, end = self._offsets[split][row : row + 2].tolist()
            input_ids[index, : end - start] = self._ids[split][start:end]
        attention_mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "targets": torch.from_numpy(self._targets[split][rows]),
        }

    def row_weights(self, split: Split, rows: np.ndarray) -> np.ndarray:
        return self._class_weights[self._targets[split][rows]]

    def row_losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> RowLosses:
        logits = model(batch["input_ids"], batch["attention_mask"])
        loss = nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
        return RowLosses(loss, logits.argmax(dim=1), batch["targets"])
