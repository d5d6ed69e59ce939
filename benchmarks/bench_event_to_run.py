"""`python -m benchmarks.bench_event_to_run`: from "an object landed" to "user code runs", leg by leg, on the stack of `make up`.

Three ways in: an object put into the datasets bucket, an event posted to the event bridge, and, for an empty flow,
`retrain.requested` posted to the Prefect server itself. README.md says what each leg is.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.machine import describe_machine, load_average, markdown_table, write_result
from ml.events import RETRAIN_REQUESTED, resource_id
from services.event_bridge.launcher import bridge_token, event_log_path
from services.worker import WORK_POOL
from tests.faults.operated_stack import MODEL, OperatedStack
from tests.tiny_encoders import write_tiny_bert

GOAL_SECONDS, LIMIT_SECONDS = 3.0, 5.0
EMPTY_MODEL = "benchmark-empty"
TRAINING_DATA = "s3://millstream-datasets/benchmark/"
POLL_SECONDS = 0.02
IDLE_SECONDS = 2.0

MOMENTS = ("sent", "received", "asked", "created", "taken", "process", "running", "user code")
LEGS = {
    "received": "event bridge has it",
    "asked": "it asked Prefect for a run",
    "created": "flow run created",
    "taken": "worker took it (Pending)",
    "process": "its process began",
    "running": "Running",
    "user code": "first act of the flow",
}
"""The moment that ends each leg -> in words. A leg begins where the last one before it that was seen ended."""


@dataclass(frozen=True)
class Passage:
    """When one event reached each moment, in seconds since the epoch; a moment that the way in does not have is missing."""

    way: str
    moments: dict[str, float]

    @property
    def legs(self) -> dict[str, float]:
        seen = [name for name in MOMENTS if name in self.moments]
        return {name: self.moments[name] - self.moments[before] for before, name in itertools.pairwise(seen)}

    @property
    def total(self) -> float:
        return self.moments["user code"] - self.moments["sent"]


class BenchStack(OperatedStack):
    """A run is started as soon as the stack can: no debounce, no cool-down."""

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "MILLSTREAM_DEBOUNCE_SECONDS": "0", "MILLSTREAM_RETRAIN_MINUTES_PER_DAY": "1440"}

    @contextmanager
    def up(self) -> Iterator[None]:
        started = self.call("up")
        try:
            if started.returncode != 0:
                raise SystemExit(f"the stack did not start:\n{started.stdout}{started.stderr}")
            self.wait_until_well()
            yield
        finally:
            self.call("down")

    def warm_up(self) -> None:
        """Train once on data that never changes: every later run reuses all stages and ends within seconds."""
        store = self.store
        path = Path(self.reviews())
        store.objects.put(store.datasets_bucket, f"{TRAINING_DATA.removeprefix('s3://millstream-datasets/')}{path.name}", path)
        request = self.request(TRAINING_DATA)
        self.use_for_events(request)
        ended = self.wait_for(self.start_run(request))
        if ended["state_type"] != "COMPLETED":
            raise SystemExit(f"the first run ended as {ended['state']}:\n{self.log_end()}")

    def wait_until_idle(self) -> None:
        """No run, and no request that the event bridge still follows; then a moment of rest."""
        self.until(lambda: not self._busy(), 240, "nothing runs and nothing waits")
        time.sleep(IDLE_SECONDS)

    def _busy(self) -> bool:
        state = {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}
        if self.api("/flow_runs/count", {"flow_runs": {"state": state}}) or self.slots_taken():
            return True
        requests = self.bridge("GET", "/v1/events", params={"name": MODEL, "limit": 5})["requests"]
        return any(request["state"] in ("new", "emitted", "seen") for request in requests)

    def bridge(self, method: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {bridge_token(self.state_dir)}"}
        answer = httpx.request(method, f"{self.url('event-bridge')}{path}", headers=headers, timeout=10, trust_env=False, **options)
        return answer.raise_for_status().json()

    def run_objects(self) -> set[str]:
        store = self.store
        return {info.key for info in store.objects.list(store.runs_bucket, "runs/") if info.key.endswith("/config.json")}

    def states(self, flow_run_id: str) -> list[dict[str, Any]]:
        return self.api(f"/flow_run_states/?flow_run_id={flow_run_id}", method="GET")

    def register_empty_flow(self) -> str:
        """A deployment and a trigger like those of prefect.yaml; returns its id."""
        flow_id = self.api("/flows/", {"name": "benchmark-empty"})["id"]
        deployment = {
            "name": EMPTY_MODEL,
            "flow_id": flow_id,
            "entrypoint": "benchmarks.empty_flow.empty",
            "work_pool_name": WORK_POOL,
            "job_variables": {"command": "python -m services.flow_process"},
            "enforce_parameter_schema": False,
        }
        deployment_id = self.api("/deployments/", deployment)["id"]
        request = {"__prefect_kind": "json", "value": {"__prefect_kind": "jinja", "template": "{{ event.payload.request | tojson }}"}}
        trigger = {
            "type": "event",
            "posture": "Reactive",
            "expect": [RETRAIN_REQUESTED],
            "match": {"prefect.resource.id": resource_id(EMPTY_MODEL)},
            "threshold": 1,
            "within": 0,
        }
        action = {"type": "run-deployment", "source": "selected", "deployment_id": deployment_id, "parameters": {"request": request}}
        self.api("/automations/", {"name": "benchmark-empty", "trigger": trigger, "actions": [action]})
        return deployment_id


def measure(stack: BenchStack, way: str, deployment_id: str, send: Callable[[], float], first_act: Callable[[], float | None]) -> Passage:
    """Send one event and follow it to the first act of the flow, and to the end of its run.

    Args:
        send: sends it and returns when that was done.
        first_act: the time of the flow's first act, once it has happened.
    """
    stack.wait_until_idle()
    known = {run["id"] for run in flow_runs(stack, deployment_id)}
    moments = {"sent": send()}
    processes, pids = stack.state_dir / "processes", {}
    deadline = time.monotonic() + 120
    while (began := first_act()) is None:
        for path in set(processes.glob("flow-run.*.json")) - set(pids):
            pids[path] = process_start(path)
        if time.monotonic() > deadline:
            raise SystemExit(f"no user code within 120 s of an event by {way}:\n{stack.log_end()}")
        time.sleep(POLL_SECONDS)
    moments["user code"] = began

    new = [run for run in flow_runs(stack, deployment_id) if run["id"] not in known]
    if len(new) != 1:
        raise SystemExit(f"one event by {way} made {len(new)} runs")
    run_id = new[0]["id"]
    ended = stack.wait_for(run_id)
    if ended["state_type"] != "COMPLETED":
        raise SystemExit(f"the run of an event by {way} ended as {ended['state']}:\n{stack.log_end()}")
    moments["created"] = seconds(new[0]["created"])
    for state in reversed(stack.states(run_id)):
        if state["type"] in ("PENDING", "RUNNING"):
            moments["taken" if state["type"] == "PENDING" else "running"] = seconds(state["timestamp"])
    if (start := pids.get(processes / f"flow-run.{run_id}.json")) is not None:
        moments["process"] = start
    moments |= bridge_moments(event_log_path(stack.state_dir), moments["sent"])
    return Passage(way, moments)


def flow_runs(stack: BenchStack, deployment_id: str) -> list[dict[str, Any]]:
    body = {"deployments": {"id": {"any_": [deployment_id]}}, "limit": 200}
    return [run for run in stack.api("/flow_runs/filter", body) if not run["auto_scheduled"]]


def process_start(record: Path) -> float | None:
    """When a process began. psutil takes the time of boot in whole seconds, so its answer is off by up to one."""
    try:
        pid = json.loads(record.read_bytes())["pid"]
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError):
        return None
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def bridge_moments(log: Path, since: float) -> dict[str, float]:
    """When the event bridge had the event and when it had asked for a run, from its log. Empty for an event that went past it."""
    words, found = {"event": "received", "emitted": "asked"}, {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        moment = seconds(entry["time"])
        # The webhook of an object may come in just before its put returns.
        if entry["event"] in words and entry.get("name") == MODEL and moment > since - IDLE_SECONDS / 2:
            found.setdefault(words[entry["event"]], moment)
    return found


def seconds(iso: str) -> float:
    return datetime.fromisoformat(iso.replace("Z", "+00:00")).timestamp()


class Ways:
    """The ways in. Each makes one passage."""

    def __init__(self, stack: BenchStack):
        self.stack = stack
        self.training_id = stack.deployment["id"]
        self.empty_id = stack.register_empty_flow()

    def put_object(self) -> Passage:
        store = self.stack.store

        def send() -> float:
            store.objects.put(store.datasets_bucket, f"{MODEL}/{uuid.uuid4().hex}.csv", b"review,stars\na warm film,5\n")
            return time.time()

        return self._training("object put", send)

    def post_event(self) -> Passage:
        def send() -> float:
            self.stack.bridge("POST", "/v1/events", json={"kind": "retrain.asked", "name": MODEL, "source": "benchmark"})
            return time.time()

        return self._training("event posted", send)

    def _training(self, way: str, send: Callable[[], float]) -> Passage:
        known = self.stack.run_objects()

        def first_act() -> float | None:
            # The listing costs the store something, so it begins when the process is there.
            if not any((self.stack.state_dir / "processes").glob("flow-run.*.json")):
                return None
            return time.time() if self.stack.run_objects() - known else None

        return measure(self.stack, way, self.training_id, send, first_act)

    def empty_flow(self) -> Passage:
        path = self.stack.folder / f"{uuid.uuid4().hex}.txt"

        def send() -> float:
            event = {
                "id": str(uuid.uuid4()),
                "event": RETRAIN_REQUESTED,
                "occurred": datetime.now().astimezone().isoformat(),
                "resource": {"prefect.resource.id": resource_id(EMPTY_MODEL)},
                "payload": {"request": {"write_to": str(path)}},
            }
            self.stack.api("/events", [event])
            return time.time()

        return measure(
            self.stack, "empty flow", self.empty_id, send, lambda: float(path.read_text(encoding="utf-8")) if path.exists() else None
        )


def report(passages: list[Passage], imports: list[str], load_before: float) -> str:
    """The result as Markdown: medians and 95th percentiles of each leg and in all, and every single passage."""
    ways = list(dict.fromkeys(passage.way for passage in passages))
    of_way = {way: [passage for passage in passages if passage.way == way] for way in ways}
    rows = [[f"→ {words}", *(_spread([p.legs[leg] for p in of_way[way] if leg in p.legs]) for way in ways)] for leg, words in LEGS.items()]
    rows.append(["**in all**", *(f"**{_spread([p.total for p in of_way[way]])}**" for way in ways)])
    singles = []
    for passage in passages:
        legs = passage.legs
        singles.append([passage.way, *(f"{legs[leg]:.2f}" if leg in legs else "" for leg in LEGS), f"{passage.total:.2f}"])
    verdicts = []
    for way in ways:
        totals = [passage.total for passage in of_way[way]]
        median, within = float(np.median(totals)), sum(total <= LIMIT_SECONDS for total in totals)
        goal = f"goal {GOAL_SECONDS:g} s {'met' if median <= GOAL_SECONDS else 'MISSED'}"
        verdicts.append(f"- {way}: median {median:.2f} s ({goal}); {within} of {len(totals)} within the limit of {LIMIT_SECONDS:g} s")
    lines = [
        "# From an event to user code",
        "",
        *describe_machine(load_before),
        f"- {', '.join(f'{len(of_way[way])} times {way}' for way in ways)}, in turn, each from idle; one run at a time",
        "",
        *verdicts,
        "",
        "Seconds of each leg, median (95th percentile):",
        "",
        *markdown_table(["", *ways], rows),
        "",
        "Imports of a fresh process, seconds, each alone:",
        "",
        *imports,
        "",
        "Every passage, seconds:",
        "",
        *markdown_table(["way", *(f"→ {moment}" for moment in LEGS), "in all"], singles),
        "",
    ]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({np.percentile(values, 95):.2f})" if values else ""


def time_imports(repeats: int = 5) -> list[str]:
    """Markdown lines: what a flow process imports before user code can run."""
    rows = []
    for statement in ("pass", "import prefect", "import prefect.engine, prefect.flow_engine", "import flows.training_pipeline"):
        taken = []
        for _ in range(repeats):
            started = time.monotonic()
            subprocess.run([sys.executable, "-c", statement], check=True)
            taken.append(time.monotonic() - started)
        rows.append([f"`{statement}`", f"{np.median(taken):.2f}", f"{max(taken):.2f}"])
    return markdown_table(["", "median", "longest"], rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_event_to_run", description=__doc__)
    parser.add_argument("--times", type=int, default=15, help="events by each way in")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args(arguments)
    load_before = load_average()
    imports = time_imports()
    with tempfile.TemporaryDirectory(prefix="millstream-bench-", ignore_cleanup_errors=True) as name:
        stack = BenchStack(Path(name))
        (stack.folder / "home").mkdir()
        write_tiny_bert(stack.encoder)
        passages = []
        with stack.up():
            stack.warm_up()
            ways = Ways(stack)
            for number in range(options.times):
                for make in (ways.put_object, ways.post_event, ways.empty_flow):
                    passages.append(make())
                    print(f"{number + 1} of {options.times}, {passages[-1].way}: {passages[-1].total:.2f} s", flush=True)
    markdown = report(passages, imports, load_before)
    print(markdown)
    if options.write:
        print(f"written to {write_result('event_to_run', markdown)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
