"""Whatever is killed, whenever: the run ends in a true state, nothing hangs, nothing is left behind, the next run works."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.operated_stack import LONG_TRAINING, OperatedStack, make_operated_stack

TRUE_STATE_SECONDS = 60
NUM_SOAK_RECOVERIES = 20


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatedStack]:
    stack = make_operated_stack(tmp_path_factory.mktemp("faults"))
    started = stack.call("up")
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield stack
    finally:
        stack.call("down")
        assert stack.processes() == []


@pytest.fixture(scope="module")
def generator() -> random.Random:
    seed = int(os.environ.get("FAULT_SEED", time.time()))
    print(f"FAULT_SEED={seed}")
    return random.Random(seed)


def kill_flow(stack: OperatedStack, flow_run_id: str, generator: random.Random) -> None:
    stack.kill(stack.flow_pid(flow_run_id))


def kill_rank(stack: OperatedStack, flow_run_id: str, generator: random.Random) -> None:
    ranks = stack.rank_pids()
    if ranks:  # else the training has just ended, and there is nothing to hit
        stack.kill(generator.choice(ranks))


def kill_part(part: str) -> Callable[[OperatedStack, str, random.Random], None]:
    return lambda stack, flow_run_id, generator: stack.kill_part(part)


def kill_worker_and_flow(stack: OperatedStack, flow_run_id: str, generator: random.Random) -> None:
    stack.kill_part("worker")
    kill_flow(stack, flow_run_id, generator)


def cancel(stack: OperatedStack, flow_run_id: str, generator: random.Random) -> None:
    """What the button of the UI does."""
    stack.api(f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})


def cancel_without_worker(stack: OperatedStack, flow_run_id: str, generator: random.Random) -> None:
    stack.kill_part("worker")
    cancel(stack, flow_run_id, generator)


# fault -> how to do it, and how the run has to end
FAULTS = {
    "worker": (kill_part("worker"), "COMPLETED"),
    "flow process": (kill_flow, "CRASHED"),
    "rank": (kill_rank, "COMPLETED"),
    "prefect server": (kill_part("prefect-server"), "COMPLETED"),
    "object store": (kill_part("object-store"), "COMPLETED"),
    "predictor": (kill_part("predictor"), "COMPLETED"),
    "supervisor": (kill_part("supervisor"), "COMPLETED"),
    "worker and flow process": (kill_worker_and_flow, "CRASHED"),
    "cancel": (cancel, "CANCELLED"),
    "cancel without a worker": (cancel_without_worker, "CANCELLED"),
}


def recover(stack: OperatedStack, fault: str, generator: random.Random, after_seconds: float) -> None:
    """One run that is hurt in training, or `after_seconds` after its checkpoint; everything is looked at afterwards."""
    do, expected = FAULTS[fault]
    seed = generator.randrange(10**6)
    request = stack.request(stack.reviews(f"reviews-{seed}.csv", seed=seed), *LONG_TRAINING)
    flow_run_id = stack.start_run(request)
    stack.wait_for_training()
    time.sleep(after_seconds)
    do(stack, flow_run_id, generator)
    hurt = time.monotonic()
    timeout = 240 if expected == "COMPLETED" else TRUE_STATE_SECONDS
    run = stack.wait_for(flow_run_id, timeout=timeout)
    if expected == "CANCELLED" and run["state_type"] == "CRASHED":
        # The process says first that it was told to end; who asked for it is said a moment later.
        run = stack.wait_for(flow_run_id, "CANCELLED", timeout=10)
    assert run["state_type"] == expected, f"{run['state']}\n{stack.log_end()}"
    print(f"{fault}, {after_seconds:.1f} s into training: {run['state_name']} after {time.monotonic() - hurt:.1f} s")
    stack.until(lambda: stack.slots_taken() == 0, 20, "no slot is taken")
    stack.until(lambda: not stack.strays() and not stack.rank_pids(), 20, "no process is left")
    assert stack.store_problems() == []
    if expected != "COMPLETED":
        again = stack.wait_for(stack.start_run(request), timeout=240)
        assert again["state_type"] == "COMPLETED", f"the next run: {again['state']}"
    stack.wait_until_well()


QUICK = ("flow process",)


@pytest.mark.parametrize("fault", QUICK)
def test_a_run_that_is_hurt_ends_in_a_true_state_and_the_next_one_works(stack: OperatedStack, generator: random.Random, fault: str) -> None:
    recover(stack, fault, generator, generator.uniform(0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in QUICK])
def test_every_other_fault(stack: OperatedStack, generator: random.Random, fault: str) -> None:
    recover(stack, fault, generator, generator.uniform(0, 5))


@pytest.mark.slow
def test_a_host_that_is_gone_is_noticed_by_its_silence(stack: OperatedStack) -> None:
    """With worker and watchdog out of the way, as when the machine is lost, the automation of `make up` speaks."""
    request = stack.request(stack.reviews("lost-host.csv", seed=77), *LONG_TRAINING)
    flow_run_id = stack.start_run(request)
    stack.wait_for_training()
    os.kill(stack.pid("supervisor"), signal.SIGSTOP)
    try:
        stack.kill_part("worker")
        stack.kill(stack.flow_pid(flow_run_id))
        lost = time.monotonic()
        run = stack.wait_for(flow_run_id, timeout=200)
        print(f"{run['state_name']} after {time.monotonic() - lost:.0f} s: {run['state']['message']}")
        assert run["state_type"] == "CRASHED"
        assert "no sign of life" in run["state"]["message"]
        assert stack.slots_taken() == 0
    finally:
        os.kill(stack.pid("supervisor"), signal.SIGCONT)
    stack.wait_until_well()


@pytest.mark.soak
def test_twenty_random_faults_in_a_row_are_recovered_from(stack: OperatedStack, generator: random.Random) -> None:
    faults = [*FAULTS, *FAULTS][:NUM_SOAK_RECOVERIES]
    generator.shuffle(faults)
    for number, fault in enumerate(faults, start=1):
        print(f"{number} of {len(faults)}: ", end="", flush=True)
        recover(stack, fault, generator, generator.uniform(0, 12))
