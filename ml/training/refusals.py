"""What cannot work is refused before anything is started: on the caller's side, without waiting for a rank."""

from ml.training.gradient_sync import check_gradient_sync
from ml.training.layout import check_layout
from ml.training.nodes import check_nodes, num_local_ranks
from ml.training.spec import GradientSync, Parallelism, TrainSpec

_ALWAYS_POSSIBLE = ("auto", "fp32", "bf16")


def check_spec(spec: TrainSpec) -> None:
    """Look at everything that the spec asks for by name. What it leaves to "auto" needs no look, and no torch.

    Raises:
        ConfigError: with the reason, and the nearest setting that works.
        TrainingError: there is no such job.
    """
    check_nodes(spec)
    if spec.parallelism == Parallelism() and spec.gradient_sync == GradientSync() and spec.precision in _ALWAYS_POSSIBLE:
        return
    import torch

    from ml.training.job import load_job, plan_of
    from ml.training.precision import check_precision
    from ml.training.ranks import choose_backend

    num_gpus = torch.cuda.device_count()
    if spec.precision != "auto":
        check_precision(spec.precision, "cuda" if num_gpus else "cpu")
    if spec.num_ranks == 1:
        return
    job = load_job(spec)
    backend = choose_backend(spec.nodes.backend, num_gpus, num_local_ranks(spec))
    strategy = "ddp" if spec.parallelism.strategy == "auto" else spec.parallelism.strategy
    check_gradient_sync(spec.gradient_sync, backend, strategy, find_unused_parameters=job.find_unused_parameters)
    if spec.parallelism.strategy != "auto":
        check_layout(spec.parallelism, spec.num_ranks, plan_of(job), spec.gradient_sync)
