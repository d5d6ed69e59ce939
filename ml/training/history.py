"""history.jsonl: one line per step, validation and event, written by the first rank.

{"kind": "step", "step", "epoch", "loss", "learning_rate", "rows_per_second", "seconds"}
{"kind": "validation", "step", "epoch", "loss", "accuracy", "recall", "seconds"}
{"kind": "event", "message"}    the first one, the plan, also has "num_steps"

`step` counts finished steps; `epoch` is a fraction; `seconds` is training time, interruptions not counted.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

Report = Callable[[dict[str, Any]], None]


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

    def __enter__(self) -> "HistoryWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line that was cut off by a kill is left out. Empty when there is no file."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def last_step(records: list[dict[str, Any]]) -> int:
    return max((record["step"] for record in records if record["kind"] == "step"), default=0)


def rewind(path: Path, step: int, kept: Path | None) -> int:
    """Cut the history back to a step, so that no step is in it twice; events stay.

    Args:
        kept: the history inside the checkpoint, used when the live one does not reach the step (another machine).

    Returns:
        How many finished steps were cut off and must be done again.
    """
    records = read_history(path)
    reached = last_step(records)
    if reached < step and kept is not None:
        records = read_history(kept)
    lines = [json.dumps(record) + "\n" for record in records if record["kind"] == "event" or record["step"] <= step]
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)
    return max(reached - step, 0)


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
                self._report(json.loads(line))
