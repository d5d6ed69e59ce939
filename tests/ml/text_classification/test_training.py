import json
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ml.artifacts import ArtifactRef, SplitDataset
from ml.bundles import read_bundle
from ml.config import TrainConfig
from ml.errors import TrainingError
from ml.solution import TrainContext
from ml.text_classification.settings import TextClassifierConfig
from ml.text_classification.training import balanced_weights, choose_max_length, is_weighted, train_text_classifier
from ml.text_classification.training_job import TextClassificationJob, write_token_arrays
from tests.tiny_encoders import write_tiny_bert

SETTINGS = TextClassifierConfig(encoder="unused")
LABELS = ("bad", "good", "so-so")


def reviews(num_rows: int, seed: int) -> pd.DataFrame:
    """Texts of letters and words; the class is the word of praise or blame that is in them, if any."""
    chance = random.Random(seed)
    rows = []
    for index in range(num_rows):
        target = chance.choice((0, 0, 1, 1, 2))
        words = [chance.choice(("the", "a", "film", "was", "xyz", "plot")) for _ in range(chance.randint(2, 12))]
        if target != 2:
            words.insert(chance.randrange(len(words)), LABELS[target])
        rows.append((str(index), " ".join(words), LABELS[target], target))
    return pd.DataFrame(rows, columns=["row_id", "text", "label", "target"])


@pytest.fixture
def context(tmp_path: Path) -> TrainContext:
    encoder = write_tiny_bert(tmp_path / "encoder")
    reviews(300, 1).to_parquet(tmp_path / "train.parquet")
    reviews(80, 2).to_parquet(tmp_path / "validation.parquet")
    nowhere = ArtifactRef(uri="s3://bucket/key", sha256="0" * 64, size_bytes=0)
    splits = SplitDataset(train=nowhere, validation=nowhere, test=nowhere, labels=LABELS, counts={})
    return TrainContext(
        train_table=tmp_path / "train.parquet",
        validation_table=tmp_path / "validation.parquet",
        splits=splits,
        solution="sentiment",
        config=TrainConfig(batch_size_per_rank=8, epochs=10, learning_rate=3e-3, checkpoint_every_steps=10),
        model=TextClassifierConfig(encoder=str(encoder)),
        budget_seconds=600,
        seed=0,
        work_dir=tmp_path / "work",
        output_dir=tmp_path / "bundle",
    )


def test_training_learns_survives_a_kill_and_writes_a_bundle(context: TrainContext) -> None:
    import torch

    from ml.text_classification.codec import load_codec
    from ml.text_classification.model import build_module

    reported: list[dict[str, Any]] = []

    def report(record: dict[str, Any]) -> None:
        reported.append(record)
        if record["kind"] == "step" and record["step"] == 25 and Counter(r.get("step") for r in reported)[25] == 1:
            os.kill(json.loads((context.work_dir / "attempts/0001/rank-1.json").read_bytes())["pid"], signal.SIGKILL)

    result = train_text_classifier(context.__class__(**{**context.__dict__, "report": report}))

    assert result.resumed_from_step >= 20
    assert result.num_recomputed_steps <= 10
    assert result.num_train_rows == 300
    assert result.plan["validation_accuracy"] > 0.9
    assert result.plan["max_length"] % 8 == 0
    assert {"step", "validation", "event", "resumed"} == {record["kind"] for record in reported}

    bundle = read_bundle(context.output_dir)
    assert (bundle.solution, bundle.runtime, bundle.options["labels"]) == ("sentiment", "torch", list(LABELS))
    model, codec = build_module(bundle, context.output_dir, "classifier"), load_codec(bundle, context.output_dir)
    requests = [{"text": "the film was good"}, {"text": "a bad bad plot"}, {"text": "the film was a film"}]
    inputs = codec.encode(requests)
    with torch.inference_mode():
        logits = model(torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])).numpy()
    assert [reply["label"] for reply in codec.decode(requests, {"logits": logits})] == ["good", "bad", "so-so"]

    # Called again, all of it is kept, down to the bytes of the bundle.
    again = context.__class__(**{**context.__dict__, "output_dir": context.output_dir.with_name("again")})
    prepared = (context.work_dir / "prepared/tokens.safetensors").stat().st_mtime_ns
    repeated = train_text_classifier(again)
    assert repeated.num_steps == result.num_steps
    assert (context.work_dir / "prepared/tokens.safetensors").stat().st_mtime_ns == prepared
    assert read_bundle(again.output_dir).digests == bundle.digests


@pytest.mark.parametrize(
    ("settings", "limit", "expected"),
    [
        ({}, 512, 96),  # 95 % have at most 95 tokens
        ({"max_length_cap": 64}, 512, 64),
        ({"max_length": 30}, 512, 30),
        ({"max_length": 1000}, 512, 512),
        ({}, 50, 50),
    ],
)
def test_length_covers_most_texts_within_what_is_allowed(settings: dict, limit: int, expected: int) -> None:
    lengths = np.arange(1, 101)
    assert choose_max_length(lengths, SETTINGS.model_copy(update=settings), limit=limit) == expected


def test_classes_are_weighted_when_they_differ_much() -> None:
    even, uneven = np.array([0] * 30 + [1] * 20), np.array([0] * 40 + [1] * 10)
    assert not is_weighted(even, 2, "auto")
    assert is_weighted(uneven, 2, "auto")
    assert is_weighted(even, 2, "balanced")
    assert not is_weighted(uneven, 2, "none")
    assert balanced_weights(uneven, 2) == [0.625, 2.5]
    assert sum(np.array(balanced_weights(uneven, 2))[uneven]) == pytest.approx(50)


@pytest.fixture
def job(tmp_path: Path) -> TextClassificationJob:
    from ml.storage.artifacts import digest_file

    encoder = write_tiny_bert(tmp_path / "encoder")
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    rows = [[2, 7, 3], [2, 8, 9, 10, 3], [2, 3]]
    write_token_arrays(prepared / "tokens.safetensors", {"train": (rows, np.array([1, 0, 1])), "validation": (rows[:1], np.array([0]))})
    (prepared / "prepared.json").write_text(json.dumps({"encoder_dir": str(encoder)}))
    return TextClassificationJob(
        tmp_path,
        arrays_sha256=digest_file(prepared / "tokens.safetensors"),
        model=SETTINGS.model_dump(),
        num_labels=2,
        vocab_size=60,
        pad_id=0,
        class_weights=[1.0, 2.0],
    )


def test_a_batch_is_padded_on_the_right(job: TextClassificationJob) -> None:
    batch = job.batch("train", np.array([2, 0]))
    assert batch["input_ids"].tolist() == [[2, 3, 0], [2, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["targets"].tolist() == [1, 1]
    assert job.lengths["train"].tolist() == [3, 5, 2]
    assert job.row_weights("train", np.array([0, 1])).tolist() == [2.0, 1.0]


def test_losses_are_per_row_and_do_not_depend_on_the_padding(job: TextClassificationJob) -> None:
    model = job.build_model(0).eval()
    together = job.row_losses(model, job.batch("train", np.array([0, 1, 2]))).loss
    alone = [job.row_losses(model, job.batch("train", np.array([row]))).loss.item() for row in range(3)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_arrays_that_changed_since_they_were_prepared_are_refused(job: TextClassificationJob, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not the file that was prepared"):
        TextClassificationJob(tmp_path, arrays_sha256="0" * 64, model={}, num_labels=2, vocab_size=60, pad_id=0, class_weights=[1.0, 1.0])
