"""`python -m benchmarks.bench_gradient_sync`: what the ways of averaging gradients cost and send, and what the hooks lose.

Two ranks with one model, wrapped anew for each setting, in turn over several rounds. README.md says how to read it.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.encoder import build_encoder, random_texts
from benchmarks.machine import SETTLE_SECONDS, describe_machine, load_average, markdown_table, write_result
from ml.evaluation.bootstrap import median_interval
from ml.training.gradient_sync import MIB, POWERSGD_START_STEP, apply_hook, ddp_options, gradient_bytes
from ml.training.spec import GradientSync

NUM_RESAMPLES = 10_000
WARMUP_STEPS, TIMED_STEPS = 2, 3
SEED, LEARNING_RATE = 1, 3e-4
BASE = "25 MiB"
SETTINGS: dict[str, GradientSync] = {
    "1 MiB": GradientSync(bucket_mb=1),
    "5 MiB": GradientSync(bucket_mb=5),
    BASE: GradientSync(bucket_mb=25),
    "100 MiB": GradientSync(bucket_mb=100),
    "no overlap (one bucket)": GradientSync(overlap=False),
    "25 MiB, no views": GradientSync(bucket_mb=25, bucket_views=False),
    "25 MiB, static graph": GradientSync(bucket_mb=25, static_graph=True),
    "25 MiB, 2 passes": GradientSync(bucket_mb=25, accumulation_steps=2),
    "25 MiB, 4 passes": GradientSync(bucket_mb=25, accumulation_steps=4),
    "25 MiB, fp16": GradientSync(bucket_mb=25, hook="fp16"),
    "25 MiB, bf16": GradientSync(bucket_mb=25, hook="bf16"),
    "25 MiB, PowerSGD 4": GradientSync(bucket_mb=25, hook="powersgd", powersgd_rank=4),
    "25 MiB, PowerSGD 16": GradientSync(bucket_mb=25, hook="powersgd", powersgd_rank=16),
}


class Trainer:
    """One rank's model, and steps of it with any setting."""

    def __init__(self, rank: int, num_ranks: int, backend: str, sizes: dict[str, Any], rows: int):
        self.rank, self.num_ranks, self.backend, self.sizes, self.rows = rank, num_ranks, backend, sizes, rows
        self.device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        self.texts = random_texts(4096, SEED)
        self.start_anew()

    def start_anew(self) -> None:
        """The weights and the optimizer of the first step."""
        self.model = build_encoder(SEED, **self.sizes, dropout=0.0).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def wrap(self, sync: GradientSync) -> DistributedDataParallel:
        for parameter in self.model.parameters():
            parameter.grad = None
        devices = [self.device] if self.device.type == "cuda" else None
        ddp = DistributedDataParallel(self.model, device_ids=devices, **ddp_options(sync))
        apply_hook(ddp, sync, self.backend)
        if sync.hook == "powersgd":
            # Its exact steps at the start are not what is timed.
            hook_state: Any = ddp._comm_hooks[0][1]
            hook_state.iter = hook_state.start_powerSGD_iter - WARMUP_STEPS
        return ddp

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """As long as its longest row; the same rows for the same step."""
        rows = np.random.default_rng([SEED, step]).integers(0, len(self.texts.targets), self.rows * self.num_ranks)
        rows = rows[np.argsort(self.texts.lengths[rows], kind="stable")][self.rank :: self.num_ranks]
        return {name: tensor.to(self.device) for name, tensor in self.texts.batch(rows).items()}

    def step(self, ddp: DistributedDataParallel, sync: GradientSync, step: int) -> float:
        """One optimizer step; this rank's loss."""
        batch = self.batch(step)
        parts = [tensor.chunk(sync.accumulation_steps) for tensor in (batch["input_ids"], batch["is_padding"], batch["targets"])]
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index, (ids, is_padding, targets) in enumerate(zip(*parts, strict=True)):
            is_last = index == sync.accumulation_steps - 1
            with contextlib.nullcontext() if is_last else ddp.no_sync():
                loss = nn.functional.cross_entropy(ddp(ids, is_padding), targets, reduction="sum") / self.rows
                loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return total

    def timed(self, sync: GradientSync, first_step: int) -> dict[str, float]:
        """Median seconds of a few steps, the slowest rank's, and bytes that went through the loopback interface per step."""
        ddp = self.wrap(sync)
        for number in range(WARMUP_STEPS):
            self.step(ddp, sync, first_step + number)
        seconds = []
        self._wait()
        before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
        for number in range(TIMED_STEPS):
            start = time.perf_counter()
            self.step(ddp, sync, first_step + WARMUP_STEPS + number)
            seconds.append(time.perf_counter() - start)
        self._wait()
        sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
        slowest = torch.tensor(statistics.median(seconds), device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return {"seconds": float(slowest), "loopback_bytes": sent / TIMED_STEPS}

    def losses(self, sync: GradientSync, num_steps: int) -> list[float]:
        """Of a training from the same start, over all ranks. PowerSGD has its exact steps first, as in a real one."""
        self.start_anew()
        ddp = DistributedDataParallel(self.model, device_ids=[self.device] if self.device.type == "cuda" else None, **ddp_options(sync))
        apply_hook(ddp, sync, self.backend)
        found = []
        for step in range(num_steps):
            loss = torch.tensor(self.step(ddp, sync, step), device=self.device)
            dist.all_reduce(loss)
            found.append(float(loss) / self.num_ranks)
        return found

    def _wait(self) -> None:
        dist.barrier()


def run_rank(rank: int, num_ranks: int, backend: str, folder: str, options: dict[str, Any]) -> None:
    """Measure everything and write `found.json`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", num_ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=300))
    trainer = Trainer(rank, num_ranks, backend, options["sizes"], options["rows"])
    settings = {name: GradientSync(**sync) for name, sync in options["settings"].items()}
    timed: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for number in range(options["rounds"]):
        # Every round begins with another setting, and all settings of a round take the same batches.
        names = list(settings)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            timed[name].append(trainer.timed(settings[name], first_step=number * (WARMUP_STEPS + TIMED_STEPS)))
    losses = {name: trainer.losses(settings[name], options["loss_steps"]) for name in options["loss_settings"]}
    if rank == 0:
        shapes = [list(parameter.shape) for parameter in trainer.model.parameters()]
        Path(folder, "found.json").write_text(json.dumps({"timed": timed, "losses": losses, "shapes": shapes}))
    dist.barrier()
    sys.stdout.flush()
    # Tearing gloo down now and then aborts, when all is done.
    os._exit(0)


@contextlib.contextmanager
def spawned(num_ranks: int, arguments: tuple[Any, ...]) -> Iterator[list[Any]]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, num_ranks, *arguments)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def measure(backend: str, num_ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """
    Raises:
        SystemExit: a rank failed; what it said is above.
    """
    with tempfile.TemporaryDirectory(prefix="millstream-bench-") as folder:
        with spawned(num_ranks, (backend, folder, options)) as processes:
            for process in processes:
                process.join(900)
            if any(process.exitcode for process in processes):
                raise SystemExit(f"the ranks ended with exit codes {[process.exitcode for process in processes]}")
        return json.loads(Path(folder, "found.json").read_bytes())


def report(found: dict[str, Any], settings: dict[str, GradientSync], backend: str, num_ranks: int, rows: int, load_before: float) -> str:
    timed, losses = found["timed"], found["losses"]
    whole = gradient_bytes(found["shapes"], 4, GradientSync(), num_ranks).whole
    table = []
    for name, sync in settings.items():
        seconds = statistics.median(entry["seconds"] for entry in timed[name])
        pairs = zip(timed[name], timed[BASE], strict=True)
        ratio = median_interval([entry["seconds"] / base["seconds"] for entry, base in pairs], NUM_RESAMPLES)
        sent = gradient_bytes(found["shapes"], 4, sync, num_ranks).sent
        counted = statistics.median(entry["loopback_bytes"] for entry in timed[name]) / num_ranks
        table.append(
            [
                name,
                f"{1000 * seconds:.0f}",
                f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
                f"{sent / MIB:.2f}",
                f"{counted / MIB:.2f}" if backend == "gloo" else "-",
            ]
        )
    exact = losses[BASE]
    effect = []
    for name, values in losses.items():
        tail = max(1, len(values) // 5)
        differences = [abs(a - b) / abs(b) for a, b in zip(values, exact, strict=True)]
        effect.append([name, f"{np.mean(values[-tail:]):.4f}", f"{max(differences):.1e}", f"{differences[-1]:.1e}"])
    lines = [
        "# Ways of averaging gradients",
        "",
        *describe_machine(load_before),
        f"- {num_ranks} {backend} ranks of 1 thread, {rows} rows each, fp32; gradient {whole / MIB:.0f} MiB "
        f"({whole / 4e6:.1f} M parameters)",
        f"- {len(timed[BASE])} rounds of {TIMED_STEPS} timed steps each; ratios are to {BASE} in the same round, with 95 % intervals",
        "",
        "Bytes are MiB that each rank sends per step: by formula, and as counted at the loopback interface, headers and whatever "
        "else the machine sent there included.",
        "",
        *markdown_table(["setting", "ms a step", f"ratio to {BASE}", "MiB by formula", "MiB counted"], table),
        "",
        f"What a hook does to the loss, {len(exact)} steps of AdamW from the same start, against {BASE} without a hook. PowerSGD's "
        f"first {POWERSGD_START_STEP} steps are exact.",
        "",
        *markdown_table(["setting", "mean loss of the last fifth", "largest difference", "of the last step"], effect),
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gradient_sync", description=__doc__)
    parser.add_argument("--backend", choices=("auto", "gloo", "nccl"), default="auto", help="auto: nccl with at least two GPUs")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step and rank")
    parser.add_argument("--loss-steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: shows that it runs; numbers of no worth")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args(arguments)
    load_before = load_average(0.0 if options.quick else SETTLE_SECONDS)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend = ("nccl" if num_gpus >= 2 else "gloo") if options.backend == "auto" else options.backend
    settings = {name: sync for name, sync in SETTINGS.items() if sync.hook != "bf16" or backend == "nccl"}
    # 20 M parameters; the small one has 2.3 M, so that there still are buckets.
    sizes, rounds, loss_steps = {"width": 480, "num_layers": 6}, options.rounds, options.loss_steps
    if options.quick:
        sizes, rounds, loss_steps = {"width": 192, "num_layers": 2}, min(rounds, 2), min(loss_steps, 15)
    ranks = num_gpus if backend == "nccl" else 2
    hooked = [BASE, *(name for name, sync in settings.items() if sync.hook != "none")]
    found = measure(
        backend,
        ranks,
        {
            "sizes": sizes,
            "rows": options.rows,
            "rounds": rounds,
            "loss_steps": loss_steps,
            "settings": {name: asdict(sync) for name, sync in settings.items()},
            "loss_settings": hooked,
        },
    )
    markdown = report(found, settings, backend, ranks, options.rows, load_before)
    print(markdown)
    if options.write:
        print(f"written to {write_result('gradient_sync', markdown)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
