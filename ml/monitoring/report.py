"""A check as a page of its own, and as markdown for the run page in Prefect."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import ml.report
from ml.monitoring.check import LABELS, CheckOutcome, metric_words
from ml.monitoring.findings import Finding, p_words
from ml.monitoring.pictures import describe_histograms, histograms_picture
from ml.monitoring.state import Alarm

# The style sheet is the one of the run's report.
_TEMPLATES = [Path(__file__).parent / "templates", Path(ml.report.__path__[0]) / "templates"]


def render_check(outcome: CheckOutcome) -> str:
    """One HTML file that needs no network, script or font; a content security policy forbids every request."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"p": p_words, "effect": _effect}
    histograms = outcome.comparison.histograms
    return environment.get_template("check.html").render(
        outcome=outcome,
        verdict=verdict(outcome),
        metric=metric_words(outcome.live_metric),
        picture=histograms_picture(histograms),
        picture_words=describe_histograms(histograms),
        labels=LABELS,
    )


def render_check_markdown(outcome: CheckOutcome) -> str:
    """Verdict, table of tests and picture, for a markdown artifact."""
    lines = [f"**{verdict(outcome)}**", ""]
    lines += [f"- {_cell(reason)}" for reason in outcome.reasons]
    if outcome.comparison.findings:
        lines += ["", "| rows | what | verdict | size | needed | p, corrected | in words |", "|---|---|---|---:|---:|---:|---|"]
        lines += [
            f"| {finding.sample} | {finding.test} | {finding.verdict} | {_effect(finding)} | {finding.effect_limit:g} | "
            f"{p_words(finding.corrected_p_value)} | {_cell(finding.details)} |"
            for finding in outcome.comparison.findings
        ]
    if picture := histograms_picture(outcome.comparison.histograms):
        lines += ["", f"![{_cell(describe_histograms(outcome.comparison.histograms))}]({picture})"]
    return "\n".join(lines) + "\n"


def verdict(outcome: CheckOutcome) -> str:
    """The outcome in one sentence."""
    if outcome.status == "no champion":
        return "Nothing to check: there is no champion"
    if outcome.status == "not enough rows":
        return "Too few rows to say anything"
    if outcome.status == "no change":
        return "No change that matters"
    parts = []
    if outcome.comparison.changed:
        parts.append("inputs differ from the training data" + _repeats(outcome.state.drift, outcome.num_repeats))
    if outcome.live_metric is not None and outcome.live_metric.dropped:
        parts.append(f"{outcome.live_metric.metric} dropped" + _repeats(outcome.state.metric, outcome.num_repeats))
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:]


def _repeats(alarm: Alarm, num_repeats: int) -> str:
    if alarm.emitted:
        return ", and the event was sent already"
    if alarm.event is not None:
        return f", check {alarm.num_checks} in a row: an event is sent"
    return f", check {alarm.num_checks} of {num_repeats} in a row that an event takes"


def _effect(finding: Finding) -> str:
    return f"{finding.effect:.2f} {finding.effect_name}"


def _cell(text: str) -> str:
    """Texts come from callers: no markup of theirs may change the table."""
    return text.translate({ord(character): f"\\{character}" for character in "\\`*_{}[]<>#|!~"}).replace("\n", " ")
