"""What is wrong with a training, in words: from its history and the ranks' meters alone.

Figures of ranks are medians over their latest lines (see `ml.training.meters`), so that one odd interval says nothing; findings
about losses are in `ml.training.loss_diagnosis`. Thresholds stand at the top, each with its reason.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from ml.training.findings import (
    COMMUNICATION_BOUND,
    INPUT_BOUND,
    MEMORY,
    NAMES,
    STRAGGLER,
    UNDER_USED,
    Finding,
    percent,
)
from ml.training.loss_diagnosis import diagnose_losses

Line = dict[str, Any]

RECENT_SECONDS = 120.0
MIN_STEPS = 10
# Curing it makes the training at least a quarter faster: 1 / (1 - 0.2).
INPUT_BOUND_SHARE = 0.20
# Ranks on one machine differ by some 10 % by chance; a rank with little to do also looks slow per token.
SLOWER_PER_TOKEN = 1.3
SLOWER_PER_STEP = 1.2
# A third of each step is more than overlap and larger buckets usually leave exposed on a fit network.
COMMUNICATION_SHARE = 0.30
# Below a half, at least half of what is paid for idles. Waiting that has a finding of its own is not blamed on the batch.
BUSY_PERCENT = 50.0
IDLE_CORES_PERCENT = 40.0
EXPLAINED_SHARE = 0.25
UNEVEN_TOKENS = 1.25
# Validation and checkpoints need some memory on top; the kernel kills without a warning.
MEMORY_SHARE = 0.90
# The allocator may hold all of a GPU without harm, so only what tensors take counts.
GPU_MEMORY_SHARE = 0.92
GROWING_MEMORY_SHARE = 0.70
GROWING_MEMORY_SECONDS = 1800.0
GROWING_MEMORY_LINES = 12


def diagnose(history: Sequence[Line], metrics: dict[int, list[Line]]) -> list[Finding]:
    """All that is wrong now, the most pressing first; empty for a healthy training.

    Args:
        history: lines of the training history (see `ml.training.history`), oldest first; steps may be left out.
        metrics: rank -> its lines (see `ml.training.meters.read_metrics`), oldest first.
    """
    ranks = recent_lines(metrics)
    findings = diagnose_losses(history, metrics)
    findings += _memory(metrics, ranks)
    if sum(line["num_steps"] for line in next(iter(ranks.values()), [])) >= MIN_STEPS:
        waiting = [*_input_bound(ranks), *_straggler(ranks), *_communication_bound(ranks)]
        findings += waiting
        if not waiting:
            findings += _under_used(ranks)
    return sorted(findings, key=lambda finding: NAMES.index(finding.name))


def recent_lines(metrics: dict[int, list[Line]]) -> dict[int, list[Line]]:
    """The lines of the last two minutes (of slow steps: the last three or so) of the ranks there are now, ranks without any left out.

    A training may go on with fewer ranks than it began with: the newest line says how many there are.
    """
    latest = max((lines[-1] for lines in metrics.values() if lines), key=lambda line: line["time"], default=None)
    if latest is None:
        return {}
    seconds = max(RECENT_SECONDS, 3.5 * latest["step_seconds"] * latest["num_steps"])
    recent = {
        rank: [line for line in lines if latest["time"] - line["time"] <= seconds and line["num_ranks"] == latest["num_ranks"]]
        for rank, lines in metrics.items()
        if rank < latest["num_ranks"]
    }
    return {rank: lines for rank, lines in recent.items() if lines}


def _input_bound(ranks: dict[int, list[Line]]) -> list[Finding]:
    # The rank that waits longest holds up all others.
    shares = {rank: _middle(lines, "data_wait_share") or 0.0 for rank, lines in ranks.items()}
    rank = max(shares, key=lambda rank: shares[rank])
    if shares[rank] < INPUT_BOUND_SHARE:
        return []
    seconds = _middle(ranks[rank], "data_seconds") or 0.0
    who = "all ranks wait" if min(shares.values()) >= INPUT_BOUND_SHARE else f"rank {rank} waits"
    return [
        Finding(
            INPUT_BOUND,
            "warning",
            f"{who} for data {percent(shares[rank])} of each step ({1000 * seconds:.0f} ms)",
            "raise train.prefetch_batches, make batches cheaper to build (tokenise once, before training), or read from a nearer disk",
        )
    ]


def _straggler(ranks: dict[int, list[Line]]) -> list[Finding]:
    if len(ranks) < 2:
        return []
    forward = {rank: _middle(lines, "forward_seconds") or 0.0 for rank, lines in ranks.items()}
    per_token = {rank: forward[rank] / max(_middle(lines, "tokens_per_step") or 0.0, 1.0) for rank, lines in ranks.items()}
    slowest = max(per_token, key=lambda rank: per_token[rank])
    others = [rank for rank in ranks if rank != slowest]
    slower_per_token = per_token[slowest] / max(statistics.median(per_token[rank] for rank in others), 1e-12)
    slower_per_step = forward[slowest] / max(statistics.median(forward[rank] for rank in others), 1e-12)
    # A slow rank that was given fewer rows holds up nobody.
    if slower_per_token < SLOWER_PER_TOKEN or slower_per_step < SLOWER_PER_STEP:
        return []
    waits = [share for rank in others if (share := _middle(ranks[rank], "communication_share")) is not None]
    waiting = f"; the others wait {percent(statistics.median(waits))} of each step" if waits else ""
    cpu, num_threads = _middle(ranks[slowest], "cpu_percent"), _middle(ranks[slowest], "num_threads") or 1
    starved = ranks[slowest][-1].get("device") == "cpu" and cpu is not None and cpu < BUSY_PERCENT * num_threads
    cause = f" It gets {cpu:.0f} % of a core for {num_threads:.0f} threads." if starved else ""
    return [
        Finding(
            STRAGGLER,
            "warning",
            f"rank {slowest} needs {slower_per_token:.1f} times as long per token as the others{waiting}.{cause}".rstrip("."),
            f"see what else runs on the machine of rank {slowest}, and whether its processor or GPU is throttled; "
            "train.load_aware: true gives it fewer rows until then",
        )
    ]


def _communication_bound(ranks: dict[int, list[Line]]) -> list[Finding]:
    shares = [_middle(lines, "communication_share") for lines in ranks.values()]
    known = [share for share in shares if share is not None]
    # Of a straggler only the others wait: where even the rank that waits least waits long, it is the network.
    if len(ranks) < 2 or len(known) < len(shares) or min(known) < COMMUNICATION_SHARE:
        return []
    seconds = statistics.median(_middle(lines, "step_seconds") or 0.0 for lines in ranks.values())
    return [
        Finding(
            COMMUNICATION_BOUND,
            "warning",
            f"every rank spends at least {percent(min(known))} of a step of {1000 * seconds:.0f} ms on communication that the backward "
            "pass does not hide, and none of them is slower than the others",
            "use the fast interface (`interface` in the training file), fewer exchanges (train.gradient_sync.accumulation_steps, "
            "a larger batch), smaller ones (train.gradient_sync.hook), or fewer ranks",
        )
    ]


def _under_used(ranks: dict[int, list[Line]]) -> list[Finding]:
    tokens = {rank: _middle(lines, "tokens_per_step") or 0.0 for rank, lines in ranks.items()}
    uneven = max(tokens.values()) > UNEVEN_TOKENS * max(min(tokens.values()), 1.0)
    if uneven:
        advice = (
            "shares are uneven: let batches be balanced by length (train.max_tokens_per_batch) and train.load_aware: true share them out"
        )
    else:
        advice = "raise train.batch_size_per_rank or train.max_tokens_per_batch, or set train.compile to on: steps are too small for it"
    for rank, lines in ranks.items():
        waits = (_middle(lines, "data_wait_share") or 0.0) + (_middle(lines, "communication_share") or 0.0)
        if waits > EXPLAINED_SHARE and not uneven:
            continue
        gpu, cpu = _middle(lines, "gpu_percent"), _middle(lines, "cpu_percent")
        if lines[-1].get("device") == "cuda":
            if gpu is not None and gpu < BUSY_PERCENT:
                return [Finding(UNDER_USED, "warning", f"the GPU of rank {rank} works only {gpu:.0f} % of the time", advice)]
            continue
        num_threads = _middle(lines, "num_threads")
        if cpu is not None and num_threads and cpu < BUSY_PERCENT * num_threads:
            busy = f"rank {rank} uses {cpu:.0f} % of a core with {num_threads:.0f} threads"
            return [Finding(UNDER_USED, "warning", busy, advice)]
        node = _middle(lines, "node_cpu_percent")
        if node is not None and node < IDLE_CORES_PERCENT:
            idle = f"the {lines[-1]['num_cores']} cores of the machine of rank {rank} are used only to {node:.0f} %"
            return [Finding(UNDER_USED, "warning", idle, "raise train.num_ranks, or OMP_NUM_THREADS where it is set by hand")]
    return []


def _memory(metrics: dict[int, list[Line]], ranks: dict[int, list[Line]]) -> list[Finding]:
    advice = "lower train.batch_size_per_rank, or split the model (train.parallelism.strategy fsdp); close what else runs there"
    for rank, lines in ranks.items():
        share = lines[-1].get("node_memory_share")
        if share is not None and share >= MEMORY_SHARE:
            words = f"{percent(share)} of the memory that rank {rank} may use is taken: the system may kill it at any moment"
            return [Finding(MEMORY, "error", words, advice)]
        peak, total = lines[-1].get("gpu_memory_peak_bytes"), lines[-1].get("gpu_memory_total_bytes")
        if peak and total and peak >= GPU_MEMORY_SHARE * total:
            words = f"tensors of rank {rank} took up to {percent(peak / total)} of its GPU's {total / 1e9:.0f} GB"
            return [Finding(MEMORY, "warning", words, advice)]
        seconds = _seconds_until_full(metrics[rank])
        if seconds is not None and share is not None and share >= GROWING_MEMORY_SHARE and seconds < GROWING_MEMORY_SECONDS:
            words = f"memory on the machine of rank {rank} is at {percent(share)} and grows: full in about {seconds / 60:.0f} min"
            return [
                Finding(MEMORY, "warning", words, "look for what keeps growing (caches, lists of tensors with their graphs); " + advice)
            ]
    return []


def _seconds_until_full(lines: list[Line]) -> float | None:
    """From the growth of the latest lines between the medians of their first and their last third; None when there is no growth."""
    points = [(line["time"], share) for line in lines[-60:] if (share := line.get("node_memory_share")) is not None]
    if len(points) < GROWING_MEMORY_LINES:
        return None
    third = len(points) // 3
    (start, before), (end, after) = (
        (statistics.median(time for time, _ in part), statistics.median(share for _, share in part))
        for part in (points[:third], points[-third:])
    )
    # Less than a percent between them is what other programs do.
    return (1.0 - after) * (end - start) / (after - before) if after - before > 0.01 and end > start else None


def _middle(lines: Sequence[Line], name: str) -> float | None:
    values = [float(value) for line in lines if (value := line.get(name)) is not None]
    return statistics.median(values) if values else None
