"""Next-token prediction on sets of token shards, which are read as training goes: from a folder or from object storage.

Imported in the ranks only; torch is loaded with it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ml.errors import ConfigError, DataError
from ml.language_model.transformer import Transformer, TransformerConfig, parallel_plan
from ml.training.batches import Shards
from ml.training.job import ParallelPlan, RowLosses, Split
from ml.training.shards import FolderShards, ShardedRows, ShardSource

# Of the rows, when there is no set for validation.
VALIDATION_SHARE = 0.01
# Of the cache, when there is one.
VALIDATION_CACHE_SHARE = 0.25
IGNORED = -100


class LanguageModelJob:
    """Cross-entropy of each token given those before it; implements `ml.training.job.TrainingJob`.

    A row counts as many times as it has predicted tokens, so the loss of a step is the mean over the tokens of its batch.

    Args:
        work_dir: of the training.
        shards: set to train on: a folder, or `s3://bucket/prefix` in the store that the environment names.
        model: arguments of `TransformerConfig`; `vocab_size` and `max_length` are those of the set unless given.
        shards_sha256: of the set to train on, as `prepare` printed it. Part of what identifies the training: with it, one that is
            resumed on a set that was written anew is refused.
        validation_shards: like `shards`; without, the last hundredth of the training rows is kept for it.
        cache_bytes: bound of the copies of shards on this machine's disk and of what of them is in memory.
        cache_dir: where they lie; `shards/` of the work folder unless given. When machines share the work folder, give one that is
            on each machine's own disk.

    Attributes:
        train_shards: where the training rows lie, for the order of an epoch (`ml.training.batches.Sampler`).

    Raises:
        DataError: a set cannot be read, or is another one.
        ConfigError: the model is too small for the set.
    """

    find_unused_parameters = False

    def __init__(
        self,
        work_dir: Path,
        *,
        shards: str,
        model: dict[str, Any],
        shards_sha256: str | None = None,
        validation_shards: str | None = None,
        cache_bytes: int = 2**30,
        cache_dir: str | None = None,
    ):
        cache = Path(cache_dir) if cache_dir else work_dir / "shards"
        for_validation = int(cache_bytes * VALIDATION_CACHE_SHARE) if validation_shards else 0
        train = ShardedRows(open_shards(shards), cache / "train", cache_bytes - for_validation)
        if shards_sha256 not in (None, train.index.digest):
            raise DataError(
                f"{shards} is not the set that was given (sha256 {train.index.digest[:16]}... instead of {shards_sha256[:16]}...); "
                "restore it, or train anew in another work folder"
            )
        num_train = train.index.num_rows
        if validation_shards:
            validation, first = ShardedRows(open_shards(validation_shards), cache / "validation", for_validation), 0
        else:
            if num_train < 2:
                raise DataError(f"{shards} has a single row; with validation_shards not given, one is needed to train on and one more")
            num_train -= max(round(num_train * VALIDATION_SHARE), 1)
            validation, first = train, num_train
        self._sets: dict[Split, ShardedRows] = {"train": train, "validation": validation}
        self._first: dict[Split, int] = {"train": 0, "validation": first}
        self.config = _fitting_config(model, train, validation)
        # Predicted tokens: a row's first token is predicted by nothing.
        self.lengths: dict[Split, np.ndarray] = {
            "train": np.maximum(train.lengths[:num_train] - 1, 1),
            "validation": np.maximum(validation.lengths[first:] - 1, 1),
        }
        self.train_strata = np.zeros(num_train, dtype=np.int8)
        self.train_shards = Shards(train.starts, train.shards_together)

    def expect_shards(self, shards: Sequence[int]) -> None:
        """Training rows of these shards come next (`ml.training.batches.Sampler.shards_ahead`): fetch them meanwhile."""
        self._sets["train"].expect(shards)

    def parallel_plan(self) -> ParallelPlan:
        plan = parallel_plan(self.config)
        return replace(plan, padding={**plan.padding, "targets": IGNORED})

    def build_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Transformer(self.config).train()

    def batch(self, split: Split, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """`input_ids` and `targets` (B, T) int64: the tokens but the last and but the first one, padded on the right."""
        found = self._sets[split].tokens(rows + self._first[split])
        longest = max(max(len(tokens) for tokens in found) - 1, 1)
        input_ids = np.zeros((len(rows), longest), dtype=np.int64)
        targets = np.full((len(rows), longest), IGNORED, dtype=np.int64)
        for index, tokens in enumerate(found):
            # A row of a single token predicts nothing, but a model takes no empty row.
            input_ids[index, : max(len(tokens) - 1, 1)] = tokens[: max(len(tokens) - 1, 1)]
            targets[index, : len(tokens) - 1] = tokens[1:]
        return {"input_ids": torch.from_numpy(input_ids), "targets": torch.from_numpy(targets)}

    def row_weights(self, split: Split, rows: np.ndarray) -> np.ndarray:
        stored = self._sets[split].lengths[rows + self._first[split]]
        return (stored - 1).astype(np.float64)

    def row_losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> RowLosses:
        """Of each row, the mean over its predicted tokens; 0 where there are none."""
        logits_BTV = model(batch["input_ids"])
        targets_BT = batch["targets"]
        losses = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none")
        counts_B = (targets_BT != IGNORED).sum(1).clamp(min=1)
        return RowLosses(losses.view_as(targets_BT).sum(1) / counts_B)


def open_shards(place: str) -> ShardSource:
    """Where a set lies: a folder or `s3://bucket/prefix`.

    Raises:
        ConfigError: no object store is known here.
    """
    if not place.startswith("s3://"):
        return FolderShards(Path(place))
    # A machine that trains from a folder needs no client of object storage.
    from ml.storage.connect import open_artifact_store
    from ml.storage.shards import StoredShards, parse_shards_uri

    return StoredShards(open_artifact_store().objects, *parse_shards_uri(place))


def _fitting_config(model: dict[str, Any], *sets: ShardedRows) -> TransformerConfig:
    vocabulary = max(rows.index.vocabulary for rows in sets)
    longest = max(int(rows.lengths.max()) - 1 for rows in sets)
    config = TransformerConfig(**{"vocab_size": vocabulary, "max_length": max(longest, 1), **model})
    if config.vocab_size < vocabulary or config.max_length < longest:
        raise ConfigError(
            f"the model takes {config.vocab_size} tokens of vocabulary and rows of {config.max_length}, the shards have {vocabulary} "
            f"and {longest}; raise vocab_size and max_length of the model, or prepare the shards with a smaller --context"
        )
    return config
