"""Runs models in a bounded pool of threads, so that a flood of requests is turned away instead of piling up."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from services.predictor.checking import RequestRefused

MAX_WAITING = 64

T = TypeVar("T")


class InferencePool:
    """A pool of threads with a bounded queue.

    Args:
        num_threads: calls that run at once.
        max_waiting: calls that may wait beyond those.
    """

    def __init__(self, num_threads: int, max_waiting: int = MAX_WAITING):
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="inference")
        self._capacity = num_threads + max_waiting
        self._num_pending = 0

    async def run(self, function: Callable[[], T]) -> T:
        """Call the function in a thread. Only to be called from the event loop's thread.

        Raises:
            RequestRefused: 503 when the queue is full.
        """
        if self._num_pending >= self._capacity:
            raise RequestRefused(503, f"{self._num_pending} requests are waiting already; try again in a second", retry_after_seconds=1)
        self._num_pending += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, function)
        # Counted until the thread is done with it, also when the caller has hung up before.
        future.add_done_callback(self._finished)
        return await asyncio.shield(future)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _finished(self, future: "asyncio.Future[T]") -> None:
        self._num_pending -= 1
        if not future.cancelled():
            future.exception()  # seen here, so that an abandoned call does not warn


def num_inference_threads(threads_per_process: int) -> int:
    """As many calls at once as keep the usable cores busy, each with its math threads."""
    return max(1, len(os.sched_getaffinity(0)) // threads_per_process)
