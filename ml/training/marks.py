"""Seconds between points of a step as the device sees them: on a GPU the program is long past a point when the GPU gets there."""

import itertools
import time

import torch


class Marks:
    """Points in time, the first of them now. Marking waits for nothing; on a GPU it puts an event into the current stream."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Here, after all that was given to the device up to now."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next. Waits until the device has reached the last one: call it where the step waits anyway."""
        if self._on_gpu:
            self._events[-1].synchronize()
            return [start.elapsed_time(end) / 1000.0 for start, end in itertools.pairwise(self._events)]
        return [end - start for start, end in itertools.pairwise(self._times)]
