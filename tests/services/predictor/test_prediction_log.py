"""The prediction log: what it keeps, what it never does to a request, and where it stops."""

import json
import logging
import threading
from collections import Counter

import pytest

from ml.errors import StorageUnavailableError
from ml.monitoring.records import MAX_TEXT_CHARACTERS, LoggedPrediction
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from services.predictor import prediction_log as module
from services.predictor.prediction_log import PredictionLog, is_sampled, new_prediction_id
from tests.services.predictor.serving import Served, wait_until

ITEMS = [{"text": "a great film"}, {"text": "awful and boring"}]
REPLY = {"label": "positive", "probability": 0.9}


def logged(store: ArtifactStore, name: str = "sentiment") -> list[LoggedPrediction]:
    infos = store.objects.list(store.monitoring_bucket, keys.predictions_prefix(name))
    lines = [line for info in infos for line in store.objects.get(info.bucket, info.key).splitlines()]
    return sorted((LoggedPrediction(**json.loads(line)) for line in lines), key=lambda row: (row.id, row.item))


@pytest.fixture
def make_log(artifact_store):
    """A log over the store in memory, stopped at the end."""
    made = []

    def make(share: float = 1.0, rows_per_hour: int = 10_000, flush_seconds: float = 0.02) -> PredictionLog:
        made.append(PredictionLog(artifact_store, share=share, rows_per_hour=rows_per_hour, flush_seconds=flush_seconds))
        made[-1].start()
        return made[-1]

    yield make
    for log in made:
        log.stop()


def offer(log: PredictionLog, num_rows: int = 1, *, name: str = "sentiment", text: str = "fine", num_bytes: int = 100) -> str:
    prediction_id = new_prediction_id()
    log.offer(prediction_id, name, "v1", [{"text": text}] * num_rows, [REPLY] * num_rows, num_bytes)
    return prediction_id


def down(*_: object, **__: object) -> None:
    raise StorageUnavailableError("the object store does not answer")


def test_every_reply_has_an_id_under_which_its_items_are_found(s3_artifact_store, tmp_path):
    with Served(s3_artifact_store, tmp_path) as served:
        version = served.promote(seed=1)
        contents = [served.ask("sentiment", ITEMS) for _ in range(3)]
        wait_until(lambda: served.prediction_log.counts.stored == 6)
    assert len({content["id"] for content in contents}) == 3
    rows = logged(s3_artifact_store)
    for content in contents:
        mine = [row for row in rows if row.id == content["id"]]
        assert [row.item for row in mine] == [0, 1]
        assert [row.request for row in mine] == ITEMS
        assert [row.reply for row in mine] == content["replies"]
        assert {(row.name, row.version) for row in mine} == {("sentiment", version)}


def test_rows_lie_under_the_day_and_hour_of_their_answer(make_log, artifact_store):
    log = make_log()
    offer(log)
    wait_until(lambda: log.counts.stored == 1)
    (row,) = logged(artifact_store)
    (info,) = artifact_store.objects.list(artifact_store.monitoring_bucket)
    assert info.key.startswith(f"predictions/sentiment/{row.answered:%Y-%m-%d}/{row.answered:%H}/")


def test_with_share_0_nothing_is_logged_and_the_id_is_still_given(artifact_store, tmp_path):
    with Served(artifact_store, tmp_path, log_share=0) as served:
        served.promote(seed=1)
        assert len(served.ask("sentiment", ITEMS)["id"]) == 24
        assert served.get("/v1/sentiment")["prediction_log"] is None
        assert served.prediction_log.counts.offered == 0
    assert list(artifact_store.objects.list(artifact_store.monitoring_bucket)) == []


def test_a_caller_can_keep_its_request_out_of_the_log(artifact_store, tmp_path):
    with Served(artifact_store, tmp_path) as served:
        served.promote(seed=1)
        quiet = served.client.post("/v1/sentiment/predict", json={"items": ITEMS}, headers={"X-Millstream-Log": "no"}).json()
        loud = served.ask("sentiment", ITEMS)
        wait_until(lambda: served.prediction_log.counts.stored == 2)
    assert {row.id for row in logged(artifact_store)} == {loud["id"]}
    assert quiet["replies"] == loud["replies"]


def test_a_refused_request_is_not_logged(artifact_store, tmp_path):
    with Served(artifact_store, tmp_path) as served:
        served.promote(seed=1)
        assert served.client.post("/v1/sentiment/predict", json={"items": [{"txt": "secret"}]}).status_code == 422
        assert served.prediction_log.counts.offered == 0
    assert logged(artifact_store) == []


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_sample_has_the_size_asked_for_and_goes_by_the_id_alone(share):
    ids = [f"{number:024x}" for number in range(20_000)]
    chosen = [prediction_id for prediction_id in ids if is_sampled(prediction_id, share)]
    # Five standard deviations of a binomial count.
    assert abs(len(chosen) - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5
    assert {prediction_id for prediction_id in ids if is_sampled(prediction_id, share / 2)} <= set(chosen)
    assert all(is_sampled(prediction_id, 1.0) for prediction_id in ids)


def test_only_the_sample_is_logged(make_log, artifact_store):
    log = make_log(share=0.3)
    ids = [offer(log) for _ in range(300)]
    expected = {prediction_id for prediction_id in ids if is_sampled(prediction_id, 0.3)}
    wait_until(lambda: log.counts.stored == len(expected))
    assert {row.id for row in logged(artifact_store)} == expected
    assert log.counts.not_sampled == 300 - len(expected)


def test_each_model_has_its_own_limit_an_hour(make_log, artifact_store):
    log = make_log(rows_per_hour=10)
    for _ in range(4):
        offer(log, 4)
    offer(log, 3, name="reviews")
    wait_until(lambda: log.counts.stored == 13)
    assert (log.counts.over_hourly_limit, len(logged(artifact_store)), len(logged(artifact_store, "reviews"))) == (6, 10, 3)


def test_long_texts_are_cut_and_marked_and_larger_items_left_out(make_log, artifact_store):
    log = make_log()
    offer(log, text="é" * 9_000)
    log.offer("f" * 24, "sentiment", "v1", [{"text": "short", "rest": ["x"] * 20_000}], [REPLY], 100)
    wait_until(lambda: log.counts.stored == 2)
    cut, left_out = logged(artifact_store)[0], logged(artifact_store)[1]
    if cut.id == "f" * 24:
        cut, left_out = left_out, cut
    assert cut.request == {"text": "é" * MAX_TEXT_CHARACTERS}
    assert cut.cut == {"text": 9_000}
    assert left_out.request is None
    assert left_out.cut[""] > 60_000


def test_half_of_a_surrogate_pair_is_logged_as_it_came(make_log, artifact_store):
    log = make_log()
    offer(log, text="a \ud83d b")
    wait_until(lambda: log.counts.stored == 1)
    assert logged(artifact_store)[0].request == {"text": "a \ud83d b"}


def test_a_store_that_is_down_costs_no_request_and_no_row_that_fits(artifact_store, tmp_path, monkeypatch):
    with Served(artifact_store, tmp_path) as served:
        served.promote(seed=1)
        with monkeypatch.context() as patch:
            patch.setattr(artifact_store.objects, "put", down)
            ids = {served.ask("sentiment", ITEMS)["id"] for _ in range(20)}
            wait_until(lambda: served.get("/v1/sentiment")["prediction_log"]["error"] == "the object store does not answer")
            assert served.prediction_log.counts.stored == 0
        wait_until(lambda: served.prediction_log.counts.stored == 40)
        assert served.get("/v1/sentiment")["prediction_log"] == {"share": 1.0, "rows_per_hour": 10_000, "error": None}
    assert Counter(row.id for row in logged(artifact_store)) == dict.fromkeys(ids, 2)


def test_a_full_queue_drops_and_counts_and_what_waited_is_still_written(make_log, artifact_store, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING_ROWS", 50)
    log = make_log()
    with monkeypatch.context() as patch:
        patch.setattr(artifact_store.objects, "put", down)
        for _ in range(80):
            offer(log)
        wait_until(lambda: log.error is not None)
        for _ in range(20):
            offer(log)
        assert (log.num_waiting_rows, log.counts.dropped) == (50, 50)
    wait_until(lambda: log.counts.stored == 50)
    offer(log)
    wait_until(lambda: log.counts.stored == 51)
    assert (log.num_waiting_rows, log._num_waiting_bytes) == (0, 0)
    assert len(logged(artifact_store)) == 51


def test_the_queue_is_bounded_in_bytes_too(make_log, artifact_store, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 1_000)
    monkeypatch.setattr(artifact_store.objects, "put", down)
    log = make_log()
    for _ in range(10):
        offer(log, num_bytes=300)
    assert (log.num_waiting_rows, log.counts.dropped) == (3, 7)


def test_a_write_whose_reply_was_lost_leaves_no_second_copy(make_log, artifact_store, monkeypatch):
    put, tried = artifact_store.objects.put, []

    def put_and_lose_the_first_reply(*arguments: object, **options: object) -> object:
        done = put(*arguments, **options)
        tried.append(arguments[1])
        if len(tried) == 1:
            down()
        return done

    monkeypatch.setattr(artifact_store.objects, "put", put_and_lose_the_first_reply)
    log = make_log()
    offer(log, 5)
    wait_until(lambda: log.counts.stored == 5)
    assert len(tried) == 2
    assert len(logged(artifact_store)) == 5


def test_offering_does_not_wait_for_a_store_that_hangs(make_log, artifact_store, monkeypatch):
    hanging, put = threading.Event(), artifact_store.objects.put
    started = threading.Event()

    def hang(*arguments: object, **options: object) -> object:
        started.set()
        hanging.wait()
        return put(*arguments, **options)

    monkeypatch.setattr(artifact_store.objects, "put", hang)
    log = make_log()
    offer(log)
    assert started.wait(10)
    for _ in range(100):
        offer(log)  # would never return if it waited for the put
    assert log.num_waiting_rows == 101
    hanging.set()
    wait_until(lambda: log.counts.stored == 101)


def test_what_waits_is_written_when_the_predictor_stops(artifact_store):
    log = PredictionLog(artifact_store, share=1, rows_per_hour=1_000, flush_seconds=3600)
    log.start()
    offer(log, 7)
    assert logged(artifact_store) == []
    log.stop()
    assert len(logged(artifact_store)) == 7


def test_many_rows_are_written_before_their_time(artifact_store):
    log = PredictionLog(artifact_store, share=1, rows_per_hour=10_000, flush_seconds=3600)
    log.start()
    try:
        offer(log, 256)
        offer(log, 256)
        wait_until(lambda: log.counts.stored == 512)
    finally:
        log.stop()


def test_counters_reach_the_events_log_and_texts_do_not(make_log, caplog):
    with caplog.at_level(logging.INFO, logger="millstream.services"):
        log = make_log(rows_per_hour=2)
        offer(log, 3, text="a secret sentence")
        wait_until(lambda: '"predictions logged"' in caplog.text)
    line = next(json.loads(record.message) for record in caplog.records if '"predictions logged"' in record.message)
    assert (line["rows"], line["offered"], line["stored"], line["over_hourly_limit"], line["dropped"]) == (2, 3, 2, 1, 0)
    assert "secret" not in caplog.text


FEEDBACK = {"id": "0" * 24, "item": 0, "label": "positive"}


def feedback(store: ArtifactStore) -> list[dict]:
    infos = store.objects.list(store.monitoring_bucket, keys.feedback_prefix("sentiment"))
    return [json.loads(line) for info in infos for line in store.objects.get(info.bucket, info.key).splitlines()]


def test_feedback_is_stored_before_it_is_accepted(s3_artifact_store, tmp_path):
    with Served(s3_artifact_store, tmp_path) as served:
        served.promote(seed=1)
        prediction_id = served.ask("sentiment", ITEMS)["id"]
        items = [{"id": prediction_id, "item": index, "label": label} for index, label in enumerate(["positive", "negative"])]
        response = served.client.post("/v1/sentiment/feedback", json={"items": items})
        assert (response.status_code, response.json()) == (202, {"name": "sentiment", "stored": 2})
        stored = feedback(s3_artifact_store)
    assert [{key: row[key] for key in ("id", "item", "label")} for row in stored] == items
    assert {row["name"] for row in stored} == {"sentiment"}


@pytest.mark.parametrize(
    ("item", "field", "told"),
    [
        ({**FEEDBACK, "label": "postive"}, "label", "must be one of ['negative', 'positive'], found \"postive\""),
        ({**FEEDBACK, "label": 1}, "label", "must be of type string, found 1"),
        ({**FEEDBACK, "item": -1}, "item", "minimum = 0, found -1"),
        ({**FEEDBACK, "item": 256}, "item", "maximum = 255, found 256"),
        ({**FEEDBACK, "item": "0"}, "item", 'must be of type integer, found "0"'),
        ({**FEEDBACK, "item": True}, "item", "must be of type integer, found true"),
        ({**FEEDBACK, "id": "abc"}, "id", "must have at least 24 characters"),
        ({"id": "0" * 24, "item": 0}, "", "must have 'label'"),
        ({**FEEDBACK, "text": "a"}, "", "has unknown fields ['text']"),
        ("positive", "", 'must be of type object, found "positive"'),
    ],
)
def test_wrong_feedback_is_refused_with_a_reason_and_none_of_it_is_stored(artifact_store, tmp_path, item, field, told):
    with Served(artifact_store, tmp_path) as served:
        served.promote(seed=1)
        response = served.client.post("/v1/sentiment/feedback", json={"items": [FEEDBACK, item]})
    assert response.status_code == 422
    problem = response.json()["problems"][0]
    assert (problem["item"], problem["field"]) == (1, field)
    assert told in problem["message"]
    assert feedback(artifact_store) == []


@pytest.mark.parametrize("body", [{"items": []}, {"items": [FEEDBACK] * 257}, {"labels": [FEEDBACK]}, []])
def test_feedback_of_the_wrong_form_or_size_is_refused(artifact_store, tmp_path, body):
    with Served(artifact_store, tmp_path) as served:
        served.promote(seed=1)
        assert served.client.post("/v1/sentiment/feedback", json=body).status_code == 422
    assert feedback(artifact_store) == []


def test_feedback_that_cannot_be_stored_is_handed_back(artifact_store, tmp_path, monkeypatch):
    with Served(artifact_store, tmp_path, log_share=0) as served:
        served.promote(seed=1)
        with monkeypatch.context() as patch:
            patch.setattr(artifact_store.objects, "put", down)
            refused = served.client.post("/v1/sentiment/feedback", json={"items": [FEEDBACK]})
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
            assert "send it again" in refused.json()["detail"]
        assert served.client.post("/v1/sentiment/feedback", json={"items": [FEEDBACK]}).status_code == 202
    assert len(feedback(artifact_store)) == 1


def test_feedback_on_an_unknown_model_is_refused_and_the_api_shows_what_it_takes(artifact_store, tmp_path):
    with Served(artifact_store, tmp_path) as served:
        served.promote(seed=1, name="stars", labels=("1", "2", "3"))
        assert served.client.post("/v1/sentiment/feedback", json={"items": [FEEDBACK]}).status_code == 404
        assert served.get("/v1/stars")["feedback_schema"]["properties"]["label"]["enum"] == ["1", "2", "3"]
        document = served.get("/openapi.json")
        assert "/v1/{name}/feedback" not in document["paths"]
        body = document["paths"]["/v1/stars/feedback"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["properties"]["items"]["items"] == {"$ref": "#/components/schemas/stars.feedback"}
        reply = document["paths"]["/v1/stars/predict"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert "id" in reply["required"]
