"""One line of figures per rank every few seconds: `<work>/metrics/rank-<n>.jsonl`, always on.

A line covers the steps since the line before; seconds are means per step, shares are of the time inside steps, 0 to 1:

    time                 seconds since 1970, at the end of the line's steps
    rank, num_ranks, step    the last finished step
    num_steps            steps in this line
    step_seconds         data, forward, backward and update together
    data_seconds, forward_seconds, backward_seconds, update_seconds
    data_wait_share      waiting for the next batch
    communication_share  waiting for other ranks or the network, see below; null where it cannot be known
    outside_steps_share  of the wall time: validation, checkpoints and whatever else lies between steps
    rows_per_second, tokens_per_second    of this rank, over the time inside steps
    rows_per_step, tokens_per_step        of this rank
    mfu                  model FLOPs per second over the peak of the device (see ml.training.flops); null where unknown
    num_not_finite       steps whose loss or gradient was not finite
    num_threads, num_cores    of torch in this rank, and of the machine
    device               "cpu" or "cuda"
    cpu_percent, node_cpu_percent, rss_bytes, pss_bytes, node_memory_share,
    gpu_percent, gpu_memory_bytes, gpu_memory_peak_bytes, gpu_memory_total_bytes    see devices.DeviceSample; null where unknown

Exposed communication: a rank's backward pass alone takes `backward_per_forward` times its forward pass, a ratio that is measured
once without any other rank (flops.calibrate). What the backward pass takes beyond that is waiting: for the network, or for a
slower rank. So a straggler makes the *others'* share rise while its own stays near zero, and its forward seconds per token tell
on it; a slow network makes every rank's share rise with forward seconds alike. Communication hidden behind the backward pass
costs nothing and is not counted. Where the forward pass communicates too (split matrices, pipeline, sharded parameters), the ratio
means nothing: no calibration is given and the share is null.
"""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml.training.devices import SAMPLE_SECONDS, DeviceSampler

if TYPE_CHECKING:
    import torch

    from ml.training.flops import Calibration
    from ml.training.stepping import StepResult

SECONDS_BETWEEN_LINES = 5.0
# The first steps of a process allocate, compile and open connections.
NUM_UNCOUNTED_STEPS = 2
# Enough for the last ten minutes of a rank.
_TAIL_BYTES = 128 * 1024


class RankMeters:
    """Counts the steps of one rank and appends the lines. `step` costs microseconds; it never waits for a device or a rank.

    Args:
        path: of this rank's file, see `metrics_file`.
        calibration: FLOPs per token and the backward/forward ratio; without it, MFU and communication are unknown.
        peak_flops: of this rank's device in this precision, FLOP/s.
        memory_limit_bytes: what this process may use, where that is less than the machine and the container allow.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        device: "torch.device",
        *,
        num_ranks: int = 1,
        num_threads: int | None = None,
        calibration: "Calibration | None" = None,
        peak_flops: float | None = None,
        memory_limit_bytes: int | None = None,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
        num_uncounted_steps: int = NUM_UNCOUNTED_STEPS,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._constant = {"rank": rank, "num_ranks": num_ranks}
        self._machine = {"num_threads": num_threads, "num_cores": os.cpu_count(), "device": device.type}
        self._calibration = calibration
        self._peak_flops = peak_flops
        self._seconds_between_lines = seconds_between_lines
        self._num_uncounted_steps = num_uncounted_steps
        self._sampler = DeviceSampler(
            device, memory_limit_bytes=memory_limit_bytes, sample_seconds=min(SAMPLE_SECONDS, seconds_between_lines)
        )
        self._sampler.start()
        self._last_step = 0
        self._begin()

    def step(self, step: int, result: "StepResult") -> None:
        """Count a finished step."""
        if self._num_uncounted_steps > 0:
            self._num_uncounted_steps -= 1
            if self._num_uncounted_steps == 0:
                self._sampler.take()
                self._begin()
            return
        self._last_step = step
        self._num_steps += 1
        self._num_rows += result.num_rows
        self._num_tokens += result.num_tokens
        self._num_not_finite += not result.finite
        self._data += result.data_seconds
        self._forward += result.forward_seconds
        self._backward += result.backward_seconds
        self._update += result.update_seconds
        if time.perf_counter() - self._begun >= self._seconds_between_lines:
            self._write()

    def close(self) -> None:
        """Write what was counted since the last line, and stop sampling."""
        self._sampler.close()
        if self._num_steps:
            self._sampler.sample()
            self._write()
        self._file.close()

    def _begin(self) -> None:
        self._begun = time.perf_counter()
        self._num_steps = self._num_rows = self._num_tokens = self._num_not_finite = 0
        self._data = self._forward = self._backward = self._update = 0.0

    def _write(self) -> None:
        inside = max(self._data + self._forward + self._backward + self._update, 1e-9)
        wall = max(time.perf_counter() - self._begun, inside)
        per_step = 1.0 / self._num_steps
        line = {
            "time": round(time.time(), 3),
            **self._constant,
            "step": self._last_step,
            "num_steps": self._num_steps,
            "step_seconds": inside * per_step,
            "data_seconds": self._data * per_step,
            "forward_seconds": self._forward * per_step,
            "backward_seconds": self._backward * per_step,
            "update_seconds": self._update * per_step,
            "data_wait_share": self._data / inside,
            "communication_share": self._communication_share(inside),
            "outside_steps_share": 1.0 - inside / wall,
            "rows_per_second": self._num_rows / inside,
            "tokens_per_second": self._num_tokens / inside,
            "rows_per_step": self._num_rows * per_step,
            "tokens_per_step": self._num_tokens * per_step,
            "mfu": self._mfu(inside),
            "num_not_finite": self._num_not_finite,
            **self._machine,
            **asdict(self._sampler.take()),
        }
        self._file.write(json.dumps({name: _short(value) for name, value in line.items()}) + "\n")
        self._file.flush()
        self._begin()

    def _communication_share(self, inside: float) -> float | None:
        if self._constant["num_ranks"] == 1:
            return 0.0
        if self._calibration is None or self._calibration.backward_per_forward is None:
            return None
        return max(0.0, self._backward - self._calibration.backward_per_forward * self._forward) / inside

    def _mfu(self, inside: float) -> float | None:
        if self._calibration is None or not self._peak_flops:
            return None
        return self._calibration.flops_per_token * self._num_tokens / inside / self._peak_flops


def metrics_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.jsonl"


def read_metrics(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """rank -> its latest lines, oldest first; a line that is being written is left out. Empty when there are none."""
    metrics: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        lines = []
        for text in _tail(path).splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the first one of the tail, or one that a kill cut off
                continue
        if lines:
            metrics[lines[-1]["rank"]] = lines
    return dict(sorted(metrics.items()))


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
        file.seek(start)
        data = file.read()
    if start:
        data = data.partition(b"\n")[2]
    return data[: data.rfind(b"\n") + 1].decode("utf-8", errors="replace")


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and value < 1e9 else value
