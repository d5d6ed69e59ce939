"""What the checks of a model have found so far, and the rule that makes an event of it.

One finding is no reason to train: only `num_repeats` checks in a row that each find a significant change, on rows that no
earlier check has seen, make an event. Then there is none until a check finds no change, the champion changes, or the
state is cleared. An event is kept here until the bridge took it, so none is lost; its id says which model and which first
check it speaks of, so the same one sent twice counts once.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Literal

from pydantic import Field

from ml.artifacts import Record
from ml.errors import ObjectNotFoundError, WriteConflictError
from ml.events import Event
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore

MAX_ATTEMPTS = 10
SOURCE = "drift check"
MAX_SUMMARY_CHARACTERS = 500


class Alarm(Record):
    """One thing that is watched: drift, or the metric."""

    num_checks: int = Field(default=0, description="significant checks in a row")
    first_check: str | None = Field(default=None, description="the first of them")
    emitted: bool = Field(default=False, description="the event bridge has taken the event of this row of checks")
    event: Event | None = Field(default=None, description="due, and not yet taken")


class CheckState(Record):
    """`seen_until`: kind of rows -> no later check looks before it. A kind with too few rows keeps its place and collects more."""

    champion: str | None = None
    last_check: str | None = None
    seen_until: dict[str, datetime] = Field(default_factory=dict)
    drift: Alarm = Alarm()
    metric: Alarm = Alarm()

    @property
    def due_events(self) -> tuple[Event, ...]:
        return tuple(alarm.event for alarm in (self.drift, self.metric) if alarm.event is not None)

    def of_champion(self, champion: str) -> "CheckState":
        """This state, or where another version was watched, a new one: nothing that was found of that holds for this."""
        if self.champion == champion:
            return self
        return CheckState(champion=champion, last_check=self.last_check, seen_until=self.seen_until)


def advance(
    alarm: Alarm,
    changed: bool | None,
    *,
    kind: Literal["drift.detected", "metric.dropped"],
    name: str,
    champion: str,
    check: str,
    num_repeats: int,
    summary: str,
    now: datetime,
) -> Alarm:
    """The alarm after one more check.

    Args:
        changed: what the check found; None when it had too few rows to say, which neither counts nor breaks the row.
    """
    if changed is None:
        return alarm
    if not changed:
        return Alarm(event=alarm.event)  # an event that is due stays due until it is told
    first = alarm.first_check or check
    alarm = alarm.model_copy(update={"num_checks": alarm.num_checks + 1, "first_check": first})
    if alarm.num_checks < num_repeats or alarm.emitted or alarm.event is not None:
        return alarm
    event = Event(
        id=f"{kind}:{name}:{champion}:{first}",
        kind=kind,
        name=name,
        occurred=now,
        source=SOURCE,
        summary=summary[:MAX_SUMMARY_CHARACTERS],
    )
    return alarm.model_copy(update={"event": event})


def read_state(store: ArtifactStore, name: str) -> CheckState:
    return _read(store, name)[0]


def change_state(store: ArtifactStore, name: str, change: Callable[[CheckState], CheckState]) -> CheckState:
    """Read, change, write if nobody else did meanwhile; else again. `change` may be called several times.

    Raises:
        WriteConflictError: others wrote every time; or as `change` does.
    """
    key = keys.check_state(name)
    for _ in range(MAX_ATTEMPTS):
        present, etag = _read(store, name)
        changed = change(present)
        if changed == present:
            return present
        data = changed.model_dump_json(indent=1).encode()
        try:
            if etag is None:
                store.objects.put(store.monitoring_bucket, key, data, if_none_match=True)
            else:
                store.objects.put(store.monitoring_bucket, key, data, if_match=etag)
            return changed
        except WriteConflictError:
            continue
    raise WriteConflictError(f"{name}: others wrote the state of its checks {MAX_ATTEMPTS} times meanwhile; run one check at a time")


def mark_taken(store: ArtifactStore, name: str, event: Event) -> CheckState:
    """Note that the bridge has taken an event; does nothing when it was noted before."""

    def taken(alarm: Alarm) -> Alarm:
        if alarm.event is None or alarm.event.id != event.id:
            return alarm
        return alarm.model_copy(update={"event": None, "emitted": alarm.num_checks > 0})

    return change_state(store, name, lambda state: state.model_copy(update={"drift": taken(state.drift), "metric": taken(state.metric)}))


def clear_state(store: ArtifactStore, name: str) -> None:
    """Forget everything that was found; the next check begins anew. Idempotent."""
    store.objects.delete(store.monitoring_bucket, keys.check_state(name))


def _read(store: ArtifactStore, name: str) -> tuple[CheckState, str | None]:
    try:
        data, info = store.objects.get_with_info(store.monitoring_bucket, keys.check_state(name))
    except ObjectNotFoundError:
        return CheckState(), None
    return CheckState.model_validate_json(data), info.etag
