"""Copies of the model, each with its own rows; gradients are averaged while the backward pass still runs. Also the single process."""

from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ml.training.gradient_sync import apply_hook, ddp_options
from ml.training.job import TrainingJob
from ml.training.layout import Layout
from ml.training.ranks import RankGroup
from ml.training.spec import GradientSync, TrainSpec
from ml.training.strategies.base import Strategy
from ml.training.strategies.states import tensor_shapes


class DataParallel(Strategy):
    """DDP (Li et al. 2020) with the options and the hook of `gradient_sync`."""

    def __init__(self, layout: Layout, spec: TrainSpec, job: TrainingJob, model: nn.Module, group: RankGroup):
        shapes = tensor_shapes(model)
        mesh = layout.mesh(group.device.type) if layout.num_ranks > 1 else None
        super().__init__(layout, spec, job, group, mesh, shapes, model.to(group.device))
        self._wrapped: DistributedDataParallel | None = None
        if mesh is not None:
            self.rewrap(spec.gradient_sync)

    @property
    def is_bucketed(self) -> bool:
        return self._wrapped is not None

    def rewrap(self, sync: GradientSync) -> None:
        """Lay the buckets out anew. Before the first step, or between two; a hook's state starts anew."""
        if self.mesh is None:
            return
        # The old wrapper's hooks on the parameters go with it.
        self._wrapped = None
        self.callable_model = self.model
        for parameter in self.parameters:
            parameter.grad = None
        self._wrapped = DistributedDataParallel(
            self.model,
            device_ids=[self.group.device] if self.group.device.type == "cuda" else None,
            process_group=self.mesh.get_group("replicate"),
            forward_sync_buffers=False,
            find_unused_parameters=self.job.find_unused_parameters,
            **ddp_options(sync),
        )
        apply_hook(self._wrapped, sync, dist.get_backend())
        self.callable_model = self._wrapped

    def _syncing(self, is_last: bool) -> AbstractContextManager:
        return nullcontext() if is_last or self._wrapped is None else self._wrapped.no_sync()
