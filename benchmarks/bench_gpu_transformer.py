"""`python -m benchmarks.bench_gpu_transformer`: tokens per second and MFU of training transformers of 100 M and 1 B parameters.

One GPU, bf16 autocast over fp32 weights, torch.compile, fused AdamW, flash attention, all of a step included: loss, backward pass,
clipping, optimizer. Tokens are random, for speed does not depend on them. Needs torch and numpy only (Python 3.11 and up).
README.md says how to read it.
"""

import argparse
import gc
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ml.language_model.transformer import Transformer, TransformerConfig
from ml.training.compiling import try_compiled
from ml.training.flops import peak_flops, transformer_flops_per_token
from ml.training.optimizers import build_optimizer
from ml.training.precision import Precision, computing_in
from ml.training.spec import Optimizer

RESULTS_FOLDER = Path(__file__).parent / "results"
GOAL_MFU = 0.45
GRADIENT_CLIP = 1.0
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Size:
    """A model, and the batches that it is measured with.

    Args:
        batch_sizes: rows of a step; the largest that fits the memory is used, the first one first.
    """

    config: TransformerConfig
    batch_sizes: tuple[int, ...]


SIZES: dict[str, Size] = {
    "100M": Size(TransformerConfig(vocab_size=32_768, width=768, num_layers=10, num_heads=12, hidden=2048, max_length=2048), (32, 16, 8)),
    "1B": Size(TransformerConfig(vocab_size=32_768, width=2048, num_layers=18, num_heads=16, hidden=5632, max_length=2048), (16, 8, 4)),
}
TINY = Size(TransformerConfig(vocab_size=256, width=32, num_layers=2, num_heads=2, hidden=64, max_length=32), (4,))


@dataclass(frozen=True)
class Found:
    """
    Args:
        num_counted: parameters without the token table, which multiplies nothing.
        step_seconds: of each timed step.
        loss: of the first and the last step.
        note: what did not go as wanted.
    """

    name: str
    config: TransformerConfig
    precision: Precision
    compiled: bool
    batch_size: int
    num_parameters: int
    num_counted: int
    step_seconds: list[float]
    compile_seconds: float
    memory_bytes: int
    loss: tuple[float, float]
    note: str = ""

    @property
    def tokens(self) -> int:
        return self.batch_size * self.config.max_length

    @property
    def flops_per_token(self) -> float:
        config = self.config
        return transformer_flops_per_token(self.num_counted, num_layers=config.num_layers, width=config.width, length=config.max_length)

    def mfu(self, seconds: float, peak: float | None) -> float | None:
        return self.flops_per_token * self.tokens / seconds / peak if peak else None


def measure(name: str, size: Size, device: torch.device, *, compiled: bool, num_steps: int, precision: Precision = "bf16") -> Found:
    """With the largest of the batch sizes that fits.

    Raises:
        torch.OutOfMemoryError: not even the smallest fits.
    """
    for batch_size in size.batch_sizes:
        try:
            return _measure(name, size.config, device, batch_size, compiled, num_steps, precision)
        except torch.OutOfMemoryError:
            if batch_size == size.batch_sizes[-1]:
                raise
            print(f"{name}: a batch of {batch_size} does not fit", flush=True)
        # The traceback held the model.
        _free()
    raise AssertionError


def _measure(
    name: str, config: TransformerConfig, device: torch.device, batch_size: int, compiled: bool, num_steps: int, precision: Precision
) -> Found:
    torch.manual_seed(0)
    with device:
        model = Transformer(config)
    model.train()
    optimizer = build_optimizer(model.named_parameters(), Optimizer(learning_rate=1e-4, weight_decay=0.1, beta2=0.95), device)
    tokens = torch.randint(0, config.vocab_size, (batch_size, config.max_length + 1), device=device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    on_gpu = device.type == "cuda"

    def loss_of() -> torch.Tensor:
        with attention(device), computing_in(precision, device):
            logits = model(inputs)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        return loss.detach()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    note, compile_seconds, first = "", 0.0, 0.0
    if compiled:
        start = time.perf_counter()
        # The blocks are alike: compiled once, used by all of them.
        note = try_compiled(model, lambda: float(step()), list(model.blocks.values()), dynamic=False) or ""
        compile_seconds = time.perf_counter() - start
    first = float(step())
    for _ in range(3):
        step()
    seconds, last = _timed(step, num_steps, device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    table = 0 if model.embedding is None or config.tied_head else model.embedding.weight.numel()
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    return Found(
        name=name,
        config=config,
        precision=precision,
        compiled=compiled and not note,
        batch_size=batch_size,
        num_parameters=num_parameters,
        num_counted=num_parameters - table,
        step_seconds=seconds,
        compile_seconds=compile_seconds,
        memory_bytes=memory,
        loss=(first, last),
        note=note,
    )


def attention(device: torch.device):
    """On a GPU flash attention or an error: a slower kernel must not slip in."""
    backends = [SDPBackend.FLASH_ATTENTION] if device.type == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(backends)


def _timed(step: Callable[[], torch.Tensor], num_steps: int, device: torch.device) -> tuple[list[float], float]:
    """Seconds of each step, and the last loss. A GPU is given all of them at once, and times them itself."""
    if device.type != "cuda":
        seconds, loss = [], torch.zeros(())
        for _ in range(num_steps):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        return seconds, float(loss)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    loss = torch.zeros(())
    for event in events[1:]:
        loss = step()
        event.record()
    torch.cuda.synchronize(device)
    return [events[i].elapsed_time(events[i + 1]) / 1000 for i in range(num_steps)], float(loss)


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report(results: list[Found], device: torch.device) -> str:
    rows, single = [], []
    goal = ""
    for found in results:
        peak = peak_flops(device, found.precision)
        seconds, low, high = _median_interval(found.step_seconds)
        mfu = found.mfu(seconds, peak)
        compiled = "compiled" if found.compiled else "as written"
        spread = f"{1000 * seconds:.1f} ({1000 * low:.1f} to {1000 * high:.1f})"
        share = f"{mfu:.1%}" if mfu is not None else "-"
        rows.append(
            [
                f"{found.name}, {compiled}",
                f"{found.num_parameters / 1e6:.1f}",
                f"{found.batch_size} x {found.config.max_length}",
                spread,
                f"{found.tokens / seconds:,.0f}",
                f"{found.flops_per_token * found.tokens / seconds / 1e12:.1f}",
                share,
                f"{found.memory_bytes / 2**30:.1f}",
                f"{found.compile_seconds:.0f}",
                f"{found.loss[0]:.3f} to {found.loss[1]:.3f}",
            ]
        )
        single.append(f"- {found.name}, {compiled}: {' '.join(f'{1000 * value:.1f}' for value in found.step_seconds)}")
        if found.note:
            single.append(f"- {found.name}: {found.note}")
        if found.name == "1B" and found.compiled and mfu is not None:
            verdict = "met" if mfu >= GOAL_MFU else "MISSED"
            goal = f"**1 B parameters: {share} of the peak of {(peak or 0) / 1e12:.0f} TFLOP/s; goal at least {GOAL_MFU:.0%}: {verdict}.**"
    head = ["model", "M parameters", "batch", "ms a step", "tokens/s", "TFLOP/s", "MFU", "GiB", "s to compile", "loss"]
    lines = [
        "# Training transformers on one GPU",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {platform.platform()}",
        f"- {device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}, numpy {np.__version__}",
        "- autocast over fp32 weights, fused AdamW, clipping, flash attention with a causal mask; random tokens",
        "- FLOPs: 6 per parameter (token table left out) and token, and 12 layers width length for attention, masked half included",
        "",
        *([goal, ""] if goal else []),
        "Medians over the steps with 95 % bootstrap intervals:",
        "",
        "| " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "Every step, ms:",
        "",
        *single,
        "",
    ]
    return "\n".join(lines)


def _median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % percentile interval over resampled values (`ml.evaluation.bootstrap` needs more than a GPU machine has)."""
    sample = np.asarray(values)
    rows = np.random.default_rng(0).integers(0, len(sample), (NUM_RESAMPLES, len(sample)))
    low, high = np.percentile(np.median(sample[rows], axis=1), [2.5, 97.5])
    return statistics.median(values), float(low), float(high)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu_transformer", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that it runs; numbers of no worth")
    parser.add_argument("--quick", action="store_true", help="10 steps, compiled only")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_gpu_transformer: no CUDA device here; nothing was measured. `--tiny --device cpu` shows that it runs", file=sys.stderr)
        return 2
    if options.device == "cpu" and not options.tiny:
        print("bench_gpu_transformer: these models are too large for a CPU; add --tiny", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    sizes = {"tiny": TINY} if options.tiny else {name: SIZES[name] for name in options.sizes}
    num_steps = min(options.steps, 10) if options.quick or options.tiny else options.steps
    variants = [True, False] if not options.quick else [True]
    results = []
    for name, size in sizes.items():
        for compiled in [False] if options.no_compile else variants:
            results.append(measure(name, size, device, compiled=compiled, num_steps=num_steps))
            print(
                f"{name} {'compiled' if compiled else 'as written'}: {statistics.median(results[-1].step_seconds):.3f} s a step", flush=True
            )
            _free()
    markdown = report(results, device)
    print(markdown)
    if options.write:
        RESULTS_FOLDER.mkdir(exist_ok=True)
        hardware = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
        path = RESULTS_FOLDER / f"gpu_transformer_{hardware}_{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text(markdown, encoding="utf-8")
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
