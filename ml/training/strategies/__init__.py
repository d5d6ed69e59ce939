"""How a model is spread over ranks, one file each. All give the gradient of the same loss and the same weights as one process.

base.Strategy       what the stepper asks of any of them
  ddp               copies of the model; also the single process
  fsdp              a part of each parameter in each rank (FSDP2), also on top of split matrices
  tensor            a part of each matrix in each rank (DTensor), also with copies
  pipeline          some blocks in each rank (GPipe, 1F1B), also with copies
gradients           averaging, norm and clipping of gradients that lie in parts
states              parameters and optimizer state by the names that they have in the whole model
"""

from torch import nn

from ml.training.job import TrainingJob, plan_of
from ml.training.layout import Layout
from ml.training.ranks import RankGroup
from ml.training.spec import TrainSpec
from ml.training.strategies.base import Strategy
from ml.training.strategies.ddp import DataParallel
from ml.training.strategies.fsdp import ShardedParallel
from ml.training.strategies.pipeline import PipelineParallel
from ml.training.strategies.tensor import TensorParallel


def build_strategy(layout: Layout, spec: TrainSpec, job: TrainingJob, model: nn.Module, group: RankGroup) -> Strategy:
    """Spread a whole model over the ranks of a layout from `check_layout`. All ranks call it.

    Args:
        model: the same in every rank, on the CPU or on the rank's device; it is taken apart.
    """
    plan = plan_of(job)
    if layout.pipeline > 1:
        return PipelineParallel(layout, spec, job, plan, model, group)
    if layout.shard > 1:
        return ShardedParallel(layout, spec, job, plan, model, group)
    if layout.tensor > 1:
        return TensorParallel(layout, spec, job, plan, model, group)
    return DataParallel(layout, spec, job, model, group)
