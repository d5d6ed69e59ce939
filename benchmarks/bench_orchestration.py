"""`python -m benchmarks.bench_orchestration`: what does it cost that Prefect runs the pipeline?

Pairs of runs in the order AB BA AB ...: one through Prefect on the real local stack, one by plain_pipeline.py. Each is a
process of its own, on an empty object store, and must produce what the other produced. README.md says how to read it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import yaml

from benchmarks.machine import describe_machine, load_average, markdown_table, write_result
from ml.artifacts import Interval
from ml.config import RunRequest
from ml.environment import describe_environment
from ml.evaluation.bootstrap import median_interval
from ml.outcome import RunRecords
from ml.settings import Settings
from services.local_stack import LocalStack, StackAddresses

Side = Literal["prefect", "plain"]
MODULES: dict[Side, str] = {"prefect": "benchmarks.orchestrated_pipeline", "plain": "benchmarks.plain_pipeline"}
NO_PREFECT = "http://127.0.0.1:9/no-prefect-server-here"
KEPT = ("prefect", "ports.json", "locks")
GOAL = 1.05
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Repetition:
    """One run of one side. All times in seconds.

    Args:
        stack: starting the services.
        startup: from starting the process to the first line of the pipeline's own code.
        first_calls: the part of it after the imports.
        body: from there to the last line, and until Prefect has taken in the end of the flow.
        shutdown: from there to the end of the process.
        produced: what must be equal on both sides.
    """

    side: Side
    stack: float
    startup: float
    first_calls: float
    body: float
    shutdown: float
    api_calls: int
    task_runs: int
    load: float
    produced: dict[str, Any]

    @property
    def process(self) -> float:
        return self.startup + self.body + self.shutdown


class Bench:
    """Args:
    folder: for state and requests; taken as it is, so that the Prefect server's database need not be made anew.
    """

    def __init__(self, folder: Path, request: dict[str, Any]):
        self.state_dir = folder / "state"
        self.request_path, self.result_path = folder / "request.json", folder / "result.json"
        self.request_path.write_text(RunRequest.model_validate(request).model_dump_json(), encoding="utf-8")
        self.log_path = folder / "runs.log"

    @contextmanager
    def stack(self, side: Side) -> Iterator[StackAddresses]:
        """The services that a side needs, on an empty store. A plain script has no Prefect server beside it."""
        settings = Settings(state_dir=self.state_dir, s3_endpoint=None, predictor_url=None, bucket_prefix="millstream-")
        given = NO_PREFECT if side == "plain" else None
        with LocalStack(self.state_dir, settings=settings, prefect_api_url=given).running() as addresses:
            yield addresses

    def warm_up(self) -> float:
        """Seconds of the first start, which makes the database of the Prefect server."""
        started = time.monotonic()
        with self.stack("prefect"):
            return time.monotonic() - started

    def repeat(self, side: Side) -> Repetition:
        """
        Raises:
            SystemExit: the run failed; its output is in the log.
        """
        self._forget()
        load, asked = load_average(), time.monotonic()
        with self.stack(side) as addresses:
            spawned = time.monotonic()
            command = [sys.executable, "-m", MODULES[side], str(self.request_path), str(self.result_path)]
            with self.log_path.open("ab") as log:
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
            exited = time.monotonic()
            if done.returncode != 0:
                raise SystemExit(f"the {side} run ended with exit status {done.returncode}; see {self.log_path}:\n{self._log_end()}")
            task_runs = count_task_runs(addresses.prefect_api_url) if side == "prefect" else 0
        result = json.loads(self.result_path.read_bytes())
        moments = result["moments"]
        return Repetition(
            side=side,
            stack=spawned - asked,
            startup=moments["body_began"] - spawned,
            first_calls=moments["body_began"] - moments["imported"],
            body=moments["body_ended"] - moments["body_began"],
            shutdown=exited - moments["body_ended"],
            api_calls=int(result["figures"].get("api_calls", 0)),
            task_runs=task_runs,
            load=load,
            produced=what_was_produced(RunRecords.model_validate(result["manifest"]["records"])) | {"status": result["manifest"]["status"]},
        )

    def _forget(self) -> None:
        """All but the database of the Prefect server, so that nothing of an earlier run is reused."""
        for path in self.state_dir.iterdir():
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _log_end(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-30:])


def count_task_runs(api_url: str) -> int:
    """Of the latest flow run."""
    with httpx.Client(base_url=api_url, timeout=30, trust_env=False) as client:
        runs = client.post("/flow_runs/filter", json={"sort": "START_TIME_DESC", "limit": 1}).raise_for_status().json()
        body = {"flow_runs": {"id": {"any_": [runs[0]["id"]]}}}
        return client.post("/task_runs/count", json=body).raise_for_status().json()


def what_was_produced(records: RunRecords) -> dict[str, Any]:
    """All that has to be equal: digests of data and bundles, metrics, the decision. Times and measured speed are not in it."""
    produced: dict[str, Any] = {}
    for name in ("raw", "clean", "validated"):
        record = getattr(records, name)
        produced[f"{name} table"] = record.table.sha256 if record else None
    for name in ("train", "validation", "test"):
        produced[f"{name} split"] = getattr(records.splits, name).sha256 if records.splits else None
    produced["trained bundle"] = records.trained.bundle.digest if records.trained else None
    produced["training steps"] = records.trained.num_steps if records.trained else None
    for variant in records.variants:
        produced[f"bundle of {variant.name}"] = variant.bundle.digest if variant.bundle else variant.failure
    for evaluation in (*records.validation, *records.test):
        quality = evaluation.quality
        produced[f"metrics of {evaluation.variant} on {quality.split}"] = quality.model_dump(include={"num_rows", "metrics"})
    produced["chosen variant"] = records.decision.variant if records.decision else None
    produced["deployment"] = records.deployment.status if records.deployment else None
    return produced


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What was not produced alike, in words."""
    return [f"{key}: {one.get(key)} and {other.get(key)}" for key in sorted({*one, *other}) if one.get(key) != other.get(key)]


@dataclass(frozen=True)
class Pair:
    prefect: Repetition
    plain: Repetition

    @property
    def ratio(self) -> float:
        return self.prefect.body / self.plain.body

    @property
    def differences(self) -> list[str]:
        return differences(self.prefect.produced, self.plain.produced)


def run_pairs(bench: Bench, num_pairs: int) -> list[Pair]:
    pairs = []
    for number in range(num_pairs):
        order: tuple[Side, ...] = ("prefect", "plain") if number % 2 == 0 else ("plain", "prefect")
        runs = {side: bench.repeat(side) for side in order}
        pair = Pair(runs["prefect"], runs["plain"])
        pairs.append(pair)
        unlike = f"; NOT the same outcome: {'; '.join(pair.differences)}" if pair.differences else ""
        text = f"pair {number + 1} of {num_pairs}: body {pair.prefect.body:.2f} s through Prefect, {pair.plain.body:.2f} s plain"
        print(f"{text}, ratio {pair.ratio:.3f}{unlike}", flush=True)
    return pairs


def report(pairs: list[Pair], request: dict[str, Any], first_start: float, load_before: float) -> str:
    """The result as Markdown: the ratio, where the time outside the body goes, and every single run."""
    ratio = median_interval([pair.ratio for pair in pairs], NUM_RESAMPLES)
    extra = median_interval([pair.prefect.body - pair.plain.body for pair in pairs], NUM_RESAMPLES)
    num_alike = sum(not pair.differences for pair in pairs)
    unlike = [f"- pair {number + 1}: {text}" for number, pair in enumerate(pairs) for text in pair.differences]
    prefect = pairs[-1].prefect
    parts = {"stack": "stack start", "startup": "process start to the pipeline's first line", "first_calls": "of it after the imports"}
    parts |= {"body": "body", "shutdown": "end of the body to end of the process", "process": "whole process"}
    rows = []
    for field, words in parts.items():
        medians = [median_interval([getattr(getattr(pair, side), field) for pair in pairs], NUM_RESAMPLES) for side in MODULES]
        rows.append([words, *(_seconds(median) for median in medians), f"{medians[0].value - medians[1].value:+.2f}"])
    runs = []
    for number, pair in enumerate(pairs):
        for run in (pair.prefect, pair.plain):
            figures = [f"{value:.2f}" for value in (run.stack, run.startup, run.body, run.shutdown, run.load)]
            runs.append([f"{number + 1} {run.side}", *figures, f"{pair.ratio:.3f}" if run is pair.prefect else ""])
    lines = [
        "# What orchestration costs",
        "",
        *describe_machine(load_before),
        f"- {len(pairs)} pairs, request `{json.dumps(request)}`",
        "",
        f"**Body of the pipeline: {ratio.value:.3f} times the plain script's (95 % interval {ratio.low:.3f} to {ratio.high:.3f}), "
        f"{extra.value:+.2f} s ({extra.low:+.2f} to {extra.high:+.2f}); goal at most {GOAL}, "
        f"{'met' if ratio.value <= GOAL else 'MISSED'}.** "
        f"Both sides produced the same data, bundles, metrics and decision in {num_alike} of {len(pairs)} pairs.",
        *(["", "Not the same:", "", *unlike] if unlike else []),
        "",
        f"One run makes {prefect.api_calls} HTTP calls to the Prefect server and {prefect.task_runs} task runs. "
        f"The first start of all, with an empty database, took {first_start:.1f} s.",
        "",
        "Median seconds with 95 % bootstrap intervals over the pairs:",
        "",
        *markdown_table(["", "Prefect", "plain", "difference"], rows),
        "",
        "Every run; load is the load average before it, which the run before has raised:",
        "",
        *markdown_table(["pair", "stack", "start", "body", "shutdown", "load", "ratio of bodies"], runs),
        "",
    ]
    return "\n".join(lines)


def _seconds(interval: Interval) -> str:
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def fixed_settings() -> dict[str, object]:
    """What a run would decide by the speed of the machine is fixed, so that both sides train alike."""
    fast = {"avx512_bf16", "amx_bf16", "bf16"} & set(describe_environment().cpu_flags)
    return {"budget_minutes": 600, "train.epochs": 2, "train.precision": "bf16" if fast else "fp32"}


def tiny_request(folder: Path) -> dict[str, Any]:
    """300 rows and a random encoder: for tests of the benchmark, not for numbers."""
    from tests.e2e.conftest import QUICK_SETTINGS, write_reviews
    from tests.tiny_encoders import write_tiny_bert

    folder.mkdir()
    data = write_reviews(folder / "reviews.csv", 300)
    # Of variants that are as fast as each other a stopwatch would choose; one method leaves it no choice.
    one_method = ["compression=[dynamic_int8]", *(f"select.max_{what}_ratio=100" for what in ("latency", "memory", "file"))]
    return {
        "data": str(data),
        "text_column": "review",
        "label_column": "stars",
        "encoder": str(write_tiny_bert(folder / "encoder")),
        "overrides": overrides([*QUICK_SETTINGS, *one_method]),
    }


def overrides(settings: list[str]) -> dict[str, object]:
    pairs = (setting.partition("=") for setting in settings)
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_orchestration", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="at least 5 for an interval that means something")
    parser.add_argument("--data", help="as `make run DATA=`; by default the demo data")
    parser.add_argument("--text", dest="text_column")
    parser.add_argument("--label", dest="label_column")
    parser.add_argument("--encoder")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes a run; numbers of no worth")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args(arguments)
    load_before = load_average()
    os.environ.pop("PREFECT_API_URL", None)  # a server of somebody else is not what is measured

    with tempfile.TemporaryDirectory(prefix="millstream-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        request: dict[str, Any] = {"profile": options.profile, "overrides": {}}
        if options.tiny:
            request |= tiny_request(folder / "tiny")
        given = {key: getattr(options, key) for key in ("data", "text_column", "label_column", "encoder")}
        request |= {key: value for key, value in given.items() if value is not None}
        request["overrides"] = fixed_settings() | request["overrides"] | overrides(options.set)
        bench = Bench(folder, request)
        first_start = bench.warm_up()
        pairs = run_pairs(bench, options.pairs)
    markdown = report(pairs, request, first_start, load_before)
    print(markdown)
    if options.write:
        print(f"written to {write_result('orchestration', markdown)}")
    if any(pair.differences for pair in pairs):
        print("bench_orchestration: the two sides did not produce the same; their times must not be compared", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
