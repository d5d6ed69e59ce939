"""How data-parallel ranks average their gradients: options and hooks of DDP, what is refused, and how many bytes travel.

    none        exact but for the order of additions
    fp16, bf16  the gradient is rounded to 16 bits on the way: half the bytes, relative error 2^-11 and 2^-8 of each value
    powersgd    each matrix travels as two thin ones (Vogels et al. 2019, "PowerSGD", algorithm 1), what was lost is added
                to the next step's gradient (error feedback); vectors and small matrices travel whole

PowerSGD keeps what was lost in each rank. That is not in a checkpoint: it belongs to buckets, which another number of ranks
or another bucket size lays out anew. After a resume it starts from nothing, with some exact steps first (`resume_note`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ml.errors import ConfigError
from ml.training.spec import GradientSync, StrategyName

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

MIB = 2**20
# Steps that PowerSGD leaves exact: DDP lays its buckets out anew after the first one, and early gradients matter most.
POWERSGD_START_STEP = 10
# A matrix travels as two thin ones when these have less than half its values.
POWERSGD_MIN_RATE = 2
# Keeps the columns of a gradient that is zero from becoming 0/0.
POWERSGD_EPSILON = 1e-8
# Larger than any model: all gradients in one bucket, which is ready when the backward pass is done.
ONE_BUCKET_MB = 2**20


def check_gradient_sync(sync: GradientSync, backend: str, strategy: StrategyName, *, find_unused_parameters: bool = False) -> None:
    """Refuse what cannot work, before anything is started.

    Args:
        backend: "gloo" or "nccl".
        find_unused_parameters: of the job: which parameters get a gradient may change from step to step.

    Raises:
        ConfigError: with the reason, and the nearest setting that works.
    """
    if sync.bucket_mb != "auto" and sync.bucket_mb <= 0:
        raise ConfigError(f"gradient_sync.bucket_mb is {sync.bucket_mb}; give a size above 0, or auto")
    if sync.accumulation_steps < 1:
        raise ConfigError(f"gradient_sync.accumulation_steps is {sync.accumulation_steps}; give 1 or more")
    if sync.hook == "powersgd" and sync.powersgd_rank < 1:
        raise ConfigError(f"gradient_sync.powersgd_rank is {sync.powersgd_rank}; give 1 or more")
    if sync.hook == "bf16" and backend != "nccl":
        raise ConfigError(f"gradient_sync.hook bf16 needs the backend nccl, this training has {backend}; fp16 works on it")
    if strategy != "ddp":
        if sync.hook != "none":
            raise ConfigError(
                f"gradient_sync.hook {sync.hook} compresses the buckets of DDP, which the strategy {strategy} does not have; "
                "set hook none, or the strategy ddp"
            )
        if sync.static_graph:
            raise ConfigError(f"gradient_sync.static_graph is an option of DDP, not of the strategy {strategy}; set it to false")
    if sync.static_graph and find_unused_parameters:
        raise ConfigError(
            "gradient_sync.static_graph needs the same parameters to get a gradient in every step, and this model says that they "
            "change (find_unused_parameters); set static_graph to false"
        )
    if sync.static_graph and sync.accumulation_steps > 1:
        raise ConfigError(
            f"gradient_sync.static_graph does not go with accumulation_steps {sync.accumulation_steps}: DDP learns the graph in the first "
            "pass, and that one must communicate; set static_graph to false"
        )


def ddp_options(sync: GradientSync) -> dict[str, Any]:
    """Keyword arguments of DistributedDataParallel. "auto", not yet measured, is DDP's own choice (25 MiB, the first of 1)."""
    bucket_mb = ONE_BUCKET_MB if not sync.overlap else (None if sync.bucket_mb == "auto" else sync.bucket_mb)
    return {"bucket_cap_mb": bucket_mb, "gradient_as_bucket_view": sync.bucket_views, "static_graph": sync.static_graph}


def apply_hook(ddp: "DistributedDataParallel", sync: GradientSync, backend: str) -> None:
    """Make the gradients of a wrapped model travel as `sync.hook` says. Call it before the first backward pass.

    Raises:
        ConfigError: the backend cannot do it.
    """
    check_gradient_sync(sync, backend, "ddp")
    if sync.hook == "none":
        return
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if sync.hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=ddp.process_group,
            matrix_approximation_rank=sync.powersgd_rank,
            start_powerSGD_iter=POWERSGD_START_STEP,
            min_compression_rate=POWERSGD_MIN_RATE,
            use_error_feedback=True,
            warm_start=True,
            orthogonalization_epsilon=POWERSGD_EPSILON,  # pyright: ignore[reportArgumentType] - its default is the int 0
        )
        ddp.register_comm_hook(state, _careful(powerSGD_hook.powerSGD_hook, in_order=backend != "nccl"))
        return
    hook = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}[sync.hook]
    ddp.register_comm_hook(ddp.process_group, hook)


def _careful(powersgd_hook: Callable, *, in_order: bool) -> Callable:
    """torch's PowerSGD, for trainings that skip a step, and for gloo.

    A gradient that is not finite is not kept: the step is skipped, but what was left over of it would spoil all later ones.

    Args:
        in_order: wait for each bucket before the next. PowerSGD calls all-reduce three times a bucket, the last two when the one
            before is done. Under NCCL that is in the order of the calls; gloo does it in threads of its own, so two ranks could
            mix up their buckets (torch 2.13 then ends with "collective mismatch"). This costs the overlap.
    """

    # DDP takes no annotations but its own.
    def powersgd(state, bucket):
        index = bucket.index()

        def keep_if_finite(future: "torch.futures.Future[torch.Tensor]") -> "torch.Tensor":
            gradient = future.value()
            # The averaged gradient, the same in all ranks, so all of them forget or none.
            if not bool(gradient.isfinite().all()):
                for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                    kept.pop(index, None)
            return gradient

        done = powersgd_hook(state, bucket).then(keep_if_finite)
        if in_order:
            done.wait()
        return done

    return powersgd


def resume_note(sync: GradientSync) -> str | None:
    """What a resumed training says about the state of the hook, if it has any."""
    if sync.hook != "powersgd":
        return None
    return f"PowerSGD starts anew: the next {POWERSGD_START_STEP} steps are exact, what it had left over before is lost"


@dataclass(frozen=True)
class GradientBytes:
    """Bytes of one averaged gradient.

    Args:
        whole: of the gradient itself.
        handed_over: to all-reduce, after compression.
        sent: by each rank, and received by it.
    """

    whole: int
    handed_over: int
    sent: float


def gradient_bytes(shapes: Iterable[Sequence[int]], item_bytes: int, sync: GradientSync, num_ranks: int) -> GradientBytes:
    """What one step sends, once warmed up. Accumulation does not change it: only the last pass communicates.

    A ring all-reduce of B bytes over n ranks sends 2 (n - 1) / n B from each rank (Patarasuk and Yuan 2009, "Bandwidth optimal
    all-reduce algorithms", section 3). PowerSGD sends (rows + columns) * rank values of a matrix.

    Args:
        shapes: of all parameters that get a gradient.
        item_bytes: of one value of the gradient: 4 in float32.
    """
    whole = handed_over = 0
    for shape in shapes:
        values = prod(shape)
        whole += values * item_bytes
        handed_over += _values_handed_over(shape, sync) * (2 if sync.hook in ("fp16", "bf16") else item_bytes)
    return GradientBytes(whole, handed_over, 2 * (num_ranks - 1) / num_ranks * handed_over)


def _values_handed_over(shape: Sequence[int], sync: GradientSync) -> int:
    values = prod(shape)
    if sync.hook != "powersgd" or not shape or not values:
        return values
    num_rows, num_columns = shape[0], values // shape[0]
    thin = (num_rows + num_columns) * min(num_rows, num_columns, sync.powersgd_rank)
    return thin if thin * POWERSGD_MIN_RATE < values else values
