"""What the stepper asks of every strategy, and what most of them do alike."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ml.training.job import RowLosses, TrainingJob
from ml.training.layout import Layout
from ml.training.marks import Marks
from ml.training.precision import Precision, computing_in
from ml.training.ranks import RankGroup
from ml.training.spec import GradientSync, TrainSpec
from ml.training.strategies.gradients import GradientAverager, clip_gradients, fill_missing_gradients, gradient_norm
from ml.training.strategies.states import load_whole_weights, restore_state, state_tensors, whole_weights


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model at once: a batch on the rank's device, and what each of its rows counts, (B,) float64."""

    batch: dict[str, torch.Tensor]
    weights: np.ndarray


@dataclass(frozen=True)
class Passed:
    """What came of the passes of a step.

    Args:
        weighted_loss: sum of weight times loss over this rank's rows; zero in a rank that does not count, see `Layout.counts`.
        forward_seconds, backward_seconds: of this rank. In a pipeline the two take turns, and all is forward.
        row_losses: of each pass, (B,); none in a rank that does not see the outputs.
    """

    weighted_loss: float
    forward_seconds: float
    backward_seconds: float
    row_losses: tuple[torch.Tensor, ...]


class Strategy:
    """A model spread over ranks, seen from one of them.

    Args:
        model: this rank's part of it, on the rank's device. Names are those of the whole model.
        callable_model: what a job calls; `model`, or a wrapper around it.
        averaged_over: the dimension over which gradients are averaged after the backward pass; none where torch does it.
    """

    def __init__(
        self,
        layout: Layout,
        spec: TrainSpec,
        job: TrainingJob,
        group: RankGroup,
        mesh: DeviceMesh | None,
        shapes: dict[str, torch.Size],
        model: nn.Module,
        callable_model: nn.Module | None = None,
        *,
        averaged_over: str | None = None,
    ):
        self.layout = layout
        self.spec = spec
        self.job = job
        self.group = group
        self.mesh = mesh
        self.model = model
        self.callable_model = model if callable_model is None else callable_model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._shapes = shapes
        self._averager = None
        if averaged_over is not None and mesh is not None and averaged_over in (mesh.mesh_dim_names or ()):
            self._averager = GradientAverager(self.parameters, mesh.get_group(averaged_over), bucket_bytes(spec))

    def forward_backward(self, passes: Sequence[Pass], scale: float, precision: Precision) -> Passed:
        """Add the gradient of `scale` times the weighted loss, averaged over the data ranks, to the parameters' gradients.

        All ranks call it with the same number of passes; gradients travel once, with the last pass.
        """
        weighted_loss = torch.zeros((), dtype=torch.float64, device=self.group.device)
        marks = Marks(self.group.device)
        row_losses: list[torch.Tensor] = []
        for index, each in enumerate(passes):
            with self._syncing(index == len(passes) - 1):
                with computing_in(precision, self.group.device):
                    losses = self.job.row_losses(self.callable_model, each.batch).loss
                weighted = (losses * as_tensor(each.weights, losses)).sum()
                marks.mark()
                (weighted * scale).backward()
                marks.mark()
            weighted_loss += weighted.detach()
            row_losses.append(losses.detach())
        self._finish_gradients()
        marks.mark()
        counted = float(weighted_loss) if self.layout.counts(self.group.rank) else 0.0
        *passed, finishing = marks.seconds()
        return Passed(counted, sum(passed[::2]), sum(passed[1::2]) + finishing, tuple(row_losses))

    def row_losses(self, batch: dict[str, torch.Tensor], precision: Precision) -> RowLosses | None:
        """Forward only, without a graph. None in a rank that does not see the outputs. All ranks call it equally often."""
        with torch.no_grad(), computing_in(precision, self.group.device):
            return self.job.row_losses(self.model, batch)

    def gradient_norm(self) -> float:
        """Euclidean norm of the whole model's gradient, the same in every rank."""
        return gradient_norm(self.parameters, self.mesh)

    def clip_gradients(self, norm: float, largest: float) -> None:
        """Scale all gradients so that their norm is at most `largest`."""
        clip_gradients(self.parameters, norm, largest)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers of the whole model on the CPU, in the first rank; nothing in the others. All call it."""
        return whole_weights(self.model, self._shapes, self.mesh, self.group)

    def load_whole_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Take this rank's part of a whole model's weights, given in every rank.

        Raises:
            TrainingError: names or shapes are of another model.
        """
        load_whole_weights(self.model, self._shapes, weights)

    def restore(self, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
        """Take this rank's part of whole tensors, named as those of `state_tensors` and given in every rank.

        Raises:
            TrainingError: some are missing or of another shape.
        """
        restore_state(self.state_tensors(optimizer), tensors)

    def state_tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """This rank's part of "model/<name>" and "optimizer/<name>/<key>", see `states.state_tensors`."""
        return state_tensors(self.model, optimizer)

    @property
    def is_bucketed(self) -> bool:
        """Whether gradients travel in DDP's buckets, which `rewrap` can lay out anew."""
        return False

    def rewrap(self, sync: GradientSync) -> None:
        """Lay the buckets out anew, where there are any. All ranks call it, between two steps."""
        del sync

    def _syncing(self, is_last: bool) -> AbstractContextManager:
        """Around a pass: gradients travel in the last one only."""
        del is_last
        return nullcontext()

    def _finish_gradients(self) -> None:
        fill_missing_gradients(self.parameters)
        if self._averager is not None:
            self._averager.average()


def as_tensor(weights: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(weights).to(device=like.device, dtype=like.dtype)


def bucket_bytes(spec: TrainSpec) -> int:
    """DDP's own default where it is not set."""
    megabytes = spec.gradient_sync.bucket_mb
    return int((25.0 if megabytes == "auto" else megabytes) * 2**20)
