from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from ml.errors import WriteConflictError
from ml.events import Event
from ml.monitoring.state import Alarm, CheckState, advance, change_state, clear_state, mark_taken, read_state
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
CHAMPION = "20260301T000000Z-abcdef12"


@pytest.fixture(params=["memory", "s3"])
def store(request, object_store_endpoint):
    return request.getfixturevalue("artifact_store" if request.param == "memory" else "s3_artifact_store")


def after(alarm: Alarm, *found: bool | None, first_check: int = 1, num_repeats: int = 2) -> Alarm:
    for number, changed in enumerate(found, start=first_check):
        alarm = advance(
            alarm,
            changed,
            kind="drift.detected",
            name="reviews",
            champion=CHAMPION,
            check=f"check{number}",
            num_repeats=num_repeats,
            summary="longer " * 200,
            now=NOW,
        )
    return alarm


def test_one_finding_is_no_event_and_as_many_as_asked_for_in_a_row_are_one():
    assert after(Alarm(), True).event is None
    alarm = after(Alarm(), True, True)
    assert alarm.event is not None
    assert (alarm.event.kind, alarm.event.name, alarm.event.source) == ("drift.detected", "reviews", "drift check")
    assert alarm.event.id == f"drift.detected:reviews:{CHAMPION}:check1"
    assert len(alarm.event.summary) <= 500
    assert after(Alarm(), True, True, num_repeats=3).event is None
    assert after(Alarm(), True, num_repeats=1).event is not None


def test_a_check_without_finding_breaks_the_row_and_one_with_too_few_rows_does_not():
    assert after(Alarm(), True, False, True).event is None
    assert after(Alarm(), True, False, True) == Alarm(num_checks=1, first_check="check3")
    assert after(Alarm(), True, None, None, True).event is not None
    assert after(Alarm(), None) == Alarm()


def test_the_longest_names_still_make_a_valid_event_id():
    alarm = advance(
        Alarm(),
        True,
        kind="metric.dropped",
        name="n" * 63,
        champion=CHAMPION,
        check="20260302T120000Z",
        num_repeats=1,
        summary="",
        now=NOW,
    )
    assert alarm.event is not None


def test_an_event_is_due_until_it_was_taken_and_then_no_more_in_the_same_row(store):
    state = change_state(store, "reviews", lambda state: state.model_copy(update={"drift": after(Alarm(), True, True)}))
    (event,) = state.due_events
    assert read_state(store, "reviews").due_events == (event,)
    # Not taken yet: further checks keep the very same event, also when the change has gone.
    assert after(state.drift, True, first_check=3).event == event
    assert after(state.drift, False, first_check=3).event == event

    taken = mark_taken(store, "reviews", event)
    assert (taken.due_events, taken.drift.emitted) == ((), True)
    assert mark_taken(store, "reviews", event) == taken
    assert after(taken.drift, True, True, True, first_check=3).event is None
    # Gone and back: another row of checks, another event.
    again = after(taken.drift, False, True, True, first_check=3)
    assert again.event is not None
    assert again.event.id.endswith(":check4")


def test_an_event_taken_after_its_row_ended_leaves_a_new_row_free():
    alarm = after(Alarm(), True, True, False)
    assert alarm.num_checks == 0
    assert alarm.event is not None


def test_another_champion_begins_anew_and_a_cleared_state_too(store):
    state = change_state(store, "reviews", lambda _: CheckState(champion=CHAMPION, last_check="c", drift=after(Alarm(), True, True)))
    assert state.of_champion(CHAMPION) == state
    fresh = state.of_champion("20260401T000000Z-abcdef12")
    assert (fresh.drift, fresh.due_events, fresh.last_check) == (Alarm(), (), "c")
    clear_state(store, "reviews")
    clear_state(store, "reviews")
    assert read_state(store, "reviews") == CheckState()


def test_of_many_writers_at_once_none_is_lost(store):
    def count(state: CheckState) -> CheckState:
        return state.model_copy(update={"drift": Alarm(num_checks=state.drift.num_checks + 1)})

    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(change_state, store, "reviews", count) for _ in range(12)]
    lost = [future for future in done if future.exception()]
    assert all(isinstance(future.exception(), WriteConflictError) for future in lost)
    assert read_state(store, "reviews").drift.num_checks == 12 - len(lost)


def test_the_state_lies_where_the_layout_says(artifact_store: ArtifactStore):
    change_state(artifact_store, "reviews", lambda _: CheckState(champion=CHAMPION))
    stored = artifact_store.objects.get(artifact_store.monitoring_bucket, keys.check_state("reviews"))
    assert CheckState.model_validate_json(stored).champion == CHAMPION


def test_marking_another_event_does_nothing(store):
    state = change_state(store, "reviews", lambda state: state.model_copy(update={"drift": after(Alarm(), True, True)}))
    assert mark_taken(store, "reviews", Event(kind="drift.detected", name="reviews")) == state
