"""Train what a file says, on this machine: `python -m ml.training --spec train.yaml`.

The file is YAML (see docs/distributed-training.md) or the JSON of a `TrainSpec`; the latter needs torch and nothing else.
Starts this machine's ranks, watches them and prints how it goes on the standard error; the last thing on the standard output
is the outcome as one line of JSON.

Exit codes: 0 done; 1 failure; 2 something given is wrong; 75 asked to end (SIGTERM or Ctrl-C) after saving a checkpoint: run the
same again.

Started by torchrun (`torchrun ... -m ml.training --spec train.yaml`, as Kubeflow Trainer does) it is one rank itself and starts none.
"""

import argparse
import difflib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ml.errors import ConfigError, MillstreamError, TrainingPreempted
from ml.training.folders import AttemptFolder, WorkFolder
from ml.training.launcher import TrainOutcome, describe_launch, outcome_of, run_training
from ml.training.refusals import check_spec
from ml.training.spec import TrainSpec
from ml.training.uploads import CheckpointSink

SECONDS_BETWEEN_LINES = 5.0
_NODE_OPTIONS = ("count", "min_count", "rank", "master_addr", "master_port", "backend", "interface")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        spec, checkpoints = read_spec(options.spec, _overrides(options))
        check_spec(spec)
        if options.dry_run:
            print(json.dumps({"spec": json.loads(spec.to_json()), **describe_launch(spec)}, indent=1))
            return 0
        if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
            return _be_a_rank(spec)
        with _metrics_served(options.metrics_port, spec):
            _tell("done", outcome_json(run_training(spec, Progress(), checkpoints)))
        return 0
    except TrainingPreempted as error:
        return _tell_failure("preempted", error, error.exit_code)
    except KeyboardInterrupt:
        return _tell_failure("preempted", TrainingPreempted("ended by Ctrl-C; run the same again to go on"), TrainingPreempted.exit_code)
    except MillstreamError as error:
        return _tell_failure("failed", error, error.exit_code)


def read_spec(path: Path, overrides: dict[str, Any]) -> tuple[TrainSpec, CheckpointSink | None]:
    """What to train, and where checkpoints are copied to, from a file and what the command line changes in it.

    Of several machines all may read the same file: `PET_NODE_RANK` or `JOB_COMPLETION_INDEX` in the environment say which one this
    is, `PET_NNODES`, `PET_MASTER_ADDR` and `PET_MASTER_PORT` how many there are and where they meet. The command line goes before the
    environment, and that before the file.

    Args:
        overrides: path in the file -> value, e.g. "optimizer.learning_rate"; paths below "nodes" are those of `Nodes`.

    Raises:
        ConfigError: with the file, the path in it, and the value found.
    """
    if not path.is_file():
        raise ConfigError(f"--spec {path}: there is no such file ({path.resolve()})")
    environment = _nodes_of_environment()
    of_nodes = environment | {name.removeprefix("nodes."): value for name, value in overrides.items() if name.startswith("nodes.")}
    others = {name: value for name, value in overrides.items() if not name.startswith("nodes.")}
    values = _read_json_spec(path)
    if values is not None:
        spec, checkpoints = _spec_of_json(path, values, others), None
        spec = replace(spec, nodes=replace(spec.nodes, **_checked_nodes(of_nodes)))
    else:
        # Only here are pydantic and YAML needed: a bare machine with torch runs the JSON of a `TrainSpec`.
        from ml.training_file import read_training_file

        spec, checkpoints = read_training_file(path, others, _checked_nodes(of_nodes))
    if spec.nodes.count == 1 and "rank" in environment and "nodes.rank" not in overrides:
        # A Job of independent trainings: the index is not a place among machines.
        spec = replace(spec, nodes=replace(spec.nodes, rank=0))
    return spec, checkpoints


def outcome_json(outcome: TrainOutcome) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(outcome), default=str))


class Progress:
    """A line on the terminal for each validation and event, and every few seconds for the steps."""

    def __init__(self) -> None:
        self._last_line = 0.0

    def __call__(self, record: dict[str, Any]) -> None:
        if "message" in record:
            self._print(record["message"])
        elif record["kind"] == "validation":
            shown = (f"{name} {record[name]:.4f}" for name in ("loss", "accuracy", "recall") if record.get(name) is not None)
            self._print(f"step {record['step']}: validation {', '.join(shown)}")
        elif record["kind"] == "step" and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._print(f"step {record['step']}: loss {record['loss']:.4f}, {record['rows_per_second']:.0f} rows/s")

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ml.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spec", type=Path, required=True, metavar="FILE", help="YAML file, or the JSON of a TrainSpec")
    parser.add_argument("--num-ranks", type=int, metavar="N", help="processes over all machines (world_size of the file)")
    parser.add_argument("--num-nodes", type=int, metavar="N", help="machines that take part")
    parser.add_argument("--min-nodes", type=int, metavar="N", help="go on with as few as these when machines are lost")
    parser.add_argument("--node-rank", type=int, metavar="N", help="which machine this is, from 0 (rank of the file)")
    parser.add_argument("--master-addr", metavar="HOST", help="where the machines meet; node 0 listens there")
    parser.add_argument("--master-port", type=int, metavar="PORT")
    parser.add_argument("--backend", choices=["auto", "gloo", "nccl"])
    parser.add_argument("--interface", metavar="NAME", help="network interface between machines; else by the route to master-addr")
    parser.add_argument("--work-dir", metavar="FOLDER", help="holds all that survives a kill; machines of one training share it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change a setting of the file, e.g. optimizer.learning_rate=1e-4"
    )
    parser.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="figures for Prometheus at http://127.0.0.1:PORT/metrics while it trains"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved spec and the launch command, and start nothing")
    return parser


@contextmanager
def _metrics_served(port: int | None, spec: TrainSpec) -> Iterator[None]:
    if port is None:
        yield
        return
    try:
        from ml.training_metrics import serve
    except ImportError as error:
        raise ConfigError(f"--metrics-port needs the package prometheus-client ({error}); install it, or leave the option out") from error
    work = WorkFolder(spec.work_dir)
    try:
        stop = serve(port, spec.work_dir.name, work.history, work.metrics)
    except OSError as error:
        raise ConfigError(f"--metrics-port {port}: {error.strerror or error}; give a free port") from error
    try:
        yield
    finally:
        stop()


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for text in options.set:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {text}: give it as PATH=VALUE, e.g. --set optimizer.learning_rate=1e-4")
        overrides[path] = _value(value)
    given = {
        "num_ranks": options.num_ranks,
        "work_dir": options.work_dir,
        "nodes.count": options.num_nodes,
        "nodes.min_count": options.min_nodes,
        "nodes.rank": options.node_rank,
        "nodes.master_addr": options.master_addr,
        "nodes.master_port": options.master_port,
        "nodes.backend": options.backend,
        "nodes.interface": options.interface,
    }
    return overrides | {name: value for name, value in given.items() if value is not None}


def _value(text: str) -> Any:
    """JSON where it is some, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _nodes_of_environment() -> dict[str, Any]:
    """As Kubeflow Trainer and Kubernetes' Indexed Jobs give them."""
    found: dict[str, Any] = {}
    environment = os.environ
    for name in ("JOB_COMPLETION_INDEX", "PET_NODE_RANK"):
        if environment.get(name, "").isdigit():
            found["rank"] = int(environment[name])
    if address := environment.get("PET_MASTER_ADDR"):
        found["master_addr"] = address
    if (port := environment.get("PET_MASTER_PORT", "")).isdigit():
        found["master_port"] = int(port)
    if match := re.fullmatch(r"(?:(\d+):)?(\d+)", environment.get("PET_NNODES", "")):
        found["count"] = int(match[2])
        if match[1]:
            found["min_count"] = int(match[1])
    return found


def _checked_nodes(values: dict[str, Any]) -> dict[str, Any]:
    for name in values:
        if name not in _NODE_OPTIONS:
            raise ConfigError(f"unknown setting 'nodes.{name}'{_nearest(name, _NODE_OPTIONS)}")
    return values


def _read_json_spec(path: Path) -> dict[str, Any] | None:
    """The content of a file that is the JSON of a `TrainSpec`; None for any other, such as YAML."""
    if path.suffix != ".json":
        return None
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return values if isinstance(values, dict) and "job" in values else None


def _spec_of_json(path: Path, given: dict[str, Any], overrides: dict[str, Any]) -> TrainSpec:
    values = json.loads(TrainSpec(job="", work_dir=Path()).to_json())
    _merge(values, given, path, "")
    for dotted, value in overrides.items():
        nested: Any = value
        for part in reversed(dotted.split(".")):
            nested = {part: nested}
        _merge(values, nested, path, "")
    if "work_dir" not in given and "work_dir" not in overrides:
        raise ConfigError(f"{path}: work_dir is missing; give it there or as --work-dir")
    return TrainSpec.from_json(json.dumps(values))


def _merge(values: dict[str, Any], changes: dict[str, Any], path: Path, where: str) -> None:
    """Lay changes over known values, section by section."""
    for name, value in changes.items():
        if name not in values:
            raise ConfigError(f"{path}: unknown setting {where + name!r}{_nearest(name, values)}")
        # The arguments of a job are known to the job alone.
        if isinstance(values[name], dict) and name != "job_arguments":
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {where}{name} is a section, found {value!r}")
            _merge(values[name], value, path, f"{where}{name}.")
        elif name == "job_arguments" and isinstance(value, dict):
            values[name] = values[name] | value
        else:
            values[name] = value


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" known: {', '.join(sorted(known))}"


def _be_a_rank(spec: TrainSpec) -> int:
    """Train as one of the ranks that another torchrun started."""
    from ml.training.worker import end_process, run_rank

    work = WorkFolder(spec.work_dir)
    name = re.sub(r"[^A-Za-z0-9_-]", "-", os.environ["TORCHELASTIC_RUN_ID"])
    attempt = AttemptFolder(work.attempts / f"torchrun-{name}-node-{os.environ.get('GROUP_RANK', '0')}")
    attempt.root.mkdir(parents=True, exist_ok=True)
    exit_code = run_rank(spec, attempt, launched=time.time(), store_file=None)
    if os.environ["RANK"] == "0":
        if exit_code == 0:
            _tell("done", outcome_json(outcome_of(work)))
        else:
            _tell("preempted" if exit_code == TrainingPreempted.exit_code else "failed", {})
    end_process(exit_code)
    return exit_code


def _tell(status: str, values: dict[str, Any]) -> None:
    print(json.dumps({"status": status, **values}), flush=True)


def _tell_failure(status: str, error: BaseException, exit_code: int) -> int:
    print(error, file=sys.stderr, flush=True)
    _tell(status, {"error": type(error).__name__, "message": str(error)})
    return exit_code
