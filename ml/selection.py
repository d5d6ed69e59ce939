"""Which model is deployed: the compression contract decides on validation, the baseline has the last word on test."""

import math
from collections.abc import Sequence

from ml.artifacts import EXPORT_METHOD, ClauseResult, Decision, Evaluation, Interval, Timing, Variant
from ml.config import CompressionContract
from ml.outcome import BASELINE_NAME

_CLAUSE_WORDS = {
    "max_drop_points": "points lost",
    "max_latency_ratio": "latency ratio",
    "max_memory_ratio": "memory ratio",
    "max_file_ratio": "file size ratio",
}


def select(validation: tuple[Evaluation, ...], variants: tuple[Variant, ...], contract: CompressionContract) -> Decision:
    """Hold every compressed variant against the contract; the fastest that keeps all clauses is selected.

    Variants whose latency intervals overlap with the fastest one's are equally fast: the better primary metric decides
    among them. When none keeps the contract, the uncompressed model is kept, served by ONNX Runtime.

    Args:
        validation: one evaluation with timing per variant, all on the same validation rows.
        variants: the exported uncompressed model (method "export") and the compressed ones, failed ones included.
    """
    exported = next(variant for variant in variants if variant.method == EXPORT_METHOD)
    evaluations = {evaluation.variant: evaluation for evaluation in validation}
    clauses: dict[str, tuple[ClauseResult, ...]] = {}
    reasons = []
    for variant in variants:
        if variant is exported:
            continue
        evaluation = evaluations.get(variant.name)
        if variant.bundle is None:
            reasons.append(f"{variant.name} could not be made: {variant.failure}")
        elif evaluation is None or evaluation.timing is None or evaluation.quality.primary_drop_points is None:
            reasons.append(f"{variant.name} was not fully measured, so it cannot be chosen")
        else:
            clauses[variant.name] = _check(evaluation.timing, evaluation.quality.primary_drop_points, contract)

    keepers = [name for name, results in clauses.items() if all(result.passed for result in results)]
    doubts = [doubt for name in clauses if (doubt := _doubt_about_drop(evaluations[name], contract.max_drop_points, name)) is not None]
    if keepers:
        chosen = _fastest([evaluations[name] for name in keepers])
        reasons.insert(0, _why_chosen(chosen, len(keepers)))
        reasons += [f"{name} breaks the contract: {_failures(clauses[name])}" for name in clauses if name not in keepers]
        return Decision(status="selected", variant=chosen.variant, reasons=(*reasons, *doubts), clauses=clauses)

    reasons.insert(0, f"no compressed variant keeps the contract, so the uncompressed model is kept ({exported.name}, ONNX Runtime)")
    reasons += [f"{name} breaks the contract: {_failures(clauses[name])}" for name in clauses]
    if clauses:
        nearest = min(clauses, key=lambda name: _distance(clauses[name]))
        reasons.append(f"{nearest} came nearest")
    return Decision(status="uncompressed", variant=exported.name, reasons=(*reasons, *doubts), clauses=clauses)


def final_gate(decision: Decision, test: tuple[Evaluation, ...], contract: CompressionContract) -> Decision:
    """Reject a model that does not beat the simple baseline on the test split, which nothing was chosen by.

    The point estimate decides; the interval says how sure that is, and how many rows would settle it.

    Args:
        test: evaluations of the chosen variant and of the baseline, both with their paired difference to the
            uncompressed model on the same rows.

    Returns:
        The decision with what was found added to its reasons, or one of status "rejected".
    """
    chosen = next(evaluation for evaluation in test if evaluation.variant == decision.variant)
    baseline = next(evaluation for evaluation in test if evaluation.variant == BASELINE_NAME)
    metric, value = next(iter(chosen.quality.metrics.items()))
    gain = _gain_points(chosen, baseline)
    limit = contract.min_gain_over_baseline_points
    found = (
        f"on {chosen.quality.num_rows} test rows {decision.variant} has {metric} {_range(value, '.4f')}, the baseline "
        f"{_range(baseline.quality.metrics[metric], '.4f')}: a gain of {_range(gain, '+.2f')} points, at least {limit:+.2f} wanted"
    )
    doubt = _rows_to_settle(gain, limit, chosen.quality.num_rows)
    reasons = (found,) if doubt is None else (found, f"the gain over the baseline is not settled: {doubt}")
    if gain.value < limit:
        return decision.model_copy(update={"status": "rejected", "variant": None, "reasons": (*reasons, *decision.reasons)})
    return decision.model_copy(update={"reasons": (*decision.reasons, *reasons)})


def _check(timing: Timing, drop: Interval, contract: CompressionContract) -> tuple[ClauseResult, ...]:
    found = {
        "max_drop_points": drop.value,
        "max_latency_ratio": timing.latency_ratio.value,
        "max_memory_ratio": timing.memory_ratio,
        "max_file_ratio": timing.file_ratio,
    }
    limits = {clause: getattr(contract, clause) for clause in found}
    return tuple(
        ClauseResult(clause=clause, limit=limits[clause], found=value, passed=value <= limits[clause]) for clause, value in found.items()
    )


def _fastest(candidates: Sequence[Evaluation]) -> Evaluation:
    latencies = {evaluation.variant: _latency(evaluation) for evaluation in candidates}
    first = min(candidates, key=lambda evaluation: latencies[evaluation.variant].value)
    as_fast = [evaluation for evaluation in candidates if latencies[evaluation.variant].low <= latencies[first.variant].high]
    return min(as_fast, key=lambda evaluation: (_drop(evaluation).value, latencies[evaluation.variant].value, evaluation.variant))


def _why_chosen(chosen: Evaluation, num_keepers: int) -> str:
    metric, value = next(iter(chosen.quality.metrics.items()))
    place = "the only variant that keeps the contract"
    if num_keepers > 1:
        place = f"the fastest of {num_keepers} variants that keep the contract, and the most accurate of those as fast"
    return (
        f"{chosen.variant} is {place}: {metric} {value.value:.4f}, {_drop(chosen).value:+.2f} points lost, "
        f"p50 latency {_range(_latency(chosen), '.2f')} of uncompressed PyTorch"
    )


def _failures(results: Sequence[ClauseResult]) -> str:
    return ", ".join(
        f"{_CLAUSE_WORDS[result.clause]} {result.found:.2f}, {result.found - result.limit:.2g} above the limit of {result.limit:.2f}"
        for result in results
        if not result.passed
    )


def _distance(results: Sequence[ClauseResult]) -> tuple[int, float]:
    """How far from keeping the contract: clauses broken, then the largest excess relative to its limit."""
    broken = [result for result in results if not result.passed]
    return len(broken), max((result.found - result.limit) / max(result.limit, 1e-9) for result in broken)


def _doubt_about_drop(evaluation: Evaluation, limit: float, name: str) -> str | None:
    doubt = _rows_to_settle(_drop(evaluation), limit, evaluation.quality.num_rows)
    return None if doubt is None else f"the accuracy clause of {name} is not settled: {doubt}"


def _rows_to_settle(estimate: Interval, limit: float, num_rows: int) -> str | None:
    """None when the interval lies on one side of the limit; else the rows needed, in words.

    The half-width of an interval shrinks with the square root of the number of rows, so it takes
    n * (half-width / distance)^2 rows for the interval to clear the limit, if the estimate stays where it is.
    """
    if not estimate.low < limit < estimate.high:
        return None
    distance = abs(estimate.value - limit)
    half_width = estimate.high - estimate.value if estimate.value < limit else estimate.value - estimate.low
    spans = f"the 95 % interval {estimate.low:+.2f} to {estimate.high:+.2f} points spans the limit of {limit:+.2f}"
    if distance * 100 < half_width:
        return f"{spans}, and the estimate lies on it: no practical number of rows would tell"
    needed = math.ceil(num_rows * (half_width / distance) ** 2)
    return f"{spans}; about {needed - num_rows:,} more rows would tell ({needed:,} in all)"


def _gain_points(chosen: Evaluation, baseline: Evaluation) -> Interval:
    """Points by which the chosen model beats the baseline, from the paired differences of both to the uncompressed model.

    The interval joins the two by the square-and-add rule (Zou & Donner 2008, Construction of confidence limits about
    effect measures), as if they were independent.
    """
    lead, loss = _drop(baseline), _drop(chosen)
    value = lead.value - loss.value
    return Interval(
        value=value,
        low=value - math.hypot(lead.value - lead.low, loss.high - loss.value),
        high=value + math.hypot(lead.high - lead.value, loss.value - loss.low),
    )


def _drop(evaluation: Evaluation) -> Interval:
    drop = evaluation.quality.primary_drop_points
    if drop is None:
        raise ValueError(f"{evaluation.variant} was not compared with the uncompressed model; evaluate it with a reference")
    return drop


def _latency(evaluation: Evaluation) -> Interval:
    if evaluation.timing is None:
        raise ValueError(f"{evaluation.variant} was not timed")
    return evaluation.timing.latency_ratio


def _range(interval: Interval, form: str) -> str:
    return f"{interval.value:{form}} ({interval.low:{form}} to {interval.high:{form}})"
