"""A request from its emission to the end of its run, under a clock of the test."""

from services.event_bridge.prefect_api import PrefectUnavailableError
from tests.services.event_bridge.serving import finish, state_of


def test_a_request_that_nobody_saw_is_emitted_again_with_growing_pauses(bridge, prefect, clock):
    prefect.triggers_work = False
    bridge.send("drift.detected")
    start = clock.now
    emissions = {len(prefect.events): 0.0}
    for _ in range(500):
        clock.advance(0.5)
        bridge.step()
        emissions.setdefault(len(prefect.events), clock.now - start)
    pauses = [round(emissions[number + 1] - emissions[number], 1) for number in range(1, max(emissions))]
    assert pauses == [15.0, 30.0, 60.0, 60.0, 60.0]
    assert len({event["id"] for event in prefect.events}) == len(prefect.events)
    assert len({event["payload"]["request"]["cause"]["request_id"] for event in prefect.events}) == 1
    assert "trigger on retrain.requested" in bridge.queue.open_requests()[0].why

    prefect.triggers_work = True
    clock.advance(60)
    bridge.step()
    clock.advance(1)
    bridge.step()
    assert bridge.queue.open_requests()[0].state == "seen"


def test_of_two_runs_of_one_request_the_one_that_waits_is_cancelled(bridge, prefect, clock):
    """A server that was slow may make a run of each attempt."""
    prefect.triggers_work = False
    bridge.send("drift.detected")
    bridge.step()
    clock.advance(15)
    bridge.step()
    request = prefect.events[0]["payload"]["request"]
    first = prefect.add_run("sentiment", "RUNNING", request=request)
    clock.advance(1)
    bridge.step()
    late = prefect.add_run("sentiment", "SCHEDULED", request=request)
    clock.advance(2)
    bridge.step()
    assert (first["state"]["type"], late["state"]["type"]) == ("RUNNING", "CANCELLED")
    assert bridge.queue.open_requests()[0].flow_run_id == first["id"]

    # And it is not taken for the request's run when the other one crashes.
    prefect.triggers_work = True
    prefect.set_state(first, "CRASHED")
    clock.advance(2)
    bridge.step()
    clock.advance(1)
    bridge.step()
    clock.advance(1)
    bridge.step()
    assert bridge.queue.open_requests()[0].flow_run_id == prefect.runs[-1]["id"]
    assert len(prefect.runs) == 3


def test_a_crashed_run_is_asked_for_again_twice(bridge, prefect, put, clock):
    event = bridge.send("data.arrived", objects=[put("a.csv")])
    bridge.step()
    for crash in range(3):
        assert len(prefect.runs) == crash + 1
        finish(prefect, bridge, clock, "CRASHED", message="no sign of life")
        clock.advance(1)
        bridge.step()
    clock.advance(3600)
    bridge.step()
    assert len(prefect.runs) == 3
    assert len({run["parameters"]["request"]["cause"]["request_id"] for run in prefect.runs}) == 1
    assert state_of(bridge, event) == ("requested", "failed")
    (request,) = bridge.queue.recent_requests(None, 5)
    assert request.why.startswith("3 runs crashed, the last: flow run run-3 is crashed: no sign of life")
    assert bridge.count("runs_crashed") == 3
    # The data was never trained on, so new word of it is no "same data".
    bridge.send("data.arrived", objects=[put("a.csv")])
    bridge.step()
    assert len(prefect.runs) == 4


def test_a_crashed_run_that_is_repeated_ends_well(bridge, prefect, put, clock):
    event = bridge.send("data.arrived", objects=[put("a.csv")])
    bridge.step()
    finish(prefect, bridge, clock, "CRASHED")
    clock.advance(1)
    bridge.step()
    finish(prefect, bridge, clock)
    assert state_of(bridge, event) == ("requested", "completed")
    assert len(prefect.runs) == 2


def test_a_run_that_was_deleted_closes_its_request(bridge, prefect, clock):
    event = bridge.send("drift.detected")
    bridge.step()
    clock.advance(1)
    bridge.step()
    prefect.runs.clear()
    clock.advance(5)
    bridge.step()
    assert state_of(bridge, event) == ("requested", "cancelled")


def test_a_request_whose_emission_failed_is_emitted_later(bridge, prefect, put, clock, monkeypatch):
    event = bridge.send("data.arrived", objects=[put("a.csv")])

    def fail(*_: object) -> None:
        raise PrefectUnavailableError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(bridge.prefect, "emit", fail)
        bridge.step()
    assert state_of(bridge, event) == ("requested", "new")
    assert prefect.events == []
    clock.advance(1)
    bridge.step()
    assert state_of(bridge, event) == ("requested", "emitted")
    assert len(prefect.runs) == 1


def test_an_emission_whose_answer_was_lost_makes_no_second_run(bridge, prefect, clock, monkeypatch):
    bridge.send("drift.detected")
    emit = bridge.prefect.emit

    def lose(*arguments: object) -> None:
        emit(*arguments)  # type: ignore[arg-type]
        raise PrefectUnavailableError("the answer was lost")

    prefect.triggers_work = False  # its run comes late
    with monkeypatch.context() as patch:
        patch.setattr(bridge.prefect, "emit", lose)
        bridge.step()
    clock.advance(1)
    bridge.step()
    assert len(prefect.events) == 1  # the same attempt is the same event
    assert bridge.queue.open_requests()[0].attempt == 1
