"""What to train and how, as plain JSON: what the launcher writes and every rank reads."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

StrategyName = Literal["ddp", "fsdp", "tensor", "pipeline", "ddp+tensor", "fsdp+tensor", "ddp+pipeline"]
HookName = Literal["none", "fp16", "bf16", "powersgd"]
PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]
PoisonPolicy = Literal["skip", "rollback", "stop"]
WatchedMetric = Literal["loss", "accuracy", "recall"]

# What may differ between a training and its resumption without changing what is being trained.
_NOT_IDENTIFYING = (
    "work_dir",
    "num_ranks",
    "batch_size_per_rank",
    "nodes",
    "parallelism",
    "gradient_sync",
    "compile",
    "load_aware",
    "prefetch_batches",
    "poisoned_batch",
    "max_poisoned_batches",
    "checkpoint_every_steps",
    "asynchronous_checkpoints",
    "keep_last_checkpoints",
    "collective_timeout_seconds",
    "heartbeat_timeout_seconds",
    "max_restarts",
    "budget_seconds",
)


@dataclass(frozen=True)
class Parallelism:
    """How the model is split over the ranks.

    Args:
        strategy: "auto" is chosen from the size of the model, the memory and the devices.
        tensor_ranks: ranks over which each layer's matrices are split, in the strategies with "tensor".
        pipeline_ranks: stages of consecutive layers, in the strategies with "pipeline".
        microbatches: parts of a batch that are under way in a pipeline at once; "auto" is twice the stages.
    """

    strategy: StrategyName | Literal["auto"] = "auto"
    tensor_ranks: int = 2
    pipeline_ranks: int = 2
    pipeline_schedule: Literal["gpipe", "1f1b"] = "1f1b"
    microbatches: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class GradientSync:
    """How gradients of data-parallel ranks are averaged.

    Args:
        bucket_mb: gradients travel in buckets of this size (MiB); "auto" is measured before the first step.
        bucket_views: gradients are views into the buckets, which saves a copy and the memory of it.
        static_graph: the same parameters get a gradient in every step; allows more overlap.
        overlap: buckets travel while the backward pass still runs; otherwise all of them after it.
        hook: compression of what travels. All but "none" change the gradient.
        accumulation_steps: passes over parts of a batch before the gradient travels once.
    """

    bucket_mb: float | Literal["auto"] = "auto"
    bucket_views: bool = True
    static_graph: bool = False
    overlap: bool = True
    hook: HookName = "none"
    powersgd_rank: int = 4
    accumulation_steps: int = 1


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or plain SGD with momentum. Vectors (biases, norms) do not decay."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 5e-5
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.0


@dataclass(frozen=True)
class Nodes:
    """The machines of one training. With one node nothing listens beyond the loopback interface.

    Args:
        count: machines that take part; `num_ranks` of the training is their ranks together.
        min_count: go on with as few as these when machines are lost.
        rank: of this machine, 0 to count - 1.
        master_addr, master_port: where the machines meet; node 0 listens there.
        backend: "auto" is nccl where every rank has a GPU of its own, else gloo.
        interface: network interface for gloo and NCCL between machines; found by the route to `master_addr` when empty.
    """

    count: int = 1
    min_count: int | None = None
    rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    interface: str | None = None


@dataclass(frozen=True)
class TrainSpec:
    """One training. Values are checked by the caller (`ml.config.TrainConfig` has the bounds).

    Args:
        job: "module:Class" of a `TrainingJob`. Chosen by code, never by a form.
        job_arguments: keyword arguments of that class, JSON; it also gets `work_dir`.
        work_dir: holds everything that survives a kill; one training per folder. Machines of one training share it.
        num_ranks: processes, over all nodes.
        batch_size_per_rank: rows; times `num_ranks` it is the global batch, which stays when ranks are lost or added.
        epochs: "auto" is decided from the number of rows and the budget.
        max_tokens_per_batch: of a global batch, padding included; batches of long rows then have fewer rows.
        precision: "auto" is bf16 where the hardware has it and a few measured steps are faster with it.
        compile: "auto" where a few measured steps gain more than compiling costs.
        load_aware: ranks get rows of each batch by their measured speed, not equal shares; sums are then in another order in each run.
        prefetch_batches: batches that are made ready in advance.
        poisoned_batch: what to do with a batch whose loss or gradient is not finite.
        max_poisoned_batches: after so many in a row the training ends with an error.
        validate_every_steps: "epoch" validates at the end of each epoch, but at most ten times in all.
        watch: the validation metric of early stopping and of the best checkpoint.
        patience: validations without improvement before stopping.
        budget_seconds: wall time from the launch; rows and epochs are cut to fit it.
        collective_timeout_seconds: a rank that waits so long for another one ends with an error.
        heartbeat_timeout_seconds: a rank that is silent this long is lost.
        max_restarts: restarts from the last checkpoint after a lost rank.
    """

    job: str
    work_dir: Path
    job_arguments: dict[str, Any] = field(default_factory=dict)
    num_ranks: int = 2
    nodes: Nodes = Nodes()
    parallelism: Parallelism = Parallelism()
    gradient_sync: GradientSync = GradientSync()
    optimizer: Optimizer = Optimizer()
    batch_size_per_rank: int = 32
    max_tokens_per_batch: int | None = None
    epochs: int | Literal["auto"] = "auto"
    precision: PrecisionName | Literal["auto"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    load_aware: bool = False
    prefetch_batches: int = 2
    poisoned_batch: PoisonPolicy = "skip"
    max_poisoned_batches: int = 3
    checkpoint_every_steps: int = 50
    asynchronous_checkpoints: bool = True
    keep_last_checkpoints: int = 2
    validate_every_steps: int | Literal["epoch"] = "epoch"
    watch: WatchedMetric = "loss"
    patience: int = 2
    seed: int = 0
    budget_seconds: float = 3600.0
    collective_timeout_seconds: float = 300.0
    heartbeat_timeout_seconds: float = 120.0
    max_restarts: int = 2

    @property
    def global_batch_size(self) -> int:
        return self.num_ranks * self.batch_size_per_rank

    @property
    def fingerprint(self) -> str:
        """Identifies what is trained: a checkpoint may be resumed under another machine's layout, not under another recipe."""
        identifying = {name: value for name, value in asdict(self).items() if name not in _NOT_IDENTIFYING}
        identifying["global_batch_size"] = self.global_batch_size
        return hashlib.sha256(json.dumps(identifying, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> "TrainSpec":
        values = json.loads(text)
        return cls(
            **{
                **values,
                "work_dir": Path(values["work_dir"]),
                "nodes": Nodes(**values["nodes"]),
                "parallelism": Parallelism(**values["parallelism"]),
                "gradient_sync": GradientSync(**values["gradient_sync"]),
                "optimizer": Optimizer(**values["optimizer"]),
            }
        )
