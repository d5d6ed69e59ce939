"""What a training is about: the seam between the loop and whoever brings model, data and loss."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from ml.errors import TrainingError
from ml.training.spec import TrainSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class RowLosses:
    """Per row of a batch: `loss` (B,), not reduced and not weighted, and for a classifier `predicted` and `target` (B,), int64."""

    loss: "torch.Tensor"
    predicted: "torch.Tensor | None" = None
    target: "torch.Tensor | None" = None


class TrainingJob(Protocol):
    """Created in every rank as `Class(work_dir=..., **job_arguments)`; must be the same in all of them.

    Attributes:
        lengths: split -> (N,) cost of a row relative to others (tokens); rows of like length are batched together.
        train_strata: (N,) int; a sample of the training rows keeps the shares of these values.
        find_unused_parameters: true when some parameters get no gradient in some steps (routing).
    """

    lengths: dict[Split, np.ndarray]
    train_strata: np.ndarray
    find_unused_parameters: bool

    def build_model(self, seed: int) -> "nn.Module":
        """The model, the same in every rank, on the CPU, in training mode."""
        ...

    def batch(self, split: Split, rows: np.ndarray) -> "dict[str, torch.Tensor]":
        """Tensors of these rows, batch first, on the CPU."""
        ...

    def row_weights(self, split: Split, rows: np.ndarray) -> np.ndarray:
        """(len(rows),) float64: what each row counts in the loss. The loss of a step is the weighted mean."""
        ...

    def row_losses(self, model: "nn.Module", batch: "dict[str, torch.Tensor]") -> RowLosses:
        """Run the model (possibly wrapped for data parallelism) on a batch."""
        ...


def load_job(spec: TrainSpec) -> TrainingJob:
    """Import and create the job.

    Raises:
        TrainingError: there is no such class.
    """
    module_name, _, class_name = spec.job.partition(":")
    try:
        job_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise TrainingError(f"training job {spec.job!r} cannot be imported: {error}; give it as 'module:Class'") from error
    return job_class(work_dir=spec.work_dir, **spec.job_arguments)
