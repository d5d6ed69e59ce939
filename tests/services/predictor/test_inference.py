import asyncio
import threading

import pytest

from services.predictor.checking import RequestRefused
from services.predictor.inference import InferencePool, num_inference_threads


def test_calls_beyond_the_queue_are_refused_with_when_to_try_again_and_the_others_finish():
    pool = InferencePool(num_threads=1, max_waiting=2)
    gate = threading.Event()

    async def flood() -> tuple[list[int], RequestRefused]:
        running = [asyncio.create_task(pool.run(lambda number=number: gate.wait(10) and number)) for number in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(RequestRefused) as caught:
            await pool.run(lambda: 3)
        gate.set()
        return [await task for task in running], caught.value

    answers, refused = asyncio.run(flood())
    assert answers == [0, 1, 2]
    assert (refused.status, refused.retry_after_seconds) == (503, 1)
    pool.close()


def test_a_caller_that_hangs_up_keeps_its_place_until_its_thread_is_free():
    pool = InferencePool(num_threads=1, max_waiting=0)
    gate = threading.Event()

    async def hang_up() -> str:
        task = asyncio.create_task(pool.run(lambda: gate.wait(10)))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with pytest.raises(RequestRefused):
            await pool.run(lambda: "too early")
        gate.set()
        for _ in range(100):
            try:
                return await pool.run(lambda: "free again")
            except RequestRefused:
                await asyncio.sleep(0.02)
        return "never free"

    assert asyncio.run(hang_up()) == "free again"
    pool.close()


def test_an_error_in_a_call_reaches_its_caller_and_frees_its_place():
    pool = InferencePool(num_threads=1, max_waiting=0)

    async def fail_then_work() -> int:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await pool.run(lambda: 1 // 0)
        return await pool.run(lambda: 7)

    assert asyncio.run(fail_then_work()) == 7
    pool.close()


def test_there_is_always_a_thread():
    assert num_inference_threads(10_000) == 1
