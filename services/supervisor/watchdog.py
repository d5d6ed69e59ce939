"""Finds flow runs whose state is not true, and makes it true: the process is gone, or will not end.

Every flow process of this machine is remembered under `processes/flow-run.<id>.json` by pid and start time (see
services/flow_process.py), so nothing here is a guess: a run is Running exactly as long as its process lives, whatever
became of the worker that started it. A run of another machine is not touched.
"""

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from services.flow_process import RECORD_PREFIX
from services.prefect_rest import open_prefect
from services.processes import ProcessRecord, process_names, read_process, remembered_process, signal_process, stop_process
from services.worker import WORK_POOL, worker_name

# The worker, or the flow itself, says first how it ended; only when nobody does, the watchdog speaks.
GONE_SECONDS = 5
# How long the worker has to end a run that was cancelled, and the run to follow a TERM, before the next stronger means.
CANCEL_SECONDS = 15
KILL_SECONDS = 20
# From "taken by a worker" to "has a process" it takes one or two seconds.
PENDING_SECONDS = 60

FINAL_TYPES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Watchdog:
    """Looks after the flow runs of one state folder.

    Args:
        api_url: of the Prefect server.
        gone_seconds: how long a process must be gone before its run is reported.
    """

    def __init__(self, state_dir: Path, api_url: str, *, gone_seconds: float = GONE_SECONDS):
        self._state_dir = state_dir
        self._gone_seconds = gone_seconds
        self._client = open_prefect(api_url, timeout_seconds=10)
        self._gone_since: dict[str, float] = {}
        self._asked_to_end: dict[str, float] = {}

    def check(self) -> list[str]:
        """One look at everything; what was done, in words. To be called every second or two.

        Raises:
            httpx.HTTPError: the server does not answer; the next look makes up for it.
        """
        names = [name for name in process_names(self._state_dir) if name.startswith(RECORD_PREFIX)]
        runs = self._read_runs([name.removeprefix(RECORD_PREFIX) for name in names])
        done = []
        for name in names:
            run = runs.get(name.removeprefix(RECORD_PREFIX))
            process = read_process(name, self._state_dir)
            done += self._look_after_dead(name, run) if process is None else self._look_after_living(name, process, run)
        return done + self._give_back_lost(set(runs))

    def _look_after_dead(self, name: str, run: Mapping[str, Any] | None) -> list[str]:
        """The process is gone; if nobody says so, say it."""
        now = time.monotonic()
        gone_for = now - self._gone_since.setdefault(name, now)
        if run is not None and run["state_type"] not in FINAL_TYPES and gone_for < self._gone_seconds:
            return []
        done = []
        if run is not None:
            was_cancelled = run["state_type"] == "CANCELLING" or (name in self._asked_to_end and run["state_type"] == "CRASHED")
            if was_cancelled:
                self._set_state(run, "CANCELLED", "cancelled; its process has ended")
                done.append(f"flow run {run['name']} is Cancelled: its process has ended")
            elif run["state_type"] not in FINAL_TYPES:
                record = remembered_process(name, self._state_dir)
                message = f"its process {record.pid if record else ''} on {os.uname().nodename} is gone and left no result"
                self._set_state(run, "CRASHED", message)
                done.append(f"flow run {run['name']} is Crashed: {message}")
        stop_process(name, self._state_dir, grace_seconds=0)  # whatever is left of its group, and the record
        self._gone_since.pop(name, None)
        self._asked_to_end.pop(name, None)
        return done

    def _look_after_living(self, name: str, process: ProcessRecord, run: Mapping[str, Any] | None) -> list[str]:
        """A run that is to be cancelled, or is said to be over, must not go on."""
        if run is None:
            return []
        to_end = run["state_type"] in ("CANCELLING", "CANCELLED", "CRASHED")
        if not to_end or _seconds_since(run["state"]["timestamp"]) < CANCEL_SECONDS:
            return []
        if (asked := self._asked_to_end.get(name)) is None:
            self._asked_to_end[name] = time.monotonic()
            signal_process(process, signal.SIGTERM)
            return [f"flow run {run['name']} is {run['state_name']} but process {process.pid} goes on: sent TERM"]
        if time.monotonic() - asked > KILL_SECONDS:
            self._asked_to_end[name] = time.monotonic()
            signal_process(process, signal.SIGKILL)
            return [f"flow run {run['name']}: process {process.pid} did not heed TERM: sent KILL"]
        return []

    def _give_back_lost(self, known: set[str]) -> list[str]:
        """A run that a worker took and never started, because it died in between, is offered again."""
        flow_run_filter = {"state": {"type": {"any_": ["PENDING"]}}}
        pool_filter = {"name": {"any_": [WORK_POOL]}}
        pending = self._post("/flow_runs/filter", {"flow_runs": flow_run_filter, "work_pools": pool_filter, "limit": 200})
        lost = [run for run in pending if run["id"] not in known and _seconds_since(run["state"]["timestamp"]) > PENDING_SECONDS]
        if lost:
            workers = self._post(f"/work_pools/{WORK_POOL}/workers/filter", {})
            if any(worker["status"] == "ONLINE" and worker["name"] != worker_name() for worker in workers):
                return []  # a worker of another machine may have it
        for run in lost:
            self._set_state(run, "SCHEDULED", "the worker that took it died before starting it")
        return [f"flow run {run['name']} is Scheduled again: the worker that took it died before starting it" for run in lost]

    def _read_runs(self, ids: list[str]) -> dict[str, Mapping[str, Any]]:
        if not ids:
            return {}
        return {run["id"]: run for run in self._post("/flow_runs/filter", {"flow_runs": {"id": {"any_": ids}}, "limit": 200})}

    def _set_state(self, run: Mapping[str, Any], state_type: str, message: str) -> None:
        # Forced: the usual rules ask the flow's own process, which is what is gone. Slots are freed all the same.
        state = {"type": state_type, "message": message}
        self._post(f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})

    def _post(self, path: str, body: object) -> Any:
        answer = self._client.post(path, json=body)
        answer.raise_for_status()
        return answer.json()


def end_flow_runs(state_dir: Path, api_url: str, grace_seconds: float = 10) -> None:
    """End every flow process of this machine, and see to it that the server knows: to be called before the server stops."""
    names = [name for name in process_names(state_dir) if name.startswith(RECORD_PREFIX)]
    for number, patience in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 2.0)):
        living = [process for name in names if (process := read_process(name, state_dir))]
        for process in living:
            signal_process(process, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any(read_process(process.name, state_dir) for process in living):
            time.sleep(0.1)
    if names:
        with contextlib.suppress(httpx.HTTPError):  # without a server the records stay, for the next watchdog
            Watchdog(state_dir, api_url, gone_seconds=0).check()


def _seconds_since(timestamp: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(timestamp.replace("Z", "+00:00"))).total_seconds()
