import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from pydantic import BaseModel

from ml.errors import ConfigError
from ml.settings import REPOSITORY_ROOT
from ml.train_config import GradientSyncConfig, ParallelismConfig
from ml.training.folders import WorkFolder
from ml.training.history import read_history
from ml.training.shards import ShardWriter
from ml.training.spec import Nodes, TrainSpec
from ml.training_file import KINDS, CheckpointSection, OptimizerSection, TrainingFile, read_training_file
from tests.tiny_encoders import write_tiny_bert

DOCUMENT = REPOSITORY_ROOT / "docs" / "distributed-training.md"
LANGUAGE_MODEL = {"kind": "language-model", "width": 32, "num_layers": 2, "num_heads": 2}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return {"work_dir": str(tmp_path / "work"), "model": dict(LANGUAGE_MODEL), "data": {"shards": str(tmp_path / "tokens")}}


def write(tmp_path: Path, values: dict[str, Any]) -> Path:
    path = tmp_path / "training.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def read(tmp_path: Path, values: dict[str, Any], **options) -> TrainSpec:
    return read_training_file(write(tmp_path, values), **options)[0]


def write_tokens(folder: Path) -> Path:
    """Rows that count upwards modulo 30: easy to learn."""
    random = np.random.default_rng(0)
    with ShardWriter(folder, vocabulary=30, split="train", shard_bytes=2048) as writer:
        for _ in range(160):
            writer.add((random.integers(30) + np.arange(random.integers(6, 16))) % 30)
    return folder


def example() -> dict[str, Any]:
    found = re.search(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


def test_the_shape_of_the_source_is_a_spec(tmp_path: Path, values: dict[str, Any]) -> None:
    spec = read(
        tmp_path,
        values
        | {
            "backend": "gloo",
            "world_size": 8,
            "num_nodes": 2,
            "min_nodes": 1,
            "rank": 1,
            "master_addr": "10.0.0.1",
            "master_port": 1234,
            "optimizer": {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9},
            "parallelism": {"strategy": "fsdp"},
            "gradient_sync": {"bucket_mb": 10, "accumulation_steps": 2},
            "precision": "bf16",
            "checkpoints": {"every_steps": 7, "asynchronous": False, "keep_last": 3},
            "budget_minutes": 2,
            "watch": "accuracy",
        },
    )
    assert spec.nodes == Nodes(count=2, min_count=1, rank=1, master_addr="10.0.0.1", master_port=1234, backend="gloo")
    assert spec.num_ranks == 8
    assert (spec.optimizer.name, spec.optimizer.learning_rate, spec.optimizer.momentum) == ("sgd", 0.5, 0.9)
    assert spec.parallelism.strategy == "fsdp"
    assert (spec.gradient_sync.bucket_mb, spec.gradient_sync.accumulation_steps) == (10, 2)
    assert (spec.checkpoint_every_steps, spec.asynchronous_checkpoints, spec.keep_last_checkpoints) == (7, False, 3)
    assert (spec.precision, spec.watch, spec.budget_seconds) == ("bf16", "accuracy", 120)
    assert spec.job == "ml.language_model.job:LanguageModelJob"
    assert spec.job_arguments["model"] == {
        **{name: value for name, value in LANGUAGE_MODEL.items() if name != "kind"},
        "hidden": 128,
        "tied_head": False,
        "dropout": 0.0,
    }
    assert TrainSpec.from_json(spec.to_json()) == spec


def test_defaults_are_those_of_the_spec(tmp_path: Path, values: dict[str, Any]) -> None:
    spec = read(tmp_path, values)
    plain = TrainSpec(job=spec.job, job_arguments=spec.job_arguments, work_dir=spec.work_dir)
    ours, theirs = json.loads(spec.to_json()), json.loads(plain.to_json())
    # "auto" in the file; a language model is not fine-tuned.
    assert ours["optimizer"].pop("learning_rate") == 3e-4
    theirs["optimizer"].pop("learning_rate")
    assert ours == theirs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lerning_rate": 1}, "unknown setting 'lerning_rate'"),
        ({"optimizer": {"lr": 1e-3}}, "unknown setting 'optimizer.lr'"),
        ({"optimizer": {"learning_rat": 1e-3}}, "unknown setting 'optimizer.learning_rat'; did you mean 'learning_rate'?"),
        ({"optimizer": {"learning_rate": -1}}, r"optimizer.learning_rate.*found -1"),
        ({"world_size": 0}, "world_size: .*greater than or equal to 1, found 0"),
        ({"world_size": "many"}, "world_size: .*found 'many'"),
        ({"backend": "mpi"}, "backend: .*found 'mpi'"),
        ({"master_port": 70000}, "master_port: .*found 70000"),
        ({"model": {"kind": "languge-model"}}, "model.kind: found 'languge-model'; did you mean 'language-model'?"),
        ({"model": {"kind": "os:system"}}, "model.kind: found 'os:system'; known: language-model, text-classifier"),
        ({"model": {}}, "model.kind: found None"),
        ({"model": LANGUAGE_MODEL | {"widht": 64}}, "unknown setting 'model.widht'; did you mean 'width'?"),
        ({"model": LANGUAGE_MODEL | {"width": 30}}, r"model.width: must be a multiple of twice num_heads \(4\), found 30"),
        ({"data": {"path": "x"}}, "unknown setting 'data.path'"),
        ({"data": {}}, "data.shards: Field required"),
        ({"job": "os:system"}, "unknown setting 'job'"),
    ],
)
def test_what_is_wrong_is_told_with_file_path_and_value(tmp_path: Path, values: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, values | changes)
    assert all(line.startswith(str(tmp_path / "training.yaml")) for line in str(caught.value).splitlines())
    assert caught.value.exit_code == 2


def test_a_file_that_is_no_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "training.yaml"
    for content, said in (("a: [", "cannot be read as YAML"), ("- 1", "settings are expected"), ("", "settings are expected")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=said):
            read_training_file(path)


def test_overrides_go_before_the_file(tmp_path: Path, values: dict[str, Any]) -> None:
    spec = read(
        tmp_path,
        values | {"optimizer": {"learning_rate": 0.1, "momentum": 0.5}, "rank": 1},
        overrides={"optimizer.learning_rate": 0.2, "num_ranks": 6, "checkpoints.every_steps": 3},
        nodes={"count": 3, "rank": 2, "master_addr": "there"},
    )
    assert (spec.optimizer.learning_rate, spec.optimizer.momentum) == (0.2, 0.5)
    assert (spec.num_ranks, spec.checkpoint_every_steps) == (6, 3)
    assert (spec.nodes.count, spec.nodes.rank, spec.nodes.master_addr) == (3, 2, "there")
    with pytest.raises(ConfigError, match="'work_dir' is a value, not a section"):
        read(tmp_path, values, overrides={"work_dir.x": 1})


def sections() -> list[type[BaseModel]]:
    of_kinds = [model for kind in KINDS.values() for model in (kind.model, kind.data)]
    return [TrainingFile, OptimizerSection, CheckpointSection, ParallelismConfig, GradientSyncConfig, *of_kinds]


def test_every_field_is_documented() -> None:
    prefixes = ["", "optimizer.", "checkpoints.", "parallelism.", "gradient_sync.", *("model.", "data.") * len(KINDS)]
    text = DOCUMENT.read_text()
    for section, prefix in zip(sections(), prefixes, strict=True):
        for name, field in section.model_fields.items():
            assert f"| `{prefix}{name}` |" in text, f"{prefix}{name} is not in {DOCUMENT}"
            if section in (TrainingFile, OptimizerSection, CheckpointSection):
                assert field.description, name


def test_the_example_of_the_document_trains(tmp_path: Path) -> None:
    path = write(tmp_path, example())
    changes = [f"data.shards={write_tokens(tmp_path / 'tokens')}"]
    command = [sys.executable, "-m", "ml.training", "--spec", str(path), "--work-dir", str(tmp_path / "work"), "--set", *changes]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["status"] == "done"
    assert Path(outcome["weights_path"]).is_file()
    losses = [record["loss"] for record in read_history(WorkFolder(tmp_path / "work").history) if record["kind"] == "step"]
    assert len(losses) == outcome["num_steps"] > 10
    assert losses[-1] < losses[0]
    assert "validation loss" in result.stderr


def test_a_text_classifier_is_prepared_from_its_tables(tmp_path: Path) -> None:
    encoder = write_tiny_bert(tmp_path / "encoder")
    frame = pd.DataFrame({"text": ["a good film", "the bad film"] * 20, "target": [1, 0] * 20})
    frame.to_parquet(tmp_path / "train.parquet")
    frame[:8].to_parquet(tmp_path / "validation.parquet")
    values = {
        "work_dir": str(tmp_path / "work"),
        "model": {"kind": "text-classifier", "encoder": str(encoder)},
        "data": {"train": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "validation.parquet")},
    }
    spec = read(tmp_path, values)
    assert spec.job == "ml.text_classification.training_job:TextClassificationJob"
    assert spec.job_arguments["num_labels"] == 2
    assert (tmp_path / "work" / "prepared" / "prepared.json").is_file()
    assert spec.optimizer.learning_rate == pytest.approx(5e-5)  # of an encoder with trained weights
    # The same again is the same training: each machine reads the file for itself.
    assert read(tmp_path, values).fingerprint == spec.fingerprint
    assert read(tmp_path, values | {"optimizer": {"learning_rate": 0.01}}).optimizer.learning_rate == 0.01
    with pytest.raises(ConfigError, match=r"data.train: there is no file .*nothere.parquet"):
        read(tmp_path, values | {"data": values["data"] | {"train": str(tmp_path / "nothere.parquet")}})
