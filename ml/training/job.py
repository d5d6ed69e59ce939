"""What a training is about: the seam between the loop and whoever brings model, data and loss."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Stage:
    """Which part of a model one rank of a pipeline holds: blocks `blocks.start` to `blocks.stop - 1`, and what is before the first
    and behind the last one if it is the first or last stage."""

    index: int
    num_stages: int
    blocks: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


@dataclass(frozen=True)
class ParallelPlan:
    """How a model can be split over ranks, as far as it can.

    Module names may hold `*` for one level: "blocks.*.attention.query".

    Args:
        blocks: names of the repeated blocks in the order in which they run. They are what "fsdp" gathers at a time, and where a
            pipeline may be cut.
        splits: linear layers that "tensor" splits -> by "columns" (each rank has some outputs) or "rows" (each rank has some
            inputs, and the sums are added up over the ranks). Between the two, a model must take its sizes from the tensors it is
            given: a rank sees a part of the heads or of the inner units.
        tensor_sizes: what the tensor ranks must divide -> its size: {"heads": 12, "inner units": 3072}.
        make_stage: cut a whole model down to a stage. The result's `forward(first, **context)` takes the batch's `stage_input` in
            the first stage and the previous stage's (B, ...) tensor in the others; the last stage returns what the whole model
            returns. Its parameters and buffers keep the names that they have in the whole model, those of other stages are gone.
        stage_input: name of the batch's tensor that the first stage takes.
        stage_context: names of the batch's tensors that every stage gets by keyword.
        padding: name of a batch's (B, T) tensor -> the value to pad T with. A pipeline needs few different shapes; a row's loss
            must not depend on how far it is padded.
        max_length: the longest T that the model takes; padding stops there.
        no_tensor, no_pipeline: why there is none of it.
    """

    blocks: tuple[str, ...] = ()
    splits: Mapping[str, Literal["columns", "rows"]] = field(default_factory=dict)
    tensor_sizes: Mapping[str, int] = field(default_factory=dict)
    make_stage: "Callable[[nn.Module, Stage], nn.Module] | None" = None
    stage_input: str = ""
    stage_context: tuple[str, ...] = ()
    padding: Mapping[str, float] = field(default_factory=dict)
    max_length: int | None = None
    no_tensor: str = "none was written for it"
    no_pipeline: str = "none was written for it"


class TrainingJob(Protocol):
    """Created in every rank as `Class(work_dir=..., **job_arguments)`; must be the same in all of them.

    A job whose model can be split over ranks also has `parallel_plan() -> ParallelPlan`, which builds no model, see `plan_of`. One
    whose rows come in shards has `train_shards`, a `batches.Shards`, and `expect_shards(shards)`, which is told which of them
    come next. `batch` is called in a thread while steps run.

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
        """Run the model (possibly wrapped for data parallelism) on a batch.

        The model is called once. In a pipeline it is a stand-in that returns what the last stage gave.
        """
        ...


def plan_of(job: TrainingJob) -> ParallelPlan:
    """The job's parallel plan; an empty one for a job that has none: each rank then needs the whole model."""
    declare: Callable[[], ParallelPlan] | None = getattr(job, "parallel_plan", None)
    return declare() if declare is not None else ParallelPlan()


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
