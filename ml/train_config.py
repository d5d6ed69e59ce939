"""The `train` section of a run's config: the settings of `ml.training`, described and bounded."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ml.training.spec import GradientSync, Optimizer, Parallelism


class Section(BaseModel):
    """A part of a config: frozen, and without room for what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ParallelismConfig(Section):
    """How the model is split over the ranks, see `ml.training.spec.Parallelism`."""

    strategy: Literal["auto", "ddp", "fsdp", "tensor", "pipeline", "ddp+tensor", "fsdp+tensor", "ddp+pipeline"] = Field(
        default="auto", description="auto: from the size of the model, the memory and the devices"
    )
    tensor_ranks: int = Field(default=2, ge=2, le=64, description="ranks over which each layer's matrices are split")
    pipeline_ranks: int = Field(default=2, ge=2, le=64, description="stages of consecutive layers")
    pipeline_schedule: Literal["gpipe", "1f1b"] = Field(
        default="1f1b", description="1f1b holds fewer microbatches in memory; the result is the same"
    )
    microbatches: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default="auto", description="parts of a batch that are under way in a pipeline at once; auto: twice the stages"
    )


class GradientSyncConfig(Section):
    """How gradients are averaged over data-parallel ranks, see `ml.training.spec.GradientSync`."""

    bucket_mb: Annotated[float, Field(gt=0, le=4096)] | Literal["auto"] = Field(
        default="auto", description="MiB that travel at once; auto: measured before the first step"
    )
    bucket_views: bool = Field(default=True, description="gradients are views into the buckets: one copy less")
    static_graph: bool = Field(default=False, description="the same parameters get a gradient in every step")
    overlap: bool = Field(default=True, description="buckets travel while the backward pass still runs")
    hook: Literal["none", "fp16", "bf16", "powersgd"] = Field(
        default="none", description="compression of what travels; all but none change the gradient; bf16 needs NCCL"
    )
    powersgd_rank: int = Field(default=4, ge=1, le=1024, description="of the two factors that travel in place of a matrix")
    accumulation_steps: int = Field(default=1, ge=1, le=1024, description="passes over parts of a batch before the gradient travels once")


class TrainConfig(Section):
    """The supervised training loop. "auto" is decided once, from the data and the machine, and kept on resume."""

    num_ranks: int = Field(default=2, ge=1, le=64)
    batch_size_per_rank: int = Field(default=32, ge=1, le=4096)
    max_tokens_per_batch: int | None = Field(
        default=None, ge=1, description="of a step, padding included; long rows then come in fewer rows"
    )
    parallelism: ParallelismConfig = ParallelismConfig()
    gradient_sync: GradientSyncConfig = GradientSyncConfig()
    epochs: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] = "auto"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        default="auto", description="auto: small for a pretrained encoder, larger for random weights or a mostly new vocabulary"
    )
    warmup_fraction: float = Field(default=0.1, ge=0, le=0.9)
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        default="auto", description="auto: the fastest that is measured; fp16 and tf32 need a GPU"
    )
    compile: Literal["auto", "on", "off"] = Field(default="auto", description="torch.compile; auto: where it gains more than it costs")
    load_aware: bool = Field(
        default=False, description="ranks get rows of each batch by their measured speed; runs then differ in the last digits"
    )
    prefetch_batches: int = Field(default=2, ge=0, le=64, description="batches that are made ready in advance")
    class_weights: Literal["auto", "none", "balanced"] = Field(
        default="auto", description="auto: balanced when classes differ by more than 3:1"
    )
    poisoned_batch: Literal["skip", "rollback", "stop"] = Field(
        default="skip", description="a batch whose loss or gradient is not finite: leave it out, go back to the last checkpoint, or end"
    )
    max_poisoned_batches: int = Field(default=3, ge=1, le=1000, description="so many in a row end the training")
    checkpoint_every_steps: int = Field(default=50, ge=1)
    asynchronous_checkpoints: bool = Field(default=True, description="checkpoints are written while training goes on")
    keep_last_checkpoints: int = Field(default=2, ge=1, le=100)
    validate_every_steps: Annotated[int, Field(ge=1)] | Literal["epoch"] = "epoch"
    watch: Literal["loss", "accuracy", "recall"] = Field(
        default="loss", description="validation metric of early stopping and of the best weights"
    )
    patience: int = Field(default=2, ge=1, description="validations without improvement before stopping")
    collective_timeout_seconds: float = Field(default=300, gt=0, description="a rank that waits so long for another ends with an error")
    heartbeat_timeout_seconds: float = Field(default=120, gt=0, description="a rank that is silent this long is lost")
    max_restarts: int = Field(default=2, ge=0, description="restarts from the last checkpoint after a lost rank")


# Fields that have the same name and meaning in `TrainSpec`.
_SAME = (
    "num_ranks",
    "batch_size_per_rank",
    "max_tokens_per_batch",
    "epochs",
    "precision",
    "compile",
    "load_aware",
    "prefetch_batches",
    "poisoned_batch",
    "max_poisoned_batches",
    "checkpoint_every_steps",
    "asynchronous_checkpoints",
    "keep_last_checkpoints",
    "validate_every_steps",
    "watch",
    "patience",
    "collective_timeout_seconds",
    "heartbeat_timeout_seconds",
    "max_restarts",
)


def settings_of_training(config: TrainConfig, *, learning_rate: float) -> dict:
    """The arguments of `TrainSpec` that a config gives; job, folder, seed and budget are the caller's."""
    optimizer = Optimizer(
        name=config.optimizer,
        learning_rate=learning_rate,
        warmup_fraction=config.warmup_fraction,
        weight_decay=config.weight_decay,
        gradient_clip=config.gradient_clip,
    )
    return {
        **{name: getattr(config, name) for name in _SAME},
        "parallelism": Parallelism(**config.parallelism.model_dump()),
        "gradient_sync": GradientSync(**config.gradient_sync.model_dump()),
        "optimizer": optimizer,
    }
