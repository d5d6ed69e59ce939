import gc
import json
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from jsonschema import Draft202012Validator

from ml.errors import StorageUnavailableError
from ml.registry import Aliases
from services.predictor.checking import MAX_BODY_BYTES
from tests.services.predictor.serving import Served, wait_until

TEXTS = ["a great film", "awful and boring", "it is fine", "good", "the film was bad and it was boring"]
ITEMS = [{"text": text} for text in TEXTS]


@pytest.fixture
def served(artifact_store, tmp_path):
    with Served(artifact_store, tmp_path) as running:
        yield running


def test_replies_equal_the_bundle_asked_directly_and_keep_its_schema(served):
    version = served.promote(seed=1)
    content = served.ask("sentiment", ITEMS)
    assert (content["name"], content["version"]) == ("sentiment", version)
    assert content["replies"] == served.offline_replies(seed=1, items=ITEMS)
    schema = served.get("/v1/sentiment")["output_schema"]
    for reply in content["replies"]:
        Draft202012Validator(schema).validate(reply)


def test_every_name_with_a_champion_is_served_and_described(served):
    first = served.promote(seed=1)
    second = served.promote(seed=2, name="reviews", labels=("bad", "fine", "good"))
    assert {model["name"]: model["version"] for model in served.get("/v1")["models"]} == {"sentiment": first, "reviews": second}
    about = served.get("/v1/reviews")
    assert about["options"]["labels"] == ["bad", "fine", "good"]
    assert (about["champion"], about["error"]) == (second, None)
    assert about["alias_generation"] == served.registry.read_aliases("reviews").generation
    assert set(served.ask("reviews", ITEMS)["replies"][0]["probabilities"]) == {"bad", "fine", "good"}
    assert served.get("/readyz")["live"] == {"sentiment": first, "reviews": second}


def test_the_openapi_document_shows_the_schemas_of_what_is_live_now(served):
    assert "/v1/sentiment/predict" not in served.get("/openapi.json")["paths"]
    served.promote(seed=1)
    served.promote(seed=2, name="reviews", labels=("bad", "fine", "good"))
    document = served.get("/openapi.json")
    assert {"/v1/sentiment/predict", "/v1/reviews/predict", "/healthz", "/readyz"} <= set(document["paths"])
    assert "/v1/{name}/predict" not in document["paths"]
    assert document["components"]["schemas"]["reviews.reply"]["properties"]["label"]["enum"] == ["bad", "fine", "good"]
    operation = document["paths"]["/v1/reviews/predict"]["post"]
    items = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]["items"]
    assert items["items"] == {"$ref": "#/components/schemas/reviews.item"}


def test_wrong_requests_are_refused_with_a_reason_and_do_not_disturb_others(served):
    served.promote(seed=1)
    wrong = served.client.post("/v1/sentiment/predict", json={"items": [{"text": "good"}, {"txt": "bad"}]})
    assert wrong.status_code == 422
    assert [problem["item"] for problem in wrong.json()["problems"]] == [1, 1]
    unknown = served.client.post("/v1/sentimnet/predict", json={"items": ITEMS})
    assert (unknown.status_code, "live models: sentiment" in unknown.json()["detail"]) == (404, True)
    large = served.client.post("/v1/sentiment/predict", content=b" " * (MAX_BODY_BYTES + 1))
    assert large.status_code == 413
    chunked = served.client.post("/v1/sentiment/predict", content=(b" " * 2**16 for _ in range(20)))
    assert chunked.status_code == 413
    served.ask("sentiment", ITEMS)


def test_no_request_fails_while_versions_are_swapped_and_each_reply_is_of_its_version(served):
    versions = {served.add_version(seed=seed): served.offline_replies(seed=seed, items=ITEMS) for seed in (1, 2)}
    assert len({json.dumps(replies) for replies in versions.values()}) == 2
    first, second = versions
    served.make_champion(first)
    stop = threading.Event()

    def keep_asking() -> list[str]:
        seen = []
        with httpx.Client(base_url=served.url, trust_env=False) as client:
            while not stop.is_set():
                response = client.post("/v1/sentiment/predict", json={"items": ITEMS})
                assert response.status_code == 200, response.text
                content = response.json()
                assert content["replies"] == versions[content["version"]]
                seen.append(content["version"])
        return seen

    with ThreadPoolExecutor(6) as threads:
        asking = [threads.submit(keep_asking) for _ in range(6)]
        try:
            for version in [second, first] * 10:
                served.make_champion(version)
                time.sleep(0.05)
        finally:
            stop.set()
        seen = [future.result() for future in asking]
    assert sum(len(versions_seen) for versions_seen in seen) > 100
    assert all(set(versions_seen) == {first, second} for versions_seen in seen)


def test_a_champion_that_cannot_be_loaded_leaves_the_old_one_serving_and_is_shown(served):
    old = served.promote(seed=1)
    broken = served.add_version(seed=2)
    graph = served.registry.get_version("sentiment", broken).bundle.files["model.onnx"]
    bucket, _, key = graph.uri.removeprefix("s3://").partition("/")
    whole = served.store.objects.get(bucket, key)
    served.store.objects.put(bucket, key, b"damaged")

    served.move_champion(broken)
    about = wait_until(lambda: (shown := served.get("/v1/sentiment"))["error"] and shown)
    assert (about["version"], about["champion"], about["error"]["version"]) == (old, broken, broken)
    assert "sha256" in about["error"]["message"]
    ready = served.client.get("/readyz")
    assert ready.status_code == 503
    assert f"still serving {old}" in ready.json()["not_live"]["sentiment"]
    assert served.ask("sentiment", ITEMS)["version"] == old

    served.store.objects.put(bucket, key, whole)
    wait_until(lambda: served.client.get("/readyz").status_code == 200)
    assert served.ask("sentiment", ITEMS)["version"] == broken
    assert served.get("/v1/sentiment")["error"] is None


def test_a_store_that_is_down_leaves_everything_serving(served, monkeypatch):
    version = served.promote(seed=1)

    def down(*_: object, **__: object) -> None:
        raise StorageUnavailableError("the object store does not answer")

    with monkeypatch.context() as patch:
        for method in ("get", "get_with_info", "list", "stat"):
            patch.setattr(served.store.objects, method, down)
        wait_until(lambda: served.get("/readyz")["registry"] == "the object store does not answer")
        assert served.get("/readyz")["ready"] is True
        assert served.ask("sentiment", ITEMS)["version"] == version
    wait_until(lambda: served.get("/readyz")["registry"] == "reachable")


def test_a_name_without_champion_is_no_longer_served(served):
    served.registry.withdraw("sentiment", served.promote(seed=1), Aliases(), "test", "taken away")
    wait_until(lambda: served.client.post("/v1/sentiment/predict", json={"items": ITEMS}).status_code == 404)
    assert served.get("/v1")["models"] == []
    assert served.get("/readyz")["ready"] is True


def test_a_replaced_model_is_freed_and_its_folder_goes_with_the_next_swap(served):
    first = served.promote(seed=1)
    replaced = weakref.ref(served.models.snapshot.live["sentiment"])
    digest = served.models.snapshot.live["sentiment"].bundle_digest
    served.promote(seed=2)
    wait_until(lambda: gc.collect() is not None and replaced() is None)
    assert (served.folder / digest).is_dir(), "kept for a rollback"
    served.promote(seed=3)
    wait_until(lambda: not (served.folder / digest).exists())
    served.make_champion(first)
    assert served.ask("sentiment", ITEMS)["replies"] == served.offline_replies(seed=1, items=ITEMS)


def test_each_request_is_one_log_line_without_its_text(served, caplog):
    served.promote(seed=1)
    with caplog.at_level(logging.INFO, logger="millstream.services"):
        served.ask("sentiment", [{"text": "a secret sentence"}, {"text": "good"}])
        served.client.post("/v1/sentiment/predict", json={"items": [{"text": "", "secret": 1}]})
    lines = [json.loads(record.message) for record in caplog.records if '"predict"' in record.message]
    assert [(line["items"], line["status"]) for line in lines] == [(2, 200), (1, 422)]
    assert all(line["milliseconds"] > 0 for line in lines)
    assert "secret" not in caplog.text
