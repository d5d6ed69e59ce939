"""What to train and how, as plain JSON: what the launcher writes and every rank reads."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

# What may differ between a training and its resumption without changing what is being trained.
_NOT_IDENTIFYING = (
    "work_dir",
    "num_ranks",
    "batch_size_per_rank",
    "checkpoint_every_steps",
    "heartbeat_timeout_seconds",
    "max_restarts",
    "budget_seconds",
)


@dataclass(frozen=True)
class TrainSpec:
    """One training. Values are checked by the caller (`ml.config.TrainConfig` has the bounds).

    Args:
        job: "module:Class" of a `TrainingJob`. Chosen by code, never by a form.
        job_arguments: keyword arguments of that class, JSON; it also gets `work_dir`.
        work_dir: holds everything that survives a kill; one training per folder.
        epochs: "auto" is decided from the number of rows and the budget.
        warmup_fraction: share of all steps over which the learning rate rises to its peak.
        precision: "auto" is bf16 where the hardware has it and a few measured steps are faster with it.
        validate_every_steps: "epoch" validates at the end of each epoch, but at most ten times in all.
        patience: validations without improvement of the loss before stopping.
        budget_seconds: wall time from the launch; rows and epochs are cut to fit it.
        heartbeat_timeout_seconds: a rank that is silent this long is lost.
        max_restarts: restarts from the last checkpoint after a lost rank.
    """

    job: str
    work_dir: Path
    job_arguments: dict[str, Any] = field(default_factory=dict)
    num_ranks: int = 2
    batch_size_per_rank: int = 32
    epochs: int | Literal["auto"] = "auto"
    learning_rate: float = 5e-5
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every_steps: int = 50
    validate_every_steps: int | Literal["epoch"] = "epoch"
    patience: int = 2
    seed: int = 0
    budget_seconds: float = 3600.0
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
        return cls(**{**values, "work_dir": Path(values["work_dir"])})
