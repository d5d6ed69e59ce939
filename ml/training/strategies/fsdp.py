"""Each rank holds a part of each parameter, gradient and optimizer state, and gathers one block at a time (FSDP2)."""

from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from ml.training.job import ParallelPlan, TrainingJob
from ml.training.layout import Layout
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec
from ml.training.strategies.base import Strategy
from ml.training.strategies.states import tensor_shapes
from ml.training.strategies.tensor import split_matrices


class ShardedParallel(Strategy):
    """`fully_shard` of each declared block and of what is left (Zhao et al. 2023; Rajbhandari et al. 2020, stage 3).

    With `tensor` ranks, matrices are split first, and each slice is then sharded. Weights stay in the model's own format and are
    gathered in it. While gradients are accumulated they are kept whole: they travel with the last pass only.
    """

    def __init__(self, layout: Layout, spec: TrainSpec, job: TrainingJob, plan: ParallelPlan, model: nn.Module, group: RankGroup):
        shapes = tensor_shapes(model)
        mesh = layout.mesh(group.device.type)
        model = model.to(group.device)
        if layout.tensor > 1:
            split_matrices(model, plan, mesh["tensor"])
        for name in plan.blocks:
            fully_shard(model.get_submodule(name), mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        self._sharded = cast(FSDPModule, model)
        if job.find_unused_parameters:
            # Ranks whose rows reach different parameters would otherwise exchange different numbers of bytes.
            self._sharded.set_reduce_scatter_unused_params(True)
        super().__init__(layout, spec, job, group, mesh, shapes, model)

    def _syncing(self, is_last: bool) -> AbstractContextManager:
        self._sharded.set_requires_gradient_sync(is_last)
        return nullcontext()
