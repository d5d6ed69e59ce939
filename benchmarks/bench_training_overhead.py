"""`python -m benchmarks.bench_training_overhead`: what does our training cost a step, against a minimal torchrun script?

Both train the same model on the same batches in two gloo ranks, at the same time: a block of steps of one, then of the other.
README.md says how to read it.
"""

import argparse
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.interleaved import ended_together
from benchmarks.machine import SETTLE_SECONDS, describe_machine, load_average, markdown_table, write_result
from benchmarks.training_sides import Work, losses_by_hand, num_cores, our_losses, our_spec, start_by_hand, start_ours
from ml.evaluation.bootstrap import median_interval
from ml.training.spec import TrainSpec

GOAL, GOAL_UPPER = 1.02, 1.05
NUM_RESAMPLES = 10_000
# Relative difference of losses that still counts as the same training: rounding that grows over the steps.
SAME_LOSS = {"fp32": 1e-2, "bf16": 5e-2}
NUM_COMPARED_STEPS = 30


@dataclass(frozen=True)
class Pair:
    """Seconds of one block of steps."""

    ours: float
    by_hand: float

    @property
    def ratio(self) -> float:
        return self.ours / self.by_hand


def measure(work: Work, num_ranks: int, folder: Path, checkpoint_every_steps: int) -> tuple[list[Pair], TrainSpec, float]:
    """The pairs, and the largest relative difference of the losses of the two trainings' first steps.

    Raises:
        SystemExit: a side failed.
    """
    batches = work.write_batches(folder / "batches.json")
    spec = our_spec(work, folder / "ours", batches, num_ranks, checkpoint_every_steps=checkpoint_every_steps)
    sides = []
    with ended_together(sides):
        sides.append(start_ours("our training", spec, folder / "ours"))
        sides.append(start_by_hand("the script", work, spec, folder / "script", batches))
        ours, script = sides
        for side in sides:
            side.reach_first_gate()
        pairs = []
        for number in range(1 + work.num_blocks):
            # One after the other for ever, so each runs as often before the other as after it.
            pair = Pair(ours.run_block().seconds, script.run_block().seconds)
            if number:
                pairs.append(pair)
                print(f"pair {number} of {work.num_blocks}: {pair.ours:.3f} s and {pair.by_hand:.3f} s, ratio {pair.ratio:.3f}", flush=True)
        for side in sides:
            status = side.finish()
            if status:
                raise SystemExit(f"{side.name} ended with exit status {status}; its log:\n{side.log_end()}")
    return pairs, spec, loss_difference(our_losses(spec), losses_by_hand(folder / "script", num_ranks))


def loss_difference(ours: dict[int, float], by_hand: dict[int, float]) -> float:
    """Largest relative difference over the first steps that both have."""
    shared = sorted(ours.keys() & by_hand.keys())
    compared = [step for step in shared if step <= NUM_COMPARED_STEPS]
    return max(abs(ours[step] - by_hand[step]) / abs(by_hand[step]) for step in compared)


def report(pairs: list[Pair], work: Work, num_ranks: int, difference: float, checkpoint_every_steps: int, load_before: float) -> str:
    ratio = median_interval([pair.ratio for pair in pairs], NUM_RESAMPLES)
    extra = median_interval([1000 * (pair.ours - pair.by_hand) / work.block_steps for pair in pairs], NUM_RESAMPLES)
    total = sum(pair.ours for pair in pairs) / sum(pair.by_hand for pair in pairs)
    ratios = sorted(pair.ratio for pair in pairs)
    met = ratio.value <= GOAL and ratio.high <= GOAL_UPPER
    # The script against itself one block later: what noise and unlike rows alone do.
    own = [later.by_hand / earlier.by_hand for earlier, later in itertools.pairwise(pairs)]
    own_spread = f"{min(own):.3f} to {max(own):.3f}" if own else "-"
    rows = [[str(i + 1), f"{pair.ours:.3f}", f"{pair.by_hand:.3f}", f"{pair.ratio:.3f}"] for i, pair in enumerate(pairs)]
    lines = [
        "# What our training costs a step, against a minimal torchrun script",
        "",
        *describe_machine(load_before),
        f"- {num_ranks} gloo ranks of {max(1, num_cores() // num_ranks)} thread, {work.global_batch_size} rows a step, {work.precision}, "
        f"encoder {work.sizes or 'of 6 layers and width 384'}",
        f"- {len(pairs)} pairs of {work.block_steps} steps, a checkpoint every {checkpoint_every_steps} steps on our side",
        "",
        f"**Step time: {ratio.value:.3f} times the script's (median; 95 % interval {ratio.low:.3f} to {ratio.high:.3f}), "
        f"{extra.value:+.1f} ms a step ({extra.low:+.1f} to {extra.high:+.1f}); goal at most {GOAL}, upper end at most {GOAL_UPPER}: "
        f"{'met' if met else 'MISSED'}.**",
        "",
        f"All blocks together, so with every checkpoint in it: {total:.3f} times. Ratios from {ratios[0]:.3f} to {ratios[-1]:.3f}; "
        f"the script against its own block before: {own_spread}.",
        f"Losses of the first {NUM_COMPARED_STEPS} steps differ by at most {difference:.1e} of their value.",
        "",
        "Seconds of each block:",
        "",
        *markdown_table(["pair", "ours", "script", "ratio"], rows),
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_training_overhead", description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="at least 15 for an interval that means something")
    parser.add_argument("--steps", type=int, default=10, help="steps in a block")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step and rank")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the processor has it")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps; the pipeline's default")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few pairs: shows that it runs; numbers of no worth")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args(arguments)
    load_before = load_average(0.0 if options.quick else SETTLE_SECONDS)
    precision = options.precision
    if precision == "auto":
        import torch

        from ml.training.precision import has_fast_bf16

        precision = "bf16" if has_fast_bf16(torch.device("cpu")) else "fp32"
    sizes, pairs, steps = {}, options.pairs, options.steps
    if options.quick:
        sizes, pairs, steps = {"width": 64, "num_layers": 2, "num_heads": 4}, min(pairs, 4), min(steps, 3)
    # Without dropout both sides compute the same numbers, which shows that they do the same work.
    work = Work(pairs, steps, options.rows * options.ranks, precision, {**sizes, "dropout": 0.0})
    with tempfile.TemporaryDirectory(prefix="millstream-bench-", ignore_cleanup_errors=True) as name:
        found, _, difference = measure(work, options.ranks, Path(name), options.checkpoint_every)
    markdown = report(found, work, options.ranks, difference, options.checkpoint_every, load_before)
    print(markdown)
    if options.write:
        print(f"written to {write_result('training_overhead', markdown)}")
    if difference > SAME_LOSS[precision]:
        print("bench_training_overhead: the two sides did not train alike; their times must not be compared", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
