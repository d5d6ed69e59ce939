"""Whether a training run is due. Pure: what is known of one model at one moment in, what to do out.

The first event after idle asks for a run at once. Events that come while that run is on, or soon after it was asked for,
are put together into one follow-up when the cool-down is over. A person who asks waits for no cool-down, but no model
ever trains beside itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

BY_A_PERSON = "retrain.asked"
NEW_DATA = "data.arrived"
OVER_BUDGET = "over budget"

# How long until something that only others can change is looked at again.
BUSY_SECONDS = 5.0
BUDGET_SECONDS = 60.0


@dataclass(frozen=True)
class WaitingEvent:
    """What the decision needs of an `ml.events.Event`."""

    id: str
    kind: str
    summary: str = ""
    objects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """See the settings of the same names."""

    debounce_seconds: float
    cool_down_seconds: float
    retrain_minutes_per_day: float


@dataclass(frozen=True)
class Situation:
    """What is known of one model.

    Args:
        last_request: when the last run was asked for, seconds since the epoch; None when there was none.
        busy: in words, what of its deployment is scheduled to run now or running; None when nothing is.
        used_minutes: run time of its deployment in the last 24 hours.
        data_digest: of the objects that lie there now; None when there is none.
        trained_digest: that of the last request whose run did not crash or fail.
    """

    last_request: float | None
    busy: str | None
    used_minutes: float
    data_digest: str | None
    trained_digest: str | None


@dataclass(frozen=True)
class Decision:
    """What to do with all waiting events of a model.

    Args:
        action: "ask" for a run, "wait", or "close" the events as answered without one.
        why: in words; of "close" one of "same data", "no data".
        seconds: of "wait", until when to look again at the latest.
    """

    action: Literal["ask", "wait", "close"]
    why: str
    seconds: float = 0.0


def seconds_until_due(events: Sequence[WaitingEvent], last_request: float | None, limits: Limits, now: float) -> float:
    """How long the clock alone keeps a run from being asked for; 0 when it does not. `events` is not empty."""
    if last_request is None or _a_person_asks(events):
        return 0.0
    pause = max(limits.debounce_seconds, limits.cool_down_seconds)
    # A clock that was set back must not prolong the pause.
    return max(0.0, min(last_request, now) + pause - now)


def decide(events: Sequence[WaitingEvent], situation: Situation, limits: Limits, now: float) -> Decision:
    """`events` is not empty, in the order in which they were received."""
    seconds = seconds_until_due(events, situation.last_request, limits, now)
    if seconds > 0:
        return Decision("wait", "cool-down", seconds)
    if situation.busy is not None:
        return Decision("wait", situation.busy, BUSY_SECONDS)
    if _a_person_asks(events):
        return Decision("ask", "a person asks")
    if all(event.kind == NEW_DATA for event in events):
        if situation.data_digest is None:
            return Decision("close", "no data")
        if situation.data_digest == situation.trained_digest:
            return Decision("close", "same data")
    if situation.used_minutes >= limits.retrain_minutes_per_day:
        return Decision(
            "wait",
            f"{OVER_BUDGET}: {situation.used_minutes:.0f} of {limits.retrain_minutes_per_day:g} minutes of run time "
            "are used in the last 24 hours (MILLSTREAM_RETRAIN_MINUTES_PER_DAY)",
            BUDGET_SECONDS,
        )
    return Decision("ask", "due")


def cause_kind(events: Sequence[WaitingEvent]) -> str:
    """A person's wish comes first, since it is why the cool-down did not count; else the first event."""
    return BY_A_PERSON if _a_person_asks(events) else events[0].kind


def summarize(events: Sequence[WaitingEvent]) -> str:
    """The cause in words, such as "3 new objects, the first s3://bucket/name/a.csv"."""
    kind = cause_kind(events)
    same = [event for event in events if event.kind == kind]
    objects = list(dict.fromkeys(address for event in same for address in event.objects))
    if kind == NEW_DATA and objects:
        text = f"{len(objects)} new objects, the first {objects[0]}" if len(objects) > 1 else f"new object {objects[0]}"
        num_more = len(events) - len(same)
    else:
        text, num_more = same[0].summary or kind, len(events) - 1
    return text + (f", and {num_more} more event{'s' if num_more > 1 else ''}" if num_more else "")


def _a_person_asks(events: Sequence[WaitingEvent]) -> bool:
    return any(event.kind == BY_A_PERSON for event in events)
