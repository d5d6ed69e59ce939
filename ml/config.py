"""What a run is asked to do (`RunRequest`) and what that resolves to (`RunConfig`, frozen and saved with the run).

`solutions/<name>/config.yaml` gives the defaults, its `profiles:` change some of them, the request changes the rest.
After `resolve_config` nobody reads YAML or the environment.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ml.errors import ConfigError
from ml.events import MODEL_NAME_PATTERN, Cause
from ml.solution import load_solution, solution_folder
from ml.train_config import Section, TrainConfig


class DataConfig(Section):
    """Where rows come from and which columns matter."""

    source: str = Field(description="file, folder, s3://bucket/prefix, or package:<import name>/<file>")
    text_column: str = "text"
    label_column: str = "label"
    split_column: str | None = Field(default=None, description="column that says train, validation or test")
    group_column: str | None = Field(default=None, description="rows of one group never part across splits")
    encoding: str | None = Field(default=None, description="text encoding of CSV and JSONL; detected when not given")
    where: dict[str, list[str]] = Field(default_factory=dict, description="column -> values to keep")
    label_names: dict[str, str] = Field(default_factory=dict, description="value in the data -> name of the class")
    positive_label: str | None = Field(default=None, description="for two classes: the class that *_positive metrics speak of")
    window: Literal["all", "last_n", "since"] = Field(default="all", description="which objects of a folder or prefix")
    window_last_n: int | None = Field(default=None, ge=1)
    window_since: str | None = Field(default=None, description="ISO date; objects modified at or after it")


class CleanConfig(Section):
    """Each rule can be switched off; each counts what it changed or dropped."""

    strip_html: bool = True
    strip_control_characters: bool = True
    fix_encoding: bool = True
    strip_urls: bool = True
    strip_label_leaks: bool = Field(default=True, description="ratings written in the text, such as 8/10")
    drop_exact_duplicates: bool = True
    drop_near_duplicates: bool = True
    near_duplicate_similarity: float = Field(default=0.9, gt=0.5, le=1.0, description="Jaccard similarity of word shingles")
    min_characters: int = Field(default=1, ge=1)


class SplitConfig(Section):
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    test_fraction: float = Field(default=0.2, gt=0, lt=0.5)
    salt: str = "millstream"
    min_rows_per_class: int = Field(default=10, ge=3)


class EvaluateConfig(Section):
    max_rows: int = Field(default=2000, ge=50, description="validation and test rows scored per variant, stratified")
    max_values: int = Field(
        default=80_000, ge=1_000, description="input values (tokens) scored per variant and split; long texts are fewer rows"
    )
    bootstrap_resamples: int = Field(default=1000, ge=100, le=20000)
    latency_length_tokens: int = Field(default=32, ge=4)
    throughput_batch_size: int = Field(default=32, ge=1)
    rounds: int = Field(default=12, ge=3, description="interleaved measuring rounds per variant")
    calls_per_round: int = Field(default=15, ge=3)
    memory_requests: int = Field(default=200, ge=20, description="mixed requests before memory is read")
    num_threads: int = Field(default=1, ge=1)


class CompressionContract(Section):
    """What a compressed variant must keep to be deployed, against the uncompressed PyTorch model on this machine."""

    max_drop_points: float = Field(default=1.0, ge=0, description="largest loss of the primary metric on validation, in points")
    max_latency_ratio: float = Field(default=0.6, gt=0, description="largest p50 latency at batch 1")
    max_memory_ratio: float = Field(default=0.6, gt=0, description="largest memory of the serving process")
    max_file_ratio: float = Field(default=0.6, gt=0, description="largest size of the weights")
    min_gain_over_baseline_points: float = Field(default=0.0, description="smallest gain over the simple baseline on test, in points")


class DeployConfig(Section):
    alias: Literal["champion"] = "champion"
    smoke_rows: int = Field(default=100, ge=1, description="held-out rows asked over HTTP and compared with the offline scores")


class RunConfig(Section):
    """All settings of one run, resolved. Saved as runs/<run_id>/config.json."""

    solution: str
    name: str = Field(pattern=f"^{MODEL_NAME_PATTERN}$")
    profile: str
    seed: int = Field(default=0, ge=0, lt=2**31)
    budget_minutes: float = Field(default=10, gt=0, le=7 * 24 * 60)
    cause: Cause = Field(default=Cause(), description="what asked for this run")
    contract: dict = Field(description="the data contract, see ml.data.contracts")
    data: DataConfig
    clean: CleanConfig = CleanConfig()
    split: SplitConfig = SplitConfig()
    model: dict = Field(default_factory=dict, description="the solution's own section")
    train: TrainConfig = TrainConfig()
    compression: tuple[dict, ...] = ()
    evaluate: EvaluateConfig = EvaluateConfig()
    select: CompressionContract = CompressionContract()
    deploy: DeployConfig = DeployConfig()


class RunRequest(BaseModel):
    """One training run. Every field may stay empty: then the model's own data is used or, while there is none, the demo data."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=lambda schema: _shape_form(schema))

    solution: str = Field(default="sentiment", description="the recipe: a folder of `solutions/`")
    profile: str = Field(default="quick", description="a set of defaults of the solution, see its `config.yaml`")
    data: str | None = Field(
        default=None,
        description="CSV, Parquet or JSONL file or folder on the machine that runs this, or `s3://bucket/prefix`; "
        "by default what lies under the model's name in the datasets bucket, else the demo data",
    )
    text_column: str | None = Field(default=None, description="column with the text; by default `text`")
    label_column: str | None = Field(default=None, description="column with the class; by default `label`")
    encoding: str | None = Field(default=None, description="text encoding of the files, e.g. `latin-1`; detected when empty")
    name: Annotated[str, Field(pattern=f"^{MODEL_NAME_PATTERN}$")] | None = Field(
        default=None,
        title="Model name",
        description="in the registry and in the URL: lower case letters, digits, `-` and `_`; "
        "by default the file name of the data, else the solution",
    )
    encoder: str | None = Field(
        default=None,
        description="pretrained model to start from: Hugging Face folder, `s3://` prefix, `package:<name>/<folder>` or hub name; "
        "by default that of the solution",
    )
    budget_minutes: float | None = Field(
        default=None,
        gt=0,
        le=7 * 24 * 60,
        title="Budget in minutes",
        description="time the run may take, more than 0 and at most 10080 (a week); large data is sampled to fit; "
        "by default that of the profile",
    )
    seed: int | None = Field(default=None, ge=0, lt=2**31, description="of every random choice, 0 or more; by default 0")
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        title="Other settings",
        description='any other setting by its path, as JSON, e.g. `{"train.epochs": 3, "select.max_drop_points": 0.5}`',
    )
    cause: Cause | None = Field(default=None, description="leave this empty: the event bridge says here what asked for the run")

    @field_validator("name", "data", "text_column", "label_column", "encoding", "encoder", mode="before")
    @classmethod
    def _empty_means_unset(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _is_about_what_there_is(self) -> "RunRequest":
        """Refused at once, before any task starts. Raises ConfigError, see `resolve_config`, which pydantic lets through as it is."""
        resolve_config(self)
        return self


def _shape_form(schema: dict[str, Any]) -> None:
    from ml.request_form import shape_form

    shape_form(schema)


def read_solution_config(solution: str) -> dict[str, Any]:
    """The `config.yaml` of a solution that there is."""
    return yaml.safe_load((solution_folder(solution) / "config.yaml").read_text(encoding="utf-8"))


def resolve_config(request: RunRequest) -> RunConfig:
    """Merge defaults, profile and request into one frozen config.

    Raises:
        ConfigError: an unknown solution, profile or key (with the nearest known name), or a value out of bounds.
    """
    from ml.compression.registry import validate_methods
    from ml.data.contracts import load_contract

    spec = load_solution(request.solution)
    settings = read_solution_config(request.solution)
    profiles = settings.pop("profiles", {})
    if request.profile not in profiles:
        raise ConfigError(f"{request.solution} has no profile {request.profile!r}{nearest(request.profile, profiles)}")
    settings = _merge(settings, profiles[request.profile])

    data = settings.setdefault("data", {})
    if request.data is not None:
        # Another source: nothing that the defaults say of the demo data holds for it.
        data = settings["data"] = {"source": request.data}
    for field, value in (("text_column", request.text_column), ("label_column", request.label_column), ("encoding", request.encoding)):
        if value is not None:
            data[field] = value
    if request.encoder is not None:
        settings.setdefault("model", {})["encoder"] = request.encoder
    if request.budget_minutes is not None:
        settings["budget_minutes"] = request.budget_minutes
    if request.seed is not None:
        settings["seed"] = request.seed
    for dotted, value in request.overrides.items():
        _set_path(settings, dotted, value)

    settings["solution"] = request.solution
    settings["profile"] = request.profile
    settings["cause"] = (request.cause or Cause()).model_dump(mode="json")
    settings["name"] = request.name or (model_name_from(request.data) if request.data else request.solution)
    contract = settings.get("contract", request.solution)
    settings["contract"] = load_contract(contract) if isinstance(contract, str) else contract
    settings["compression"] = validate_methods(settings.get("compression", []))
    settings["model"] = validate(spec.model_config, settings.get("model", {}), "model").model_dump(mode="json")
    return validate(RunConfig, settings, "")


def model_name_from(source: str) -> str:
    """A model name from a path or URI: its last part without the extension, lower case, plain characters.

    Raises:
        ConfigError: nothing is left of it; the caller must name the model.
    """
    stem = Path(source.rstrip("/")).name.split(".")[0].lower()
    name = re.sub(r"[^a-z0-9_-]+", "-", stem).strip("-_")[:63]
    if not name:
        raise ConfigError(f"no model name can be made from {source!r}; give one, e.g. NAME=reviews")
    return name


def validate(model: type[BaseModel], values: object, where: str) -> Any:
    """Validate settings; errors name the path, the value found, and the nearest known key.

    Raises:
        ConfigError: with one line per problem.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = ".".join(str(part) for part in ((where,) if where else ()) + problem["loc"])
            if problem["type"] == "extra_forbidden":
                known = _known_keys(model, problem["loc"][:-1])
                lines.append(f"unknown setting {path!r}{nearest(str(problem['loc'][-1]), known)}")
            else:
                lines.append(f"{path}: {problem['msg']}, found {problem['input']!r}")
        raise ConfigError("\n".join(lines)) from error


def nearest(name: str, known: Any) -> str:
    """'; did you mean X?' and the known names, for error messages."""
    known = sorted(str(key) for key in known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" known: {', '.join(known)}"


def _known_keys(model: type[BaseModel], location: tuple) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _merge(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for key, value in (changes or {}).items():
        merged[key] = _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _set_path(settings: dict, dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    target = settings
    for part in parents:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {dotted!r}: {part!r} is a value, not a section")
    target[last] = value
