"""A small job without transformers: sequences of tokens, an embedding, attention, a class. Learns in a second."""

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ml.training.job import RowLosses, Split

VOCABULARY = 50


class ToyNetwork(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=dropout, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.block(self.embedding(ids), src_key_padding_mask=~mask)
        return self.head((hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


class ToyJob:
    """Class 1 when tokens of the upper half of the vocabulary prevail; `noise` of the labels are wrong.

    Args:
        double: weights and arithmetic in float64.
        step_seconds: rest this long before each batch, to leave time for accidents.
        fault: what goes wrong, in batch number `batch` (those of the probe count) of rank `rank`: "raise" or "nan".
        poisoned: training rows whose loss is not a number.
    """

    find_unused_parameters = False

    def __init__(
        self,
        work_dir: Path,
        num_rows: int = 203,
        width: int = 16,
        dropout: float = 0.0,
        noise: float = 0.0,
        double: bool = False,
        step_seconds: float = 0.0,
        weights: tuple[float, float] = (1.0, 1.0),
        fault: dict | None = None,
        poisoned: tuple[int, ...] = (),
    ):
        random = np.random.default_rng(7)
        self.width, self.dropout, self.double, self.step_seconds, self.fault = width, dropout, double, step_seconds, fault
        self.class_weights = np.asarray(weights)
        self.num_batches, self.poisoned = 0, list(poisoned)
        self.texts: dict[Split, list[np.ndarray]] = {}
        self.targets: dict[Split, np.ndarray] = {}
        sizes: dict[Split, int] = {"train": num_rows, "validation": 61}
        for split, size in sizes.items():
            self.texts[split] = [random.integers(0, VOCABULARY, random.integers(3, 20)) for _ in range(size)]
            targets = np.array([int((text >= VOCABULARY // 2).mean() > 0.5) for text in self.texts[split]])
            self.targets[split] = np.where(random.random(size) < noise, 1 - targets, targets)
        self.lengths: dict[Split, np.ndarray] = {split: np.array([len(text) for text in texts]) for split, texts in self.texts.items()}
        self.train_strata = self.targets["train"]

    def build_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = ToyNetwork(self.width, self.dropout)
        return model.double() if self.double else model

    def batch(self, split: Split, rows: np.ndarray) -> dict[str, torch.Tensor]:
        if split == "train":
            self.num_batches += 1
            time.sleep(self.step_seconds)
            if self._is_due("raise"):
                raise ValueError("the toy broke")
        longest = int(self.lengths[split][rows].max())
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=bool)
        for i, row in enumerate(rows):
            text = self.texts[split][row]
            ids[i, : len(text)], mask[i, : len(text)] = text, True
        poisoned = np.isin(rows, self.poisoned) & (split == "train")
        tensors = {"ids": ids, "mask": mask, "targets": self.targets[split][rows], "poisoned": poisoned}
        return {name: torch.from_numpy(array) for name, array in tensors.items()}

    def row_weights(self, split: Split, rows: np.ndarray) -> np.ndarray:
        return self.class_weights[self.targets[split][rows]].astype(np.float64)

    def row_losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> RowLosses:
        logits = model(batch["ids"], batch["mask"])
        loss = nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
        loss = loss.masked_fill(batch["poisoned"], float("nan"))
        if self._is_due("nan"):
            loss = loss * float("nan")
        return RowLosses(loss, logits.argmax(1), batch["targets"])

    def _is_due(self, what: str) -> bool:
        fault = self.fault
        return (
            fault is not None
            and fault["do"] == what
            and self.num_batches >= fault["batch"]
            and int(os.environ.get("RANK", "0")) == fault["rank"]
        )
