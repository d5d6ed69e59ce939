"""Starts a probe (`ml.evaluation.probe`) and talks to it, with an end to all waiting."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ml.errors import ServiceError

START_TIMEOUT_SECONDS = 180.0
REPLY_TIMEOUT_SECONDS = 300.0
_STDERR_TAIL_BYTES = 2000

# Every library that starts threads of its own, told not to.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class ProbeProcess:
    """A bundle in a fresh process of its own. A context manager: the process ends with it.

    Args:
        name: how messages call the bundle.
        cores: cores it has to stay on; None leaves that to the system.

    Attributes:
        load_seconds: from the start of its Python code to a loaded model.

    Raises:
        ServiceError: from every method, when the process died, did not answer in time, or reported an error; the
            message carries the end of what it wrote to stderr.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        num_threads: int,
        cores: Sequence[int] | None = None,
        start_timeout_seconds: float = START_TIMEOUT_SECONDS,
        reply_timeout_seconds: float = REPLY_TIMEOUT_SECONDS,
    ):
        self.name = name
        self._reply_timeout_seconds = reply_timeout_seconds
        self._unread = b""
        command = [sys.executable, "-m", "ml.evaluation.probe", "--bundle", str(folder), "--threads", str(num_threads)]
        if cores is not None:
            command += ["--cores", ",".join(map(str, cores))]
        environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(num_threads)) | {"TOKENIZERS_PARALLELISM": "false"}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=environment)
        try:
            self.load_seconds: float = self._read_answer(start_timeout_seconds)["load_seconds"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ProbeProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def predict(self, requests: Sequence[dict]) -> list[dict]:
        return self._ask({"command": "predict", "requests": list(requests)})["replies"]

    def time(self, batches: Sequence[Sequence[dict]], num_calls: int) -> list[float]:
        """Seconds of each of `num_calls` calls; the batches are used in turn."""
        return self._ask({"command": "time", "batches": [list(batch) for batch in batches], "calls": num_calls})["seconds"]

    def memory(self) -> tuple[int, int]:
        """Proportional set size and peak resident set size, in bytes."""
        found = self._ask({"command": "memory"})
        return found["pss_bytes"], found["peak_rss_bytes"]

    def close(self) -> None:
        """End the process; idempotent."""
        if self._stderr.closed:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                # An unsent command may still sit in the buffer of stdin.
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        self._stderr.close()

    def _ask(self, command: dict) -> dict:
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101  (a pipe was asked for)
        try:
            stdin.write(json.dumps(command).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise self._failure("died") from error
        answer = self._read_answer(self._reply_timeout_seconds)
        if "error" in answer:
            raise ServiceError(f"{self.name}: the measuring process could not {command['command']}: {answer['error']}")
        return answer

    def _read_answer(self, timeout_seconds: float) -> dict:
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101  (a pipe was asked for)
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._unread:
            readable, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise self._failure(f"gave no answer for {timeout_seconds:g} seconds")
            chunk = os.read(stdout.fileno(), 1 << 16)
            if not chunk:
                raise self._failure("died")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _failure(self, what: str) -> ServiceError:
        if what == "died":
            # Its last words are complete only when it is gone.
            try:
                code = self._process.wait(timeout=10)
                what = f"died with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
            except subprocess.TimeoutExpired:
                what = "closed its output"
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL_BYTES))
        tail = self._stderr.read().decode(errors="replace").strip()
        advice = f"its last words:\n{tail}" if tail else "it left no message; if the machine was out of memory, free some and run again"
        return ServiceError(f"{self.name}: the process that measures it (pid {self._process.pid}) {what}; {advice}")
