import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ml.errors import ServiceError
from ml.evaluation.machine_lock import machine_lock

HOLD = """
import sys, time
from pathlib import Path
from ml.evaluation.machine_lock import machine_lock
with machine_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_one_waits_until_the_first_is_done_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lock"
    events: list[str] = []

    def second() -> None:
        with machine_lock(path):
            events.append("second")

    with caplog.at_level("INFO"), machine_lock(path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.7)
        events.append("first done")
    thread.join(timeout=10)
    assert events == ["first done", "second"]
    assert "waiting for another run" in caplog.text


def test_waiting_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with machine_lock(path), pytest.raises(ServiceError, match="another run"), machine_lock(path, wait_seconds=0.2):
        pass


def test_a_killed_holder_leaves_no_lock_behind(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ServiceError), machine_lock(path, wait_seconds=0.2):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with machine_lock(path, wait_seconds=5):
        pass


def test_a_file_that_may_only_be_read_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch(mode=0o444)
    with machine_lock(path):
        pass
