"""Small jobs whose models can be split: a language model, an encoder like BERT, and the toy that has blocks only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ml.language_model.transformer import Transformer, TransformerConfig, parallel_plan
from ml.training.job import ParallelPlan, RowLosses, Split
from tests.ml.training.toy_job import ToyJob

VOCABULARY = 40
CONFIG = TransformerConfig(vocab_size=VOCABULARY, width=16, num_layers=3, num_heads=4, hidden=24, max_length=40)
NO_TARGET = -100


class ToyJobWithBlocks(ToyJob):
    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(blocks=("block",))


class TinyLanguageModelJob:
    """Next tokens of random rows of 3 to 20 tokens; a row's loss is the mean over its tokens, and weighs 1, 2 or 3.

    Args:
        unlike: every rank builds another model.
        poisoned_row: the loss of this training row is not a number.
    """

    find_unused_parameters = False

    def __init__(
        self,
        work_dir: Path,
        double: bool = False,
        tied_head: bool = False,
        dropout: float = 0.0,
        unlike: bool = False,
        poisoned_row: int | None = None,
    ):
        random = np.random.default_rng(3)
        self.double = double
        self.unlike = unlike
        self.poisoned_row = poisoned_row
        self.config = replace(CONFIG, tied_head=tied_head, dropout=dropout)
        sizes: dict[Split, int] = {"train": 60, "validation": 13}
        self.rows: dict[Split, list[np.ndarray]] = {
            split: [random.integers(0, VOCABULARY, random.integers(3, 20)) for _ in range(size)] for split, size in sizes.items()
        }
        self.lengths: dict[Split, np.ndarray] = {split: np.array([len(row) for row in rows]) for split, rows in self.rows.items()}
        self.train_strata = np.zeros(60, dtype=int)

    def build_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed + (torch.distributed.get_rank() if self.unlike else 0))
        model = Transformer(self.config)
        return model.double() if self.double else model

    def parallel_plan(self) -> ParallelPlan:
        return replace(parallel_plan(self.config), padding={"input_ids": 0, "targets": NO_TARGET})

    def batch(self, split: Split, rows: np.ndarray) -> dict[str, torch.Tensor]:
        longest = int(self.lengths[split][rows].max()) - 1
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        targets = np.full((len(rows), longest), NO_TARGET, dtype=np.int64)
        for i, row in enumerate(rows):
            tokens = self.rows[split][row]
            ids[i, : len(tokens) - 1], targets[i, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        poison = np.where(rows == (-1 if split == "validation" else self.poisoned_row), np.nan, 1.0)
        return {"input_ids": torch.from_numpy(ids), "targets": torch.from_numpy(targets), "poison": torch.from_numpy(poison)}

    def row_weights(self, split: Split, rows: np.ndarray) -> np.ndarray:
        return 1.0 + (rows % 3).astype(np.float64)

    def row_losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> RowLosses:
        logits = model(batch["input_ids"])
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=NO_TARGET, reduction="none")
        counts = (batch["targets"] != NO_TARGET).sum(1)
        return RowLosses(losses.view_as(batch["targets"]).sum(1) / counts * batch["poison"].to(losses.dtype))
