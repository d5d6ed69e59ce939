"""The YAML file of `python -m ml.training`: what a person writes, described and bounded, and the `TrainSpec` that it stands for.

It is the caller's side: `ml.training` itself knows plain dataclasses only. `model` and `data` name one of the kinds below, never
an import path.
"""

import fcntl
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field

from ml.config import nearest, validate
from ml.errors import ConfigError
from ml.text_classification.settings import TextClassifierConfig
from ml.train_config import GradientSyncConfig, LoopSettings, ParallelismConfig, Section, TrainConfig, spec_fields
from ml.training.spec import Nodes, Optimizer, TrainSpec
from ml.training.uploads import CheckpointSink

LANGUAGE_MODEL_JOB = "ml.language_model.job:LanguageModelJob"


class OptimizerSection(Section):
    """AdamW or SGD. Vectors (biases, norms) do not decay."""

    name: Literal["adamw", "sgd"] = Field(default="adamw", description="adamw, or sgd with momentum")
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        default="auto", description="at its peak; auto: by the kind of model (text-classifier: by its encoder; language-model: 3e-4)"
    )
    warmup_fraction: float = Field(default=0.1, ge=0, le=0.9, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(default=0.01, ge=0, le=10, description="of matrices")
    gradient_clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="adamw: memory of the mean gradient")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="adamw: memory of its square")
    epsilon: float = Field(default=1e-8, gt=0, le=1, description="adamw: added to the denominator")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="sgd")


class CheckpointSection(Section):
    """Checkpoints are whole or not there; a training that was interrupted goes on from the newest."""

    every_steps: int = Field(default=50, ge=1, description="so many steps are lost at most when a rank is killed")
    asynchronous: bool = Field(default=True, description="written while training goes on")
    keep_last: int = Field(default=2, ge=1, le=100, description="older ones are deleted")
    object_storage: bool = Field(default=False, description="copy each to the object store that MILLSTREAM_S3_ENDPOINT names")


class TrainingFile(LoopSettings):
    """One training, as the file says it."""

    work_dir: str = Field(min_length=1, description="folder of all that survives a kill; machines of one training share it")
    model: dict[str, Any] = Field(description="`kind`, and the settings of that kind of model")
    data: dict[str, Any] = Field(description="where the rows come from; depends on the kind of model")

    backend: Literal["auto", "gloo", "nccl"] = Field(default="auto", description="auto: nccl where each rank has a GPU, else gloo")
    world_size: int = Field(default=2, ge=1, le=65_536, description="ranks (processes) over all machines")
    num_nodes: int = Field(default=1, ge=1, le=4096, description="machines; each has world_size / num_nodes ranks")
    min_nodes: int | None = Field(default=None, ge=1, le=4096, description="go on with as few as these; by default all are needed")
    rank: int = Field(default=0, ge=0, lt=4096, description="of this machine, from 0; PET_NODE_RANK and JOB_COMPLETION_INDEX go before it")
    master_addr: str = Field(default="127.0.0.1", min_length=1, description="where the machines meet; node 0 listens there")
    master_port: int = Field(default=29500, ge=1, le=65_535, description="port of that")
    interface: str | None = Field(default=None, description="network interface between machines; by default by the route to master_addr")

    optimizer: OptimizerSection = Field(default=OptimizerSection(), description="how weights are changed")
    parallelism: ParallelismConfig = Field(default=ParallelismConfig(), description="how the model is split over the ranks")
    gradient_sync: GradientSyncConfig = Field(default=GradientSyncConfig(), description="how gradients are averaged over the ranks")
    batch_size_per_rank: int = Field(
        default=32, ge=1, le=65_536, description="rows; times world_size it is the rows of a step, which stay when machines are lost"
    )
    epochs: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = Field(
        default="auto", description="passes over the data; auto: by the number of rows and the budget"
    )

    checkpoints: CheckpointSection = Field(default=CheckpointSection(), description="what a training resumes from")
    patience: int = Field(default=2, ge=1, le=100_000, description="validations without improvement before stopping")
    budget_minutes: float = Field(default=60, gt=0, le=60 * 24 * 365, description="wall time; rows and epochs are cut to fit it")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of every random choice")
    collective_timeout_seconds: float = Field(default=300, gt=0, le=86_400, description="a rank that waits so long for another one ends")
    heartbeat_timeout_seconds: float = Field(default=120, gt=0, le=86_400, description="a rank that is silent this long is lost")
    max_restarts: int = Field(default=2, ge=0, le=10_000, description="from the last checkpoint, after a lost rank or machine")


class TextTables(Section):
    """Prepared tables of a text classifier, as the pipeline's split stage writes them."""

    train: str = Field(min_length=1, description="Parquet file with columns `text` and `target` (class, from 0)")
    validation: str = Field(min_length=1, description="the same, of other rows")
    class_weights: Literal["auto", "none", "balanced"] = Field(default="auto", description="auto: balanced beyond 3:1")


class LanguageModelConfig(Section):
    """Sizes of a causal transformer, see `ml.language_model.transformer`."""

    vocab_size: int | None = Field(default=None, ge=2, le=10_000_000, description="by default that of the shards")
    width: int = Field(ge=8, le=65_536, description="of the residual stream; a multiple of twice num_heads")
    num_layers: int = Field(ge=1, le=1000, description="blocks of attention and feed-forward")
    num_heads: int = Field(ge=1, le=1024, description="of attention")
    hidden: int | None = Field(default=None, ge=1, description="of the feed-forward part; by default 8/3 of the width, a multiple of 64")
    max_length: int | None = Field(default=None, ge=2, le=1_000_000, description="tokens of a row; by default those of the shards")
    tied_head: bool = Field(default=False, description="the output matrix is the embedding table")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of activations that are left out")


class TokenShards(Section):
    """Tokenized text in shards, written by `python -m ml.language_model.prepare`; read as training goes."""

    shards: str = Field(min_length=1, description="folder, or s3://bucket/prefix of the store that MILLSTREAM_S3_ENDPOINT names")
    validation_shards: str | None = Field(default=None, description="the same, of other text; by default the last hundredth of the rows")
    cache_gb: float = Field(default=1.0, gt=0, le=100_000, description="GiB of shards that are kept on this machine's disk")
    cache_dir: str | None = Field(default=None, description="where; a folder on each machine's own disk when they share the work folder")


@dataclass(frozen=True)
class Kind:
    """A kind of model that a file may name.

    Args:
        describe: the file, its model section and its data section -> job, arguments of the job, learning rate.
    """

    model: type[BaseModel]
    data: type[BaseModel]
    describe: Callable[[TrainingFile, Any, Any], tuple[str, dict[str, Any], float]]


def read_training_file(
    path: Path, overrides: dict[str, Any] | None = None, nodes: dict[str, Any] | None = None
) -> tuple[TrainSpec, CheckpointSink | None]:
    """The training that a file describes, its data prepared in the work folder, and where checkpoints are copied to.

    Args:
        overrides: path in the file -> value, e.g. "optimizer.learning_rate".
        nodes: fields of `ml.training.spec.Nodes` that go before the file's.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value is out of bounds; names the file, the path and the value.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: settings are expected, such as `work_dir: /data/training`, found {type(values).__name__}")
    try:
        for dotted, value in (overrides or {}).items():
            _set(values, "world_size" if dotted == "num_ranks" else dotted, value)
        for name, value in (nodes or {}).items():
            values[{"count": "num_nodes", "min_count": "min_nodes"}.get(name, name)] = value
        file: TrainingFile = validate(TrainingFile, values, "")
        kind, model = _kind_of(file)
        data = validate(kind.data, file.data, "data")
        spec = _spec(file, *kind.describe(file, model, data))
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error
    return spec, _open_checkpoints(spec) if file.checkpoints.object_storage else None


def _kind_of(file: TrainingFile) -> tuple[Kind, Any]:
    settings = dict(file.model)
    name = settings.pop("kind", None)
    if name not in KINDS:
        raise ConfigError(f"model.kind: found {name!r}{nearest(str(name), KINDS)}")
    return KINDS[name], validate(KINDS[name].model, settings, "model")


def _spec(file: TrainingFile, job: str, job_arguments: dict[str, Any], learning_rate: float) -> TrainSpec:
    optimizer = file.optimizer.model_dump()
    if optimizer["learning_rate"] == "auto":
        optimizer["learning_rate"] = learning_rate
    settings = spec_fields(file) | {
        "job": job,
        "job_arguments": job_arguments,
        "work_dir": Path(file.work_dir),
        "num_ranks": file.world_size,
        "nodes": Nodes(
            count=file.num_nodes,
            min_count=file.min_nodes,
            rank=file.rank,
            master_addr=file.master_addr,
            master_port=file.master_port,
            backend=file.backend,
            interface=file.interface,
        ),
        "optimizer": Optimizer(**optimizer),
        "checkpoint_every_steps": file.checkpoints.every_steps,
        "asynchronous_checkpoints": file.checkpoints.asynchronous,
        "keep_last_checkpoints": file.checkpoints.keep_last,
        "budget_seconds": file.budget_minutes * 60,
    }
    return TrainSpec(**settings)


def _describe_text_classifier(file: TrainingFile, model: TextClassifierConfig, data: TextTables) -> tuple[str, dict[str, Any], float]:
    """Tokenizes the tables into the work folder, once: machines that share it come one after the other."""
    import pandas as pd

    from ml.artifacts import SplitDataset
    from ml.solution import TrainContext
    from ml.text_classification.training import training_spec

    for name in ("train", "validation"):
        table = Path(getattr(data, name))
        if not table.is_file():
            raise ConfigError(f"data.{name}: there is no file {table} ({table.resolve()})")
    targets = pd.read_parquet(data.train, columns=["target"])["target"].to_numpy(dtype="int64")
    labels = tuple(str(label) for label in range(int(targets.max()) + 1))
    work_dir = Path(file.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        spec = training_spec(
            TrainContext(
                solution="",
                train_table=Path(data.train),
                validation_table=Path(data.validation),
                # Of the splits nothing but the classes is asked for.
                splits=SplitDataset.model_construct(labels=labels),
                config=TrainConfig(class_weights=data.class_weights, learning_rate=file.optimizer.learning_rate),
                model=model,
                budget_seconds=file.budget_minutes * 60,
                seed=file.seed,
                work_dir=work_dir,
                output_dir=work_dir,
            )
        )
    return spec.job, spec.job_arguments, spec.optimizer.learning_rate


def _describe_language_model(file: TrainingFile, model: LanguageModelConfig, data: TokenShards) -> tuple[str, dict[str, Any], float]:
    if model.width % (2 * model.num_heads):
        raise ConfigError(f"model.width: must be a multiple of twice num_heads ({2 * model.num_heads}), found {model.width}")
    sizes = model.model_dump(exclude_none=True)
    # The usual size of a SwiGLU with as many parameters as a plain one of four times the width (Shazeer 2020).
    sizes.setdefault("hidden", math.ceil(8 * model.width / (3 * 64)) * 64)
    arguments = {"shards": data.shards, "model": sizes, "validation_shards": data.validation_shards}
    cache = {"cache_bytes": int(data.cache_gb * 2**30), "cache_dir": data.cache_dir}
    return LANGUAGE_MODEL_JOB, arguments | cache, 3e-4


KINDS: dict[str, Kind] = {
    "text-classifier": Kind(TextClassifierConfig, TextTables, _describe_text_classifier),
    "language-model": Kind(LanguageModelConfig, TokenShards, _describe_language_model),
}


def _open_checkpoints(spec: TrainSpec) -> CheckpointSink:
    from ml.storage.checkpoints import StoredCheckpoints
    from ml.storage.connect import open_artifact_store

    return StoredCheckpoints(open_artifact_store(), spec.fingerprint)


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {section!r} is a value, not a section")
    values[last] = value
