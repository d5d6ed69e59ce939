"""Whole checks over a champion with real records: what they find, what they say, and when they make an event."""

import json
import time
from datetime import UTC, datetime, timedelta

import pytest

from ml.errors import DataError, WriteConflictError
from ml.monitoring.check import CheckOutcome, compare_window, conclude, open_window, run_check
from ml.monitoring.config import DriftRequest
from ml.monitoring.report import render_check, render_check_markdown, verdict
from ml.monitoring.state import CheckState, clear_state, mark_taken, read_state
from ml.registry import Registry
from ml.storage import keys
from tests.ml.monitoring.champions import Champion, make_champion, noisy, wrong
from tests.ml.monitoring.text_sources import TextSource
from tests.ml.report.test_html import Page
from tests.tiny_bundles import build_tiny_bundle, tiny_version

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
DAY = timedelta(days=1)
REQUEST = DriftRequest(name="reviews")


@pytest.fixture
def champion(artifact_store) -> Champion:
    return make_champion(artifact_store, TextSource(1).draw(1_200))


def check(champion: Champion, now: datetime = NOW, request: DriftRequest = REQUEST) -> CheckOutcome:
    return run_check(champion.store, request, now=now)


def changed(outcome: CheckOutcome) -> set[tuple[str, str]]:
    return {(finding.sample, finding.test) for finding in outcome.comparison.findings if finding.changed}


def test_without_champion_there_is_nothing_to_check(artifact_store):
    outcome = run_check(artifact_store, REQUEST, now=NOW)
    assert outcome.status == "no champion"
    assert read_state(artifact_store, "reviews") == CheckState()


def test_requests_of_the_same_source_are_no_change(champion):
    champion.answer(TextSource(2).draw(300), NOW)
    outcome = check(champion)
    assert outcome.status == "no change", outcome.reasons
    assert {finding.test for finding in outcome.comparison.findings} == {
        "length",
        "unknown words",
        "word frequencies",
        "meaning",
        "predicted classes",
        "confidence",
    }
    assert outcome.comparison.num_rows == {"requests": 300, "new data": 0}
    assert outcome.events == ()


def test_longer_requests_are_an_event_after_the_second_check_in_a_row_and_only_then(champion):
    events = []
    for day in range(4):
        now = NOW + day * DAY
        champion.answer(TextSource(10 + day, median_length=30).draw(300), now, prefix=f"{day}")
        outcome = check(champion, now)
        assert ("requests", "length") in changed(outcome)
        events.append(outcome.events)
        for event in outcome.events:
            mark_taken(champion.store, "reviews", event)
    assert [len(found) for found in events] == [0, 1, 0, 0]
    (event,) = events[1]
    assert event.id == f"drift.detected:reviews:{champion.version.version}:20260302T120000Z"
    assert "length of requests: median" in event.summary


def test_a_change_that_goes_again_is_no_event(champion):
    for day, length in enumerate([30, 15, 30, 15]):
        now = NOW + day * DAY
        champion.answer(TextSource(10 + day, median_length=length).draw(300), now, prefix=f"{day}")
        assert check(champion, now).events == ()


def test_no_row_counts_in_two_checks(champion):
    champion.answer(TextSource(3, median_length=30).draw(300), NOW)
    assert check(champion).status == "changed"
    again = check(champion, NOW + timedelta(hours=1))
    assert again.status == "not enough rows"
    assert again.state.drift.num_checks == 1
    assert again.events == ()


def test_too_few_rows_are_said_and_kept_for_the_next_check(champion):
    champion.answer(TextSource(2).draw(150), NOW, prefix="a")
    first = check(champion)
    assert first.status == "not enough rows"
    assert "150 distinct texts, 200 are needed" in first.reasons[0]
    champion.answer(TextSource(3).draw(100), NOW + timedelta(hours=1), prefix="b", spread_minutes=30)
    second = check(champion, NOW + timedelta(hours=1))
    assert (second.status, second.comparison.num_rows["requests"]) == ("no change", 250)


def test_a_text_that_is_sent_again_and_again_counts_once(champion):
    champion.answer(TextSource(2).draw(220) + ["the same probe of a monitor, over and over again"] * 500, NOW)
    outcome = check(champion)
    assert (outcome.status, outcome.comparison.num_rows["requests"]) == ("no change", 221)


def test_other_answers_to_the_same_kind_of_texts_are_found(champion):
    texts = TextSource(2).draw(1_500)
    replies = champion.predictor.predict([{"text": text} for text in texts])
    one_sided = [text for text, reply in zip(texts, replies, strict=True) if reply["label"] == "positive"][:250]
    champion.answer(one_sided, NOW)
    assert ("requests", "predicted classes") in changed(check(champion))


def test_answers_of_another_version_are_not_compared_with_those_of_the_champion(champion):
    champion.answer(TextSource(2).draw(250), NOW, version="20260101T000000Z-00000000")
    tests = {finding.test for finding in check(champion).comparison.findings}
    assert "length" in tests
    assert not tests & {"predicted classes", "confidence"}


def test_new_data_is_compared_with_its_classes(champion):
    now = datetime.now(UTC) + timedelta(minutes=1)
    same = TextSource(2).draw(300)
    champion.put_data("same.csv", same, noisy([row["label"] for row in champion.predictor.predict([{"text": text} for text in same])]))
    quiet = check(champion, now)
    assert (quiet.status, quiet.comparison.num_rows["new data"]) == ("no change", 300)
    assert {finding.test for finding in quiet.comparison.findings} >= {"length", "classes"}
    assert check(champion, now).comparison.num_rows["new data"] == 0, "objects of the last check are not new again"

    clear_state(champion.store, "reviews")
    champion.store.objects.delete(champion.store.datasets_bucket, "reviews/same.csv")
    champion.put_data("other.csv", TextSource(3, vocabulary="x").draw(300), ["positive"] * 290 + ["negative"] * 10)
    champion.put_data("no_label.csv", ["a"] * 3)
    champion.store.objects.put(champion.store.datasets_bucket, "reviews/wrong.csv", b"a,b\n1,2\n")
    loud = check(champion, now)
    assert {("new data", "unknown words"), ("new data", "classes")} <= changed(loud)
    assert loud.comparison.num_rows["new data"] == 301
    assert any("wrong.csv" in note and "new data was not compared" in note for note in loud.comparison.notes)


def test_data_older_than_the_training_is_not_new(artifact_store):
    trained = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    champion = make_champion(artifact_store, TextSource(1).draw(600), trained=trained)
    champion.put_data("old.csv", TextSource(3, vocabulary="x").draw(300))
    assert check(champion, trained + timedelta(hours=1)).comparison.num_rows["new data"] == 0


def label(champion: Champion, share_right: float, num_labels: int, now: datetime, prefix: str) -> None:
    rows = champion.answer(TextSource(7).draw(num_labels), now, prefix=prefix)
    num_right = round(share_right * num_labels)
    labels = [row.reply["label"] if place < num_right else wrong(row.reply["label"]) for place, row in enumerate(rows)]
    champion.tell(rows, labels, now - timedelta(minutes=2), part=prefix)


def test_a_metric_that_dropped_twice_is_an_event_with_its_numbers(champion):
    assert champion.version.metrics["accuracy"] == pytest.approx(0.9, abs=0.01)
    outcomes = []
    for day in range(2):
        label(champion, 0.7, 150, NOW + day * DAY, prefix=f"{day}")
        outcomes.append(check(champion, NOW + day * DAY, REQUEST.model_copy(update={"min_rows": 1_000})))
    assert [outcome.live_metric.dropped for outcome in outcomes if outcome.live_metric] == [True, True]
    live = outcomes[0].live_metric
    assert live is not None and live.value is not None
    assert (live.num_labels, live.value.value) == (150, pytest.approx(0.7))
    # A binomial interval of 150 labels, within the jitter of a bootstrap.
    assert (live.value.low, live.value.high) == (pytest.approx(0.7 - 0.073, abs=0.015), pytest.approx(0.7 + 0.073, abs=0.015))
    assert [len(outcome.events) for outcome in outcomes] == [0, 1]
    (event,) = outcomes[1].events
    assert (event.kind, event.id.split(":")[0]) == ("metric.dropped", "metric.dropped")
    assert "accuracy on 150 late labels 0.700" in event.summary


@pytest.mark.parametrize(("share_right", "num_labels", "dropped"), [(0.9, 150, False), (0.86, 150, False), (0.7, 90, None)])
def test_no_drop_within_chance_or_tolerance_and_no_word_on_few_labels(champion, share_right, num_labels, dropped):
    label(champion, share_right, num_labels, NOW, prefix="a")
    outcome = check(champion)
    assert outcome.live_metric is not None
    assert outcome.live_metric.dropped is dropped
    assert outcome.events == ()


def test_labels_that_come_days_later_find_their_answers_and_count_once(champion):
    rows = champion.answer(TextSource(7).draw(150), NOW - 5 * DAY)
    champion.tell(rows, [wrong(row.reply["label"]) for row in rows], NOW - timedelta(hours=1))
    first = check(champion)
    assert first.live_metric is not None
    assert (first.live_metric.num_labels, first.live_metric.dropped) == (150, True)
    second = check(champion, NOW + DAY)
    assert second.live_metric is not None
    assert (second.live_metric.num_labels, second.state.metric.num_checks) == (0, 1)


def test_labels_without_a_logged_answer_of_the_champion_are_counted_apart(champion):
    rows = champion.answer(TextSource(7).draw(10), NOW)
    others = champion.answer(TextSource(8).draw(20), NOW, prefix="q", version="20260101T000000Z-00000000")
    champion.tell([*rows, *others], ["positive"] * 30, NOW - timedelta(hours=1))
    live = check(champion).live_metric
    assert live is not None
    assert (live.num_labels, live.num_unmatched) == (10, 20)


def test_another_champion_ends_the_row(champion):
    for day in range(2):
        now = NOW + day * DAY
        champion.answer(TextSource(10 + day, median_length=30).draw(300), now, prefix=f"{day}")
        outcome = check(champion, now)
        if day == 0:
            champion = make_champion(champion.store, TextSource(1).draw(1_200), bundle_seed=19, trained=NOW + timedelta(hours=1))
    assert changed(outcome)
    assert (outcome.state.drift.num_checks, outcome.events) == (1, ())


def test_the_same_check_concluded_again_counts_once(champion):
    champion.answer(TextSource(3, median_length=30).draw(300), NOW)
    window = open_window(champion.store, REQUEST, now=NOW)
    assert window is not None
    comparison, live = compare_window(champion.store, REQUEST, window)
    first = conclude(champion.store, REQUEST, window, comparison, live)
    assert conclude(champion.store, REQUEST, window, comparison, live) == first
    assert first.state.drift.num_checks == 1


def test_of_two_checks_at_once_one_is_refused(champion):
    champion.answer(TextSource(3, median_length=30).draw(300), NOW)
    slow = open_window(champion.store, REQUEST, now=NOW)
    assert slow is not None
    check(champion, NOW + timedelta(seconds=5))
    comparison, live = compare_window(champion.store, REQUEST, slow)
    with pytest.raises(WriteConflictError, match="run one check at a time"):
        conclude(champion.store, REQUEST, slow, comparison, live)
    assert read_state(champion.store, "reviews").drift.num_checks == 1


def test_a_champion_whose_run_left_no_manifest_is_an_error_that_says_so(champion):
    champion.store.objects.delete(champion.store.runs_bucket, keys.run_file(champion.version.run_id, "manifest.json"))
    with pytest.raises(DataError, match=r"left no manifest.*train the model again"):
        check(champion)


def test_a_champion_that_no_run_made_is_an_error_that_says_so(artifact_store, tmp_path):
    build_tiny_bundle(tmp_path, seed=1)
    version = tiny_version(artifact_store, tmp_path, name="reviews")
    registry = Registry(artifact_store)
    registry.add_version(version)
    registry.promote("reviews", version.version, "test", "because")
    with pytest.raises(DataError, match="'test-run' is no run's id"):
        run_check(artifact_store, REQUEST, now=NOW)


def test_the_request_is_bounded_and_described():
    schema = DriftRequest.model_json_schema()
    assert all("description" in field and "default" in field for field in schema["properties"].values())
    for wrong_values in ({"min_rows": 10}, {"significance": 0.5}, {"num_repeats": 0}, {"min_rows": 600, "max_rows": 500}, {"nmae": "a"}):
        with pytest.raises(ValueError):
            DriftRequest(**wrong_values)


HOSTILE = "<img/src=http://example.com/x.png> | `code` [link](http://example.com) $x$"


@pytest.mark.parametrize("length", [15, 30])
def test_the_page_says_what_was_found_and_asks_for_nothing_from_elsewhere(champion, length):
    champion.answer([f"{text} {HOSTILE}" for text in TextSource(3, median_length=length).draw(300)], NOW)
    label(champion, 0.5, 120, NOW - timedelta(minutes=3), prefix="l")
    outcome = check(champion)
    html = render_check(outcome)
    page = Page(html)
    assert verdict(outcome) in page.text
    for finding in outcome.comparison.findings:
        assert finding.test in page.text
    assert "late labels" in page.text
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert sources
    assert all(source and source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "default-src 'none'" in html


def test_markdown_of_the_run_page_takes_no_markup_from_callers(champion):
    champion.answer([f"{text} {HOSTILE}" for text in TextSource(3).draw(300)], NOW)
    text = render_check_markdown(check(champion))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6
    assert all(len(row.replace("\\|", "").split("|")) == 9 for row in rows)
    assert "<img" not in text.replace("\\<", "")
    assert text.count("![") == 1
    assert "](data:image/svg+xml;base64," in text


def test_every_status_has_a_page(champion, artifact_store):
    for outcome in (run_check(artifact_store, DriftRequest(name="unknown"), now=NOW), check(champion)):
        assert verdict(outcome) in Page(render_check(outcome)).text
        assert verdict(outcome) in render_check_markdown(outcome)


def test_the_outcome_is_json_and_back(champion):
    champion.answer(TextSource(3, median_length=30).draw(300), NOW)
    outcome = check(champion)
    assert CheckOutcome.model_validate(json.loads(outcome.model_dump_json())) == outcome


def test_a_check_over_the_real_store(s3_artifact_store):
    champion = make_champion(s3_artifact_store, TextSource(1).draw(600))
    champion.answer(TextSource(3, median_length=30).draw(300), NOW)
    started = time.perf_counter()
    outcome = check(champion)
    print(f"check of 300 requests: {time.perf_counter() - started:.2f} s")
    assert ("requests", "length") in changed(outcome)
    assert read_state(s3_artifact_store, "reviews").drift.num_checks == 1
