"""The stack of `make up` in a folder of its own, runs on it, and the means to hurt them."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from ml.storage.artifacts import ArtifactStore
from ml.storage.s3 import S3Store
from services.object_store import object_store_endpoint
from tests.e2e.conftest import QUICK_SETTINGS, Workspace, write_reviews
from tests.store_checker import find_problems

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
MODEL = "sentiment"
# Long enough to be hit in the middle of training, short enough to be waited for.
LONG_TRAINING = ("train.epochs=30", "train.patience=1000")


class OperatedStack(Workspace):
    """`millstream up` and what a user or an attacker can do to it from outside."""

    @property
    def environment(self) -> dict[str, str]:
        quick = {"MILLSTREAM_COOL_DOWN_SECONDS": "0", "MILLSTREAM_DEBOUNCE_SECONDS": "0", "MILLSTREAM_DATASET_POLL_SECONDS": "5"}
        return {**super().environment, **quick}

    @property
    def ports(self) -> dict[str, int]:
        return json.loads((self.state_dir / "ports.json").read_bytes())

    def url(self, part: str) -> str:
        return f"http://127.0.0.1:{self.ports[part]}"

    def api(self, path: str, body: object = None, method: str = "POST") -> Any:
        """Ask the Prefect server, patiently: it may be the one that was just killed."""
        deadline = time.monotonic() + 90
        while True:
            try:
                answer = httpx.request(method, f"{self.url('prefect-server')}/api{path}", json=body, timeout=10, trust_env=False)
                answer.raise_for_status()
                return answer.json() if answer.content else None
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)

    @property
    def store(self) -> ArtifactStore:
        endpoint = object_store_endpoint(self.state_dir)
        return ArtifactStore(S3Store(endpoint.endpoint, endpoint.access_key, endpoint.secret_key))

    def store_problems(self) -> list[str]:
        return find_problems(self.store.objects, "millstream-")

    # Runs

    def request(self, data: str, *settings: str, **fields: object) -> dict[str, Any]:
        """A RunRequest as the form sends it, small enough for tests."""
        import yaml

        overrides = dict(setting.split("=", 1) for setting in (*QUICK_SETTINGS, *settings))
        return {
            "solution": "sentiment",
            "name": MODEL,
            "data": data,
            "text_column": "review",
            "label_column": "stars",
            "encoder": str(self.encoder),
            "overrides": {key: yaml.safe_load(value) for key, value in overrides.items()},
            **fields,
        }

    def reviews(self, name: str = "reviews.csv", num_rows: int = 300, seed: int = 0) -> str:
        return str(write_reviews(self.folder / name, num_rows, seed=seed))

    @property
    def deployment(self) -> dict[str, Any]:
        return self.api(f"/deployments/name/training-pipeline/{MODEL}", method="GET")

    def use_for_events(self, request: dict[str, Any]) -> None:
        """Give the deployment the parameters that its owner would write into prefect.yaml."""
        self.api(f"/deployments/{self.deployment['id']}", {"parameters": {"request": request}}, method="PATCH")

    def start_run(self, request: dict[str, Any]) -> str:
        """As the form of the Prefect UI does; returns the id of the flow run."""
        return self.api(f"/deployments/{self.deployment['id']}/create_flow_run", {"parameters": {"request": request}})["id"]

    def run(self, flow_run_id: str) -> dict[str, Any]:
        return self.api(f"/flow_runs/{flow_run_id}", method="GET")

    def runs(self) -> list[dict[str, Any]]:
        """All runs of the training deployment that were not planned by its schedule, oldest first."""
        body = {"deployments": {"id": {"any_": [self.deployment["id"]]}}, "sort": "START_TIME_ASC", "limit": 200}
        return [run for run in self.api("/flow_runs/filter", body) if not run["auto_scheduled"]]

    def wait_for(self, flow_run_id: str, *types: str, timeout: float = 240) -> dict[str, Any]:
        """The run once it is in one of these states, by default in a final one."""
        wanted = types or FINAL
        return self.until(lambda: (run := self.run(flow_run_id))["state_type"] in wanted and run, timeout, f"run {flow_run_id} in {wanted}")

    def until(self, check: Callable[[], Any], timeout: float, what: str) -> Any:
        deadline = time.monotonic() + timeout
        while not (found := check()):
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}\n{self.log_end()}"
            time.sleep(0.2)
        return found

    def slots_taken(self) -> int:
        return self.deployment["global_concurrency_limit"]["active_slots"]

    # Processes

    def pid(self, part: str) -> int:
        return json.loads((self.state_dir / "processes" / f"{part}.json").read_bytes())["pid"]

    def flow_pid(self, flow_run_id: str) -> int:
        record = self.state_dir / "processes" / f"flow-run.{flow_run_id}.json"
        self.until(record.exists, 60, f"{record} is there")
        return self.pid(f"flow-run.{flow_run_id}")

    def rank_pids(self) -> list[int]:
        return [process.pid for process in self.processes() if {"ml.training.worker", "--attempt"} <= set(process.cmdline())]

    def wait_for_training(self, timeout: float = 120) -> None:
        """Until a training has written a checkpoint: then its ranks are in the middle of it."""
        checkpoints = self.state_dir / "training"
        self.until(lambda: self.rank_pids() and any(checkpoints.glob("*/checkpoints/*")), timeout, "ranks train and have a checkpoint")

    def processes(self) -> list[psutil.Process]:
        """Every living process of this state folder."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("MILLSTREAM_STATE_DIR") == str(self.state_dir)
                if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def strays(self) -> list[str]:
        """Processes of this folder that belong neither to a part of the stack nor to a living flow run."""
        groups = {self.pid(path.stem) for path in (self.state_dir / "processes").glob("*.json")}
        strays = []
        for process in self.processes():
            try:
                if os.getpgid(process.pid) not in groups:
                    strays.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
            except (ProcessLookupError, psutil.Error):
                continue
        return strays

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def kill_part(self, part: str) -> None:
        self.kill(self.pid(part))

    def wait_until_well(self, timeout: float = 120) -> None:
        self.until(lambda: self.call("status").returncode == 0, timeout, "every part is healthy")

    def log_end(self, lines: int = 40) -> str:
        path = self.state_dir / "logs" / "stack.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"


def make_operated_stack(folder: Path) -> OperatedStack:
    from tests.tiny_encoders import write_tiny_bert

    stack = OperatedStack(folder)
    (folder / "home").mkdir()
    write_tiny_bert(stack.encoder)
    return stack
