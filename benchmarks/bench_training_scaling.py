"""`python -m benchmarks.bench_training_scaling`: how much faster are two ranks than one?

Three trainings of ours with the same global batches, a block of steps in turn: 1 rank of 1 thread, 2 ranks of 1 thread, 1 rank
of 2 threads. README.md says how to read it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.interleaved import ended_together
from benchmarks.machine import SETTLE_SECONDS, describe_machine, load_average, markdown_table, write_result
from benchmarks.training_sides import Work, our_losses, our_spec, start_ours
from ml.evaluation.bootstrap import median_interval

GOAL = 1.6
SMALLEST_STEP_SECONDS = 0.3
NUM_RESAMPLES = 10_000
# Name -> ranks, threads of each.
LAYOUTS = {"1 rank x 1 thread": (1, 1), "2 ranks x 1 thread": (2, 1), "1 rank x 2 threads": (1, 2)}
ONE, TWO, THREADS = LAYOUTS

Round = dict[str, float]


def measure(work: Work, folder: Path) -> tuple[list[Round], float]:
    """Seconds of each layout's block, per round, and the largest relative difference of any step's loss to that of one rank.

    Raises:
        SystemExit: a training failed.
    """
    batches = work.write_batches(folder / "batches.json")
    folders = {name: folder / f"{ranks}x{threads}" for name, (ranks, threads) in LAYOUTS.items()}
    specs = {name: our_spec(work, folders[name], batches, ranks, num_threads=threads) for name, (ranks, threads) in LAYOUTS.items()}
    sides = []
    with ended_together(sides):
        for name, spec in specs.items():
            sides.append(start_ours(name, spec, folders[name]))
        for side in sides:
            side.reach_first_gate()
        rounds = []
        for number in range(1 + work.num_blocks):
            seconds = {side.name: side.run_block().seconds for side in sides}
            if number:
                rounds.append(seconds)
                print(
                    f"round {number} of {work.num_blocks}: {', '.join(f'{name} {value:.2f} s' for name, value in seconds.items())}",
                    flush=True,
                )
        for side in sides:
            if status := side.finish():
                raise SystemExit(f"{side.name} ended with exit status {status}; its log:\n{side.log_end()}")
    losses = {name: our_losses(spec) for name, spec in specs.items()}
    difference = max(abs(losses[name][step] - loss) / abs(loss) for name in (TWO, THREADS) for step, loss in losses[ONE].items())
    return rounds, difference


def report(rounds: list[Round], work: Work, difference: float, load_before: float) -> str:
    speed_ups = {name: median_interval([seconds[ONE] / seconds[name] for seconds in rounds], NUM_RESAMPLES) for name in (TWO, THREADS)}
    two, threads = speed_ups[TWO], speed_ups[THREADS]
    step_seconds = statistics.median(seconds[ONE] for seconds in rounds) / work.block_steps
    small = "" if step_seconds >= SMALLEST_STEP_SECONDS else f" **Less than {SMALLEST_STEP_SECONDS} s: communication weighs too much.**"
    rows = [
        [str(i + 1), *(f"{seconds[name]:.3f}" for name in LAYOUTS), f"{seconds[ONE] / seconds[TWO]:.3f}"]
        for i, seconds in enumerate(rounds)
    ]
    lines = [
        "# How much faster two ranks are than one",
        "",
        *describe_machine(load_before),
        f"- {work.global_batch_size} rows a step in all, {work.precision}, encoder {work.sizes or 'of 6 layers and width 384'}",
        f"- {len(rounds)} rounds of {work.block_steps} steps; one rank of one thread takes {step_seconds:.2f} s a step.{small}",
        "",
        f"**2 ranks of 1 thread over 1 rank of 1 thread: {two.value:.2f} times (median; 95 % interval {two.low:.2f} to {two.high:.2f}); "
        f"goal at least {GOAL}: {'met' if two.value >= GOAL else 'MISSED'}.** "
        f"1 rank of 2 threads: {threads.value:.2f} times ({threads.low:.2f} to {threads.high:.2f}).",
        "",
        f"Losses of all steps differ by at most {difference:.1e} of their value between the three.",
        "",
        "Seconds of each block:",
        "",
        *markdown_table(["round", *LAYOUTS, "2 ranks over 1"], rows),
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_training_scaling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="steps in a block")
    parser.add_argument("--rows", type=int, default=64, help="rows of a step in all")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows that it runs; numbers of no worth")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args(arguments)
    load_before = load_average(0.0 if options.quick else SETTLE_SECONDS)
    sizes, rounds, steps = {}, options.rounds, options.steps
    if options.quick:
        sizes, rounds, steps = {"width": 64, "num_layers": 2, "num_heads": 4}, min(rounds, 2), min(steps, 2)
    work = Work(rounds, steps, options.rows, "fp32", {**sizes, "dropout": 0.0})
    with tempfile.TemporaryDirectory(prefix="millstream-bench-", ignore_cleanup_errors=True) as name:
        found, difference = measure(work, Path(name))
    markdown = report(found, work, difference, load_before)
    print(markdown)
    if options.write:
        print(f"written to {write_result('training_scaling', markdown)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
