"""One readable log of all parts: every line of every part's own log, in the order in which it came, with its part's name."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

MERGED_NAME = "stack"
MAX_BYTES = 20 * 2**20
READ_BYTES = 2**20

# Written as JSON lines for machines; of these, one line per request would drown the rest.
EVENT_LOG_SUFFIX = "-events"
LEFT_OUT_EVENTS = frozenset({"predict"})
# The object store tells in such lines of every volume and ring; its warnings and errors begin with W and E.
_CHATTER = re.compile(r"I\d{4} \d\d:\d\d:\d\d\.\d+ ")


class MergedLog:
    """Follows `<part>.log` files of a folder and appends their new lines to `stack.log` there.

    How far each was read lies in `stack.offsets`, so that a restart leaves nothing out and repeats nothing.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / f"{MERGED_NAME}.log"
        self._offsets_path = folder / f"{MERGED_NAME}.offsets"
        self._offsets = self._load_offsets()

    def collect(self) -> None:
        """Append what was written since the last call."""
        lines = []
        for path in sorted(self._folder.glob("*.log")):
            if path.stem != MERGED_NAME:
                lines += self._new_lines(path)
        if not lines:
            return
        if self._path.exists() and self._path.stat().st_size > MAX_BYTES:
            self._path.replace(self._path.with_suffix(".log.1"))
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        self._offsets_path.write_text(json.dumps(self._offsets), encoding="utf-8")

    def write(self, part: str, text: str) -> None:
        """Append a line of the supervisor's own."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(part, text) + "\n")

    def _new_lines(self, path: Path) -> list[str]:
        size, offset = path.stat().st_size, self._offsets.get(path.name, 0)
        if size < offset:  # turned over
            offset = 0
        if size == offset:
            return []
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(READ_BYTES)
        whole = data.rfind(b"\n") + 1
        if whole == 0 and len(data) < READ_BYTES:
            return []  # the rest of the line is still to come
        data = data[: whole or len(data)]
        self._offsets[path.name] = offset + len(data)
        part = path.stem.removesuffix(EVENT_LOG_SUFFIX)
        texts = data.decode("utf-8", errors="replace").splitlines()
        if path.stem.endswith(EVENT_LOG_SUFFIX):
            texts = [shown for text in texts if (shown := _event_text(text)) is not None]
        return [_line(part, text) for text in texts if text.strip() and not _CHATTER.match(text)]

    def _load_offsets(self) -> dict[str, int]:
        try:
            return json.loads(self._offsets_path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}


def _line(part: str, text: str) -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {part:<14} | {text}"


def _event_text(text: str) -> str | None:
    """A JSON line as `event key=value …`; None for one that is left out."""
    try:
        fields = json.loads(text)
        event = fields.pop("event")
    except (ValueError, KeyError, AttributeError, TypeError):
        return text
    if event in LEFT_OUT_EVENTS:
        return None
    fields.pop("time", None)
    return " ".join([event, *(f"{name}={value}" for name, value in fields.items() if value is not None)])
