"""Every solution, the shipped ones and the examples of the tests, each trained once on a few rows."""

import os
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import solutions
from ml.artifacts import BundleRef, SplitDataset, Variant
from ml.compression.compress import compress, export_uncompressed
from ml.config import TrainConfig
from ml.solution import SolutionSpec, TrainContext, load_solution
from ml.storage.artifacts import ArtifactStore
from ml.storage.memory import MemoryStore
from tests.tiny_encoders import write_tiny_bert

EXAMPLES_FOLDER = Path(__file__).resolve().parent.parent / "example_solutions"
SOLUTION_NAMES = sorted(module.name for module in pkgutil.iter_modules([*solutions.__path__, str(EXAMPLES_FOLDER)]) if module.ispkg)

# Python imports this module by itself in every process that finds it: so fresh processes know the examples too.
SITE_CUSTOMIZE = f"import solutions\nsolutions.__path__.append({str(EXAMPLES_FOLDER)!r})\n"

LABELS = ("delivery", "invoice", "refund")
TELLING_WORDS = {
    "delivery": ("parcel", "courier", "tracking", "shipment"),
    "invoice": ("bill", "receipt", "tax", "invoice"),
    "refund": ("money", "return", "refund", "cancel"),
}
CHATTER = "where is my the a of for please tell me about when can you have and to it i was last week order number"
COMMON_WORDS = CHATTER.split()


@dataclass(frozen=True)
class TrainedSolution:
    """A solution after training and export, on toy data that any solution of texts can learn from."""

    spec: SolutionSpec
    splits: SplitDataset
    frames: dict[str, pd.DataFrame]
    store: ArtifactStore
    torch_ref: BundleRef
    exported: Variant
    folders: dict[str, Path]
    work_dir: Path

    @property
    def requests(self) -> list[dict]:
        return self.spec.requests(self.frames["validation"])

    def compressed(self, method: str) -> Path:
        """The folder of the bundle that a compression method makes with its defaults."""
        folder = self.work_dir / method
        if not folder.is_dir():
            requests = self.spec.requests(self.frames["train"])
            onnx_ref = self.exported.require_bundle()
            variant = compress({"method": method}, self.spec, self.torch_ref, onnx_ref, requests, self.store, self.work_dir, 0)
            self.store.get_folder(variant.require_bundle(), folder)
        return folder


@pytest.fixture(scope="package", autouse=True)
def example_solutions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes the examples findable beside the shipped solutions, in this process and in those it starts."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE_CUSTOMIZE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solutions, "__path__", [*solutions.__path__, str(EXAMPLES_FOLDER)])
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        yield


@pytest.fixture(scope="package", params=SOLUTION_NAMES)
def solution_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="package")
def trained(solution_name: str, tmp_path_factory: pytest.TempPathFactory) -> TrainedSolution:
    work_dir = tmp_path_factory.mktemp(solution_name)
    spec = load_solution(solution_name)
    store = ArtifactStore(MemoryStore(), "conformance-")
    store.ensure_buckets()
    frames = {name: make_questions(size, seed) for seed, (name, size) in enumerate({"train": 240, "validation": 90, "test": 90}.items())}
    refs = {name: store.put_frame(frame) for name, frame in frames.items()}
    splits = SplitDataset(**refs, labels=LABELS, counts={name: frame["label"].value_counts().to_dict() for name, frame in frames.items()})
    spec.train(
        TrainContext(
            train_table=store.get_file(refs["train"], work_dir / "train.parquet"),
            validation_table=store.get_file(refs["validation"], work_dir / "validation.parquet"),
            splits=splits,
            solution=solution_name,
            config=TrainConfig(num_ranks=1, batch_size_per_rank=16, epochs=5, learning_rate=3e-3),
            model=spec.model_config.model_validate(tiny_model_settings(solution_name, work_dir)),
            budget_seconds=120,
            seed=0,
            work_dir=_made(work_dir / "training"),
            output_dir=_made(work_dir / "torch"),
        )
    )
    torch_ref = store.put_folder(work_dir / "torch")
    exported = export_uncompressed(spec, torch_ref, store, work_dir)
    onnx_folder = store.get_folder(exported.require_bundle(), work_dir / "onnx")
    folders = {"pytorch_fp32": work_dir / "torch", "onnx_fp32": onnx_folder}
    return TrainedSolution(spec, splits, frames, store, torch_ref, exported, folders, work_dir)


def tiny_model_settings(solution_name: str, work_dir: Path) -> dict:
    """The `model` section for a training of seconds. A solution whose defaults are small enough needs no entry."""
    if solution_name == "sentiment":
        return {"encoder": str(write_tiny_bert(work_dir / "encoder"))}
    return {}


def make_questions(num_rows: int, seed: int) -> pd.DataFrame:
    """Questions of common words, each with two words that tell its class."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(num_rows):
        target = int(random.integers(len(LABELS)))
        words = list(random.choice(COMMON_WORDS, random.integers(3, 10)))
        for telling in random.choice(TELLING_WORDS[LABELS[target]], 2, replace=False):
            words.insert(int(random.integers(len(words))), telling)
        rows.append((f"{seed}-{index}", " ".join(words), LABELS[target], target))
    return pd.DataFrame(rows, columns=["row_id", "text", "label", "target"])


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
