"""Numbers and causes as people read them, for the terminal and the page alike."""

from ml.events import Cause

_SMALL_UNITS = ("bytes", "kB", "MB", "GB", "TB")

STATUS_WORDS = {
    "deployed": "deployed, compressed",
    "deployed_uncompressed": "deployed, not compressed",
    "unchanged": "nothing new: this model is already the champion",
    "rejected": "rejected, nothing was deployed",
    "failed": "failed",
}

_CAUSE_WORDS = {
    "by hand": "by hand",
    "schedule": "by schedule",
    "data.arrived": "by new data",
    "drift.detected": "by drift",
    "metric.dropped": "by a metric that dropped",
    "retrain.asked": "on request",
}


def cause_words(cause: Cause) -> str:
    """ "Started by new data: 3 new objects, the first s3://..." """
    return f"Started {_CAUSE_WORDS[cause.kind]}" + (f": {cause.summary}" if cause.summary else "")


def duration(seconds: float | None) -> str:
    """ "0.02 s", "9.8 s", "88 s", "5.2 min", "3.1 h"; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def byte_size(num_bytes: float | None) -> str:
    """Decimal units, three digits: "23.1 MB"; a dash for None."""
    if num_bytes is None:
        return "–"
    size, unit = float(num_bytes), 0
    while size >= 1000 and unit < len(_SMALL_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} {_SMALL_UNITS[unit]}" if unit == 0 or size >= 100 else f"{size:.1f} {_SMALL_UNITS[unit]}"


def count(number: float | None) -> str:
    """Whole numbers with thousands separated; a dash for None."""
    return "–" if number is None else f"{number:,.0f}"


def plain(name: str) -> str:
    """A key as words: "drop_near_duplicates" -> "drop near duplicates"."""
    return name.replace("_", " ")
