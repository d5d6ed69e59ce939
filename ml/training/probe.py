"""A few real steps before the training, timed: what the plan is made from. Weights and random state are left as they were."""

import time
from collections.abc import Callable

import numpy as np
import torch

from ml.training.plan import Measured
from ml.training.precision import Precision, has_fast_bf16
from ml.training.stepping import Stepper

NUM_TIMED_BATCHES = 4


def measure(stepper: Stepper, batches: list[np.ndarray], beat: Callable[[], None]) -> Measured:
    """Time steps on batches spread evenly over the range of lengths, after a warm-up. All ranks take part.

    Args:
        batches: the global batches of one epoch.
    """
    group = stepper.group
    random_state = torch.get_rng_state()
    device_random_state = torch.cuda.get_rng_state(group.device) if group.device.type == "cuda" else None
    by_length = sorted(batches, key=lambda rows: float(stepper.job.lengths["train"][rows].mean()))
    count = min(NUM_TIMED_BATCHES, len(by_length))
    chosen = [by_length[int((i + 0.5) / count * len(by_length))] for i in range(count)]
    # A learning rate of zero leaves every weight exactly as it is.
    optimizer = stepper.new_optimizer(learning_rate=0.0)

    def seconds_of(action: Callable[[], object]) -> float:
        group.synchronize()
        start = time.perf_counter()
        action()
        group.synchronize()
        beat()
        return time.perf_counter() - start

    def step_seconds(rows: np.ndarray, precision: Precision) -> float:
        return seconds_of(lambda: stepper.train_step(rows, optimizer, precision, learning_rate=0.0))

    candidates = _candidates(stepper)
    for precision in candidates:
        step_seconds(chosen[-1], precision)
    # In turn, so that whatever else the machine does strikes all of them alike.
    timed: list[dict[Precision, float]] = [{precision: step_seconds(rows, precision) for precision in candidates} for rows in chosen]
    seconds: dict[Precision, float] = {precision: sum(times[precision] for times in timed) / count for precision in candidates}
    fastest = min(seconds, key=lambda precision: seconds[precision])
    middle = chosen[count // 2]
    shares = [middle[rank :: group.num_ranks] for rank in range(group.num_ranks) if rank < len(middle)]
    validation_seconds = seconds_of(lambda: stepper.evaluate("train", shares, fastest))

    torch.set_rng_state(random_state)
    if device_random_state is not None:
        torch.cuda.set_rng_state(device_random_state, group.device)
    return Measured(seconds, validation_seconds)


def _candidates(stepper: Stepper) -> list[Precision]:
    wanted = stepper.spec.precision
    if wanted != "auto":
        return [wanted]
    return ["fp32", "bf16"] if has_fast_bf16(stepper.group.device) else ["fp32"]
