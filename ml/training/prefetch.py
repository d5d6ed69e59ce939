"""Makes batches ready while the step before them is still computed."""

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import torch

from ml.errors import MillstreamError, TrainingError

# A thread that reads from a store may be in the middle of a call, which itself ends in finite time.
END_SECONDS = 10.0

Key = TypeVar("Key", bound=Hashable)
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BatchKey:
    """A rank's rows of one step. Other shares of the ranks make another key."""

    step: int
    rows: tuple[int, ...]

    @classmethod
    def of(cls, step: int, rows: np.ndarray) -> "BatchKey":
        return cls(step, tuple(rows.tolist()))

    @property
    def row_array(self) -> np.ndarray:
        return np.array(self.rows, dtype=np.int64)

    def __str__(self) -> str:
        return f"step {self.step + 1}"


@dataclass
class _Asked(Generic[Key]):
    key: Key
    done: threading.Event = field(default_factory=threading.Event)
    batch: Batch | None = None
    error: BaseException | None = None


class Prefetcher(Generic[Key]):
    """One thread that loads what was asked for, in the order of asking, at most `depth` batches ahead of what was taken.

    One thread, for batches are made by numpy and by copying, which hold the interpreter's lock only in between; and because
    workers of their own would each need the data. `load` must not depend on the order of its calls.

    Args:
        load: makes a batch on the CPU; called in the thread, or in the caller for a key that was not asked for.
        depth: batches that are ready or being made at once; 0 makes each batch when it is taken, without a thread.
        pin: copy into memory that the GPU can read by itself, so that `.to(device, non_blocking=True)` does not wait.

    Use as a context manager, or call `close`.
    """

    def __init__(self, load: Callable[[Key], Batch], depth: int, pin: bool = False):
        self._load = load
        self._depth = depth
        self._pin = pin
        self._asked: dict[Key, _Asked[Key]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.wait_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True) if depth else None
        if self._thread:
            self._thread.start()

    def ask(self, key: Key) -> None:
        """This batch will be taken after all that were asked for before it. Asking twice is asking once."""
        with self._changed:
            if self._closed:
                raise ValueError("the prefetcher is closed")
            if self._depth and key not in self._asked:
                self._asked[key] = _Asked(key)
                self._changed.notify_all()

    def take(self, key: Key) -> Batch:
        """The batch, when it is ready. What was asked for before it and never taken is dropped.

        The seconds that the caller waited are added to `wait_seconds`.

        Raises:
            TrainingError: it could not be made; the message names the key. Errors of ours pass as they are, with a note.
        """
        start = time.perf_counter()
        try:
            with self._changed:
                if self._closed:
                    raise ValueError("the prefetcher is closed")
                asked = self._asked.get(key)
                if asked is not None:
                    for earlier in list(self._asked):
                        if earlier == key:
                            break
                        del self._asked[earlier]
                    self._changed.notify_all()
            if asked is None:
                return self._made(key)
            asked.done.wait()
            with self._changed:
                self._asked.pop(key, None)
                self._changed.notify_all()
            if asked.error is not None:
                raise asked.error
            if asked.batch is None:
                raise ValueError("the prefetcher was closed while a batch was waited for")
            return asked.batch
        finally:
            self.wait_seconds += time.perf_counter() - start

    def forget(self) -> None:
        """Drop all that was asked for: it will not be taken, because steps or shares have changed."""
        with self._changed:
            self._asked.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread; what it is making is finished first, and dropped."""
        with self._changed:
            self._closed = True
            for asked in self._asked.values():
                asked.done.set()
            self._asked.clear()
            self._changed.notify_all()
        if self._thread:
            self._thread.join(END_SECONDS)

    def __enter__(self) -> "Prefetcher[Key]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        while (asked := self._wait_for_due()) is not None:
            try:
                asked.batch = self._made(asked.key)
            except BaseException as error:  # raised where it is taken
                asked.error = error
            asked.done.set()

    def _wait_for_due(self) -> _Asked[Key] | None:
        """The next to be made; None when the prefetcher was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._due() is not None)
            return None if self._closed else self._due()

    def _due(self) -> _Asked[Key] | None:
        """The next to be made, if fewer than `depth` are ready."""
        for position, asked in enumerate(self._asked.values()):
            if position >= self._depth:
                return None
            if not asked.done.is_set():
                return asked
        return None

    def _made(self, key: Key) -> Batch:
        try:
            batch = self._load(key)
            return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin else batch
        except MillstreamError as error:
            error.add_note(f"while the batch of {key} was made")
            raise
        except Exception as error:
            raise TrainingError(f"the batch of {key} could not be made: {type(error).__name__}: {error}") from error
