import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ml.errors import ServiceError
from ml.evaluation.probe_process import ProbeProcess
from ml.predictor import load_predictor
from tests.tiny_bundles import build_tiny_bundle

REQUESTS = [{"text": "a warm film"}, {"text": "it was boring and bad"}]
HEAVY = ["torch", "transformers", "pandas", "sklearn", "scipy", "prefect", "great_expectations", "matplotlib"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    build_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def probe(folder: Path):
    with ProbeProcess("tiny", folder, num_threads=1) as probe:
        yield probe


def test_it_answers_as_the_predictor_does(probe: ProbeProcess, folder: Path) -> None:
    expected = load_predictor(folder).predict(REQUESTS)
    assert [reply["label"] for reply in probe.predict(REQUESTS)] == [reply["label"] for reply in expected]
    found = [reply["probability"] for reply in probe.predict(REQUESTS)]
    np.testing.assert_allclose(found, [reply["probability"] for reply in expected], atol=1e-6)


def test_it_times_each_call(probe: ProbeProcess) -> None:
    seconds = probe.time([REQUESTS[:1], REQUESTS[1:]], 7)
    assert len(seconds) == 7
    assert all(0 < second < 5 for second in seconds)


def test_memory_is_what_the_system_says_of_that_process(probe: ProbeProcess) -> None:
    pss_bytes, peak_rss_bytes = probe.memory()
    rollup = Path(f"/proc/{probe.pid}/smaps_rollup").read_text()
    seen = int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:"))) * 1024
    assert pss_bytes == pytest.approx(seen, rel=0.2)
    assert peak_rss_bytes >= pss_bytes


def test_the_peak_is_its_own_and_not_that_of_the_process_that_started_it(folder: Path) -> None:
    ballast = np.ones(100_000_000)  # 800 MB, which a child would inherit in ru_maxrss
    with ProbeProcess("tiny", folder, num_threads=1) as probe:
        assert probe.memory()[1] < ballast.nbytes / 2


def test_it_imports_no_more_than_serving_needs(folder: Path) -> None:
    code = f"""
import io, json, sys
sys.argv = ["probe", "--bundle", {str(folder)!r}, "--threads", "1"]
sys.stdin = io.StringIO('{{"command": "time", "batches": [[{{"text": "good"}}]], "calls": 1}}\\n')
from ml.evaluation.probe import main
main()
print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "seconds" in run.stdout
    assert json.loads(run.stderr.splitlines()[-1]) == []


def test_a_request_it_cannot_answer_is_an_error_and_it_lives_on(probe: ProbeProcess) -> None:
    with pytest.raises(ServiceError, match=r"tiny: .* could not predict: (.|\n)*KeyError"):
        probe.predict([{"no text": 1}])
    assert len(probe.predict(REQUESTS)) == 2


def test_a_damaged_bundle_is_reported_with_its_last_words(tmp_path: Path) -> None:
    build_tiny_bundle(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ServiceError, match=r"broken: .* died with exit code 1(.|\n)*sha256 differs"):
        ProbeProcess("broken", tmp_path, num_threads=1)


def test_a_killed_process_is_reported(folder: Path) -> None:
    with ProbeProcess("victim", folder, num_threads=1) as probe:
        os.kill(probe.pid, signal.SIGKILL)
        with pytest.raises(ServiceError, match=r"victim: .* was killed by signal 9"):
            probe.time([REQUESTS], 3)


def test_a_hung_process_is_reported_and_ended(folder: Path) -> None:
    with ProbeProcess("sleeper", folder, num_threads=1, reply_timeout_seconds=0.5) as probe:
        os.kill(probe.pid, signal.SIGSTOP)
        with pytest.raises(ServiceError, match=r"sleeper: .* gave no answer for 0.5 seconds"):
            probe.predict(REQUESTS)
    assert not Path(f"/proc/{probe.pid}").exists()


def test_a_process_that_never_gets_ready_is_reported_and_ended(folder: Path) -> None:
    with pytest.raises(ServiceError, match=r"slow: .* gave no answer for 0.01 seconds"):
        ProbeProcess("slow", folder, num_threads=1, start_timeout_seconds=0.01)


def test_it_ends_when_the_process_that_asked_is_killed(folder: Path) -> None:
    code = f"""
from pathlib import Path
from ml.evaluation.probe_process import ProbeProcess
import time
print(ProbeProcess("orphan", Path({str(folder)!r}), num_threads=1).pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 15
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_a_library_prints_does_not_disturb_the_answers(folder: Path) -> None:
    code = f"""
import io, os, sys
sys.argv = ["probe", "--bundle", {str(folder)!r}, "--threads", "1"]
sys.stdin = io.StringIO("")
import ml.predictor
loading = ml.predictor.load_predictor
def noisy(*arguments, **named):
    print("noise from Python", flush=True)
    os.system("echo noise from C")
    return loading(*arguments, **named)
ml.predictor.load_predictor = noisy
from ml.evaluation.probe import main
main()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "load_seconds" in json.loads(run.stdout)
    assert "noise from Python" in run.stderr
    assert "noise from C" in run.stderr


def test_it_stays_on_the_cores_it_was_given(folder: Path) -> None:
    core = max(os.sched_getaffinity(0))
    with ProbeProcess("pinned", folder, num_threads=1, cores=[core]) as probe:
        assert os.sched_getaffinity(probe.pid) == {core}


def test_a_bundle_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"nothing: (.|\n)*is not a bundle"):
        ProbeProcess("nothing", tmp_path, num_threads=1)
