"""The benchmark of events: what it reads is right, and it runs."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.bench_event_to_run import MODEL, MOMENTS, Passage, bridge_moments, process_start, report, seconds


def test_legs_go_from_each_moment_that_was_seen_to_the_next() -> None:
    passage = Passage("empty flow", {"sent": 10.0, "created": 10.5, "user code": 13.0, "running": 12.0})
    assert passage.legs == {"created": 0.5, "running": 1.5, "user code": 1.0}
    assert passage.total == 3.0


def test_start_of_a_process_is_known_to_a_tenth_of_a_second(tmp_path: Path) -> None:
    before = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        after = time.time()
        (tmp_path / "record.json").write_text(json.dumps({"pid": process.pid}))
        started = process_start(tmp_path / "record.json")
        process.kill()
    assert started is not None
    assert before - 0.1 <= started <= after + 0.1  # the kernel counts in hundredths of a second
    assert process_start(tmp_path / "missing.json") is None


def test_log_of_the_event_bridge_tells_of_the_first_event_since(tmp_path: Path) -> None:
    lines = [
        {"time": "2026-01-01T00:00:10.000+00:00", "event": "event", "name": MODEL},
        {"time": "2026-01-01T00:00:59.990+00:00", "event": "event", "name": MODEL},
        {"time": "2026-01-01T00:01:00.100+00:00", "event": "emitted", "name": "another"},
        {"time": "2026-01-01T00:01:00.250+00:00", "event": "emitted", "name": MODEL},
        {"time": "2026-01-01T00:01:30.000+00:00", "event": "event", "name": MODEL},
    ]
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sent = datetime(2026, 1, 1, 0, 1, tzinfo=UTC).timestamp()
    assert bridge_moments(tmp_path / "log", sent) == {"received": sent - 0.01, "asked": sent + 0.25}


def test_report_holds_the_totals_against_goal_and_limit() -> None:
    passages = [Passage("object put", dict(zip(MOMENTS, (0, 0.1, 0.2, 0.3, 1, 1, 2, end), strict=True))) for end in (2.5, 2.9, 6)]
    text = report(passages, ["| `pass` | 0.02 |"], load_before=0.0)
    assert "object put: median 2.90 s (goal 3 s met); 2 of 3 within the limit of 5 s" in text
    assert "| → Running | 1.00 (1.00) |" in text


def test_seconds_reads_both_forms_of_utc() -> None:
    assert seconds("2026-01-01T00:00:00Z") == seconds("2026-01-01T00:00:00+00:00")


@pytest.mark.slow
def test_every_way_in_leads_to_user_code() -> None:
    command = [sys.executable, "-m", "benchmarks.bench_event_to_run", "--times", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for way in ("object put", "event posted", "empty flow"):
        assert f"- {way}: median" in done.stdout
