import json
import threading
import time

import pytest

import ml.deployment
from ml.deployment import check_in_isolation, check_reply, deploy
from ml.errors import BundleError, DeploymentError, StorageUnavailableError
from ml.predictor import load_predictor
from ml.registry import Registry
from tests.services.predictor.serving import Served
from tests.tiny_bundles import WORDS, build_tiny_bundle, tiny_version

REQUESTS = [{"text": f"{first} {second}"} for first in WORDS[2:] for second in WORDS[2:8]]


def model(folder, *, seed, labels=("negative", "positive")):
    """A bundle folder and its held-out rows with the right replies."""
    build_tiny_bundle(folder, seed=seed, labels=labels)
    return folder, list(zip(REQUESTS, load_predictor(folder).predict(REQUESTS), strict=True))


def run_deploy(registry, store, folder, held_out, *, second=0, url=None, timeout_seconds=30):
    version = tiny_version(store, folder, second=second)
    return version.version, deploy(
        registry, version, folder, held_out, predictor_url=url, who="test", why="because", timeout_seconds=timeout_seconds
    )


def spoil(held_out, *, row, by):
    """The same rows, with one expected probability moved."""
    request, reply = held_out[row]
    wrong = json.loads(json.dumps(reply))
    wrong["probabilities"]["negative"] += by
    return [*held_out[:row], (request, wrong), *held_out[row + 1 :]]


@pytest.fixture
def served(artifact_store, tmp_path):
    with Served(artifact_store, tmp_path / "predictor") as running:
        yield running


def test_a_version_becomes_champion_once_the_predictor_answers_as_it_did_offline(served, tmp_path):
    folder, held_out = model(tmp_path / "one", seed=1)
    version, deployment = run_deploy(served.registry, served.store, folder, held_out, url=served.url)
    assert (deployment.status, deployment.version, deployment.previous_version) == ("deployed", version, None)
    assert deployment.predict_url == f"{served.url}/v1/sentiment/predict"
    assert served.client.post(deployment.predict_url, json={"items": REQUESTS[:3]}).json()["replies"] == [pair[1] for pair in held_out[:3]]

    second_folder, second_rows = model(tmp_path / "two", seed=2)
    second, deployment = run_deploy(served.registry, served.store, second_folder, second_rows, second=1, url=served.url)
    assert (deployment.status, deployment.previous_version) == ("deployed", version)
    aliases = served.registry.read_aliases("sentiment")
    assert (aliases.champion, aliases.previous, aliases.candidate) == (second, version, None)


def test_the_same_bundle_again_writes_no_version_and_moves_no_alias(served, tmp_path):
    folder, held_out = model(tmp_path / "one", seed=1)
    version, _ = run_deploy(served.registry, served.store, folder, held_out, url=served.url)
    before = served.registry.read_aliases("sentiment")
    _, again = run_deploy(served.registry, served.store, folder, held_out, second=1, url=served.url)
    assert (again.status, again.version) == ("unchanged", version)
    assert served.registry.read_aliases("sentiment") == before
    assert served.registry.list_versions("sentiment") == [version]


def test_a_model_with_other_labels_is_refused_and_told_to_take_another_name(artifact_store, tmp_path):
    registry = Registry(artifact_store)
    version, _ = run_deploy(registry, artifact_store, *model(tmp_path / "one", seed=1))
    other, held_out = model(tmp_path / "two", seed=2, labels=("bad", "fine", "good"))
    _, deployment = run_deploy(registry, artifact_store, other, held_out, second=1)
    assert (deployment.status, deployment.version) == ("rejected", None)
    assert "NAME=sentiment-2" in deployment.reasons[0] and "'fine'" in deployment.reasons[0]
    assert registry.read_aliases("sentiment").champion == version
    assert registry.list_versions("sentiment") == [version]


def test_a_version_that_answers_otherwise_in_a_fresh_process_is_never_promoted(artifact_store, tmp_path):
    registry = Registry(artifact_store)
    folder, held_out = model(tmp_path / "one", seed=1)
    _, deployment = run_deploy(registry, artifact_store, folder, spoil(held_out, row=17, by=3e-5))
    assert deployment.status == "failed"
    assert "row 17 of 84" in deployment.reasons[0] and "off by 3e-05" in deployment.reasons[0]
    aliases = registry.read_aliases("sentiment")
    assert (aliases.champion, aliases.candidate) == (None, None)


def test_a_difference_within_the_tolerance_is_accepted(artifact_store, tmp_path):
    folder, held_out = model(tmp_path / "one", seed=1)
    _, deployment = run_deploy(Registry(artifact_store), artifact_store, folder, spoil(held_out, row=17, by=5e-6))
    assert deployment.status == "deployed"


@pytest.mark.parametrize("with_champion", [False, True])
def test_a_version_that_the_predictor_cannot_load_is_withdrawn_and_the_old_one_serves_on(served, tmp_path, with_champion):
    champion = before = None
    if with_champion:
        run_deploy(served.registry, served.store, *model(tmp_path / "zero", seed=3), url=served.url)
        champion, _ = run_deploy(served.registry, served.store, *model(tmp_path / "one", seed=1), second=1, url=served.url)
        before = served.registry.read_aliases("sentiment")
    folder, held_out = model(tmp_path / "two", seed=2)
    version = tiny_version(served.store, folder, second=2)
    bucket, _, key = version.bundle.files["model.onnx"].uri.removeprefix("s3://").partition("/")
    served.store.objects.put(bucket, key, b"damaged")

    deployment = deploy(served.registry, version, folder, held_out, predictor_url=served.url, who="test", why="because", timeout_seconds=30)
    assert deployment.status == "failed"
    assert "cannot load" in deployment.reasons[0] and "sha256" in deployment.reasons[0]
    aliases = served.registry.read_aliases("sentiment")
    assert (aliases.champion, aliases.previous) == (champion, before.previous if before else None)
    assert "failed its check" in aliases.why
    if champion:
        assert served.ask("sentiment", REQUESTS[:3])["version"] == champion


def test_a_predictor_that_answers_otherwise_gets_the_old_champion_back(served, tmp_path, monkeypatch):
    champion, _ = run_deploy(served.registry, served.store, *model(tmp_path / "one", seed=1), url=served.url)
    folder, held_out = model(tmp_path / "two", seed=2)
    # What a fresh process checks is right, so only the predictor's own answer can tell.
    monkeypatch.setattr(ml.deployment, "check_in_isolation", lambda *_: None)
    _, deployment = run_deploy(served.registry, served.store, folder, spoil(held_out, row=80, by=-0.1), second=1, url=served.url)
    assert deployment.status == "failed"
    assert "row 80 of 84" in deployment.reasons[0] and f"back at {champion}" in deployment.reasons[0]
    assert served.registry.read_aliases("sentiment").champion == champion


def test_a_predictor_that_is_not_there_is_said_and_the_alias_goes_back(artifact_store, tmp_path, monkeypatch):
    monkeypatch.setattr(ml.deployment, "check_in_isolation", lambda *_: None)
    registry = Registry(artifact_store)
    folder, held_out = model(tmp_path / "one", seed=1)
    _, deployment = run_deploy(registry, artifact_store, folder, held_out, url="http://127.0.0.1:9", timeout_seconds=1)
    assert deployment.status == "failed"
    assert "http://127.0.0.1:9" in deployment.reasons[0] and "ConnectError" in deployment.reasons[0]
    assert registry.read_aliases("sentiment").champion is None


def test_an_interrupted_check_puts_the_alias_back(artifact_store, tmp_path, monkeypatch):
    registry = Registry(artifact_store)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ml.deployment, "check_served", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_deploy(registry, artifact_store, *model(tmp_path / "one", seed=1), url="http://127.0.0.1:9")
    assert registry.read_aliases("sentiment").champion is None


def test_a_champion_that_somebody_else_made_meanwhile_is_left_alone(served, tmp_path, monkeypatch):
    folder, held_out = model(tmp_path / "one", seed=1)
    others = tiny_version(served.store, model(tmp_path / "two", seed=2)[0], second=1)

    def overtaken(*_: object) -> None:
        served.registry.add_version(others)
        served.registry.promote("sentiment", others.version, "somebody else", "was faster")
        raise DeploymentError("does not answer")

    monkeypatch.setattr(ml.deployment, "check_served", overtaken)
    with pytest.raises(DeploymentError, match="somebody else"):
        run_deploy(served.registry, served.store, folder, held_out, url=served.url)
    assert served.registry.read_aliases("sentiment").champion == others.version


def test_requests_are_answered_while_a_deployment_runs(served, tmp_path):
    run_deploy(served.registry, served.store, *model(tmp_path / "one", seed=1), url=served.url)
    stop, failures, count = threading.Event(), [], 0

    def keep_asking() -> None:
        nonlocal count
        while not stop.is_set():
            response = served.client.post("/v1/sentiment/predict", json={"items": REQUESTS[:5]})
            count += 1
            if response.status_code != 200:
                failures.append(response.text)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    _, deployment = run_deploy(served.registry, served.store, *model(tmp_path / "two", seed=2), second=1, url=served.url)
    stop.set()
    asking.join()
    assert (deployment.status, failures) == ("deployed", [])
    assert count > 10


def test_a_fresh_process_that_fails_says_why(tmp_path):
    folder, held_out = model(tmp_path / "one", seed=1)
    (folder / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(DeploymentError, match=r"model\.onnx is not the file that was bundled"):
        check_in_isolation(folder, REQUESTS, [pair[1] for pair in held_out])


def test_a_fresh_process_that_takes_too_long_is_ended(tmp_path):
    folder, held_out = model(tmp_path / "one", seed=1)
    started = time.monotonic()
    with pytest.raises(DeploymentError, match=r"did not answer 84 requests in 0.05 s"):
        check_in_isolation(folder, REQUESTS, [pair[1] for pair in held_out], timeout_seconds=0.05)
    assert time.monotonic() - started < 5


def test_texts_with_unusual_line_ends_are_one_request_each(tmp_path):
    folder, _ = model(tmp_path / "one", seed=1)
    requests = [{"text": "good\u2028bad\x85film"}, {"text": "great\r\nfilm\x0b"}]
    check_in_isolation(folder, requests, load_predictor(folder).predict(requests))


def test_a_bundle_that_is_not_the_version_is_not_deployed(artifact_store, tmp_path):
    version = tiny_version(artifact_store, model(tmp_path / "one", seed=1)[0])
    other, held_out = model(tmp_path / "two", seed=2)
    with pytest.raises(BundleError, match="is not the bundle of"):
        deploy(Registry(artifact_store), version, other, held_out, predictor_url=None, who="test", why="because")


def test_a_store_that_fails_after_the_promotion_is_an_error_and_the_alias_goes_back(served, tmp_path, monkeypatch):
    def lose_store(*_: object) -> None:
        raise StorageUnavailableError("the store went away")

    monkeypatch.setattr(ml.deployment, "check_served", lose_store)
    with pytest.raises(StorageUnavailableError):
        run_deploy(served.registry, served.store, *model(tmp_path / "one", seed=1), url=served.url)
    assert served.registry.read_aliases("sentiment").champion is None


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ({"a": 0.5, "more": 1}, {"a": 0.500009}, None),
        ({"a": [1, {"b": "x"}]}, {"a": [1, {"b": "x"}]}, None),
        ({"a": 0.5}, {"a": 0.50002}, "reply.a is 0.5, expected 0.50002, off by 2e-05"),
        ({"a": float("nan")}, {"a": 0.5}, "reply.a is nan"),
        ({"a": float("nan")}, {"a": float("nan")}, "reply.a is nan"),
        ({}, {"a": 0.5}, "reply.a is missing"),
        ({"a": "x"}, {"a": "y"}, "reply.a is 'x', expected 'y'"),
        ({"a": True}, {"a": 1}, "reply.a is True"),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, "expected 3 entries"),
        ({"a": [1, 2.1]}, {"a": [1, 2]}, "reply.a[1] is 2.1"),
        ([], {"a": 1}, "expected an object"),
    ],
)
def test_what_differs_between_two_replies_is_said(found, wanted, expected):
    difference = check_reply(found, wanted)
    assert (difference is None) == (expected is None)
    assert expected is None or expected in difference


def test_chunks_hold_every_request_once_and_keep_the_limits():
    requests = [{"text": "x" * 1000}] * 130 + [{"text": "y" * 600_000}] + [{"text": "z" * 300_000}] * 3
    chunks = list(ml.deployment._chunks(requests))
    assert [request for _, chunk in chunks for request in chunk] == requests
    assert [first for first, _ in chunks] == [sum(len(chunk) for _, chunk in chunks[:index]) for index in range(len(chunks))]
    assert all(len(chunk) <= ml.deployment.HTTP_CHUNK_ITEMS for _, chunk in chunks)
    assert all(len(chunk) == 1 or len(json.dumps(chunk)) < 510_000 for _, chunk in chunks)
