"""Which rank holds which part of the model and of the batch. Needs no torch, so that the launcher can refuse before it starts.

Ranks are counted with the tensor dimension innermost, for its ranks talk most and should share a machine, and the pipeline
outermost, for its stages talk least:

    rank = ((stage * replicate + copy) * shard + part) * tensor + slice
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ml.errors import ConfigError
from ml.training.job import ParallelPlan
from ml.training.spec import GradientSync, Parallelism, StrategyName

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Dimension = Literal["pipeline", "replicate", "shard", "tensor"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)

# Of a device's memory that may be planned with: the rest goes to buffers, fragments and the runtime itself.
USABLE_SHARE = 0.85
# A pipeline needs this many parts of a batch per stage for its ranks not to wait for each other half of the time.
AUTO_MICROBATCHES_PER_STAGE = 2


@dataclass(frozen=True)
class Layout:
    """Ranks per dimension; their product is the number of ranks.

    Args:
        replicate: copies of the model, each with its own rows; gradients are averaged over them.
        shard: ranks that hold a part of each parameter, and have rows of their own.
        tensor: ranks that hold a part of each matrix and compute the same rows together.
        pipeline: ranks that hold some of the blocks and compute the same rows one after the other.
    """

    strategy: StrategyName = "ddp"
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def num_ranks(self) -> int:
        return self.replicate * self.shard * self.tensor * self.pipeline

    @property
    def num_data_ranks(self) -> int:
        """Parts that a batch is dealt out to."""
        return self.replicate * self.shard

    def size(self, dimension: Dimension) -> int:
        return getattr(self, dimension)

    def coordinate(self, rank: int, dimension: Dimension) -> int:
        """Where a rank is in a dimension."""
        stride = math.prod(self.size(inner) for inner in DIMENSIONS[DIMENSIONS.index(dimension) + 1 :])
        return rank // stride % self.size(dimension)

    def data_rank(self, rank: int) -> int:
        """Which part of a batch a rank gets."""
        return self.coordinate(rank, "replicate") * self.shard + self.coordinate(rank, "shard")

    def counts(self, rank: int) -> bool:
        """Whether this rank speaks for its rows: of those that compute the same ones, the first slice of the last stage."""
        return self.coordinate(rank, "tensor") == 0 and self.coordinate(rank, "pipeline") == self.pipeline - 1

    @property
    def split_dimensions(self) -> tuple[Dimension, ...]:
        """Those with more than one rank, outermost first."""
        return tuple(dimension for dimension in DIMENSIONS if self.size(dimension) > 1)

    def mesh(self, device_type: str) -> "DeviceMesh":
        """The ranks as torch knows them, dimensions named as here. All ranks call it, after they have joined."""
        from torch.distributed.device_mesh import init_device_mesh

        names = self.split_dimensions
        return init_device_mesh(device_type, tuple(self.size(name) for name in names), mesh_dim_names=names)

    def describe(self) -> str:
        parts = {"replicate": "copies", "shard": "shards", "tensor": "slices of each matrix", "pipeline": "stages"}
        sizes = [f"{self.size(dimension)} {parts[dimension]}" for dimension in self.split_dimensions]
        return f"{self.strategy} ({' x '.join(sizes)})" if sizes else "one rank"


def num_microbatches(parallelism: Parallelism, num_stages: int) -> int:
    if parallelism.microbatches != "auto":
        return parallelism.microbatches
    return AUTO_MICROBATCHES_PER_STAGE * num_stages


def check_layout(parallelism: Parallelism, num_ranks: int, plan: ParallelPlan, gradient_sync: GradientSync | None = None) -> Layout:
    """The layout of a given strategy ("auto" is resolved by `choose_strategy` before).

    "tensor" and "pipeline" take all ranks; `tensor_ranks` and `pipeline_ranks` count in the hybrids. A single rank has nothing to
    split and always works.

    Raises:
        ConfigError: the strategy does not fit the number of ranks, the model or the other settings.
    """
    if parallelism.strategy == "auto":
        raise ValueError("the strategy is still auto; choose_strategy decides it")
    if num_ranks == 1:
        return Layout()
    layout = _layout(parallelism.strategy, parallelism.tensor_ranks, parallelism.pipeline_ranks, num_ranks)
    if isinstance(layout, Layout):
        problem = _problem(layout, plan) or _problem_of_settings(layout, parallelism, gradient_sync or GradientSync())
        if problem is None:
            return layout
    else:
        problem = layout
    raise ConfigError(f"{parallelism.strategy}: {problem}; {_nearest(parallelism.strategy, num_ranks, plan)}")


def _layout(strategy: StrategyName, tensor_ranks: int, pipeline_ranks: int, num_ranks: int) -> Layout | str:
    """The layout, or why the ranks cannot be laid out."""
    if strategy == "ddp":
        return Layout(strategy, replicate=num_ranks)
    if strategy == "fsdp":
        return Layout(strategy, shard=num_ranks)
    if strategy == "tensor":
        return Layout(strategy, tensor=num_ranks)
    if strategy == "pipeline":
        return Layout(strategy, pipeline=num_ranks)
    name, inner = ("pipeline_ranks", pipeline_ranks) if strategy == "ddp+pipeline" else ("tensor_ranks", tensor_ranks)
    outer, rest = divmod(num_ranks, inner)
    if rest:
        return f"{num_ranks} ranks are no multiple of {name} = {inner}"
    if inner < 2 or outer < 2:
        return f"{num_ranks} ranks with {name} = {inner} leave only one dimension to split"
    if strategy == "ddp+pipeline":
        return Layout(strategy, replicate=outer, pipeline=inner)
    return Layout(strategy, replicate=outer, tensor=inner) if strategy == "ddp+tensor" else Layout(strategy, shard=outer, tensor=inner)


def _problem(layout: Layout, plan: ParallelPlan) -> str | None:
    """Why a model cannot be split like this."""
    if layout.shard > 1 and not plan.blocks:
        return "the job declares no parallel plan, so there are no blocks to gather one at a time"
    if layout.tensor > 1:
        if not plan.splits:
            return f"this model declares no tensor plan ({plan.no_tensor})"
        for what, size in plan.tensor_sizes.items():
            if size % layout.tensor:
                return f"{layout.tensor} ranks do not divide {size} {what}{_that_divide(plan, layout.tensor)}"
    if layout.pipeline > 1:
        if plan.make_stage is None:
            return f"this model declares no pipeline plan ({plan.no_pipeline})"
        if layout.pipeline > len(plan.blocks):
            return f"{layout.pipeline} stages, but the model has {len(plan.blocks)} blocks"
    return None


def _problem_of_settings(layout: Layout, parallelism: Parallelism, gradient_sync: GradientSync) -> str | None:
    if gradient_sync.hook != "none" and layout.strategy != "ddp":
        return f"the {gradient_sync.hook} hook works with ddp alone; set gradient_sync.hook to none"
    microbatches = num_microbatches(parallelism, layout.pipeline)
    if layout.pipeline > 1 and parallelism.pipeline_schedule == "1f1b" and microbatches < layout.pipeline:
        return f"the 1f1b schedule needs a microbatch for each of the {layout.pipeline} stages, found {microbatches}; gpipe takes fewer"
    return None


def _that_divide(plan: ParallelPlan, wanted: int) -> str:
    """The nearest numbers below and above that divide all sizes of the plan."""
    common = math.gcd(*plan.tensor_sizes.values())
    fitting = [number for number in range(2, common + 1) if common % number == 0]
    near = [number for number in fitting if number < wanted][-1:] + [number for number in fitting if number > wanted][:1]
    return f" ({' or '.join(map(str, near))} do)" if near else ""


# What to advise instead: what saves the most alike memory first.
_ALTERNATIVES: dict[StrategyName, tuple[StrategyName, ...]] = {
    "ddp": ("ddp",),
    "fsdp": ("ddp",),
    "tensor": ("tensor", "fsdp+tensor", "fsdp", "ddp"),
    "pipeline": ("pipeline", "ddp+pipeline", "fsdp", "ddp"),
    "ddp+tensor": ("ddp+tensor", "tensor", "fsdp", "ddp"),
    "fsdp+tensor": ("fsdp+tensor", "fsdp", "tensor", "ddp"),
    "ddp+pipeline": ("ddp+pipeline", "pipeline", "fsdp", "ddp"),
}


def _nearest(strategy: StrategyName, num_ranks: int, plan: ParallelPlan) -> str:
    """The nearest that works with this number of ranks, in words."""
    for alternative in _ALTERNATIVES[strategy]:
        for inner in range(2, num_ranks) if "+" in alternative else (num_ranks,):
            layout = _layout(alternative, inner, inner, num_ranks)
            if isinstance(layout, Layout) and _problem(layout, plan) is None:
                setting = {"tensor": "tensor_ranks", "pipeline": "pipeline_ranks"}.get(alternative.partition("+")[2])
                return f"{alternative} works with {num_ranks} ranks" + (f" and {setting} = {inner}" if setting else "")
    raise AssertionError("ddp always works")


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a whole model in training.

    Args:
        parameters, gradients, optimizer: of all of them.
        activations: kept for the backward pass of one rank's rows; an estimate.
        largest_block: parameters of the largest block.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    largest_block: int

    @property
    def state(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def per_rank(self, layout: Layout) -> int:
        """Bytes that one rank needs at the most.

        Sharded blocks are gathered one at a time, the next one while the last one still computes, and their gradients
        likewise: three blocks beside the shards. Slices share activations out too; a stage keeps those of its own blocks only.
        """
        split = layout.shard * layout.tensor * layout.pipeline
        gathered = 3 * self.largest_block // layout.tensor if layout.shard > 1 else 0
        return self.state // split + gathered + self.activations // (layout.tensor * layout.pipeline)


def choose_strategy(
    sizes: ModelSizes,
    plan: ParallelPlan,
    parallelism: Parallelism,
    *,
    num_ranks: int,
    ranks_per_node: int,
    device_bytes: int,
    gradient_sync: GradientSync | None = None,
) -> tuple[Parallelism, str]:
    """Resolve "auto": the first in order of speed that fits a device's memory, and the reason in words.

    Copies first (least communication), then shards, then slices of matrices within a machine on top of shards, then slices alone,
    then stages over all ranks, for a pipeline talks least across machines.

    Args:
        device_bytes: memory that one rank may use.

    Raises:
        ConfigError: nothing that the model supports fits.
    """
    room = int(device_bytes * USABLE_SHARE)
    needs: list[tuple[int, str]] = []
    for strategy, tensor_ranks in _candidates(num_ranks, ranks_per_node):
        if num_ranks > 1 and gradient_sync is not None and gradient_sync.hook != "none" and strategy != "ddp":
            continue
        layout = _layout(strategy, tensor_ranks, num_ranks, num_ranks) if num_ranks > 1 else Layout()
        if not isinstance(layout, Layout) or _problem(layout, plan) is not None:
            continue
        need = sizes.per_rank(layout)
        if need <= room:
            chosen = Parallelism(
                strategy=strategy,
                tensor_ranks=layout.tensor if layout.tensor > 1 else parallelism.tensor_ranks,
                pipeline_ranks=layout.pipeline if layout.pipeline > 1 else parallelism.pipeline_ranks,
                pipeline_schedule=parallelism.pipeline_schedule,
                microbatches=parallelism.microbatches,
            )
            return chosen, _reason(layout, need, needs, room)
        needs.append((need, layout.describe()))
    least, description = min(needs)
    raise ConfigError(
        f"the model does not fit: a rank needs {_size(least)} at the least ({description}), a device has room for {_size(room)}; "
        "use more ranks, devices with more memory, fewer rows per rank, or a smaller model"
    )


def _candidates(num_ranks: int, ranks_per_node: int) -> list[tuple[StrategyName, int]]:
    """Strategies with their tensor ranks, the fastest first."""
    slices = [number for number in range(2, min(ranks_per_node, num_ranks) + 1) if num_ranks % number == 0]
    mixed: list[tuple[StrategyName, int]] = [("fsdp+tensor", number) for number in slices if number < num_ranks]
    whole: list[tuple[StrategyName, int]] = [("tensor", num_ranks)] if num_ranks <= ranks_per_node else []
    return [("ddp", 1), ("fsdp", 1), *mixed, *whole, ("pipeline", 1)]


def _reason(layout: Layout, need: int, failed: list[tuple[int, str]], room: int) -> str:
    fits = f"{layout.describe()}: a rank needs about {_size(need)} of {_size(room)}"
    if not failed:
        return fits
    return f"{fits}; {', '.join(f'{description} would need {_size(need)}' for need, description in failed)}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
