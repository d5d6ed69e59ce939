"""Each rank holds a slice of each matrix of attention and feed-forward layers, and all of the rest (Shoeybi et al. 2019)."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ml.training.job import ParallelPlan, TrainingJob
from ml.training.layout import Layout
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec
from ml.training.strategies.base import Strategy
from ml.training.strategies.states import tensor_shapes


def split_matrices(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh) -> None:
    """Turn the linear layers of `plan.splits` into slices, in place. Every rank has the whole model; nothing is communicated."""
    styles: dict[str, ParallelStyle] = {
        name: ColwiseParallel() if way == "columns" else RowwiseParallel() for name, way in plan.splits.items()
    }
    parallelize_module(model, mesh, styles, src_data_rank=None)


class TensorParallel(Strategy):
    """Slices within a group of ranks that compute the same rows; with `replicate`, copies of such groups, averaged after the backward.

    What is not split (embeddings, norms, the head) is held whole by each rank of a group, which computes the same gradient for it.
    """

    def __init__(self, layout: Layout, spec: TrainSpec, job: TrainingJob, plan: ParallelPlan, model: nn.Module, group: RankGroup):
        shapes = tensor_shapes(model)
        mesh = layout.mesh(group.device.type)
        model = model.to(group.device)
        split_matrices(model, plan, mesh["tensor"])
        super().__init__(layout, spec, job, group, mesh, shapes, model, averaged_over="replicate")
