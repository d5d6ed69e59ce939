"""Trains a text classifier: encoder and tokenizer are fetched, texts tokenized once, ranks started, the best model bundled.

Nothing here loads torch before it is called.
"""

import importlib.metadata
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tokenizers import Tokenizer

from ml.solution import TrainContext, TrainResult
from ml.storage.artifacts import digest_file
from ml.text_classification.encoders import fetch_encoder, has_trained_weights
from ml.text_classification.model import save_torch_bundle
from ml.text_classification.settings import TextClassifierConfig
from ml.text_classification.tokenizer import prepare_tokenizer
from ml.train_config import settings_of_training
from ml.training.folders import read_json, write_json
from ml.training.launcher import TrainOutcome, run_training
from ml.training.spec import TrainSpec

if TYPE_CHECKING:
    import pandas as pd

    from ml.text_classification.network import TextClassifier

logger = logging.getLogger(__name__)

JOB = "ml.text_classification.training_job:TextClassificationJob"
FINE_TUNING_LEARNING_RATE = 5e-5
NEW_VOCABULARY_LEARNING_RATE = 3e-4
RANDOM_WEIGHTS_LEARNING_RATE = 1e-3
MOSTLY_NEW_VOCABULARY = 0.2
LENGTH_QUANTILE = 0.95
LENGTH_MULTIPLE = 8
LENGTH_SAMPLE = 5_000
TEXTS_PER_CALL = 1_000
# "auto" class weights: balanced when the largest class has more than so many times the rows of the smallest.
BALANCE_ABOVE = 3.0


@dataclass(frozen=True)
class Prepared:
    """What came of the texts, kept in `prepared/prepared.json` so that a resumed training uses the same.

    Args:
        key: identifies the input; another input is prepared anew.
        encoder_dir: where the encoder lies on this machine.
        share_cut: share of the training texts that are longer than `max_length` tokens.
    """

    key: str
    encoder_dir: str
    arrays_sha256: str
    max_length: int
    share_cut: float
    pad_id: int
    vocab_size: int
    tokenizer: dict[str, Any]
    class_weights: list[float]
    weighted: bool


def train_text_classifier(ctx: TrainContext) -> TrainResult:
    """Fine-tune an encoder with a classification head and write a torch bundle to `ctx.output_dir`.

    Called again with the same work folder after a kill, it goes on from the last checkpoint.

    Raises:
        ConfigError: the encoder or its tokenizer cannot be used.
        TrainingError, WorkerLostError: see `ml.training.launcher.run_training`.
    """
    started = time.monotonic()
    settings = ctx.model
    assert isinstance(settings, TextClassifierConfig)  # noqa: S101 - the spec that names this function names that model
    prepared = _prepare(ctx, settings)
    spec = _spec(ctx, settings, prepared, seconds_left=ctx.budget_seconds - (time.monotonic() - started))
    outcome = run_training(spec, ctx.report, ctx.checkpoints)
    _write_bundle(ctx, settings, spec, prepared, outcome)
    return TrainResult(
        history_path=outcome.history_path,
        num_parameters=outcome.num_parameters,
        num_train_rows=outcome.num_train_rows,
        num_steps=outcome.num_steps,
        best_step=outcome.best_step,
        resumed_from_step=outcome.resumed_from_step,
        num_recomputed_steps=outcome.num_recomputed_steps,
        plan={
            **outcome.plan,
            "max_length": prepared.max_length,
            "share_of_texts_cut": prepared.share_cut,
            "tokenizer": prepared.tokenizer,
            "class_weights": prepared.class_weights if prepared.weighted else None,
            "validation_loss": outcome.best_loss,
            "validation_accuracy": outcome.best_accuracy,
        },
        warnings=outcome.warnings,
    )


def training_spec(ctx: TrainContext) -> TrainSpec:
    """Prepare the texts in `ctx.work_dir` and say what to train: for those who launch the ranks themselves (`ml.training_file`)."""
    settings = ctx.model
    assert isinstance(settings, TextClassifierConfig)  # noqa: S101 - as above
    started = time.monotonic()
    prepared = _prepare(ctx, settings)
    return _spec(ctx, settings, prepared, seconds_left=ctx.budget_seconds - (time.monotonic() - started))


def _prepare(ctx: TrainContext, settings: TextClassifierConfig) -> Prepared:
    """Tokenize both splits into arrays; what a killed training prepared from the same input is kept."""
    import pandas as pd

    folder = ctx.work_dir / "prepared"
    key = json.dumps([digest_file(ctx.train_table), digest_file(ctx.validation_table), settings.model_dump(), ctx.config.class_weights])
    encoder_dir = str(fetch_encoder(settings.encoder, ctx.work_dir).resolve())
    if (found := read_json(folder / "prepared.json")) is not None and found["key"] == key:
        prepared = Prepared(**{**found, "encoder_dir": encoder_dir})
    else:
        train = pd.read_parquet(ctx.train_table, columns=["text", "target"])
        validation = pd.read_parquet(ctx.validation_table, columns=["text", "target"])
        prepared = _tokenize(folder, key, Path(encoder_dir), train, validation, ctx, settings)
    write_json(folder / "prepared.json", asdict(prepared))
    return prepared


def _tokenize(
    folder: Path,
    key: str,
    encoder_dir: Path,
    train: "pd.DataFrame",
    validation: "pd.DataFrame",
    ctx: TrainContext,
    settings: TextClassifierConfig,
) -> Prepared:
    from ml.text_classification.training_job import ARRAYS_FILE, write_token_arrays

    folder.mkdir(parents=True, exist_ok=True)
    train_texts = train["text"].tolist()
    info = prepare_tokenizer(encoder_dir, train_texts, folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lengths = np.array([len(ids) for ids in _token_ids(tokenizer, train_texts[:: math.ceil(len(train_texts) / LENGTH_SAMPLE)])])
    max_length = choose_max_length(lengths, settings, limit=info.max_tokens)
    tokenizer.enable_truncation(max_length)
    targets = train["target"].to_numpy()
    write_token_arrays(
        folder / ARRAYS_FILE,
        {
            "train": (_token_ids(tokenizer, train_texts), targets),
            "validation": (_token_ids(tokenizer, validation["text"].tolist()), validation["target"].to_numpy()),
        },
    )
    num_labels = len(ctx.splits.labels)
    weighted = is_weighted(targets, num_labels, ctx.config.class_weights)
    return Prepared(
        key=key,
        encoder_dir=str(encoder_dir),
        arrays_sha256=digest_file(folder / ARRAYS_FILE),
        max_length=max_length,
        share_cut=float((lengths > max_length).mean()),
        pad_id=info.pad_id,
        vocab_size=info.vocab_size,
        tokenizer=asdict(info),
        class_weights=balanced_weights(targets, num_labels) if weighted else [1.0] * num_labels,
        weighted=weighted,
    )


def choose_max_length(lengths: np.ndarray, settings: TextClassifierConfig, *, limit: int) -> int:
    """Tokens kept of a text: as configured, or so many that 95 % of the texts are whole, within the cap; at most `limit`.

    Args:
        lengths: tokens of each training text, special tokens included.
        limit: the longest input that the encoder takes.
    """
    if settings.max_length != "auto":
        return min(settings.max_length, limit)
    covering = math.ceil(np.quantile(lengths, LENGTH_QUANTILE) / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return max(1, min(covering, settings.max_length_cap, limit))


def choose_learning_rate(configured: float | Literal["auto"], prepared: Prepared) -> float:
    """As configured, or by how much of the model is new: fine-tuning must not wash out what is known, random weights need large steps."""
    if configured != "auto":
        return configured
    if not has_trained_weights(Path(prepared.encoder_dir)):
        return RANDOM_WEIGHTS_LEARNING_RATE
    mostly_new = prepared.tokenizer["unknown_share_before"] > MOSTLY_NEW_VOCABULARY
    return NEW_VOCABULARY_LEARNING_RATE if mostly_new else FINE_TUNING_LEARNING_RATE


def is_weighted(targets: np.ndarray, num_labels: int, class_weights: str) -> bool:
    """Whether classes get weights; "auto": when the largest has more than three times the rows of the smallest."""
    counts = np.bincount(targets, minlength=num_labels)
    return class_weights == "balanced" or (class_weights == "auto" and bool(counts.max() > BALANCE_ABOVE * max(counts.min(), 1)))


def balanced_weights(targets: np.ndarray, num_labels: int) -> list[float]:
    """N / (classes * rows of the class): every class weighs the same and the mean row weighs 1.

    The rule of King and Zeng, "Logistic Regression in Rare Events Data" (2001), which scikit-learn calls "balanced".
    """
    counts = np.bincount(targets, minlength=num_labels)
    return [float(len(targets) / (num_labels * max(count, 1))) for count in counts]


def _token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [
        encoding.ids
        for start in range(0, len(texts), TEXTS_PER_CALL)
        for encoding in tokenizer.encode_batch_fast(texts[start : start + TEXTS_PER_CALL])
    ]


def _spec(ctx: TrainContext, settings: TextClassifierConfig, prepared: Prepared, seconds_left: float) -> TrainSpec:
    config = ctx.config
    return TrainSpec(
        job=JOB,
        job_arguments={
            "arrays_sha256": prepared.arrays_sha256,
            "model": settings.model_dump(mode="json"),
            "num_labels": len(ctx.splits.labels),
            "vocab_size": prepared.vocab_size,
            "pad_id": prepared.pad_id,
            "class_weights": prepared.class_weights,
        },
        work_dir=ctx.work_dir,
        **settings_of_training(config, learning_rate=choose_learning_rate(config.learning_rate, prepared)),
        seed=ctx.seed,
        budget_seconds=seconds_left,
    )


def _write_bundle(ctx: TrainContext, settings: TextClassifierConfig, spec: TrainSpec, prepared: Prepared, outcome: TrainOutcome) -> None:
    from ml.training.checkpoint import load_weights
    from ml.training.job import load_job

    model: TextClassifier = load_job(spec).build_model(spec.seed)  # type: ignore[assignment]
    load_weights(model, outcome.weights_path)
    save_torch_bundle(
        model.eval(),
        ctx.output_dir,
        tokenizer_path=ctx.work_dir / "prepared" / "tokenizer.json",
        labels=ctx.splits.labels,
        positive_label=ctx.splits.positive_label,
        max_length=prepared.max_length,
        pad_id=prepared.pad_id,
        provenance={
            "method": "fine_tuning",
            "encoder": settings.encoder,
            "precision": outcome.plan["precision"],
            "num_train_rows": outcome.num_train_rows,
            "best_step": outcome.best_step,
            "libraries": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        },
        solution=ctx.solution,
    )
