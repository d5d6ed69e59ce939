"""One check from end to end: open a window, compare, measure, and conclude by the repeat rule.

Each step takes and gives small records, so that the steps can be tasks; `run_check` calls them in a row.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import Field

from ml.artifacts import Record
from ml.data.words import words_of
from ml.errors import WriteConflictError
from ml.events import Event
from ml.monitoring.config import DriftRequest
from ml.monitoring.drift import AnswerSample, TextSample, compare_answers, compare_texts, distinct
from ml.monitoring.findings import Finding, judge_findings, p_words
from ml.monitoring.histograms import Histogram, share_histogram, value_histogram
from ml.monitoring.live_metric import LiveMetric, measure_live_metric
from ml.monitoring.logged import read_predictions
from ml.monitoring.new_data import read_new_data
from ml.monitoring.records import LoggedPrediction
from ml.monitoring.reference import load_reference, request_text, run_started
from ml.monitoring.sample_tests import compare_classes
from ml.monitoring.state import CheckState, advance, change_state, read_state
from ml.registry import Registry
from ml.storage.artifacts import ArtifactStore

REQUESTS, NEW_DATA, LABELS = "requests", "new data", "labels"

# The predictor writes its log every few seconds: rows that are still on their way are for the next check.
LATE_SECONDS = 30
MAX_LABEL_DAYS = 30


class CheckWindow(Record):
    """What one check looks at."""

    name: str
    check: str = Field(description="its id: when it began")
    champion: str
    run_id: str
    since: dict[str, datetime] = Field(description="requests, new data, labels -> start")
    until: datetime
    previous_check: str | None


class Comparison(Record):
    """What the tests found. Kinds of rows with too few of them are not tested, and a note says so."""

    num_rows: dict[str, int] = Field(default_factory=dict, description="kind of rows -> distinct texts")
    findings: tuple[Finding, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool | None:
        """None when nothing was tested."""
        return any(finding.changed for finding in self.findings) if self.findings else None

    @property
    def changes(self) -> tuple[str, ...]:
        """What changed, in words."""
        return tuple(
            f"{finding.test} of {finding.sample}: {finding.details} ({finding.effect_name} {finding.effect:.2g}, "
            f"p {p_words(finding.corrected_p_value)})"
            for finding in self.findings
            if finding.changed
        )


class CheckOutcome(Record):
    """What came of a check. `no champion`, and the fields are empty; else they say what was found."""

    status: Literal["no champion", "not enough rows", "no change", "changed"]
    name: str
    check: str
    window: CheckWindow | None = None
    comparison: Comparison = Comparison()
    live_metric: LiveMetric | None = None
    state: CheckState = CheckState()
    num_repeats: int = 1
    reasons: tuple[str, ...] = ()

    @property
    def events(self) -> tuple[Event, ...]:
        """Events that the bridge must be told of."""
        return self.state.due_events


def run_check(store: ArtifactStore, request: DriftRequest, *, now: datetime | None = None) -> CheckOutcome:
    """The whole check but for sending its events. Errors as `load_reference` and `conclude`."""
    window = open_window(store, request, now=now)
    if window is None:
        return no_champion(request, now=now)
    comparison, live_metric = compare_window(store, request, window)
    return conclude(store, request, window, comparison, live_metric)


def open_window(store: ArtifactStore, request: DriftRequest, *, now: datetime | None = None) -> CheckWindow | None:
    """Which champion is checked, on which rows: those since the last check, at most `window_hours` back. None without a champion."""
    now = now or datetime.now(UTC)
    registry = Registry(store)
    champion = registry.read_aliases(request.name).champion
    if champion is None:
        return None
    run_id = registry.get_version(request.name, champion).run_id
    state = read_state(store, request.name)
    earliest = {
        REQUESTS: now - timedelta(hours=request.window_hours),
        NEW_DATA: run_started(run_id),
        LABELS: now - timedelta(days=MAX_LABEL_DAYS),
    }
    return CheckWindow(
        name=request.name,
        check=_check_id(now),
        champion=champion,
        run_id=run_id,
        since={kind: max(start, state.seen_until.get(kind, start)) for kind, start in earliest.items()},
        until=now - timedelta(seconds=LATE_SECONDS),
        previous_check=state.last_check,
    )


def compare_window(store: ArtifactStore, request: DriftRequest, window: CheckWindow) -> tuple[Comparison, LiveMetric | None]:
    """Read both sides and test. The p-values of all tests are corrected together.

    Raises:
        DataError: it is not known what the champion was trained on.
    """
    version = Registry(store).get_version(window.name, window.champion)
    reference = load_reference(store, version, max_rows=request.max_rows)
    requests = read_predictions(store, window.name, window.since[REQUESTS], window.until, max_rows=2 * request.max_rows)
    new = read_new_data(store, reference, window.since[NEW_DATA], window.until, max_rows=request.max_rows)

    rows = _distinct_rows(requests)[: request.max_rows]
    texts = {REQUESTS: TextSample(tuple(text for text, _ in rows)), NEW_DATA: TextSample(new.texts)}
    findings: list[Finding] = []
    histograms: list[Histogram] = []
    notes = list(new.notes)
    for kind, sample in texts.items():
        if len(sample.texts) < request.min_rows:
            if sample.texts or kind == REQUESTS:
                notes.append(f"{kind}: {len(sample.texts)} distinct texts, {request.min_rows} are needed; not tested")
        elif len(reference.texts.texts) == 0:
            notes.append(f"{kind}: the model's requests hold no text; not tested")
        else:
            findings += compare_texts(kind, reference.texts, sample, reference.known_words)
            lengths = [[len(words_of(text)) for text in side.texts] for side in (reference.texts, sample)]
            histograms.append(value_histogram(f"Words of a text: {kind}", *lengths))
    answers = _answers([row for _, row in rows if row.version == window.champion])
    if reference.answers is not None and len(answers.labels) >= request.min_rows:
        findings += compare_answers(REQUESTS, reference.answers, answers)
        histograms.append(share_histogram("Predicted classes: requests", reference.answers.labels, answers.labels))
    if len(new.labels) >= request.min_rows:
        findings.append(compare_classes("classes", NEW_DATA, reference.labels, new.labels))
        histograms.append(share_histogram("Classes: new data", reference.labels, new.labels))

    live_metric = measure_live_metric(
        store,
        reference,
        window.since[LABELS],
        window.until,
        window.until - timedelta(days=MAX_LABEL_DAYS),
        min_labels=request.min_labels,
        tolerance_points=request.drop_tolerance_points,
    )
    comparison = Comparison(
        num_rows={kind: len(sample.texts) for kind, sample in texts.items()},
        findings=judge_findings(findings, request.significance),
        histograms=tuple(histograms),
        notes=tuple(notes),
    )
    return comparison, live_metric


def conclude(
    store: ArtifactStore, request: DriftRequest, window: CheckWindow, comparison: Comparison, live_metric: LiveMetric | None
) -> CheckOutcome:
    """Write down what was found, and which events are due by the repeat rule. To do so twice for one check counts once.

    Raises:
        WriteConflictError: another check of this model ended since the window was opened, so some rows would count twice.
    """
    now = window.until + timedelta(seconds=LATE_SECONDS)
    dropped = live_metric.dropped if live_metric else None
    seen = {kind for kind in (REQUESTS, NEW_DATA) if comparison.num_rows.get(kind, 0) >= request.min_rows}
    seen |= {LABELS} if dropped is not None else set()

    def change(present: CheckState) -> CheckState:
        if present.last_check == window.check:
            return present
        if present.last_check != window.previous_check:
            raise WriteConflictError(
                f"{window.name}: check {present.last_check} ended while {window.check} was under way; run one check at a time"
            )
        state = present.of_champion(window.champion)
        common = {"name": window.name, "champion": window.champion, "check": window.check, "num_repeats": request.num_repeats, "now": now}
        drift_words = "; ".join(comparison.changes)
        return state.model_copy(
            update={
                "last_check": window.check,
                "seen_until": {**state.seen_until, **dict.fromkeys(seen, window.until)},
                "drift": advance(state.drift, comparison.changed, kind="drift.detected", summary=drift_words, **common),
                "metric": advance(state.metric, dropped, kind="metric.dropped", summary=metric_words(live_metric), **common),
            }
        )

    state = change_state(store, window.name, change)
    changed = comparison.changed or dropped
    nothing = comparison.changed is None and dropped is None
    return CheckOutcome(
        status="changed" if changed else "not enough rows" if nothing else "no change",
        name=window.name,
        check=window.check,
        window=window,
        comparison=comparison,
        live_metric=live_metric,
        state=state,
        num_repeats=request.num_repeats,
        reasons=(*comparison.changes, *((metric_words(live_metric),) if live_metric and live_metric.value else ()), *comparison.notes),
    )


def no_champion(request: DriftRequest, *, now: datetime | None = None) -> CheckOutcome:
    reasons = (f"{request.name} has no champion yet, so there is nothing to check",)
    return CheckOutcome(status="no champion", name=request.name, check=_check_id(now or datetime.now(UTC)), reasons=reasons)


def metric_words(live: LiveMetric | None) -> str:
    if live is None or live.value is None:
        return ""
    value = live.value
    where = "below" if live.dropped else "not below"
    return (
        f"{live.metric} on {live.num_labels} late labels {value.value:.3f} ({value.low:.3f} to {value.high:.3f}), "
        f"{where} the limit of {live.limit:.3f} (test {live.test_value:.3f})"
    )


def _check_id(now: datetime) -> str:
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}"


def _distinct_rows(rows: Sequence[LoggedPrediction]) -> list[tuple[str, LoggedPrediction]]:
    """(text, row), each text once: its last, so that of several versions the newest counts."""
    newest = [(text, row) for row in reversed(rows) if (text := request_text(row.request))]
    return [newest[position] for position in distinct([text for text, _ in newest])]


def _answers(rows: Sequence[LoggedPrediction]) -> AnswerSample:
    replies = [row.reply for row in rows if "label" in row.reply and "probability" in row.reply]
    return AnswerSample(tuple(reply["label"] for reply in replies), tuple(reply["probability"] for reply in replies))
