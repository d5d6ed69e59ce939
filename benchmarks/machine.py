"""The machine that a number was measured on, and the file that it is written to."""

import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path

from ml.environment import describe_environment

RESULTS_FOLDER = Path(__file__).parent / "results"
# Load average above which a measurement is doubtful.
BUSY = 0.5
SETTLE_SECONDS = 150.0
# What the two benchmarks of orchestration depend on; a run's own report lists the others.
LIBRARIES = ("prefect", "torch", "onnxruntime", "pandas", "great-expectations")


def hardware() -> str:
    """Processor and cores in a word that fits into a file name."""
    environment = describe_environment()
    return re.sub(r"[^a-z0-9]+", "-", f"{environment.cpu} {environment.num_cores} cores".lower()).strip("-")


def load_average(settle_seconds: float = 0.0) -> float:
    """Processes that wanted a core, averaged over the last minute.

    Args:
        settle_seconds: wait up to this long for what ran before to fade out of the average.
    """
    end = time.monotonic() + settle_seconds
    while os.getloadavg()[0] > BUSY and time.monotonic() < end:
        time.sleep(1.0)
    return os.getloadavg()[0]


def describe_machine(load_before: float) -> list[str]:
    """Markdown lines: hardware, date, versions, and how busy the machine was before the benchmark began."""
    environment = describe_environment()
    versions = ", ".join(f"{name} {environment.libraries[name]}" for name in LIBRARIES if name in environment.libraries)
    flags = " ".join(environment.cpu_flags)
    busy = " **The machine was busy: these numbers are worth little.**" if load_before > BUSY else ""
    return [
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {environment.platform}",
        f"- {environment.cpu}, {environment.num_cores} cores, {flags}, {environment.memory_bytes / 2**30:.0f} GiB",
        f"- Python {environment.python}, {versions}",
        f"- load average before the start: {load_before:.2f}.{busy}",
    ]


def write_result(benchmark: str, markdown: str, folder: Path = RESULTS_FOLDER) -> Path:
    """Write `<benchmark>_<hardware>_<date>.md`. A second result of a day stands beside the first."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{benchmark}_{hardware()}_{datetime.now(UTC):%Y-%m-%d}"
    number = 1
    while (path := folder / f"{stem}{f'_{number}' if number > 1 else ''}.md").exists():
        number += 1
    path.write_text(markdown, encoding="utf-8")
    return path


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The first column is words, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
