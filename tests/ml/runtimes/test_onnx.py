import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from ml.bundles import Bundle
from ml.errors import BundleError, ConfigError
from ml.runtimes.onnx import load_graph
from tests.tiny_bundles import WORDS, build_tiny_bundle


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Bundle, Path]:
    return build_tiny_bundle(tmp_path / "bundle"), tmp_path / "bundle"


def batch(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"input_ids": random.integers(0, len(WORDS), (rows, length)), "attention_mask": np.ones((rows, length), dtype=np.int64)}


def test_any_batch_and_length_gives_one_row_each(tiny: tuple[Bundle, Path]):
    run_graph = load_graph(*tiny, "classifier", 1)
    for rows, length in ((1, 1), (3, 7), (32, 2)):
        outputs = run_graph(batch(rows, length))
        assert set(outputs) == {"logits"}
        assert outputs["logits"].shape == (rows, 2)
        assert outputs["logits"].dtype == np.float32


def test_answers_are_those_of_the_graph(tiny: tuple[Bundle, Path]):
    bundle, folder = tiny
    inputs = batch(4, 5)
    (expected,) = onnxruntime.InferenceSession(folder / "model.onnx").run(None, inputs)
    np.testing.assert_array_equal(load_graph(bundle, folder, "classifier", 1)(inputs)["logits"], expected)


def test_inputs_that_the_graph_does_not_know_are_left_out(tiny: tuple[Bundle, Path]):
    outputs = load_graph(*tiny, "classifier", 1)(batch(2, 3) | {"token_type_ids": np.zeros((2, 3), dtype=np.int64)})
    assert outputs["logits"].shape == (2, 2)


def test_many_threads_get_their_own_answers(tiny: tuple[Bundle, Path]):
    run_graph = load_graph(*tiny, "classifier", 2)
    inputs = [batch(1 + seed % 5, 1 + seed % 11, seed) for seed in range(200)]
    expected = [run_graph(one)["logits"] for one in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: run_graph(one)["logits"], inputs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_waiting_threads_sleep(tiny: tuple[Bundle, Path]):
    run_graph = load_graph(*tiny, "classifier", 4)
    for seed in range(20):
        run_graph(batch(32, 32, seed))
    before, threads = time.process_time(), threading.active_count()
    time.sleep(0.5)
    assert threads >= 1
    assert time.process_time() - before < 0.1, "threads that spin would use several times the half second"


def test_an_unknown_graph_is_refused_with_those_there(tiny: tuple[Bundle, Path]):
    with pytest.raises(BundleError, match=r"there is no graph 'encoder' in this bundle; it holds \['classifier'\]"):
        load_graph(*tiny, "encoder", 1)


def test_a_file_that_is_no_graph_is_refused(tiny: tuple[Bundle, Path]):
    bundle, folder = tiny
    (folder / "model.onnx").write_bytes(os.urandom(100))
    with pytest.raises(BundleError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        load_graph(bundle, folder, "classifier", 1)


def test_tensors_other_than_those_named_are_refused(tiny: tuple[Bundle, Path]):
    bundle, folder = tiny
    graph = bundle.graphs["classifier"]
    renamed = graph.model_copy(update={"outputs": (graph.outputs[0].model_copy(update={"name": "scores"}),)})
    with pytest.raises(BundleError, match=r"outputs \['logits'\].*names.*outputs \['scores'\]"):
        load_graph(bundle.model_copy(update={"graphs": {"classifier": renamed}}), folder, "classifier", 1)


def test_cuda_without_cuda_is_refused(tiny: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ConfigError, match="install onnxruntime-gpu"):
        load_graph(*tiny, "classifier", 1, device="cuda")
