"""The `train` section of a run's config: the settings of `ml.training`, described and bounded."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ml.training.spec import GradientSync, Optimizer, Parallelism, TrainSpec


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


class LoopSettings(Section):
    """Settings of the training loop that mean the same wherever a training is described."""

    max_tokens_per_batch: int | None = Field(
        default=None, ge=1, description="of a step, padding included; long rows then come in fewer rows"
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        default="auto", description="auto: the fastest that is measured; fp16 and tf32 need a GPU"
    )
    compile: Literal["auto", "on", "off"] = Field(default="auto", description="torch.compile; auto: where it gains more than it costs")
    load_aware: bool = Field(
        default=False, description="ranks get rows of each batch by their measured speed; runs then differ in the last digits"
    )
    prefetch_batches: int = Field(default=2, ge=0, le=64, description="batches that are made ready in advance")
    poisoned_batch: Literal["skip", "rollback", "stop"] = Field(
        default="skip", description="a batch whose loss or gradient is not finite: leave it out, go back to the last checkpoint, or end"
    )
    max_poisoned_batches: int = Field(default=3, ge=1, le=1000, description="so many in a row end the training")
    validate_every_steps: Annotated[int, Field(ge=1)] | Literal["epoch"] = Field(
        default="epoch", description="epoch: at the end of each, but at most ten times in all"
    )
    watch: Literal["loss", "accuracy", "recall"] = Field(
        default="loss", description="validation metric of early stopping and of the best weights"
    )


class TrainConfig(LoopSettings):
    """The supervised training loop. "auto" is decided once, from the data and the machine, and kept on resume."""

    num_ranks: int = Field(default=2, ge=1, le=64)
    batch_size_per_rank: int = Field(default=32, ge=1, le=4096)
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
    class_weights: Literal["auto", "none", "balanced"] = Field(
        default="auto", description="auto: balanced when classes differ by more than 3:1"
    )
    checkpoint_every_steps: int = Field(default=50, ge=1)
    asynchronous_checkpoints: bool = Field(default=True, description="checkpoints are written while training goes on")
    keep_last_checkpoints: int = Field(default=2, ge=1, le=100)
    patience: int = Field(default=2, ge=1, description="validations without improvement before stopping")
    collective_timeout_seconds: float = Field(default=300, gt=0, description="a rank that waits so long for another ends with an error")
    heartbeat_timeout_seconds: float = Field(default=120, gt=0, description="a rank that is silent this long is lost")
    max_restarts: int = Field(default=2, ge=0, description="restarts from the last checkpoint after a lost rank")


def spec_fields(section: Section) -> dict[str, Any]:
    """Arguments of `TrainSpec`: all its fields that a section has under the same name, how the model is split among them."""
    values = {field.name: getattr(section, field.name) for field in fields(TrainSpec) if field.name in type(section).model_fields}
    plain = {"parallelism": Parallelism, "gradient_sync": GradientSync}
    return values | {name: plain[name](**values[name].model_dump()) for name in plain}


def settings_of_training(config: TrainConfig, *, learning_rate: float) -> dict:
    """The arguments of `TrainSpec` that a config gives; job, folder, seed and budget are the caller's."""
    optimizer = Optimizer(
        name=config.optimizer,
        learning_rate=learning_rate,
        warmup_fraction=config.warmup_fraction,
        weight_decay=config.weight_decay,
        gradient_clip=config.gradient_clip,
    )
    return spec_fields(config) | {"optimizer": optimizer}
