"""Histories and meter lines as trainings write them, with noise, made from a few figures: shared by the tests of what reads them."""

from typing import Any

import numpy as np

Line = dict[str, Any]


def loss_lines(losses: np.ndarray, *, learning_rate: float = 3e-4, num_steps: int | None = None) -> list[Line]:
    """The history of these losses, one step each."""
    event = {"kind": "event", "message": "4 epochs", "num_steps": num_steps or len(losses)}
    steps = [
        {
            "kind": "step",
            "step": i + 1,
            "loss": float(loss),
            "learning_rate": learning_rate,
            "rows_per_second": 100.0,
            "seconds": 0.1 * (i + 1),
        }
        for i, loss in enumerate(losses)
    ]
    return [event, *steps]


def validation_lines(losses: list[float], *, every: int) -> list[Line]:
    return [
        {"kind": "validation", "step": every * (i + 1), "loss": loss, "accuracy": 0.9, "seconds": every * (i + 1) * 0.1}
        for i, loss in enumerate(losses)
    ]


def learning_curve(
    random: np.random.Generator, num_steps: int, *, start: float = 2.0, end: float = 0.4, pace: float = 8.0, noise: float = 0.2
) -> np.ndarray:
    """A loss that falls exponentially; the noise is that of one batch, relative, with rare spikes."""
    mean = end + (start - end) * np.exp(-pace * np.arange(num_steps) / num_steps)
    spikes = np.where(random.random(num_steps) < 0.01, 1.5, 1.0)
    return mean * np.exp(noise * random.standard_normal(num_steps)) * spikes


def meter_lines(
    random: np.random.Generator, rank: int, *, num_lines: int = 24, num_ranks: int = 2, noise: float = 0.05, **changes: Any
) -> list[Line]:
    """Two minutes of a healthy rank on a CPU, 100 ms a step; `changes`: fields of every line, values or functions of its number."""

    def about(value: float) -> float:
        return float(value * np.exp(noise * random.standard_normal()))

    lines = []
    for i in range(num_lines):
        data, forward, update, tokens = about(0.002), about(0.030), about(0.004), about(1000.0)
        backward = about(0.060) + about(0.006)
        seconds = data + forward + backward + update
        line = {
            "time": 1000.0 + 5.0 * (i + 1),
            "rank": rank,
            "num_ranks": num_ranks,
            "step": 50 * (i + 1),
            "num_steps": 50,
            "step_seconds": seconds,
            "data_seconds": data,
            "forward_seconds": forward,
            "backward_seconds": backward,
            "update_seconds": update,
            "data_wait_share": data / seconds,
            "communication_share": max(0.0, backward - 2 * forward) / seconds,
            "outside_steps_share": 0.05,
            "rows_per_second": 16 / seconds,
            "tokens_per_second": tokens / seconds,
            "rows_per_step": 16.0,
            "tokens_per_step": tokens,
            "mfu": about(0.4),
            "num_not_finite": 0,
            "num_threads": 1,
            "num_cores": 2,
            "device": "cpu",
            "cpu_percent": about(96.0),
            "node_cpu_percent": about(95.0),
            "rss_bytes": int(about(800e6)),
            "pss_bytes": int(about(600e6)),
            "node_memory_share": about(0.4),
            "gpu_percent": None,
            "gpu_memory_bytes": None,
            "gpu_memory_peak_bytes": None,
            "gpu_memory_total_bytes": None,
        }
        lines.append(line | {name: change(i) if callable(change) else change for name, change in changes.items()})
    return lines


def healthy_ranks(random: np.random.Generator, num_ranks: int = 2) -> dict[int, list[Line]]:
    return {rank: meter_lines(random, rank, num_ranks=num_ranks) for rank in range(num_ranks)}
