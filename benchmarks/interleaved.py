"""Several multi-process trainings that live side by side and run in turn, a block of steps each, so that noise strikes all alike.

A rank stops at a gate before the first step of each block, and says so through a named pipe. The benchmark lets the ranks of
one side through, waits until all of them stand at the next gate, and freezes that side's processes (SIGSTOP), so that nothing
it does in the background falls into another side's time.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120.0
BLOCK_SECONDS = 300.0


class Gate:
    """In a rank: `pass_through` is called before each step and returns when it may be made.

    Raises:
        SystemExit: the benchmark is gone.
    """

    def __init__(self, folder: Path, rank: int, block_steps: int):
        self._rank = rank
        self._block_steps = block_steps
        self._num_steps = 0
        self._arrived = os.open(folder / "arrived", os.O_WRONLY)
        self._go = os.open(folder / f"go-{rank}", os.O_RDONLY)

    def pass_through(self) -> None:
        if self._num_steps % self._block_steps == 0:
            os.write(self._arrived, f"{self._rank} {time.monotonic()}\n".encode())
            if not os.read(self._go, 1):
                raise SystemExit("the benchmark that opens this gate is gone")
        self._num_steps += 1


@dataclass(frozen=True)
class Block:
    """One side's block: seconds from opening the gate until its last rank stood at the next."""

    seconds: float


class Side:
    """One training and all its processes.

    Args:
        folder: for the pipes and the log; `command` gets it from the caller, `Gate` needs it.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, num_ranks: int, environment: dict[str, str] | None = None):
        self.name = name
        self.num_ranks = num_ranks
        self.log = folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        pipes = [folder / "arrived", *(folder / f"go-{rank}" for rank in range(num_ranks))]
        for pipe in pipes:
            os.mkfifo(pipe)
        # Read and write, so that opening does not wait for the ranks.
        self._arrived, *self._go = (os.open(pipe, os.O_RDWR) for pipe in pipes)
        self._unread = b""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._is_frozen = False

    def reach_first_gate(self) -> None:
        """
        Raises:
            SystemExit: it ended before, or took too long.
        """
        self._wait_for_ranks(START_SECONDS)
        self._freeze()

    def run_block(self) -> Block:
        """
        Raises:
            SystemExit: the side ended amid the block, or took too long.
        """
        self._thaw()
        started = time.monotonic()
        self._open_gate()
        last = self._wait_for_ranks(BLOCK_SECONDS)
        self._freeze()
        return Block(last - started)

    def finish(self, timeout: float = BLOCK_SECONDS) -> int:
        """Let the side run to its end; its exit status."""
        self._thaw()
        self._open_gate()
        return self._process.wait(timeout)

    def end(self) -> None:
        """End every process of the side, whatever state it is in."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        for descriptor in (self._arrived, *self._go):
            os.close(descriptor)

    def _open_gate(self) -> None:
        for go in self._go:
            os.write(go, b"g")

    def _wait_for_ranks(self, timeout: float) -> float:
        """Until every rank stands at the gate; when the last one came."""
        times: dict[int, float] = {}
        deadline = time.monotonic() + timeout
        while len(times) < self.num_ranks:
            readable, _, _ = select.select([self._arrived], [], [], 0.2)
            if readable:
                *lines, self._unread = (self._unread + os.read(self._arrived, 4096)).split(b"\n")
                for line in lines:
                    rank, arrived = line.split()
                    times[int(rank)] = float(arrived)
            elif self._process.poll() is not None or time.monotonic() > deadline:
                ended = self._process.poll()
                why = f"ended with exit status {ended}" if ended is not None else f"did not reach a gate within {timeout:.0f} s"
                raise SystemExit(f"{self.name} {why}; see {self.log}:\n{self.log_end()}")
        return max(times.values())

    def log_end(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])

    def _processes(self) -> list[psutil.Process]:
        try:
            leader = psutil.Process(self._process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _freeze(self) -> None:
        # Parents first: they must not take a stopped child for a hanging one.
        self._signal(self._processes(), signal.SIGSTOP)
        self._is_frozen = True

    def _thaw(self) -> None:
        if self._is_frozen:
            self._signal(reversed(self._processes()), signal.SIGCONT)
            self._is_frozen = False

    @staticmethod
    def _signal(processes, number: signal.Signals) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextlib.contextmanager
def ended_together(sides: Sequence[Side]):
    """Ends all sides, also after a Ctrl-C or a TERM: frozen processes would stay for ever."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        for side in sides:
            side.end()
        signal.signal(signal.SIGTERM, before)
