"""Each rank holds some consecutive blocks; parts of a batch flow through them one behind the other."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from ml.errors import ConfigError
from ml.training.job import ParallelPlan, RowLosses, Stage, TrainingJob
from ml.training.layout import Layout, num_microbatches
from ml.training.precision import Precision, computing_in
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec
from ml.training.strategies.base import Pass, Passed, Strategy, as_tensor
from ml.training.strategies.states import tensor_shapes

# Lengths are padded to a multiple of this, so that few different shapes occur.
LENGTH_STEP = 32
# Each shape has receive buffers of its own; the least recently used are given up.
MAX_SHAPES = 8


class PipelineParallel(Strategy):
    """GPipe (Huang et al. 2019) or 1F1B (Narayanan et al. 2019), with `replicate` copies of the whole pipeline.

    A pipeline needs shapes that are known in advance. So each pass is padded: its rows to a multiple of the microbatches, with
    copies of the first row that count nothing, and its lengths to a multiple of `LENGTH_STEP`, with `ParallelPlan.padding`. For each
    shape that occurs, ranks exchange once what they will send each other; then they need no more talk about it.

    The loss is computed in the last stage. All ranks of a pipeline get the same batch.
    """

    def __init__(self, layout: Layout, spec: TrainSpec, job: TrainingJob, plan: ParallelPlan, model: nn.Module, group: RankGroup):
        if plan.make_stage is None:
            raise ConfigError(f"this model declares no pipeline plan ({plan.no_pipeline})")
        shapes = tensor_shapes(model)
        mesh = layout.mesh(group.device.type)
        self._plan = plan
        self._stage = stage_of(layout.coordinate(group.rank, "pipeline"), layout.pipeline, len(plan.blocks))
        self._stages = mesh.get_group("pipeline")
        self._num_microbatches = num_microbatches(spec.parallelism, layout.pipeline)
        self._schedules: OrderedDict[tuple[Any, ...], PipelineScheduleSingle] = OrderedDict()
        part = plan.make_stage(model, self._stage).to(group.device)
        super().__init__(layout, spec, job, group, mesh, shapes, part, averaged_over="replicate")
        # Of the pass that is under way, for the loss of its microbatches.
        self._pass = Pass({}, np.zeros(0))
        self._scale = 1.0
        self._weighted: dict[int, torch.Tensor] = {}
        self._losses: dict[int, torch.Tensor] = {}

    def forward_backward(self, passes: Sequence[Pass], scale: float, precision: Precision) -> Passed:
        start = time.perf_counter()
        weighted_loss = 0.0
        row_losses: list[torch.Tensor] = []
        self._scale = scale
        for each in passes:
            self._pass = padded = self._padded(each)
            self._weighted, self._losses = {}, {}
            schedule = self._schedule(padded.batch, precision, training=True)
            index = torch.arange(len(padded.weights)) if self._stage.is_last else None
            schedule.step(*self._first(padded.batch), target=index, return_outputs=False, **self._context(padded.batch))
            weighted_loss += sum(float(weighted) for weighted in self._weighted.values())
            if self._stage.is_last:
                row_losses.append(torch.cat([self._losses[start] for start in sorted(self._losses)]))
        forward_done = time.perf_counter()
        self._finish_gradients()
        counted = weighted_loss if self.layout.counts(self.group.rank) else 0.0
        return Passed(counted, forward_done - start, time.perf_counter() - forward_done, tuple(row_losses))

    def row_losses(self, batch: dict[str, torch.Tensor], precision: Precision) -> RowLosses | None:
        num_rows = len(next(iter(batch.values())))
        padded = self._padded(Pass(batch, np.ones(num_rows))).batch
        with torch.no_grad():
            schedule = self._schedule(padded, precision, training=False)
            outputs = schedule.step(*self._first(padded), **self._context(padded))
            if outputs is None:
                return None
            with computing_in(precision, self.group.device):
                found = self.job.row_losses(_Given(outputs), padded)
        return RowLosses(*(None if values is None else values[:num_rows] for values in (found.loss, found.predicted, found.target)))  # type: ignore[arg-type]

    def _schedule(self, batch: dict[str, torch.Tensor], precision: Precision, *, training: bool) -> PipelineScheduleSingle:
        """The schedule for batches of this shape. All ranks of a pipeline see the same shapes, so they make them together."""
        key = (training, precision, *(batch[name].shape for name in (self._plan.stage_input, *self._plan.stage_context)))
        if key not in self._schedules:
            stage = PipelineStage(
                _Autocast(self.model, precision, self.group.device),
                self._stage.index,
                self._stage.num_stages,
                self.group.device,
                group=self._stages,
            )
            kind = Schedule1F1B if training and self.spec.parallelism.pipeline_schedule == "1f1b" else ScheduleGPipe
            loss = self._microbatch_loss(precision) if training else None
            self._schedules[key] = kind(stage, self._num_microbatches, loss_fn=loss, scale_grads=False)
            if len(self._schedules) > MAX_SHAPES:
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(key)
        return self._schedules[key]

    def _microbatch_loss(self, precision: Precision):
        def loss(outputs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            start, end = int(index[0]), int(index[-1]) + 1
            rows = {name: tensor[start:end] for name, tensor in self._pass.batch.items()}
            with computing_in(precision, self.group.device):
                losses = self.job.row_losses(_Given(outputs), rows).loss
            weighted = (losses * as_tensor(self._pass.weights[start:end], losses)).sum()
            self._weighted[start], self._losses[start] = weighted.detach(), losses.detach()
            return weighted * self._scale

        return loss

    def _first(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (batch[self._plan.stage_input],) if self._stage.is_first else ()

    def _context(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {name: batch[name] for name in self._plan.stage_context}

    def _padded(self, each: Pass) -> Pass:
        num_rows = len(each.weights)
        missing = -num_rows % self._num_microbatches
        batch = {name: self._padded_tensor(name, tensor, missing) for name, tensor in each.batch.items()}
        return Pass(batch, np.concatenate([each.weights, np.zeros(missing)]))

    def _padded_tensor(self, name: str, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
        if num_rows:
            tensor = torch.cat([tensor, tensor[:1].expand(num_rows, *tensor.shape[1:])])
        if name in self._plan.padding:
            length = tensor.shape[1]
            wanted = min(length + -length % LENGTH_STEP, max(self._plan.max_length or length + LENGTH_STEP, length))
            tensor = nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, wanted - length), value=self._plan.padding[name])
        return tensor


def stage_of(index: int, num_stages: int, num_blocks: int) -> Stage:
    """Blocks shared out as evenly as they go; the first stages, which have no head, get those that are left over."""
    each, more = divmod(num_blocks, num_stages)
    start = index * each + min(index, more)
    return Stage(index, num_stages, range(start, start + each + (index < more)))


class _Autocast(nn.Module):
    """A stage that computes in a number format."""

    def __init__(self, part: nn.Module, precision: Precision, device: torch.device):
        super().__init__()
        self.part = part
        self._precision: Precision = precision
        self._device = device

    def forward(self, *first: torch.Tensor, **context: torch.Tensor) -> torch.Tensor:
        with computing_in(self._precision, self._device):
            return self.part(*first, **context)


class _Given(nn.Module):
    """Stands for the whole model where a job asks it for the outputs that the last stage already has."""

    def __init__(self, outputs: torch.Tensor):
        super().__init__()
        self._outputs = outputs

    def forward(self, *_inputs: Any, **_named: Any) -> torch.Tensor:
        return self._outputs
