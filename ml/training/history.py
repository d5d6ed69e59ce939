"""history.jsonl: one line per step, validation and event, written by the first rank. Lines are only ever added.

{"kind": "step", "step", "epoch", "loss", "learning_rate", "rows_per_second", "seconds"}
{"kind": "validation", "step", "epoch", "loss", "accuracy", "recall", "seconds"}
{"kind": "event", "message"}    the first one, the plan, also has "num_steps"
{"kind": "resumed", "step", "lost", "message"}    what came before and is later than `step` was lost and is done again

`step` counts finished steps; `epoch` is a fraction; `seconds` is training time, interruptions not counted.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

Report = Callable[[dict[str, Any]], None]

# Kinds of lines that tell of a step, so that a resumption from an earlier one makes them void.
_OF_A_STEP = ("step", "validation")


class HistoryWriter:
    """Appends lines; each is handed to the system at once, so a killed rank loses none."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()

    def event(self, message: str, **values: Any) -> None:
        self.write("event", message=message, **values)

    def resumed(self, step: int, lost: int) -> None:
        """Training goes on from a step, and so many finished ones are void."""
        self.write("resumed", step=step, lost=lost, message=f"going on from step {step}; {lost} steps are done again")

    def __enter__(self) -> "HistoryWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """What holds of a history: no step or validation is in it twice. Empty when there is no file.

    Lines that were cut off by a kill are left out.
    """
    return settled(_lines(path))


def settled(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without steps and validations that were lost with an interruption and done again."""
    records: list[dict[str, Any]] = []
    for record in lines:
        if record["kind"] == "resumed":
            records = [earlier for earlier in records if earlier["kind"] not in _OF_A_STEP or earlier["step"] <= record["step"]]
        records.append(record)
    return records


def last_step(records: Iterable[dict[str, Any]]) -> int:
    return max((record["step"] for record in records if record["kind"] == "step"), default=0)


def resumptions(records: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """The step that the last interruption went back to (0 when there was none), and the steps lost with all of them."""
    resumed = [record for record in records if record["kind"] == "resumed"]
    return (resumed[-1]["step"] if resumed else 0), sum(record["lost"] for record in resumed)


def resume_history(path: Path, step: int, kept: Path | None) -> int:
    """Note that training goes on from a step. The first rank calls it at its start, before it writes anything else.

    Args:
        step: of the checkpoint; 0 when there is none.
        kept: the history inside the checkpoint; it takes the place of one that does not reach the step (another machine).

    Returns:
        How many finished steps were lost and must be done again.
    """
    restore_history(path, step, kept)
    lost = max(last_step(read_history(path)) - step, 0)
    if step or lost:
        _end_last_line(path)
        with HistoryWriter(path) as history:
            history.resumed(step, lost)
    return lost


def restore_history(path: Path, step: int, kept: Path | None) -> None:
    """Put the checkpoint's history in the place of one that does not reach its step."""
    if kept is None or not kept.is_file() or last_step(read_history(path)) >= step:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    shutil.copyfile(kept, part)
    part.replace(path)


class HistoryTail:
    """Follows a history that is being written and reports each new line once."""

    def __init__(self, path: Path, report: Report):
        self._path = path
        self._report = report
        self._offset = path.stat().st_size if path.is_file() else 0

    def poll(self) -> None:
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                record = _parse(line)
                if record is not None:
                    self._report(record)


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for the rest of a line that a kill cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _end_last_line(path: Path) -> None:
    """Close a line that a kill cut off, so that the next one begins as a line of its own."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
