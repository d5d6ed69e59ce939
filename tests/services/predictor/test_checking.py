import json

import pytest

from ml.text_classification.codec import INPUT_SCHEMA
from services.predictor.checking import MAX_ITEMS, MAX_PROBLEMS_SHOWN, ItemChecker, RequestRefused, parse_items


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"items": [NaN]}', "NaN is not a JSON number"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "good"}', "one key \"items\", found an object with the keys ['text']"),
        (b'[{"text": "good"}]', "found a list of 1"),
        (b'{"items": [], "more": 1}', "['items', 'more']"),
        (b'{"items": {"text": "good"}}', "must be a list"),
        (b'{"items": []}', "1 to 256 entries, found 0"),
        (json.dumps({"items": [{"text": "a"}] * (MAX_ITEMS + 1)}).encode(), "found 257"),
    ],
)
def test_a_body_of_another_form_is_refused_with_what_was_found(body, expected):
    with pytest.raises(RequestRefused) as caught:
        parse_items(body)
    assert caught.value.status == 422
    assert expected in caught.value.detail


def test_a_body_of_the_right_form_gives_its_items():
    assert parse_items(b'{"items": [{"text": "good"}, 3]}') == [{"text": "good"}, 3]


@pytest.mark.parametrize(
    ("item", "field", "expected"),
    [
        ("good", "", 'must be of type object, found "good"'),
        ({}, "", "must have 'text'"),
        ({"text": 3}, "text", "must be of type string, found 3"),
        ({"text": None}, "text", "must be of type string, found null"),
        ({"text": ""}, "text", "at least 1 characters"),
        ({"text": "x" * 100_001}, "text", "at most 100000 characters"),
        ({"text": "good", "txt": 1}, "", "unknown fields ['txt']"),
    ],
)
def test_a_wrong_item_is_named_with_its_field_and_the_value_found(item, field, expected):
    with pytest.raises(RequestRefused) as caught:
        ItemChecker(INPUT_SCHEMA).check([{"text": "fine"}, item])
    problem = caught.value.problems[0]
    assert (caught.value.status, problem["item"], problem["field"]) == (422, 1, field)
    assert expected in problem["message"]
    assert caught.value.detail.startswith("item 1")


def test_a_long_value_is_not_quoted_whole():
    with pytest.raises(RequestRefused) as caught:
        ItemChecker(INPUT_SCHEMA).check([{"text": "secret " * 20_000}])
    assert len(json.dumps(caught.value.problems)) < 500


def test_the_number_of_problems_shown_is_bounded():
    with pytest.raises(RequestRefused) as caught:
        ItemChecker(INPUT_SCHEMA).check([{}] * MAX_ITEMS)
    assert len(caught.value.problems) == MAX_PROBLEMS_SHOWN


def test_rules_of_any_schema_are_checked():
    schema = {
        "type": "object",
        "properties": {"user": {"type": "integer", "minimum": 1}, "seen": {"type": "array", "items": {"enum": [1, 2]}}},
    }
    ItemChecker(schema).check([{"user": 4, "seen": [1, 2]}])
    with pytest.raises(RequestRefused) as caught:
        ItemChecker(schema).check([{"user": 0, "seen": [1, 3]}])
    assert {problem["field"] for problem in caught.value.problems} == {"user", "seen.1"}
