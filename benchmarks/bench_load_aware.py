"""`python -m benchmarks.bench_load_aware`: what does it gain to give a slow rank fewer rows?

Two gloo ranks of one thread train a small transformer. The second one computes its model twice, forward and backward, with the
same gradient: a rank of half the speed. After some steps in which the shares settle, blocks of steps with equal and with
load-aware shares alternate (AB BA AB ...), in the same processes, on the same batches.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.machine import SETTLE_SECONDS, describe_machine, load_average, markdown_table, write_result
from ml.evaluation.bootstrap import median_interval
from ml.language_model.transformer import Transformer, TransformerConfig
from ml.training.batches import Sampler
from ml.training.job import RowLosses, Split
from ml.training.ranks import RankGroup
from ml.training.shares import ShareBalancer, deal_rows, padded_tokens
from ml.training.spec import Optimizer, Parallelism, TrainSpec
from ml.training.stepping import Stepper

NUM_RANKS = 2
GOAL = 1.3
NUM_RESAMPLES = 10_000
VOCABULARY = 512


class Repeated(nn.Module):
    """Computes a model several times over; output and gradient are those of once."""

    def __init__(self, inner: nn.Module, times: int):
        super().__init__()
        self.inner = inner
        self.times = times

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.inner(input_ids) for _ in range(self.times)]).mean(0)


class SlowedJob:
    """Random rows of 16 to 128 tokens, predicted token by token. Implements `ml.training.job.TrainingJob`."""

    find_unused_parameters = False

    def __init__(self, work_dir: Path, *, times: int, width: int, num_rows: int = 2000):
        random = np.random.default_rng(0)
        self.times, self.width = times, width
        lengths = np.clip(random.lognormal(4.0, 0.5, num_rows), 16, 128).astype(np.int64)
        self.lengths: dict[Split, np.ndarray] = {"train": lengths, "validation": lengths[:10]}
        self.train_strata = np.zeros(num_rows, dtype=np.int64)
        self.tokens = random.integers(0, VOCABULARY, (num_rows, 128))

    def build_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = TransformerConfig(VOCABULARY, self.width, num_layers=2, num_heads=4, hidden=3 * self.width, max_length=128)
        return Repeated(Transformer(config), self.times)

    def batch(self, split: Split, rows: np.ndarray) -> dict[str, torch.Tensor]:
        longest = int(self.lengths[split][rows].max())
        ids = torch.from_numpy(self.tokens[rows, :longest])
        return {"ids": ids, "mask": torch.arange(longest) < torch.from_numpy(self.lengths[split][rows]).unsqueeze(1)}

    def row_weights(self, split: Split, rows: np.ndarray) -> np.ndarray:
        return np.ones(len(rows))

    def row_losses(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> RowLosses:
        losses = nn.functional.cross_entropy(model(batch["ids"]).transpose(1, 2), batch["ids"], reduction="none")
        return RowLosses((losses * batch["mask"]).sum(1) / batch["mask"].sum(1))


def run_rank(rank: int, folder: str, options: dict[str, Any]) -> None:
    """One rank; the first one writes what was measured to `folder/measured.json`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)  # pyright: ignore[reportPrivateImportUsage] - documented, not re-exported
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=120))
    group = RankGroup(rank, NUM_RANKS)
    spec = TrainSpec(
        job="", work_dir=Path(folder), num_ranks=NUM_RANKS, parallelism=Parallelism("ddp"), optimizer=Optimizer(), precision="fp32"
    )
    job = SlowedJob(Path(folder), times=options["slowdown"] if rank else 1, width=options["width"])
    stepper = Stepper(spec, job, group)
    optimizer = stepper.new_optimizer(1e-4)
    lengths = job.lengths["train"]
    sampler = Sampler(np.arange(len(lengths)), lengths, options["batch"], seed=0)
    balancer = ShareBalancer(NUM_RANKS)
    equal = np.full(NUM_RANKS, 1 / NUM_RANKS)

    def run_steps(first: int, count: int, load_aware: bool) -> float:
        """Seconds a step."""
        group.wait_for_all()
        start = time.perf_counter()
        for step in range(first, first + count):
            rows, shares = deal_rows(sampler.rows(step), lengths, NUM_RANKS, balancer.fractions if load_aware else equal)
            result = stepper.train_step(rows, optimizer, "fp32", 1e-4, shares=shares)
            if load_aware:
                begin = sum(shares[:rank])
                work = padded_tokens(rows[begin : begin + shares[rank]], lengths)
                balancer.exchange(group, rank, work, result.forward_seconds)
                settled.append(balancer.fractions.tolist())
        group.wait_for_all()
        return (time.perf_counter() - start) / count

    settled: list[list[float]] = []
    run_steps(0, 3, load_aware=False)
    run_steps(3, options["settling"], load_aware=True)
    settling = list(settled)
    pairs = []
    for number in range(options["pairs"]):
        first = options["settling"] + 3 + number * options["steps"]
        order = (False, True) if number % 2 == 0 else (True, False)
        seconds = {load_aware: run_steps(first, options["steps"], load_aware) for load_aware in order}
        pairs.append({"equal": seconds[False], "load_aware": seconds[True]})
    if group.is_first:
        measured = {"pairs": pairs, "settling": settling, "fractions": balancer.fractions.tolist(), "parameters": stepper.num_parameters}
        (Path(folder) / "measured.json").write_text(json.dumps(measured))
    dist.barrier()
    os._exit(0)  # gloo's teardown may abort


def measure(options: dict[str, Any]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="millstream-bench-") as folder:
        processes = [context.Process(target=run_rank, args=(rank, folder, options)) for rank in range(NUM_RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"bench_load_aware: ranks ended with {[process.exitcode for process in processes]}")
        return json.loads((Path(folder) / "measured.json").read_bytes())


def report(measured: dict[str, Any], options: dict[str, Any], load_before: float) -> str:
    pairs = measured["pairs"]
    gain = median_interval([pair["equal"] / pair["load_aware"] for pair in pairs], NUM_RESAMPLES)
    changes = [i for i, (a, b) in enumerate(zip(measured["settling"], measured["settling"][1:], strict=False), start=2) if a != b]
    verdict = "met" if gain.value >= GOAL else "MISSED"
    slowdown = options["slowdown"]
    rows = [
        [str(number), f"{1000 * pair['equal']:.1f}", f"{1000 * pair['load_aware']:.1f}", f"{pair['equal'] / pair['load_aware']:.3f}"]
        for number, pair in enumerate(pairs, start=1)
    ]
    return "\n".join(
        [
            "# What load-aware shares gain",
            "",
            *describe_machine(load_before),
            f"- 2 gloo ranks of 1 thread, the second computes {slowdown} times; {measured['parameters']:,} parameters, "
            f"global batch {options['batch']} rows, {len(pairs)} pairs of blocks of {options['steps']} steps",
            "",
            f"**Load-aware shares: {gain.value:.3f} times as fast as equal ones (95 % interval {gain.low:.3f} to {gain.high:.3f}); "
            f"goal at least {GOAL}, {verdict}.** With no other cost it would be {(1 + slowdown) / 2:.2f}.",
            "",
            f"The shares changed at steps {changes} of the first {len(measured['settling'])} and ended at "
            f"{', '.join(f'{fraction:.3f}' for fraction in measured['fractions'])}.",
            "",
            "Milliseconds a step:",
            "",
            *markdown_table(["pair", "equal", "load-aware", "ratio"], rows),
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_load_aware", description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="in a block")
    parser.add_argument("--settling", type=int, default=20, help="steps before the first pair")
    parser.add_argument("--slowdown", type=int, default=2)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--batch", type=int, default=48, help="rows of the global batch")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = vars(parser.parse_args(arguments))
    load_before = load_average(SETTLE_SECONDS if options["write"] else 0.0)
    markdown = report(measure(options), options, load_before)
    print(markdown)
    if options["write"]:
        print(f"written to {write_result('load_aware', markdown)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
