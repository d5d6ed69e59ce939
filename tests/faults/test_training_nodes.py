"""Several machines that train together: two network namespaces with a rank each, and what can happen between them."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ml.training.folders import WorkFolder, read_json
from ml.training.history import last_step, read_history, resumptions
from ml.training.launcher import TrainOutcome, outcome_of, run_training
from ml.training.spec import Nodes, TrainSpec
from tests.faults.test_training import seeded
from tests.faults.training_nodes import Network, ending, logs, wait_for_both, why_not
from tests.ml.training.test_launcher import INTERVAL, NUM_STEPS, launched_spec, processes_of, wait_for

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_CUTS = 3


@pytest.fixture
def network() -> Iterator[Network]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Network(f"ms{os.getpid()}") as network:
        yield network


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> TrainOutcome:
    return run_training(launched_spec(tmp_path_factory.mktemp("one"), job={"step_seconds": 0.0}))


def two_machines(work_dir: Path, *, step_seconds: float = 0.15, **changes) -> TrainSpec:
    """As `launched_spec`, on two machines with a rank each; steps are slow enough to leave time for accidents."""
    settings = {"nodes": Nodes(count=2), "collective_timeout_seconds": 8, "heartbeat_timeout_seconds": 30, "max_restarts": 6}
    return launched_spec(work_dir, job={"step_seconds": step_seconds}, **(settings | changes))


def step_of_training(spec: TrainSpec) -> int:
    return last_step(read_history(WorkFolder(spec.work_dir).history))


def wait_for_step(spec: TrainSpec, step: int, launchers: list[subprocess.Popen], seconds: float = 240) -> None:
    def is_there() -> bool:
        assert all(launcher.poll() is None for launcher in launchers), logs(spec.work_dir.parent)
        return step_of_training(spec) >= step

    wait_for(is_there, seconds)


def check_done(spec: TrainSpec, launchers: list[subprocess.Popen], one_machine: TrainOutcome) -> None:
    assert wait_for_both(launchers, 300) == [0, 0], logs(spec.work_dir.parent)
    outcome = outcome_of(WorkFolder(spec.work_dir))
    steps = [record["step"] for record in read_history(outcome.history_path) if record["kind"] == "step"]
    assert steps == list(range(1, NUM_STEPS + 1))
    check_like(outcome, one_machine)
    assert processes_of(spec.work_dir) == []


def check_like(outcome: TrainOutcome, one_machine: TrainOutcome) -> None:
    """The same losses in every step, but for the order of sums: a rank that is alone on its machine has more threads.

    Not the weights: the gradient of the bias of attention keys is zero but for rounding, which Adam makes large.
    """
    ours, theirs = (read_history(found.history_path) for found in (outcome, one_machine))
    for kind in ("step", "validation"):
        expected = [record["loss"] for record in theirs if record["kind"] == kind]
        assert [record["loss"] for record in ours if record["kind"] == kind] == pytest.approx(expected, rel=1e-5)


def test_two_machines_give_the_result_of_one(tmp_path: Path, network: Network, one_machine: TrainOutcome) -> None:
    spec = two_machines(tmp_path / "work", step_seconds=0.0)
    launchers = [network.launch(spec, node) for node in (1, 0)]
    with ending(*launchers):
        check_done(spec, launchers, one_machine)
    assert resumptions(read_history(WorkFolder(spec.work_dir).history)) == (0, 0)


@pytest.mark.parametrize("lost", [0, 1], ids=["where they meet", "the other one"])
def test_a_lost_machine_comes_back_and_the_training_goes_on(tmp_path: Path, network: Network, one_machine: TrainOutcome, lost: int) -> None:
    spec = two_machines(tmp_path / "work")
    launchers = [network.launch(spec, node) for node in (0, 1)]
    with ending(*launchers):
        wait_for_step(spec, INTERVAL + seeded().randint(1, 15), launchers)
        # Takes torchrun and the rank along.
        launchers[lost].kill()
        launchers[lost].wait()
        launchers[lost] = network.launch(spec, lost)
        with ending(launchers[lost]):
            check_done(spec, launchers, one_machine)
    resumed, recomputed = resumptions(read_history(WorkFolder(spec.work_dir).history))
    assert resumed >= INTERVAL
    assert 0 <= recomputed <= INTERVAL


def test_cut_links_are_noticed_and_survived(tmp_path: Path, network: Network, one_machine: TrainOutcome) -> None:
    moment = seeded()
    spec = two_machines(tmp_path / "work", step_seconds=0.3)
    launchers = [network.launch(spec, node) for node in (0, 1)]
    with ending(*launchers):
        for cut in range(NUM_CUTS):
            wait_for_step(spec, INTERVAL * (cut + 1) + moment.randint(1, 5), launchers)
            cut_off_nodes = _errors(spec)
            network.cut(moment.randint(0, 1))
            # Both ranks say, within the finite time-out, that they lost each other; neither waits for ever.
            wait_for(lambda before=cut_off_nodes: all(_errors(spec)[node] > before[node] for node in (0, 1)), 60)
            assert all("gloo" in message.lower() for message in _messages(spec))
            for node in (0, 1):
                network.mend(node)
        check_done(spec, launchers, one_machine)
    resumed = [record for record in read_history(WorkFolder(spec.work_dir).history) if record["kind"] == "resumed"]
    assert len(resumed) >= NUM_CUTS
    assert all(record["lost"] <= INTERVAL for record in resumed)


def test_a_slow_link_changes_nothing_but_the_time(tmp_path: Path, network: Network, one_machine: TrainOutcome) -> None:
    for node in (0, 1):
        network.slow_down(node, megabits=2)
    spec = two_machines(tmp_path / "work", step_seconds=0.0, collective_timeout_seconds=60)
    launchers = [network.launch(spec, node) for node in (0, 1)]
    with ending(*launchers):
        check_done(spec, launchers, one_machine)


def test_a_machine_that_never_comes_is_named(tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.faults.training_nodes.JOIN_SECONDS", 12)
    spec = two_machines(tmp_path / "work")
    for node, said in ((0, "of 2 machines not all came to 10.77.0.1:29500 within 12 s"), (1, "node 0 at 10.77.0.1:29500 did not answer")):
        launcher = network.launch(spec, node)
        with ending(launcher):
            assert launcher.wait(120) == 1
        assert said in network.log_of(spec, node), network.log_of(spec, node)
    assert processes_of(spec.work_dir) == []


def test_with_fewer_machines_allowed_the_others_go_on_and_take_one_that_comes_back(tmp_path: Path, network: Network) -> None:
    spec = two_machines(tmp_path / "work", step_seconds=0.8, nodes=Nodes(count=2, min_count=1))
    history = WorkFolder(spec.work_dir).history
    launchers = [network.launch(spec, node) for node in (0, 1)]
    with ending(*launchers):
        wait_for_step(spec, INTERVAL + 2, launchers)
        launchers[1].kill()
        launchers[1].wait()
        wait_for(lambda: any(record["kind"] == "resumed" for record in read_history(history)), 120)
        alone = step_of_training(spec)
        wait_for_step(spec, alone + 2, launchers[:1])
        launchers[1] = network.launch(spec, 1)
        with ending(launchers[1]):
            assert wait_for_both(launchers, 300) == [0, 0], logs(tmp_path)
    # The rows of a step stay the same, so there are as many steps.
    assert outcome_of(WorkFolder(spec.work_dir)).num_steps == NUM_STEPS
    lost_with_a_machine, *for_one_more = [record for record in read_history(history) if record["kind"] == "resumed"]
    assert lost_with_a_machine["step"] >= INTERVAL and lost_with_a_machine["lost"] <= INTERVAL
    # To take a machine in, the ranks save first: nothing is lost.
    assert len(for_one_more) == 1 and for_one_more[0]["lost"] == 0
    assert processes_of(spec.work_dir) == []


def _errors(spec: TrainSpec) -> list[float]:
    """When a rank of each machine last wrote an error; 0 when none did."""
    attempts = WorkFolder(spec.work_dir).attempts
    return [max((path.stat().st_mtime for path in attempts.glob(f"node-{node}/*/*.error.json")), default=0.0) for node in (0, 1)]


def _messages(spec: TrainSpec) -> list[str]:
    paths = WorkFolder(spec.work_dir).attempts.glob("node-*/*/*.error.json")
    return [error["message"] for path in paths if (error := read_json(path)) is not None]
