"""How fast and how large each variant is, measured where it would serve: in a fresh process of its own.

Speed: all processes are alive at once and are asked in turn, round by round, in rotated order, so that whatever disturbs
the machine disturbs all of them alike; a ratio is the median of the rounds' ratios. Memory: one process at a time,
because shared pages are divided among the processes that map them.
"""

import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ml.artifacts import Interval, Timing
from ml.bundles import read_bundle
from ml.compression.weights import weights_bytes
from ml.config import EvaluateConfig
from ml.evaluation.bootstrap import median_interval
from ml.evaluation.machine_lock import machine_lock
from ml.evaluation.probe_process import ProbeProcess
from ml.evaluation.timing_requests import TimingRequests, choose_requests
from ml.solution import load_solution

logger = logging.getLogger(__name__)

_WARM_UP_CALLS = 10
_WARM_UP_BATCHES = 2


def measure_timings(
    bundles: dict[str, Path],
    requests: list[dict],
    config: EvaluateConfig,
    *,
    reference: str = "pytorch_fp32",
    onnx_reference: str = "onnx_fp32",
) -> dict[str, Timing]:
    """Time all variants against the reference, with the machine to themselves.

    Args:
        bundles: variant name -> folder; holds the reference.
        requests: real requests, e.g. the validation rows.
        onnx_reference: second reference for latency, when it is among the bundles.

    Raises:
        ServiceError: a variant's process died, hung or could not answer; the message names it.
    """
    bundle = read_bundle(bundles[reference])
    codec = load_solution(bundle.solution).load_codec(bundle, bundles[reference])
    chosen = choose_requests(codec, requests, config)
    cores = _cores(config.num_threads)
    with machine_lock():
        started = time.monotonic()
        sizes = {name: _measure_memory(name, folder, chosen, config, cores) for name, folder in bundles.items()}
        rounds = _measure_rounds(bundles, chosen, config, cores)
        logger.info(
            "measured %d variants in %.0f s: %d rounds of %d calls at %s tokens, %d thread(s)",
            *(len(bundles), time.monotonic() - started, config.rounds, config.calls_per_round, chosen.length_tokens, config.num_threads),
        )
    return {
        name: Timing(
            p50_ms=1000 * float(np.percentile(rounds[name].latencies, 50)),
            p95_ms=1000 * float(np.percentile(rounds[name].latencies, 95)),
            throughput_per_second=len(chosen.batch) / float(np.median(rounds[name].batch_seconds)),
            memory_bytes=sizes[name].memory_bytes,
            peak_rss_bytes=sizes[name].peak_rss_bytes,
            file_bytes=sizes[name].file_bytes,
            load_seconds=sizes[name].load_seconds,
            latency_ratio=_ratio(rounds[name].round_latencies, rounds[reference].round_latencies, config),
            # More rows in less time: the inverse of the ratio of seconds.
            throughput_ratio=_ratio(rounds[reference].batch_seconds, rounds[name].batch_seconds, config),
            memory_ratio=sizes[name].memory_bytes / sizes[reference].memory_bytes,
            file_ratio=sizes[name].file_bytes / sizes[reference].file_bytes,
            latency_ratio_to_onnx=_ratio(rounds[name].round_latencies, rounds[onnx_reference].round_latencies, config)
            if onnx_reference in rounds
            else None,
        )
        for name in bundles
    }


@dataclass(frozen=True)
class _Sizes:
    memory_bytes: int
    peak_rss_bytes: int
    file_bytes: int
    load_seconds: float


@dataclass
class _Rounds:
    """Seconds: of every call at batch 1, their median in each round, and of the batch in each round."""

    latencies: list[float] = field(default_factory=list)
    round_latencies: list[float] = field(default_factory=list)
    batch_seconds: list[float] = field(default_factory=list)


def _measure_memory(name: str, folder: Path, chosen: TimingRequests, config: EvaluateConfig, cores: list[int] | None) -> _Sizes:
    with ProbeProcess(name, folder, num_threads=config.num_threads, cores=cores) as probe:
        probe.time([[request] for request in chosen.mixed], len(chosen.mixed))
        memory_bytes, peak_rss_bytes = probe.memory()
        logger.info("%s: %.0f MB after %d requests, loaded in %.1f s", name, memory_bytes / 1e6, len(chosen.mixed), probe.load_seconds)
        return _Sizes(memory_bytes, peak_rss_bytes, weights_bytes(read_bundle(folder, verify=False), folder), probe.load_seconds)


def _measure_rounds(
    bundles: dict[str, Path], chosen: TimingRequests, config: EvaluateConfig, cores: list[int] | None
) -> dict[str, _Rounds]:
    one_by_one = [[request] for request in chosen.batch]
    found = {name: _Rounds() for name in bundles}
    with ExitStack() as stack:
        probes = {
            name: stack.enter_context(ProbeProcess(name, folder, num_threads=config.num_threads, cores=cores))
            for name, folder in bundles.items()
        }
        for probe in probes.values():
            probe.time(one_by_one, _WARM_UP_CALLS)
            probe.time([chosen.batch], _WARM_UP_BATCHES)
        names = list(bundles)
        for number in range(config.rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                calls = probes[name].time(one_by_one, config.calls_per_round)
                found[name].latencies += calls
                found[name].round_latencies.append(float(np.median(calls)))
                found[name].batch_seconds += probes[name].time([chosen.batch], 1)
    return found


def _cores(num_threads: int) -> list[int] | None:
    """The last cores this process may use, one per thread; None when there are too few to choose from."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-num_threads:] if len(allowed) >= num_threads else None


def _ratio(numerators: list[float], denominators: list[float], config: EvaluateConfig) -> Interval:
    ratios = [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]
    return median_interval(ratios, config.bootstrap_resamples)
