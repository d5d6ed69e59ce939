"""A tiny text classifier, exported once for all tests of compression, and its bundles in a store."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ml.artifacts import BundleRef, Variant
from ml.bundles import read_bundle
from ml.compression.compress import compress
from ml.predictor import Predictor
from ml.runtimes.onnx import load_graph
from ml.solution import SolutionSpec, load_solution
from ml.storage.artifacts import ArtifactStore
from ml.storage.memory import MemoryStore
from ml.text_classification.export import export_onnx
from ml.text_classification.model import build_classifier, save_torch_bundle
from ml.text_classification.settings import TextClassifierConfig
from tests.tiny_encoders import VOCABULARY, write_tiny_bert


@dataclass(frozen=True)
class TinyModel:
    """The uncompressed model: folders, where they lie in the store, and requests of many lengths."""

    torch_dir: Path
    onnx_dir: Path
    torch_ref: BundleRef
    onnx_ref: BundleRef
    store: ArtifactStore
    spec: SolutionSpec
    train_requests: tuple[dict, ...]
    test_requests: tuple[dict, ...]

    def compress(self, config: dict, work_dir: Path, *, seed: int = 0, calibration_requests: tuple[dict, ...] | None = None) -> Variant:
        requests = self.train_requests if calibration_requests is None else calibration_requests
        return compress(config, self.spec, self.torch_ref, self.onnx_ref, requests, self.store, work_dir, seed)

    def fetch(self, variant: Variant, folder: Path) -> Path:
        assert variant.bundle is not None, variant.failure
        return self.store.get_folder(variant.bundle, folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A BERT of 2 layers and width 32 with random weights, whose two classes are told apart by a strong random head."""
    import torch

    folder = tmp_path_factory.mktemp("tiny-model")
    encoder = write_tiny_bert(folder / "encoder")
    model = build_classifier(encoder, 2, TextClassifierConfig(encoder=str(encoder)), vocab_size=len(VOCABULARY), seed=0).eval()
    with torch.no_grad():
        model.head.weight *= 20
    save_torch_bundle(
        model,
        folder / "torch",
        tokenizer_path=encoder / "tokenizer.json",
        labels=("negative", "positive"),
        positive_label="positive",
        max_length=32,
        pad_id=0,
        provenance={"encoder": "tiny"},
        solution="sentiment",
    )
    export_onnx(folder / "torch", folder / "onnx")
    store = ArtifactStore(MemoryStore(), "t-")
    store.ensure_buckets()
    return TinyModel(
        torch_dir=folder / "torch",
        onnx_dir=folder / "onnx",
        torch_ref=store.put_folder(folder / "torch"),
        onnx_ref=store.put_folder(folder / "onnx"),
        store=store,
        spec=load_solution("sentiment"),
        train_requests=random_texts(100, seed=1),
        test_requests=random_texts(64, seed=2),
    )


def random_texts(num_texts: int, *, seed: int) -> tuple[dict, ...]:
    """Requests of 1 to 25 words that the tiny vocabulary knows."""
    random = np.random.default_rng(seed)
    words = [word for word in VOCABULARY if word.isalpha()]
    return tuple({"text": " ".join(random.choice(words, size=random.integers(1, 26)))} for _ in range(num_texts))


def open_predictor(folder: Path, spec: SolutionSpec) -> Predictor:
    bundle = read_bundle(folder)
    return Predictor(bundle, spec.load_codec(bundle, folder), load_graph(bundle, folder, next(iter(bundle.graphs)), 1))


def logits(folder: Path, spec: SolutionSpec, requests: tuple[dict, ...], *, batch_size: int = 1) -> np.ndarray:
    """(rows, classes), in batches of a size; the graph itself, without the predictor's care for batches."""
    predictor = open_predictor(folder, spec)
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    return np.concatenate([predictor.run_graph(predictor.codec.encode(batch))["logits"] for batch in batches])
