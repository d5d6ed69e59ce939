"""The seam between the pipeline and a solution: what a solution must bring, and nothing about any one of them.

A solution is a folder `solutions/<name>/` with a `spec.py` that defines `SPEC`, and a `config.yaml`. The pipeline
finds it by its folder name; no central file is edited to add one.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from pydantic import BaseModel

from ml.bundles import Bundle
from ml.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from ml.artifacts import SplitDataset
    from ml.config import CleanConfig, TrainConfig
    from ml.predictor import Predictor


class Codec(Protocol):
    """Turns requests into graph inputs and graph outputs into replies. Needs neither torch nor transformers."""

    def encode(self, requests: Sequence[dict]) -> dict[str, np.ndarray]:
        """Requests that keep `bundle.input_schema` -> one array per graph input, batch first, padded."""
        ...

    def decode(self, requests: Sequence[dict], outputs: dict[str, np.ndarray]) -> list[dict]:
        """Graph outputs -> one reply per request that keeps `bundle.output_schema`."""
        ...


@dataclass(frozen=True)
class Scores:
    """Per-row results of one model on one split: what every metric, gate and paired test is computed from.

    Each column has the rows on its first axis. A classifier gives `target` (N,) int64 and `probabilities`
    (N, C) float64; another kind of solution gives what its metrics need.
    """

    row_ids: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.row_ids)

    def take(self, rows: np.ndarray) -> "Scores":
        return Scores(self.row_ids[rows], {name: values[rows] for name, values in self.columns.items()})


@dataclass(frozen=True)
class Metric:
    """A named number computed from scores, in [0, 1] unless said otherwise."""

    name: str
    compute: Callable[[Scores], float]
    higher_is_better: bool = True


class CheckpointStore(Protocol):
    """Where checkpoints outlive the machine: the training launcher pushes committed local folders, and pulls the last."""

    def push(self, step: int, folder: Path) -> None:
        """Copy a committed checkpoint folder; its manifest is written last. Older steps beyond the last two go."""
        ...

    def pull_latest(self, destination: Path) -> int | None:
        """Copy the newest whole checkpoint into `destination/step-<n>/`; its step, or None when there is none."""
        ...


@dataclass(frozen=True)
class TrainContext:
    """All that a solution's `train` gets.

    Args:
        train_table, validation_table: local Parquet files (`row_id`, `text`, `label`, `target`).
        splits: labels and counts.
        solution: name that the bundle carries, so that it finds back to its codec.
        model: the solution's own config section, an instance of `SolutionSpec.model_config`.
        work_dir: survives a kill; the same folder is given again when the same training is resumed.
        output_dir: the torch bundle goes here.
        report: called with every logged step and validation (plain dicts), for progress and cards.
    """

    train_table: Path
    validation_table: Path
    splits: "SplitDataset"
    solution: str
    config: "TrainConfig"
    model: BaseModel
    budget_seconds: float
    seed: int
    work_dir: Path
    output_dir: Path
    checkpoints: CheckpointStore | None = None
    report: Callable[[dict[str, Any]], None] = lambda record: None


@dataclass(frozen=True)
class TrainResult:
    """What `train` says of its work; the model itself lies in `TrainContext.output_dir`."""

    history_path: Path
    num_parameters: int
    num_train_rows: int
    num_steps: int
    best_step: int
    resumed_from_step: int
    num_recomputed_steps: int
    plan: dict
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaselineResult:
    """Scores of the simple baseline on both held-out splits."""

    validation: Scores
    test: Scores
    parameters: dict


def text_requests(table: "pd.DataFrame") -> list[dict]:
    """Rows of a split table as requests, for solutions whose request is one text."""
    return [{"text": text} for text in table["text"]]


@dataclass(frozen=True)
class SolutionSpec:
    """A solution's wiring: plain functions, each importing its heavy libraries when called.

    Args:
        model_config: pydantic model of the `model` section of `config.yaml`.
        clean: raw table + settings -> (kept rows, dropped rows with `reason`, rule -> count).
        train: trains and writes a torch bundle.
        base_model_digest: model settings -> what identifies the pretrained weights it starts from, for stage keys.
        export_onnx: torch bundle folder -> ONNX Runtime fp32 bundle in another folder.
        build_module: bundle, its folder, graph name -> the torch module in eval mode, weights loaded.
        load_codec: bundle and its folder -> codec.
        score: predictor + split table -> per-row scores.
        baseline: split name -> table, labels -> the scores of a simple model anyone would try first.
        metrics: splits -> metrics, the primary one first.
        requests: rows of a split table -> requests, for calibration and for asking the served model.
        sample_requests: what a newcomer would try on the served model.
    """

    name: str
    title: str
    model_config: type[BaseModel]
    clean: "Callable[[pd.DataFrame, CleanConfig], tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]]"
    train: Callable[[TrainContext], TrainResult]
    base_model_digest: Callable[[Any], str]
    export_onnx: Callable[[Path, Path], Bundle]
    build_module: "Callable[[Bundle, Path, str], torch.nn.Module]"
    load_codec: Callable[[Bundle, Path], Codec]
    score: "Callable[[Predictor, pd.DataFrame], Scores]"
    baseline: "Callable[[dict[str, pd.DataFrame], SplitDataset, int], BaselineResult]"
    metrics: "Callable[[SplitDataset], tuple[Metric, ...]]"
    requests: "Callable[[pd.DataFrame], list[dict]]" = text_requests
    sample_requests: tuple[dict, ...] = field(default=())


def solution_names() -> list[str]:
    """Names of all solutions: the folders of `solutions/`."""
    import solutions

    return sorted(module.name for module in pkgutil.iter_modules(solutions.__path__) if module.ispkg)


def load_solution(name: str) -> SolutionSpec:
    """The spec of a solution, by folder name.

    Raises:
        ConfigError: no such folder. A name is never an import path.
    """
    known = solution_names()
    if name not in known:
        raise ConfigError(f"there is no solution {name!r}; known solutions: {', '.join(known)}")
    return importlib.import_module(f"solutions.{name}.spec").SPEC


def solution_folder(name: str) -> Path:
    """Where a solution lies; `name` is one of `solution_names()`."""
    import solutions

    return next(folder for path in solutions.__path__ if (folder := Path(path) / name).is_dir())
