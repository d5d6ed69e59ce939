from datetime import UTC, datetime, timedelta

import pytest

from ml.monitoring.logged import find_predictions, read_feedback, read_predictions
from ml.monitoring.records import MAX_REQUEST_BYTES, MAX_TEXT_CHARACTERS, cut_request, to_line
from ml.storage import keys
from tests.ml.monitoring.champions import make_champion
from tests.ml.monitoring.text_sources import TextSource

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def champion(artifact_store):
    return make_champion(artifact_store, TextSource(1).draw(100))


def test_only_rows_of_the_window_are_read_in_order_of_time(champion):
    rows = champion.answer(TextSource(2).draw(120), NOW, spread_minutes=120)
    since, until = NOW - HOUR, NOW - timedelta(minutes=10)
    found = read_predictions(champion.store, "reviews", since, until, max_rows=1_000)
    assert {row.id for row in found} == {row.id for row in rows if since <= row.answered < until}
    assert [row.time for row in found] == sorted(row.time for row in found)
    assert found[0] == next(row for row in rows if row.id == found[0].id)
    assert read_predictions(champion.store, "others", since, until, max_rows=1_000) == []


def test_of_more_rows_than_wanted_whole_objects_are_left_out(champion):
    for part in range(10):
        champion.answer(TextSource(part).draw(20), NOW, prefix=f"{part}")
    found = read_predictions(champion.store, "reviews", NOW - HOUR * 2, NOW, max_rows=50)
    assert 50 <= len(found) <= 70


def test_a_window_over_midnight_is_read_on_both_days(champion):
    midnight = datetime(2026, 3, 2, tzinfo=UTC)
    champion.answer(TextSource(2).draw(60), midnight + timedelta(minutes=30))
    found = read_predictions(champion.store, "reviews", midnight - HOUR, midnight + HOUR, max_rows=1_000)
    assert {row.answered.day for row in found} == {1, 2}
    assert len(found) == 60


def test_a_line_that_cannot_be_read_is_left_out_and_told(champion, caplog):
    champion.answer(["a good film"], NOW)
    key = keys.prediction_log("reviews", f"{NOW - HOUR:%Y-%m-%d}", f"{NOW - HOUR:%H}", "broken")
    champion.store.objects.put(champion.store.monitoring_bucket, key, b'not JSON\n{"id": 1}\n[]\n')
    assert len(read_predictions(champion.store, "reviews", NOW - HOUR, NOW, max_rows=10)) == 1
    assert caplog.text.count("is left out") == 3


def test_the_last_label_told_of_a_reply_counts(champion):
    rows = champion.answer(["a good film", "bad"], NOW)
    champion.tell(rows, ["positive", "negative"], NOW, part="a")
    champion.tell(rows[:1], ["negative"], NOW + timedelta(minutes=1), part="b")
    champion.tell(rows[:1], ["positive"], NOW - timedelta(days=3), part="c")
    told = read_feedback(champion.store, "reviews", NOW - HOUR, NOW + HOUR)
    assert {place: item.label for place, item in told.items()} == {(rows[0].id, 0): "negative", (rows[1].id, 0): "negative"}


def test_answers_are_found_by_their_ids(champion, monkeypatch):
    old = champion.answer(["a good film"], NOW - timedelta(days=2), prefix="a")
    new = champion.answer(TextSource(3).draw(30), NOW, prefix="b")
    wanted = [(old[0].id, 0), (new[3].id, 0), ("0" * 24, 0), (new[4].id, 7)]
    found = find_predictions(champion.store, "reviews", wanted, NOW - timedelta(days=3), NOW)
    assert found == {(old[0].id, 0): old[0], (new[3].id, 0): new[3]}
    monkeypatch.setattr("ml.monitoring.logged.MAX_JOIN_ROWS", 10)
    assert (old[0].id, 0) not in find_predictions(champion.store, "reviews", wanted, NOW - timedelta(days=3), NOW)


def test_requests_are_cut_field_by_field():
    assert cut_request({"text": "short", "stars": 3}) == ({"text": "short", "stars": 3}, {})
    cut, marks = cut_request({"text": "x" * 5_000, "title": "y"})
    assert cut == {"text": "x" * MAX_TEXT_CHARACTERS, "title": "y"}
    assert marks == {"text": 5_000}
    many = {f"field{number}": "x" * 5_000 for number in range(20)}
    left_out, marks = cut_request(many)
    assert left_out is None
    assert marks[""] > MAX_REQUEST_BYTES


def test_a_line_is_one_line_whatever_the_text(champion):
    (row,) = champion.answer(["a\nfilm\u2028 with \x85 breaks"], NOW)
    assert to_line(row).count(b"\n") == 1
    assert read_predictions(champion.store, "reviews", NOW - HOUR, NOW, max_rows=10) == [row]
