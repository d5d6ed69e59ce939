"""What the page of a run in the Prefect UI shows: Markdown, with the pictures inside it.

The UI draws Markdown pictures from `data:` addresses, SVG and PNG alike; SVG elements written into the text come out black,
and a picture artifact prints its whole address below the picture. So every picture here is SVG in a `data:` address.
"""

import base64
from typing import Any

from ml.outcome import PipelineOutcome
from ml.report.comparison import compare
from ml.report.table import escape_markdown, render_markdown, served_answers
from ml.report.words import cause_words

MAX_CHARACTERS = 500_000
"""Of one artifact: what the server stores, and sends to every page that lists it."""
MAX_CELL_CHARACTERS = 300

_PAGE_COLOURS = {"currentColor": "#1b1f24", "var(--faint, #888)": "#888888"}
_FIRST_ELEMENT_STYLE = ' style="background: #ffffff; font-family: sans-serif"'


def training_curve(outcome: PipelineOutcome, history: list[dict[str, Any]]) -> str | None:
    """Loss and accuracy over the steps as Markdown; None when nothing was trained.

    Args:
        history: lines of the training history (see `ml.training.history`).
    """
    pictures = _training_pictures(outcome, history)
    return _join([f"**{escape_markdown(outcome.name)}: training**", *pictures]) if pictures else None


def report(outcome: PipelineOutcome, history: list[dict[str, Any]]) -> str:
    """The report as Markdown: decision, cause, table, pictures, sample answers, and where the full report lies."""
    from ml.report.pictures import latency_quality

    comparison = compare(outcome)
    pictures = _training_pictures(outcome, history)
    if svg := latency_quality(comparison):
        pictures.insert(0, _picture("Speed and quality", svg))
    answers = [f"| {_cell(answer)} | {_cell(question)} |" for answer, question in served_answers(outcome)]
    if answers:
        pictures.append("\n".join(["The served model has just answered:", "", "| answer | question |", "| --- | --- |", *answers]))
    return _join([render_markdown(outcome), *pictures, _addresses(outcome)])


def headline(outcome: PipelineOutcome) -> str:
    """One line below the title of each artifact: how the run ended, and what asked for it."""
    return f"{outcome.status.replace('_', ' ')}. {escape_markdown(cause_words(outcome.cause))}."


def _training_pictures(outcome: PipelineOutcome, history: list[dict[str, Any]]) -> list[str]:
    from ml.report.pictures import loss_curve, validation_curve

    training = outcome.training
    drawn = {
        "Training loss": loss_curve(history, training.best_step, training.resumed_from_step),
        "Accuracy on validation": validation_curve(history, training.best_step),
    }
    return [_picture(title, svg) for title, svg in drawn.items() if svg]


def _picture(title: str, svg: str) -> str:
    """A picture that stands alone: on white, since an image knows nothing of the page's colours."""
    for of_the_page, own in _PAGE_COLOURS.items():
        svg = svg.replace(of_the_page, own)
    svg = svg.replace("<svg", "<svg" + _FIRST_ELEMENT_STYLE, 1)
    return f"{title}\n\n![{title}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _cell(text: str) -> str:
    return escape_markdown(text if len(text) <= MAX_CELL_CHARACTERS else text[: MAX_CELL_CHARACTERS - 1] + "…")


def _addresses(outcome: PipelineOutcome) -> str:
    addresses = outcome.addresses
    shown = {
        "Full report": addresses.report_path,
        "The same as data": addresses.outcome_path,
    }
    if outcome.version:  # else this run has led to no model that could be asked
        shown |= {"Ask the model": addresses.predict_url, "How to ask": addresses.api_docs_url}
    # A browser opens no file from a page, so the paths are there to be copied.
    return "\n".join(f"- {title}: `{address.replace('`', '')}`" for title, address in shown.items() if address)


def _join(parts: list[str]) -> str:
    """One text; where it would be too long, the largest pictures are left out."""
    parts = [part.rstrip() for part in parts if part]
    while sum(map(len, parts)) > MAX_CHARACTERS and (pictures := [part for part in parts if "](data:" in part]):
        parts.remove(max(pictures, key=len))
    return "\n\n".join(parts)[:MAX_CHARACTERS] + "\n"
