"""What the predictor leaves behind, one JSON object a line: what it was asked and answered, and labels that came later.

Written by a small serving process, so only the standard library is needed here.
"""

import json
from dataclasses import dataclass, field
from datetime import datetime

MAX_TEXT_CHARACTERS = 4_000
MAX_REQUEST_BYTES = 32_000


@dataclass(frozen=True)
class LoggedPrediction:
    """One item of one predict request.

    Args:
        time: when it was answered, ISO 8601 UTC.
        id: the reply's; `item` is the index in it.
        request: as it was sent, longer texts cut; None when it was too large even so.
        cut: field of the request -> characters that it had before it was cut; "" stands for the whole request, in bytes.
    """

    time: str
    id: str
    item: int
    name: str
    version: str
    request: dict | None
    reply: dict
    cut: dict[str, int] = field(default_factory=dict)

    @property
    def answered(self) -> datetime:
        return datetime.fromisoformat(self.time)


@dataclass(frozen=True)
class LoggedFeedback:
    """The true label of one item of one earlier reply, and when it was told."""

    time: str
    id: str
    item: int
    name: str
    label: str

    @property
    def told(self) -> datetime:
        return datetime.fromisoformat(self.time)


def cut_request(request: dict) -> tuple[dict | None, dict[str, int]]:
    """A request of bounded size, and what was cut; see `LoggedPrediction`."""
    cut = {key: len(value) for key, value in request.items() if isinstance(value, str) and len(value) > MAX_TEXT_CHARACTERS}
    bounded = {key: cut_text(value) if key in cut else value for key, value in request.items()} if cut else request
    if len(bounded) == 1 and all(isinstance(value, str) for value in bounded.values()):
        return bounded, cut  # one text: it fits, and measuring it costs as much as writing it
    num_bytes = len(json.dumps(bounded, ensure_ascii=False).encode(errors="surrogatepass"))
    return (bounded, cut) if num_bytes <= MAX_REQUEST_BYTES else (None, {**cut, "": num_bytes})


def cut_text(text: str) -> str:
    return text[:MAX_TEXT_CHARACTERS]


def to_line(record: LoggedPrediction | LoggedFeedback) -> bytes:
    # ASCII, since JSON may carry half of a surrogate pair, which UTF-8 cannot.
    return json.dumps(vars(record)).encode() + b"\n"
