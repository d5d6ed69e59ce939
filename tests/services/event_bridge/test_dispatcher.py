"""Decisions and requests under a clock of the test, with a real object store and a real queue."""

import pytest

from ml.data.landed import landed_objects
from ml.errors import StorageUnavailableError
from ml.events import Event
from services.event_bridge.datasets import data_digest
from tests.services.event_bridge.serving import CSV, Bridge, finish, state_of


def test_the_first_event_becomes_a_run_at_once_that_says_why(bridge, prefect, put, s3_artifact_store, clock):
    address = put("a.csv")
    event = bridge.send("data.arrived", objects=[address])
    bridge.step()
    (emitted,) = prefect.events
    assert emitted["resource"] == {"prefect.resource.id": "millstream.model.sentiment", "prefect.resource.name": "sentiment"}
    request = dict(emitted["payload"]["request"])
    cause = request.pop("cause")
    assert request == {"solution": "sentiment", "name": "sentiment", "data": f"s3://{s3_artifact_store.datasets_bucket}/sentiment/"}
    assert (cause["kind"], cause["summary"], cause["event_ids"]) == ("data.arrived", f"new object {address}", [event.id])
    assert cause["data_digest"] == data_digest(landed_objects(s3_artifact_store, "sentiment"))
    assert state_of(bridge, event) == ("requested", "emitted")

    clock.advance(1)
    bridge.step()
    assert state_of(bridge, event) == ("requested", "seen")
    assert bridge.queue.open_requests()[0].flow_run_id == prefect.runs[0]["id"]
    finish(prefect, bridge, clock)
    assert state_of(bridge, event) == ("requested", "completed")
    assert bridge.queue.open_requests() == []
    assert (bridge.count("requests"), bridge.count("runs_seen"), len(prefect.runs)) == (1, 1, 1)


def test_the_request_of_the_deployment_is_kept(bridge, prefect, put):
    prefect.deploy("own", {"solution": "sentiment", "name": "own", "data": "s3://elsewhere/own/", "overrides": {"train.epochs": 3}})
    bridge.send("data.arrived", "own", objects=[put("a.csv", name="own")])
    bridge.step()
    request = prefect.events[0]["payload"]["request"]
    assert (request["data"], request["overrides"]) == ("s3://elsewhere/own/", {"train.epochs": 3})


@pytest.mark.parametrize("kind", ["drift.detected", "metric.dropped", "retrain.asked"])
def test_other_events_use_the_data_that_has_arrived_before(bridge, prefect, put, s3_artifact_store, kind):
    bridge.send(kind, summary="why")
    put("a.csv", name="support")
    bridge.send(kind, "support")
    bridge.step()
    requests = {event["payload"]["request"]["name"]: event["payload"]["request"] for event in prefect.events}
    assert "data" not in requests["sentiment"]  # nothing lies there: the deployment's own data
    assert requests["sentiment"]["cause"]["summary"] == "why"
    assert requests["support"]["data"] == f"s3://{s3_artifact_store.datasets_bucket}/support/"


def test_a_burst_is_one_run_and_one_follow_up_after_the_cool_down(bridge, prefect, put, clock):
    first = bridge.send("data.arrived", objects=[put("0.csv")])
    bridge.step()
    burst = []
    for number in range(1, 20):
        clock.advance(1)
        burst.append(bridge.send("data.arrived", objects=[put(f"{number}.csv")]))
        bridge.step()
    finish(prefect, bridge, clock)
    assert state_of(bridge, first) == ("requested", "completed")
    assert len(prefect.events) == 1
    assert bridge.dispatcher.waits["sentiment"].startswith("cool-down until")

    asked = bridge.queue.last_request_time("sentiment")
    clock.now = asked + 599
    assert bridge.step() == pytest.approx(1, abs=0.01)
    assert len(prefect.events) == 1
    clock.now = asked + 600
    bridge.step()
    assert len(prefect.events) == 2
    cause = prefect.events[1]["payload"]["request"]["cause"]
    assert cause["summary"].startswith("19 new objects, the first s3://")
    assert cause["event_ids"] == [event.id for event in burst]
    assert bridge.count("events_coalesced") == 18
    finish(prefect, bridge, clock)
    clock.advance(3600)
    bridge.step()
    assert len(prefect.events) == 2


def test_events_during_a_long_run_wait_for_its_end(bridge, prefect, put, clock):
    bridge.send("data.arrived", objects=[put("a.csv")])
    bridge.step()
    clock.advance(1)
    bridge.step()
    prefect.set_state(prefect.runs[0], "RUNNING")
    late = bridge.send("data.arrived", objects=[put("b.csv")])
    clock.advance(3600)
    bridge.step()
    assert len(prefect.events) == 1 and "is running" in bridge.dispatcher.waits["sentiment"]
    prefect.set_state(prefect.runs[0], "COMPLETED")
    clock.advance(5)
    bridge.step()  # in the same step: the run has ended, the cool-down is long over
    assert state_of(bridge, late) == ("requested", "emitted")


@pytest.mark.parametrize("state", ["SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED"])
def test_a_run_that_others_started_is_waited_for_even_by_a_person(bridge, prefect, clock, state):
    other = prefect.add_run("sentiment", state)
    bridge.send("retrain.asked")
    bridge.send("retrain.asked", "support")
    assert bridge.step() <= 5
    assert [event["resource"]["prefect.resource.name"] for event in prefect.events] == ["support"]
    assert bridge.dispatcher.waits == {"sentiment": f"flow run {other['name']} is {state.lower()}"}
    prefect.set_state(other, "COMPLETED")
    clock.advance(5)
    bridge.step()
    assert len(prefect.events) == 2


def test_a_run_that_a_schedule_has_planned_for_tonight_is_no_obstacle(bridge, prefect):
    prefect.add_run("sentiment", "SCHEDULED", starts_in=3600)
    bridge.send("drift.detected")
    bridge.step()
    assert len(prefect.events) == 1


def test_the_same_data_never_trains_twice(bridge, prefect, put, clock, s3_artifact_store):
    bridge.send("data.arrived", objects=[put("a.csv")])
    bridge.step()
    finish(prefect, bridge, clock)
    clock.advance(3600)
    again = bridge.send("data.arrived", objects=[put("a.csv")])
    bridge.step()
    assert state_of(bridge, again) == ("same data", None)
    assert (len(prefect.events), bridge.count("events_same_data")) == (1, 1)

    put("notes.txt", b"not data")  # changes nothing that a run would read
    bridge.send("data.arrived")
    bridge.step()
    assert len(prefect.events) == 1

    bridge.send("data.arrived", objects=[put("a.csv", CSV + b"awful,negative\n")])
    bridge.step()
    assert len(prefect.events) == 2


@pytest.mark.parametrize(("ended", "trained"), [("COMPLETED", True), ("CANCELLED", True), ("FAILED", False)])
def test_data_of_a_run_that_failed_may_be_tried_again(bridge, prefect, put, clock, ended, trained):
    bridge.send("data.arrived", objects=[put("a.csv")])
    bridge.step()
    finish(prefect, bridge, clock, ended)
    clock.advance(3600)
    bridge.send("data.arrived", objects=[put("a.csv")])
    bridge.step()
    assert len(prefect.events) == (1 if trained else 2)


def test_a_person_skips_cool_down_budget_and_same_data(bridge, prefect, put, clock):
    bridge.send("data.arrived", objects=[put("a.csv")])
    bridge.step()
    finish(prefect, bridge, clock, minutes=1000)
    asked = bridge.send("retrain.asked", summary="the labels were corrected")
    bridge.step()
    assert state_of(bridge, asked) == ("requested", "emitted")
    assert prefect.events[1]["payload"]["request"]["cause"]["kind"] == "retrain.asked"


def test_over_budget_waits_until_runs_are_a_day_old(bridge, prefect, clock):
    run = prefect.add_run("sentiment", "RUNNING")
    prefect.set_state(run, "COMPLETED", minutes=300)
    other = prefect.add_run("support", "RUNNING")
    prefect.set_state(other, "COMPLETED", minutes=239)
    event = bridge.send("drift.detected")
    bridge.send("drift.detected", "support")
    bridge.step()
    assert [event["resource"]["prefect.resource.name"] for event in prefect.events] == ["support"]
    assert bridge.dispatcher.waits["sentiment"].startswith("over budget: 300 of 240 minutes")
    for _ in range(3):
        clock.advance(60)
        bridge.step()
    assert state_of(bridge, event) == ("waiting", None)
    assert bridge.count("over_budget") == 1
    clock.advance(24 * 3600)
    bridge.step()
    assert state_of(bridge, event) == ("requested", "emitted")


def test_data_that_was_removed_again_trains_nothing(bridge, prefect, put, s3_artifact_store):
    event = bridge.send("data.arrived", objects=[put("a.csv")])
    s3_artifact_store.objects.delete(s3_artifact_store.datasets_bucket, "sentiment/a.csv")
    bridge.step()
    assert state_of(bridge, event) == ("no data", None)
    assert prefect.events == []


def test_an_event_of_a_model_that_nothing_trains_is_closed(bridge, prefect, put):
    event = bridge.send("data.arrived", "nobody", objects=[put("a.csv", name="nobody")])
    bridge.step()
    assert state_of(bridge, event) == ("no deployment", None)
    assert prefect.events == []


def test_a_deployment_without_a_request_is_named(bridge, prefect):
    prefect.deployments[0]["parameters"] = {}
    bridge.send("retrain.asked")
    bridge.step()
    assert "has no parameter `request`" in bridge.dispatcher.waits["sentiment"]


def test_nothing_is_lost_while_prefect_is_down(bridge, prefect, put, clock):
    prefect.stop()
    event = bridge.send("data.arrived", objects=[put("a.csv")])
    for _ in range(5):
        assert 0 < bridge.step() <= 5
        clock.advance(5)
    assert state_of(bridge, event) == ("waiting", None)
    assert "no answer" in bridge.dispatcher.waits["sentiment"]
    assert bridge.count("prefect_unreachable") == 5
    prefect.start()
    bridge.step()
    assert state_of(bridge, event) == ("requested", "emitted")


def test_a_prefect_that_refuses_is_named_and_asked_again(bridge, prefect, clock):
    prefect.refusal = 422
    event = bridge.send("drift.detected")
    bridge.step()
    assert "refused with 422" in bridge.dispatcher.waits["sentiment"]
    prefect.refusal = 503
    clock.advance(5)
    bridge.step()
    assert "answered 503" in bridge.dispatcher.waits["sentiment"]
    prefect.refusal = None
    clock.advance(5)
    bridge.step()
    assert state_of(bridge, event) == ("requested", "emitted")


def test_listing_finds_what_no_webhook_told(polling_bridge, prefect, put, clock, s3_artifact_store):
    put("a.csv"), put("b.csv"), put(".hidden.csv"), put("a.csv", name="nobody")
    polling_bridge.step()
    polling_bridge.step()
    (event,) = polling_bridge.queue.recent_events(None, 10)
    assert (event["source"], event["name"], len(event["objects"])) == ("poll", "sentiment", 2)
    assert len(prefect.events) == 1
    finish(prefect, polling_bridge, clock)

    for _ in range(30):
        clock.advance(60)
        polling_bridge.step()
    assert len(polling_bridge.queue.recent_events(None, 10)) == 1  # nothing new, nothing said

    put("b.csv", CSV + b"awful,negative\n")
    s3_artifact_store.objects.delete(s3_artifact_store.datasets_bucket, "sentiment/a.csv")
    clock.advance(60)
    polling_bridge.step()
    polling_bridge.step()
    assert polling_bridge.queue.recent_events(None, 1)[0]["objects"] == [f"s3://{s3_artifact_store.datasets_bucket}/sentiment/b.csv"]
    assert set(polling_bridge.queue.seen_objects("sentiment")) == {"sentiment/b.csv"}
    assert len(prefect.events) == 2


def test_listing_does_not_repeat_what_a_webhook_told(polling_bridge, put, clock, s3_artifact_store):
    address = put("a.csv")
    (info,) = landed_objects(s3_artifact_store, "sentiment")
    polling_bridge.queue.add_event(Event(kind="data.arrived", name="sentiment", objects=(address,)), clock(), {info.key: info.etag})
    polling_bridge.step()
    polling_bridge.step()
    assert len(polling_bridge.queue.recent_events(None, 10)) == 1


def test_data_of_a_model_that_is_deployed_later_is_found(polling_bridge, prefect, put, clock):
    early = polling_bridge.send("data.arrived", "late", objects=[put("a.csv", name="late")])
    polling_bridge.step()
    assert state_of(polling_bridge, early) == ("no deployment", None)
    prefect.deploy("late")
    clock.advance(60)
    polling_bridge.step()
    polling_bridge.step()
    assert [event["resource"]["prefect.resource.name"] for event in prefect.events] == ["late"]


def test_an_object_store_that_is_away_holds_up_nothing_else(tmp_path, prefect, clock):
    def open_store():
        raise StorageUnavailableError("the store is away")

    bridge = Bridge(tmp_path / "queue", prefect.api_url, open_store, clock, dataset_poll=60)
    event = bridge.send("data.arrived")
    assert bridge.step() <= 5
    assert (state_of(bridge, event), bridge.dispatcher.waits) == (("waiting", None), {"sentiment": "the store is away"})
    assert bridge.count("store_unreachable") >= 1
    bridge.close()
