"""Machines for tests: network namespaces on one host, joined by a switch whose cables can be pulled and slowed."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ml.training.spec import TrainSpec

JOIN_SECONDS = 120


class Network:
    """Two machines, `10.77.0.1` and `10.77.0.2`. They share the host's files and processes, and no network but the switch."""

    def __init__(self, name: str):
        self._switch = f"{name}-switch"
        self._nodes = [f"{name}-{node}" for node in range(2)]

    def __enter__(self) -> "Network":
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for node, namespace in enumerate(self._nodes):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{node}", "netns", self._switch)
            _ip("-n", namespace, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", self._switch, "link", "set", f"port{node}", "master", "bridge", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in (*self._nodes, self._switch):
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def cut(self, node: int) -> None:
        """Nothing gets through any more, and nobody is told: the machine's own end of the cable stays up."""
        _ip("-n", self._switch, "link", "set", f"port{node}", "down")

    def mend(self, node: int) -> None:
        _ip("-n", self._switch, "link", "set", f"port{node}", "up")

    def slow_down(self, node: int, megabits: int) -> None:
        limit = ["tbf", "rate", f"{megabits}mbit", "burst", "32kb", "latency", "200ms"]
        _run("ip", "netns", "exec", self._nodes[node], "tc", "qdisc", "add", "dev", "eth0", "root", *limit)

    def launch(self, spec: TrainSpec, node: int) -> subprocess.Popen:
        """The launcher of one machine; the spec's `nodes` have all but the rank and where the machines meet."""
        nodes = replace(spec.nodes, rank=node, master_addr=self.address(0))
        given = spec.work_dir.parent / f"given-{spec.work_dir.name}-{node}.json"
        given.write_text(replace(spec, nodes=nodes).to_json())
        log = (spec.work_dir.parent / f"launcher-{spec.work_dir.name}-{node}.log").open("ab")
        with log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._nodes[node], sys.executable, "-m", "ml.training", "--spec", str(given)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "MILLSTREAM_JOIN_SECONDS": str(JOIN_SECONDS), "OMP_NUM_THREADS": "1"},
            )

    def log_of(self, spec: TrainSpec, node: int) -> str:
        return (spec.work_dir.parent / f"launcher-{spec.work_dir.name}-{node}.log").read_text(errors="replace")


def why_not() -> str | None:
    """Why network namespaces cannot be used here; None when they can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"network namespaces need the program {program} (on Debian: apt-get install iproute2)"
    name = f"probe{os.getpid()}"
    try:
        with Network(name) as network:
            network.slow_down(0, 100)
    except subprocess.CalledProcessError as error:
        return f"network namespaces do not work here: {' '.join(error.cmd)}: {error.stderr.decode(errors='replace').strip()}"
    return None


@contextlib.contextmanager
def ending(*processes: subprocess.Popen) -> Iterator[None]:
    """Leave none of the processes behind."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for_both(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    return [process.wait(seconds) for process in processes]


def logs(folder: Path) -> str:
    """The end of every log below a folder, for the message of a failed test."""
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(folder.rglob("*.log")))


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
