import shutil
import threading
import time
from pathlib import Path

import pytest

from ml.artifacts import Timing
from ml.config import EvaluateConfig
from ml.errors import ServiceError
from ml.evaluation import timing
from ml.evaluation.machine_lock import machine_lock
from ml.evaluation.probe_process import ProbeProcess
from ml.evaluation.timing import measure_timings
from tests.tiny_bundles import WORDS, build_tiny_bundle

CONFIG = EvaluateConfig(latency_length_tokens=8, throughput_batch_size=8, rounds=4, calls_per_round=8, memory_requests=20)
REQUESTS = [{"text": f"a {word} film and it was {word}"} for word in WORDS[2:]]
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reference has 12 MB of weights, the compressed one next to nothing."""
    root = tmp_path_factory.mktemp("bundles")
    build_tiny_bundle(root / "large", width=3 * MEGABYTE // len(WORDS))
    build_tiny_bundle(root / "small")
    shutil.copytree(root / "large", root / "exported")
    return {"pytorch_fp32": root / "large", "onnx_fp32": root / "exported", "compressed": root / "small"}


@pytest.fixture(scope="module")
def timings(bundles: dict[str, Path]) -> dict[str, Timing]:
    return measure_timings(bundles, REQUESTS, CONFIG)


def test_every_variant_is_timed(timings: dict[str, Timing]) -> None:
    assert set(timings) == {"pytorch_fp32", "onnx_fp32", "compressed"}
    for found in timings.values():
        assert 0 < found.p50_ms <= found.p95_ms
        assert found.throughput_per_second > 0
        assert found.load_seconds > 0
        assert found.peak_rss_bytes >= found.memory_bytes > 20 * MEGABYTE


def test_a_smaller_and_faster_variant_has_ratios_below_one(timings: dict[str, Timing]) -> None:
    found = timings["compressed"]
    assert found.latency_ratio.high < 0.7
    assert found.latency_ratio_to_onnx is not None
    assert found.latency_ratio_to_onnx.high < 0.7
    assert found.throughput_ratio.low > 1.5
    assert found.memory_ratio < 0.95
    assert found.file_ratio < 0.01
    assert found.latency_ratio.low <= found.latency_ratio.value <= found.latency_ratio.high


def test_the_reference_is_compared_with_itself(timings: dict[str, Timing]) -> None:
    reference = timings["pytorch_fp32"]
    assert (reference.latency_ratio.value, reference.latency_ratio.low, reference.latency_ratio.high) == (1, 1, 1)
    assert reference.memory_ratio == reference.file_ratio == 1


def test_file_size_is_that_of_the_weights_without_side_files(timings: dict[str, Timing], bundles: dict[str, Path]) -> None:
    for name, found in timings.items():
        assert found.file_bytes == (bundles[name] / "model.onnx").stat().st_size


def test_a_variant_that_cannot_be_loaded_is_named_and_no_process_is_left(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundles["compressed"], tmp_path / "broken")
    (tmp_path / "broken" / "model.onnx").write_bytes(b"")
    pids: list[int] = []

    class Recording(ProbeProcess):
        def __init__(self, *arguments, **named) -> None:
            super().__init__(*arguments, **named)
            pids.append(self.pid)

    monkeypatch.setattr(timing, "ProbeProcess", Recording)
    with pytest.raises(ServiceError, match="broken: "):
        measure_timings({"pytorch_fp32": bundles["compressed"], "broken": tmp_path / "broken"}, REQUESTS, CONFIG)
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_nothing_is_measured_while_another_run_measures(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    monkeypatch.setattr(timing, "machine_lock", lambda: machine_lock(lock))
    done = threading.Event()

    def measure() -> None:
        measure_timings({"pytorch_fp32": bundles["compressed"]}, REQUESTS, CONFIG)
        done.set()

    thread = threading.Thread(target=measure)
    with machine_lock(lock):
        thread.start()
        time.sleep(3)
        assert not done.is_set()
    thread.join(timeout=60)
    assert done.is_set()
