"""What may go from the state folder, and what a living process still holds."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ml.local_state import clean_local_state, keep_end
from ml.retention import CleanUpRequest

DAY = 86_400
DELETE = CleanUpRequest(dry_run=False, grace_hours=48, log_megabytes=0.001)


def write(path: Path, days_old: float, content: bytes = b"12345") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    moment = time.time() - days_old * DAY
    for touched in (path, path.parent):
        os.utime(touched, (moment, moment))
    return path


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    for name, days in (("kept", 50), ("gone", 50), ("gone-lately", 1), ("shown", 50)):
        write(tmp_path / "runs" / name / "report.html", days)
    (tmp_path / "runs" / "latest").symlink_to("shown")
    write(tmp_path / "training" / "given-up" / "plan.json", 3)
    write(tmp_path / "training" / "young" / "plan.json", 1)
    write(tmp_path / "training" / "busy" / "lock", 30, b"")
    write(tmp_path / "scratch" / "export-1" / "model.onnx", 3)
    write(tmp_path / "object-store" / "data" / "volume", 300)
    write(tmp_path / "prefect" / "prefect.db", 300)
    write(tmp_path / "logs" / "worker.log", 300, b"old but short\n")
    write(tmp_path / "logs" / "worker.log.1", 31, b"turned over\n")
    write(tmp_path / "logs" / "predictor.log", 0, b"".join(b"line %04d\n" % number for number in range(500)))
    return tmp_path


def test_what_was_given_up_goes_and_all_else_stays(state_dir: Path):
    before = files(state_dir)
    with (state_dir / "training" / "busy" / "lock").open("wb") as lock:
        os.utime(lock.name, (0, 0))
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = clean_local_state(state_dir, DELETE.model_copy(update={"dry_run": True}), {"kept"})
        assert files(state_dir) == before
        done = clean_local_state(state_dir, DELETE, {"kept"})
    assert before - files(state_dir) == {
        "runs/gone/report.html",
        "training/given-up/plan.json",
        "scratch/export-1/model.onnx",
        "logs/worker.log.1",
    }
    assert done.totals == told.totals
    assert {total.kind: total.count for total in done.totals} == {"local run": 1, "training folder": 1, "scratch folder": 1, "log": 2}
    lines = (state_dir / "logs" / "predictor.log").read_text().splitlines()
    assert lines == [f"line {number:04d}" for number in range(500 - len(lines), 500)]
    assert 0 < len(lines) * 10 <= 1000
    assert (state_dir / "logs" / "worker.log").read_text() == "old but short\n"
    # What was busy is free now, and as old as before.
    assert clean_local_state(state_dir, DELETE, {"kept"}).totals[0].examples == ("training/busy",)
    assert clean_local_state(state_dir, DELETE, {"kept"}).totals == ()


def test_a_folder_with_one_young_file_stays(tmp_path: Path):
    write(tmp_path / "training" / "key" / "plan.json", 30)
    deep = write(tmp_path / "training" / "key" / "checkpoints" / "step-1" / "weights", 1)
    clean_local_state(tmp_path, DELETE, set())
    assert deep.exists()


def test_an_empty_state_folder_has_nothing_to_go(tmp_path: Path):
    assert clean_local_state(tmp_path, DELETE, set()).totals == ()


def test_a_process_writes_on_at_the_end_of_a_shortened_log(tmp_path: Path):
    path = tmp_path / "service.log"
    code = "import sys\nfor n in range(300): print(f'line {n:04d}', flush=True)\nsys.stdin.readline()\nprint('after', flush=True)"
    with path.open("ab") as output:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=output)
    while path.stat().st_size < 3000:
        time.sleep(0.01)
    keep_end(path, 105)
    process.communicate(b"\n", timeout=30)
    assert path.read_text().splitlines() == [*(f"line {number:04d}" for number in range(290, 300)), "after"]
