"""`python -m benchmarks.bench_checkpoints`: how long does a checkpoint hold up a training?

The same state of model and AdamW is saved in turn by our checkpoints, asynchronous and synchronous, and by the writer that
comes with torch.distributed.checkpoint (DCP), while training steps run. README.md says how to read it.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice, permutations
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.machine import SETTLE_SECONDS, describe_machine, load_average, markdown_table, write_result
from ml.evaluation.bootstrap import median_interval
from ml.training.checkpoint import Checkpointer, Progress
from ml.training.folders import WorkFolder
from ml.training.plan import Plan
from ml.training.ranks import RankGroup
from ml.training.strategies.states import state_tensors

GOAL = 0.25
NUM_RESAMPLES = 10_000
NUM_LAYERS = 4
BATCH_SIZE = 32
WAYS = ("asynchronous", "synchronous", "DCP's writer")


@dataclass(frozen=True)
class Saved:
    """One save of each way, in seconds.

    Args:
        stall: the training was held up.
        step: median step before the save, and while it is written in the background.
    """

    stall: float
    whole: float
    step_before: float
    step_beside: float | None = None


class Training:
    """A stack of square layers with AdamW: weights and two moments in fp32 are the whole of the state."""

    def __init__(self, num_mebibytes: int):
        width = max(16, round((num_mebibytes * 2**20 / 12 / NUM_LAYERS) ** 0.5))
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(NUM_LAYERS)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.inputs = torch.randn(BATCH_SIZE, width)
        self.num_steps = 0

    def step(self) -> float:
        """Its seconds."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()
        self.num_steps += 1
        return time.perf_counter() - started

    def steps(self, number: int) -> float:
        """Median seconds of so many."""
        return float(torch.tensor([self.step() for _ in range(number)]).median())

    def state(self) -> dict[str, torch.Tensor]:
        return state_tensors(self.model, self.optimizer)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())


class Bench:
    """One size of state, and a folder of each way to save it."""

    def __init__(self, folder: Path, num_mebibytes: int, num_steps: int):
        self.training = Training(num_mebibytes)
        self.num_steps = num_steps
        self.folder = folder
        self.checkpointers = {way: self._checkpointer(way) for way in WAYS[:2]}
        self.training.steps(num_steps)

    def _checkpointer(self, way: str) -> Checkpointer:
        work = WorkFolder(self.folder / way)
        work.root.mkdir(parents=True)
        work.history.touch()
        return Checkpointer(work, RankGroup(), keep_last=1, asynchronous=way == "asynchronous")

    def save(self, way: str) -> Saved:
        before = self.training.steps(self.num_steps)
        started = time.perf_counter()
        if way == "DCP's writer":
            target = self.folder / "dcp"
            shutil.rmtree(target, ignore_errors=True)
            save(self.training.state(), storage_writer=FileSystemWriter(target), no_dist=True)
            seconds = time.perf_counter() - started
            return Saved(seconds, seconds, before)
        checkpointer = self.checkpointers[way]
        checkpointer.save(Progress(step=self.training.num_steps), _no_plan(), self.training.state())
        stall = time.perf_counter() - started
        if way == "synchronous":
            return Saved(stall, stall, before)
        beside = []
        while checkpointer.is_writing:
            beside.append(self.training.step())
        whole = time.perf_counter() - started
        checkpointer.wait()
        return Saved(stall, whole, before, float(torch.tensor(beside).median()) if beside else None)

    def close(self) -> None:
        for checkpointer in self.checkpointers.values():
            checkpointer.close()


def run_rounds(folder: Path, num_mebibytes: int, num_rounds: int, num_steps: int) -> tuple[int, dict[str, Saved], list[dict[str, Saved]]]:
    """Bytes of the state, the first save of each way, and the rounds; in each round the ways take another order."""
    bench = Bench(folder, num_mebibytes, num_steps)
    first = {way: bench.save(way) for way in WAYS}
    orders = list(permutations(WAYS))
    rounds = [{way: bench.save(way) for way in order} for order in islice(orders * num_rounds, num_rounds)]
    bench.close()
    return bench.training.num_bytes, first, rounds


def report(results: list[tuple[int, dict[str, Saved], list[dict[str, Saved]]]], load_before: float) -> str:
    lines = ["# How long a checkpoint holds up a training", "", *describe_machine(load_before), ""]
    lines += [f"- one rank, {torch.get_num_threads()} thread of torch; the writing thread has what is left of the cores", ""]
    for num_bytes, first, rounds in results:
        stalls = {way: [each[way].stall for each in rounds] for way in WAYS}
        ratio = median_interval([a / b for a, b in zip(stalls["asynchronous"], stalls["synchronous"], strict=True)], NUM_RESAMPLES)
        against_dcp = median_interval([a / b for a, b in zip(stalls["asynchronous"], stalls["DCP's writer"], strict=True)], NUM_RESAMPLES)
        sync_against_dcp = median_interval(
            [a / b for a, b in zip(stalls["synchronous"], stalls["DCP's writer"], strict=True)], NUM_RESAMPLES
        )
        asynchronous = [each["asynchronous"] for each in rounds]
        slower = [saved.step_beside / saved.step_before for saved in asynchronous if saved.step_beside is not None]
        beside = median_interval(slower, NUM_RESAMPLES) if slower else None
        met = "met" if ratio.value <= GOAL else "MISSED"
        lines += [
            f"## {num_bytes / 2**20:.0f} MiB of model and optimizer",
            "",
            f"**The asynchronous save holds the training up for {ratio.value:.3f} of the synchronous save's time** (median of "
            f"{len(rounds)} rounds, 95 % interval {ratio.low:.3f} to {ratio.high:.3f}; goal at most {GOAL}: {met}).",
            "",
            f"- to a synchronous save by DCP's own writer: {against_dcp.value:.3f} ({against_dcp.low:.3f} to {against_dcp.high:.3f})",
            f"- our synchronous save to DCP's own writer, which computes no digests: {sync_against_dcp.value:.3f} "
            f"({sync_against_dcp.low:.3f} to {sync_against_dcp.high:.3f})",
            f"- a step beside the writing to a step before it: {beside.value:.3f} ({beside.low:.3f} to {beside.high:.3f})"
            if beside
            else "- no step ended while it was written",
            f"- until it is on disk: {median_interval([saved.whole for saved in asynchronous], NUM_RESAMPLES).value:.2f} s",
            f"- the first asynchronous save, which gets its memory from the system: {first['asynchronous'].stall:.3f} s",
            "",
            "Seconds that the training is held up, each round:",
            "",
            *markdown_table(
                ["", *(str(number + 1) for number in range(len(rounds)))],
                [[way, *(f"{seconds:.3f}" for seconds in stalls[way])] for way in WAYS],
            ),
            "",
        ]
    return "\n".join(lines)


def _no_plan() -> Plan:
    return Plan(
        fingerprint="",
        precision="fp32",
        epochs=1,
        num_train_rows=1,
        num_available_rows=1,
        num_validation_rows=1,
        global_batch_size=1,
        steps_per_epoch=1,
        num_steps=1,
        num_warmup_steps=0,
        validate_every_steps=1,
        step_seconds=0.0,
        step_seconds_measured={},
        estimated_seconds=0.0,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_checkpoints", description=__doc__)
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[100, 400], help="sizes of the state")
    parser.add_argument("--rounds", type=int, default=12, help="at least 6: each way is then first, second and third")
    parser.add_argument("--steps", type=int, default=5, help="training steps before each save")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the system's temporary folder")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args(arguments)
    load_before = load_average(SETTLE_SECONDS if options.write else 0.0)
    torch.set_num_threads(1)
    results = []
    for num_mebibytes in options.mebibytes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results.append(run_rounds(Path(folder), num_mebibytes, options.rounds, options.steps))
    text = report(results, load_before)
    sys.stdout.write(text + "\n")
    if options.write:
        sys.stdout.write(f"written to {write_result('checkpoints', text)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
