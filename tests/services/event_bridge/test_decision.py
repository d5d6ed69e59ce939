import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.event_bridge.decision import (
    BUDGET_SECONDS,
    Limits,
    Situation,
    WaitingEvent,
    cause_kind,
    decide,
    seconds_until_due,
    summarize,
)

LIMITS = Limits(debounce_seconds=30, cool_down_seconds=600, retrain_minutes_per_day=240)
NOW = 1_800_000_000.0
DATA = WaitingEvent("a", "data.arrived", "s3://b/m/a.csv landed", ("s3://b/m/a.csv",))
MORE_DATA = WaitingEvent("b", "data.arrived", "s3://b/m/b.csv landed", ("s3://b/m/b.csv",))
DRIFT = WaitingEvent("d", "drift.detected", "the length of texts has changed")
ASKED = WaitingEvent("p", "retrain.asked", "the labels were corrected")
IDLE = Situation(last_request=None, busy=None, used_minutes=0, data_digest="new", trained_digest="old")


def situation(**changes: object) -> Situation:
    return dataclasses.replace(IDLE, **changes)  # type: ignore[arg-type]


def test_the_first_event_after_idle_asks_at_once():
    assert decide([DATA], IDLE, LIMITS, NOW).action == "ask"
    assert decide([DRIFT], IDLE, LIMITS, NOW).action == "ask"
    assert decide([DATA], situation(last_request=NOW - 600), LIMITS, NOW).action == "ask"


@pytest.mark.parametrize("age", [0, 10, 29, 31, 599])
def test_events_soon_after_a_request_wait_for_one_follow_up(age):
    decision = decide([DATA, MORE_DATA], situation(last_request=NOW - age), LIMITS, NOW)
    assert (decision.action, decision.seconds) == ("wait", 600 - age)


def test_without_a_cool_down_the_debounce_still_holds():
    limits = dataclasses.replace(LIMITS, cool_down_seconds=0)
    assert seconds_until_due([DATA], NOW - 10, limits, NOW) == 20
    assert decide([DATA], situation(last_request=NOW - 30), limits, NOW).action == "ask"


def test_a_clock_that_was_set_back_does_not_prolong_the_cool_down():
    assert seconds_until_due([DATA], NOW + 86_400, LIMITS, NOW) == 600


@pytest.mark.parametrize("event", [DATA, DRIFT, ASKED])
def test_no_model_trains_beside_itself(event):
    decision = decide([event], situation(busy="flow run x is running"), LIMITS, NOW)
    assert (decision.action, decision.why) == ("wait", "flow run x is running")


def test_the_same_data_never_trains_twice():
    same = situation(data_digest="old")
    assert (decide([DATA, MORE_DATA], same, LIMITS, NOW).action, decide([DATA], same, LIMITS, NOW).why) == ("close", "same data")
    # What is not about data changes nothing about the data, and is due all the same.
    assert decide([DRIFT], same, LIMITS, NOW).action == "ask"
    assert decide([DATA, DRIFT], same, LIMITS, NOW).action == "ask"


def test_data_that_is_gone_again_trains_nothing():
    decision = decide([DATA], situation(data_digest=None), LIMITS, NOW)
    assert (decision.action, decision.why) == ("close", "no data")
    assert decide([DRIFT], situation(data_digest=None, trained_digest=None), LIMITS, NOW).action == "ask"


def test_over_budget_waits_and_says_so():
    decision = decide([DRIFT], situation(used_minutes=240), LIMITS, NOW)
    assert (decision.action, decision.seconds) == ("wait", BUDGET_SECONDS)
    assert decision.why.startswith("over budget: 240 of 240 minutes")
    assert decide([DRIFT], situation(used_minutes=239.9), LIMITS, NOW).action == "ask"


def test_a_person_waits_for_nothing_but_a_run():
    hard = situation(last_request=NOW, used_minutes=1000, data_digest="old")
    assert decide([ASKED], hard, LIMITS, NOW).action == "ask"
    # And takes along what waits.
    assert decide([DATA, ASKED], hard, LIMITS, NOW).action == "ask"


@pytest.mark.parametrize(
    ("events", "kind", "summary"),
    [
        ([DATA], "data.arrived", "new object s3://b/m/a.csv"),
        ([DATA, MORE_DATA, DATA], "data.arrived", "2 new objects, the first s3://b/m/a.csv"),
        ([DATA, DRIFT, MORE_DATA], "data.arrived", "2 new objects, the first s3://b/m/a.csv, and 1 more event"),
        ([DRIFT, DATA, MORE_DATA], "drift.detected", "the length of texts has changed, and 2 more events"),
        ([DATA, ASKED], "retrain.asked", "the labels were corrected, and 1 more event"),
        ([WaitingEvent("m", "metric.dropped")], "metric.dropped", "metric.dropped"),
        ([WaitingEvent("n", "data.arrived", "a partner says so")], "data.arrived", "a partner says so"),
    ],
)
def test_the_cause_in_words(events, kind, summary):
    assert (cause_kind(events), summarize(events)) == (kind, summary)


events = st.lists(st.sampled_from([DATA, MORE_DATA, DRIFT, ASKED]), min_size=1)
situations = st.builds(
    Situation,
    last_request=st.none() | st.floats(NOW - 2000, NOW),
    busy=st.none() | st.just("a run"),
    used_minutes=st.floats(0, 500),
    data_digest=st.sampled_from([None, "x", "y"]),
    trained_digest=st.sampled_from([None, "x", "y"]),
)


@given(events, situations)
def test_whatever_happens_the_limits_hold(events, situation):
    decision = decide(events, situation, LIMITS, NOW)
    by_a_person = ASKED in events
    if decision.action == "ask":
        assert situation.busy is None
        if not by_a_person:
            assert situation.last_request is None or NOW - situation.last_request >= 600
            assert situation.used_minutes < 240
            assert DRIFT in events or situation.data_digest not in (None, situation.trained_digest)
    if decision.action == "wait":
        assert decision.seconds > 0
        assert decision.why
    if decision.action == "close":
        assert set(events) <= {DATA, MORE_DATA}
