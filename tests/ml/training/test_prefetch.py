"""Batches are made ahead, in order, and an accident shows where it belongs."""

import random
import threading
import time

import numpy as np
import pytest
import torch

from ml.errors import DataError, TrainingError
from ml.training.prefetch import Batch, BatchKey, Prefetcher


class Loader:
    """Remembers what it was asked to make, and how many batches it had made when."""

    def __init__(self, broken: int | None = None, error: type[Exception] = ValueError, wait: threading.Event | None = None):
        self.made: list[int] = []
        self.broken, self.error, self.wait = broken, error, wait

    def __call__(self, key: int) -> Batch:
        if self.wait:
            assert self.wait.wait(20)
        self.made.append(key)
        if key == self.broken:
            raise self.error("row 7 is a fish")
        return {"x": torch.full((2,), key)}


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_come_in_order_whatever_the_depth(depth: int) -> None:
    with Prefetcher(Loader(), depth) as prefetcher:
        for step in range(20):
            for ahead in range(step, min(step + depth, 20)):
                prefetcher.ask(ahead)
            assert prefetcher.take(step)["x"].tolist() == [step, step]


def test_no_more_than_depth_batches_are_made_ahead() -> None:
    loader = Loader()
    with Prefetcher(loader, 3) as prefetcher:
        for key in range(10):
            prefetcher.ask(key)
        wait_until(lambda: len(loader.made) == 3)
        time.sleep(0.05)
        assert loader.made == [0, 1, 2]
        prefetcher.take(0)
        wait_until(lambda: len(loader.made) == 4)
        time.sleep(0.05)
        assert loader.made == [0, 1, 2, 3]


def test_an_error_is_raised_where_the_batch_is_taken_and_names_it() -> None:
    with Prefetcher(Loader(broken=2), 3) as prefetcher:
        keys = [BatchKey(step, (step,)) for step in range(3)]
        with Prefetcher(lambda key: Loader(broken=2)(key.step), 3) as steps:
            for key in keys:
                steps.ask(key)
            assert steps.take(keys[0])["x"][0] == 0
            assert steps.take(keys[1])["x"][0] == 1
            with pytest.raises(TrainingError, match=r"batch of step 3 could not be made: ValueError: row 7 is a fish"):
                steps.take(keys[2])
        prefetcher.ask(1)
        assert prefetcher.take(1)["x"][0] == 1, "an error of one batch ends no other"


def test_our_own_errors_keep_their_kind() -> None:
    with Prefetcher(Loader(broken=0, error=DataError), 1) as prefetcher:
        prefetcher.ask(0)
        with pytest.raises(DataError, match="fish") as found:
            prefetcher.take(0)
        assert found.value.__notes__ == ["while the batch of 0 was made"]


def test_what_was_skipped_or_forgotten_is_not_made_and_not_kept() -> None:
    go = threading.Event()
    loader = Loader(wait=go)
    with Prefetcher(loader, 2) as prefetcher:
        for key in range(6):
            prefetcher.ask(key)
        prefetcher.forget()
        prefetcher.ask(10)
        prefetcher.ask(11)
        prefetcher.ask(12)
        go.set()
        assert prefetcher.take(12)["x"][0] == 12
        assert prefetcher.take(3)["x"][0] == 3, "not asked for any more, so made on the spot"
        assert not set(loader.made) & {1, 2, 4, 5}
        assert prefetcher._asked == {}


def test_waiting_is_measured() -> None:
    go = threading.Event()
    with Prefetcher(Loader(wait=go), 1) as prefetcher:
        prefetcher.ask(0)
        threading.Timer(0.1, go.set).start()
        prefetcher.take(0)
        waited = prefetcher.wait_seconds
        assert waited > 0.05
        prefetcher.ask(1)
        wait_until(lambda: prefetcher._asked[1].done.is_set())
        prefetcher.take(1)
        assert prefetcher.wait_seconds - waited < waited, "it was ready"


def test_closing_ends_the_thread_also_in_the_middle() -> None:
    for _ in range(50):
        prefetcher = Prefetcher(Loader(), 2)
        for key in range(random.randrange(5)):
            prefetcher.ask(key)
        prefetcher.close()
        assert prefetcher._thread is not None
        assert not prefetcher._thread.is_alive()
        with pytest.raises(ValueError, match="closed"):
            prefetcher.take(0)


def test_random_asking_taking_and_forgetting_never_mixes_batches_up() -> None:
    choices = random.Random(5)
    with Prefetcher(Loader(), 3) as prefetcher:
        step = 0
        for _ in range(2000):
            what = choices.random()
            if what < 0.5:
                prefetcher.ask(step + choices.randrange(4))
            elif what < 0.9:
                assert prefetcher.take(step)["x"][0] == step
                step += choices.randrange(2)
            else:
                prefetcher.forget()


def test_a_key_holds_the_rows_of_a_rank() -> None:
    key = BatchKey.of(3, np.array([5, 1]))
    assert key == BatchKey(3, (5, 1)) != BatchKey(3, (1, 5))
    assert key.row_array.tolist() == [5, 1]
