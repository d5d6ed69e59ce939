"""The small frozen records that stages hand to each other. Bytes stay in object storage.

Every record is JSON, a few kilobytes at most, and says by digest which bytes it speaks of.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ml.errors import CompressionError


class Record(BaseModel):
    """Base of all records: immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ArtifactRef(Record):
    """Bytes in object storage, named by their own digest."""

    uri: str
    sha256: str
    size_bytes: int


class BundleRef(Record):
    """A bundle folder in object storage: relative file name -> bytes. Always holds `bundle.json`."""

    files: dict[str, ArtifactRef]

    @property
    def digest(self) -> str:
        """The digest of `bundle.json`, which itself lists the digest of every other file."""
        return self.files["bundle.json"].sha256

    @property
    def size_bytes(self) -> int:
        return sum(ref.size_bytes for ref in self.files.values())


class RawDataset(Record):
    """What was read, before any change: the source objects as they came, and one table of all rows.

    `table` is Parquet with the columns `row_id`, `text`, `label` (strings; empty cells are null) and, where the
    user named them, `split` and `group`.
    """

    source: str
    objects: dict[str, ArtifactRef] = Field(description="name of each source object -> its bytes")
    table: ArtifactRef
    num_rows: int
    encodings: dict[str, str] = Field(default_factory=dict, description="source object -> text encoding used")


class CleanDataset(Record):
    """`table`: Parquet (`row_id`, `text`, `label`, `group`, optional `split`). `dropped`: the same with a `reason`."""

    table: ArtifactRef
    dropped: ArtifactRef
    num_rows_in: int
    num_rows: int
    rule_counts: dict[str, int] = Field(description="cleaning rule -> rows it changed or dropped")


class RuleResult(Record):
    """One rule of a data contract, checked."""

    rule: str
    level: Literal["row", "table"]
    passed: bool
    num_failed: int = 0
    observed: str = ""


class ValidatedDataset(Record):
    """Rows that keep the contract. `quarantine` holds the others, each with the `rule` it broke."""

    table: ArtifactRef
    quarantine: ArtifactRef
    num_rows: int
    num_quarantined: int
    passed: bool
    results: tuple[RuleResult, ...]
    failures: tuple[str, ...] = Field(default=(), description="table-level failures, in words")
    contract: dict = Field(description="the contract as checked, labels frozen")


class SplitDataset(Record):
    """Three Parquet tables (`row_id`, `text`, `label`, `target`); no near-duplicate group is in two of them.

    `labels[i]` is the name of class `i`; `target` is that index.
    """

    train: ArtifactRef
    validation: ArtifactRef
    test: ArtifactRef
    labels: tuple[str, ...]
    positive_label: str | None = Field(default=None, description="for two classes: the class that *_positive speaks of")
    counts: dict[str, dict[str, int]] = Field(description="split -> label -> rows")
    summary: dict = Field(default_factory=dict, description="statistics for the report")
    warnings: tuple[str, ...] = ()


class BaselineModel(Record):
    """TF-IDF + logistic regression on the same split. Scores: Parquet of per-row scores."""

    validation_scores: ArtifactRef
    test_scores: ArtifactRef
    parameters: dict
    train_seconds: float


class TrainedModel(Record):
    """The uncompressed model, as a torch bundle."""

    bundle: BundleRef
    history: ArtifactRef = Field(description="JSONL: one object per logged step and per validation")
    num_parameters: int
    num_train_rows: int
    num_steps: int
    best_step: int
    resumed_from_step: int
    num_recomputed_steps: int
    seconds: float
    plan: dict = Field(description="what was decided before training: precision, rows, epochs, lengths")
    warnings: tuple[str, ...] = ()


# `Variant.method` of the uncompressed model in the serving runtime: what compressed variants stand beside.
EXPORT_METHOD = "export"


class Variant(Record):
    """One candidate for deployment. A method that failed has no bundle and says why."""

    name: str
    method: str
    parameters: dict = Field(default_factory=dict)
    bundle: BundleRef | None = None
    seconds: float = 0.0
    failure: str | None = None

    def require_bundle(self) -> BundleRef:
        """Raises CompressionError when the method failed."""
        if self.bundle is None:
            raise CompressionError(f"variant {self.name} was not made: {self.failure}")
        return self.bundle


class Interval(Record):
    """A point estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Timing(Record):
    """How a variant runs in a fresh process of its own, pinned to a number of threads.

    Ratios are to the uncompressed PyTorch model measured in turn with it (below 1 is faster or smaller,
    except throughput, where above 1 is faster); low and high span the 95 % bootstrap interval over rounds.
    """

    p50_ms: float
    p95_ms: float
    throughput_per_second: float
    memory_bytes: int
    peak_rss_bytes: int
    file_bytes: int
    load_seconds: float
    latency_ratio: Interval
    throughput_ratio: Interval
    memory_ratio: float
    file_ratio: float
    latency_ratio_to_onnx: Interval | None = None


class Timings(Record):
    """All variants timed in one go, on one machine."""

    timings: dict[str, Timing]
    machine: dict = Field(description="processor, cores and threads; timings of another machine are not comparable")


class Quality(Record):
    """Metrics of one model on one split, and its paired difference to the uncompressed model."""

    split: Literal["validation", "test"]
    num_rows: int
    metrics: dict[str, Interval]
    scores: ArtifactRef
    primary_drop_points: Interval | None = Field(
        default=None, description="uncompressed minus this, in points (hundredths), paired bootstrap"
    )


class Evaluation(Record):
    """One variant judged on one split; timings are measured once, beside the validation split."""

    variant: str
    quality: Quality
    timing: Timing | None = None

    def with_timing(self, timings: Timings) -> "Evaluation":
        return self.model_copy(update={"timing": timings.timings.get(self.variant)})


class ClauseResult(Record):
    """One clause of the compression contract, for one variant."""

    clause: str
    limit: float
    found: float
    passed: bool


class Decision(Record):
    """Which variant is to be deployed, and why, in words."""

    status: Literal["selected", "uncompressed", "rejected"]
    variant: str | None
    reasons: tuple[str, ...]
    clauses: dict[str, tuple[ClauseResult, ...]] = Field(default_factory=dict, description="variant -> clauses")


class Deployment(Record):
    """What the registry and the predictor did with the decision."""

    status: Literal["deployed", "unchanged", "rejected", "failed"]
    name: str
    version: str | None
    previous_version: str | None = None
    predict_url: str | None = None
    reasons: tuple[str, ...] = ()
