"""Trainings for `benchmarks.interleaved`: ours through its launcher as in production, and the hand-written script.

`python -m benchmarks.training_sides spec.json` is our launcher in a process of its own.
"""

import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.interleaved import ROOT, Side
from ml.training.spec import Optimizer, TrainSpec

SEED = 1
LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class Work:
    """What is trained, the same for all sides.

    Args:
        num_blocks: measured ones; one block more runs first and counts for nothing.
        global_batch_size: rows of a step over all ranks.
        sizes: of `benchmarks.encoder.EncoderClassifier`.
    """

    num_blocks: int
    block_steps: int
    global_batch_size: int
    precision: str = "fp32"
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        # One step more than all blocks: every block ends at a gate.
        return (1 + self.num_blocks) * self.block_steps + 1

    @property
    def num_rows(self) -> int:
        return self.num_steps * self.global_batch_size

    def write_batches(self, path: Path) -> Path:
        """The rows of each step, dealt as our own training deals them."""
        from benchmarks.encoder import random_texts
        from ml.training.batches import Sampler

        sampler = Sampler(np.arange(self.num_rows), random_texts(self.num_rows, SEED).lengths, self.global_batch_size, SEED)
        path.write_text(json.dumps([sampler.rows(step).tolist() for step in range(self.num_steps)]))
        return path


def our_spec(work: Work, folder: Path, batches: Path, num_ranks: int, *, num_threads: int | None = None, **changes: Any) -> TrainSpec:
    """Everything on, as a user gets it, but validation (at the end only), which the other side does not have."""
    spec = TrainSpec(
        job="benchmarks.encoder_job:EncoderJob",
        job_arguments={
            "num_rows": work.num_rows,
            "seed": SEED,
            "batches": str(batches),
            "gate": str(folder),
            "block_steps": work.block_steps,
            "sizes": work.sizes,
            "num_threads": num_threads,
        },
        work_dir=folder / "work",
        num_ranks=num_ranks,
        batch_size_per_rank=work.global_batch_size // num_ranks,
        epochs=1,
        optimizer=Optimizer(learning_rate=LEARNING_RATE),
        precision=work.precision,  # type: ignore[arg-type]
        compile="off",
        # Shares by measured speed would give the ranks other rows than those of the other side.
        load_aware=False,
        validate_every_steps=work.num_steps,
        seed=SEED,
        budget_seconds=24 * 3600.0,
        heartbeat_timeout_seconds=900.0,
        collective_timeout_seconds=900.0,
    )
    return replace(spec, **changes)


def start_ours(name: str, spec: TrainSpec, folder: Path) -> Side:
    """With the plan already written, so that nothing is decided by measuring and no step is made before the first gate."""
    from ml.training.folders import WorkFolder, write_json
    from ml.training.plan import Measured, decide_plan

    work = WorkFolder(spec.work_dir)
    num_rows = spec.job_arguments["num_rows"]
    measured = Measured({spec.precision: 0.001}, 0.001)  # type: ignore[dict-item]
    plan = decide_plan(spec, num_rows=num_rows, num_validation_rows=32, measured=measured, seconds_left=spec.budget_seconds)
    write_json(work.plan, plan.to_json())
    path = folder.with_suffix(".spec.json")
    path.write_text(spec.to_json(), encoding="utf-8")
    return Side(name, [sys.executable, "-m", "benchmarks.training_sides", str(path)], folder, spec.num_ranks)


def start_by_hand(name: str, work: Work, spec: TrainSpec, folder: Path, batches: Path) -> Side:
    """The same model, rows, steps and optimizer settings, by torchrun."""
    settings = {
        "num_rows": work.num_rows,
        "seed": SEED,
        "batches": str(batches),
        "num_warmup_steps": math.ceil(spec.optimizer.warmup_fraction * work.num_steps),
        "sizes": work.sizes,
        "learning_rate": LEARNING_RATE,
        "gradient_clip": spec.optimizer.gradient_clip,
        "bf16": work.precision == "bf16",
        "gate": str(folder),
        "block_steps": work.block_steps,
        "losses": str(folder.with_suffix(".losses")),
    }
    path = folder.with_suffix(".settings.json")
    path.write_text(json.dumps(settings))
    threads = max(1, num_cores() // spec.num_ranks)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(spec.num_ranks)]
    command = [sys.executable, *torchrun, "-m", "benchmarks.minimal_torchrun", str(path)]
    environment = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return Side(name, command, folder, spec.num_ranks, environment)


def num_cores() -> int:
    from ml.training.processes import usable_cores

    return usable_cores()


def our_losses(spec: TrainSpec) -> dict[int, float]:
    """Step -> loss over the global batch."""
    from ml.training.folders import WorkFolder
    from ml.training.history import read_history

    return {record["step"]: record["loss"] for record in read_history(WorkFolder(spec.work_dir).history) if record["kind"] == "step"}


def losses_by_hand(folder: Path, num_ranks: int) -> dict[int, float]:
    """Step -> mean of what the ranks printed, which have as many rows each."""
    logs = [folder.with_suffix(f".{rank}.jsonl").read_text().splitlines() for rank in range(num_ranks)]
    ranks = [{record["step"]: record["loss"] for record in map(json.loads, log)} for log in logs]
    return {step: float(np.mean([losses[step] for losses in ranks])) for step in ranks[0]}


if __name__ == "__main__":
    from ml.training.launcher import run_training

    run_training(TrainSpec.from_json(Path(sys.argv[1]).read_bytes()))
