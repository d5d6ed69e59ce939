"""What the before/after table shows, whatever draws it: which split, which metrics, which words."""

from dataclasses import dataclass
from typing import Literal

from ml.artifacts import EXPORT_METHOD, ClauseResult, Interval
from ml.outcome import ModelRow, PipelineOutcome

VerdictKind = Literal["chosen", "passes", "fails", "failed", "reference", "unjudged"]

# Metrics of one class only (`*_positive`) are in outcome.json and in the report's details, not in the table.
_MAX_TABLE_METRICS = 4
_METRIC_TITLES = {"f1": "F1", "mrr": "MRR"}
_CLAUSE_TITLES = {
    "max_drop_points": "loss in points",
    "max_latency_ratio": "latency ratio",
    "max_memory_ratio": "memory ratio",
    "max_file_ratio": "file size ratio",
    "min_gain_over_baseline_points": "gain over the baseline in points",
}

MEGABYTE = 1e6


@dataclass(frozen=True)
class Verdict:
    """What became of one row; `words` are a few words for a table cell."""

    kind: VerdictKind
    words: str


@dataclass(frozen=True)
class Comparison:
    """The before/after table, not yet drawn.

    Args:
        split: the split that the metrics are of; one for all rows, so that they can be compared.
        num_rows: scored rows of that split, None when no row was scored.
        metrics: names of the metric columns, the primary one first.
        percent: the metrics that lie in [0, 1] on every row, and are shown times 100.
        live: the chosen row is served.
    """

    split: Literal["validation", "test"]
    num_rows: int | None
    metrics: tuple[str, ...]
    percent: frozenset[str]
    rows: tuple[ModelRow, ...]
    live: bool

    @property
    def has_results(self) -> bool:
        """Some model was scored or timed, or failed to be made: there is something to show."""
        return any(row.validation.metrics or row.test.metrics or row.timing or row.failure for row in self.rows)

    def interval(self, row: ModelRow, metric: str) -> Interval | None:
        quality = row.test if self.split == "test" else row.validation
        return quality.metrics.get(metric)

    def drop_points(self, row: ModelRow) -> Interval | None:
        return (row.test if self.split == "test" else row.validation).drop_points

    def in_units(self, metric: str, interval: Interval) -> Interval:
        """The interval as it is shown: in percent where the metric is a share."""
        factor = 100.0 if metric in self.percent else 1.0
        return Interval(value=interval.value * factor, low=interval.low * factor, high=interval.high * factor)

    def verdict(self, row: ModelRow) -> Verdict:
        if row.status == "failed":
            return Verdict("failed", "method failed")
        if row.chosen:
            return Verdict("chosen", "deployed" if self.live else "chosen")
        if row.role == "baseline":
            return Verdict("reference", "baseline")
        if row.role == "uncompressed":
            return Verdict("reference", "not compressed" if row.method == EXPORT_METHOD else "reference")
        if not row.clauses:
            return Verdict("unjudged", "not judged")
        broken = [clause for clause in row.clauses if not clause.passed]
        if not broken:
            return Verdict("passes", "passes")
        more = f" +{len(broken) - 1}" if len(broken) > 1 else ""
        return Verdict("fails", f"fails {_short(broken[0])}{more}")


def compare(outcome: PipelineOutcome) -> Comparison:
    """Choose what the table shows.

    The test split is shown when every model that was scored at all was scored on it; otherwise validation,
    because numbers of two splits in one column would not compare.
    """
    scored = [row for row in outcome.models if row.validation.metrics or row.test.metrics]
    split: Literal["validation", "test"] = "test" if scored and all(row.test.metrics for row in scored) else "validation"
    qualities = [row.test if split == "test" else row.validation for row in outcome.models]
    names = list(dict.fromkeys(name for quality in qualities for name in quality.metrics))
    shown = [name for name in names if not name.endswith("_positive")] or names
    found = {name: [quality.metrics[name] for quality in qualities if name in quality.metrics] for name in shown}
    return Comparison(
        split=split,
        num_rows=next((quality.num_rows for quality in qualities if quality.num_rows), None),
        metrics=tuple(shown[:_MAX_TABLE_METRICS]),
        percent=frozenset(name for name, values in found.items() if all(0 <= item.value <= 1 for item in values)),
        rows=outcome.models,
        live=outcome.version is not None and outcome.alias is not None,
    )


def metric_title(name: str) -> str:
    """`recall_positive` -> "Recall positive"; abbreviations keep their capitals."""
    if name in _METRIC_TITLES:
        return _METRIC_TITLES[name]
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]


def clause_title(name: str) -> str:
    """A clause of the compression contract in words."""
    return _CLAUSE_TITLES.get(name, name.replace("_", " "))


def clause_words(clause: ClauseResult) -> str:
    """ "latency ratio 0.31, limit 0.60"."""
    return f"{clause_title(clause.clause)} {clause.found:.2f}, limit {clause.limit:.2f}"


def half_width(interval: Interval) -> float:
    """The ± of an interval: half its width, which is also right where it is lopsided."""
    return (interval.high - interval.low) / 2


def _short(clause: ClauseResult) -> str:
    return clause_title(clause.clause).removesuffix(" in points").removesuffix(" ratio").removeprefix("file ")
