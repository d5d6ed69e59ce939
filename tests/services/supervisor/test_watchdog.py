"""The watchdog against a small server that keeps states as Prefect's API does; the real one is hurt in tests/faults."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from services.flow_process import record_name
from services.processes import process_names, read_process, remember_process
from services.supervisor import watchdog
from services.supervisor.watchdog import Watchdog, end_flow_runs


class States:
    """The part of the API that the watchdog uses."""

    def __init__(self) -> None:
        self.runs: dict[str, dict] = {}
        self.workers: list[dict] = []
        states = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = json.dumps(states.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, run_id: str, state_type: str, age_seconds: float = 0) -> None:
        timestamp = (datetime.now(UTC) - timedelta(seconds=age_seconds)).isoformat().replace("+00:00", "Z")
        state = {"timestamp": timestamp, "type": state_type}
        self.runs[run_id] = {"id": run_id, "name": run_id, "state_type": state_type, "state_name": state_type.title(), "state": state}

    def answer(self, path: str, body: dict) -> object:
        if path == "/flow_runs/filter":
            wanted = body["flow_runs"]
            if "id" in wanted:
                return [run for run_id, run in self.runs.items() if run_id in wanted["id"]["any_"]]
            return [run for run in self.runs.values() if run["state_type"] in wanted["state"]["type"]["any_"]]
        if path.endswith("/workers/filter"):
            return self.workers
        assert path.endswith("/set_state") and body["force"]
        run_id = path.split("/")[2]
        self.add(run_id, body["state"]["type"])
        self.runs[run_id]["message"] = body["state"]["message"]
        return {"status": "ACCEPT"}


@pytest.fixture
def states() -> Iterator[States]:
    states = States()
    yield states
    states.server.shutdown()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A flow process that leads a session, as services.flow_process does, with a child of its own."""
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); time.sleep(300)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    remember_process(record_name("r1"), child.pid, tmp_path)
    yield child
    child.kill()
    child.wait()


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def look(watchdog: Watchdog, times: int = 1) -> list[str]:
    return [text for _ in range(times) for text in watchdog.check()]


def test_a_living_run_is_left_alone(states: States, process: subprocess.Popen, tmp_path: Path) -> None:
    states.add("r1", "RUNNING", age_seconds=10_000)
    assert look(Watchdog(tmp_path, states.url, gone_seconds=0), 3) == []
    assert states.runs["r1"]["state_type"] == "RUNNING"


def test_a_run_whose_process_is_gone_is_crashed_and_its_children_end(states: States, process: subprocess.Popen, tmp_path: Path) -> None:
    states.add("r1", "RUNNING")
    kill(process)
    done = look(Watchdog(tmp_path, states.url, gone_seconds=0))
    assert states.runs["r1"]["state_type"] == "CRASHED"
    assert str(process.pid) in states.runs["r1"]["message"] and str(process.pid) in done[0]
    assert process_names(tmp_path) == []
    assert subprocess.run(["ps", "-o", "pid=", "-s", str(process.pid)], capture_output=True, text=True, check=False).stdout.strip() == ""


def test_who_knows_better_speaks_first(states: States, process: subprocess.Popen, tmp_path: Path) -> None:
    states.add("r1", "RUNNING")
    kill(process)
    patient = Watchdog(tmp_path, states.url, gone_seconds=0.5)
    assert look(patient) == []
    states.add("r1", "COMPLETED")
    assert look(patient) == []
    assert states.runs["r1"]["state_type"] == "COMPLETED"
    assert process_names(tmp_path) == []


def test_a_pid_that_somebody_else_has_now_is_not_taken_for_the_run(states: States, process: subprocess.Popen, tmp_path: Path) -> None:
    path = tmp_path / "processes" / f"{record_name('r1')}.json"
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, "started": record["started"] - 1000}))
    states.add("r1", "RUNNING")
    look(Watchdog(tmp_path, states.url, gone_seconds=0))
    assert states.runs["r1"]["state_type"] == "CRASHED"
    assert process.poll() is None, "the process of somebody else must live on"


def test_a_cancelled_run_that_nobody_ends_is_ended(states: States, process: subprocess.Popen, tmp_path: Path) -> None:
    states.add("r1", "CANCELLING", age_seconds=watchdog.CANCEL_SECONDS - 5)
    dog = Watchdog(tmp_path, states.url, gone_seconds=0)
    assert look(dog) == [], "its worker has time to do it"
    states.add("r1", "CANCELLING", age_seconds=watchdog.CANCEL_SECONDS + 1)
    assert "TERM" in look(dog)[0]
    process.wait(timeout=10)
    states.add("r1", "CRASHED")  # as the flow's own process says when it is told to end
    look(dog)
    assert states.runs["r1"]["state_type"] == "CANCELLED"


def test_one_that_does_not_heed_term_is_killed(states: States, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(300)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"on\n"
    remember_process(record_name("r1"), child.pid, tmp_path)
    monkeypatch.setattr(watchdog, "KILL_SECONDS", 0.3)
    states.add("r1", "CANCELLING", age_seconds=100)
    dog = Watchdog(tmp_path, states.url, gone_seconds=0)
    assert "TERM" in look(dog)[0]
    time.sleep(0.5)
    assert "KILL" in look(dog)[0]
    child.wait(timeout=10)
    look(dog)
    assert states.runs["r1"]["state_type"] == "CANCELLED"


def test_a_run_that_is_said_to_be_over_does_not_go_on(states: States, process: subprocess.Popen, tmp_path: Path) -> None:
    states.add("r1", "CRASHED", age_seconds=100)
    assert "TERM" in look(Watchdog(tmp_path, states.url))[0]
    process.wait(timeout=10)


def test_a_run_that_was_taken_and_never_started_is_offered_again(states: States, tmp_path: Path) -> None:
    states.add("young", "PENDING", age_seconds=5)
    states.add("lost", "PENDING", age_seconds=watchdog.PENDING_SECONDS + 1)
    dog = Watchdog(tmp_path, states.url)
    states.workers = [{"name": "another machine", "status": "ONLINE"}]
    assert look(dog) == [], "it may be starting there"
    states.workers = [{"name": "another machine", "status": "OFFLINE"}]
    look(dog)
    assert (states.runs["lost"]["state_type"], states.runs["young"]["state_type"]) == ("SCHEDULED", "PENDING")


def test_without_a_server_nothing_is_forgotten(states: States, process: subprocess.Popen, tmp_path: Path) -> None:
    kill(process)
    with pytest.raises(httpx.HTTPError):
        Watchdog(tmp_path, "http://127.0.0.1:9", gone_seconds=0).check()
    assert process_names(tmp_path) == [record_name("r1")]


def test_ending_all_runs_tells_the_server(states: States, process: subprocess.Popen, tmp_path: Path) -> None:
    states.add("r1", "RUNNING")
    end_flow_runs(tmp_path, states.url)
    assert process.poll() is not None and read_process(record_name("r1"), tmp_path) is None
    assert states.runs["r1"]["state_type"] == "CRASHED"
