import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.event_bridge.parsing import EventRefused
from services.event_bridge.store_events import read_notification, to_event

BUCKET = "millstream-datasets"
# Sent by `weed mini` 4.48 on put_object, remove_object and `fs.mv`.
SEAWEEDFS = json.loads((Path(__file__).parent / "seaweedfs_payloads.json").read_text(encoding="utf-8"))
# The example of AWS's documentation of the notification's structure, with names of ours.
S3 = {
    "Records": [
        {
            "eventVersion": "2.1",
            "eventSource": "aws:s3",
            "awsRegion": "us-west-2",
            "eventTime": "2026-01-02T03:04:05.678Z",
            "eventName": "ObjectCreated:Put",
            "userIdentity": {"principalId": "AIDAJDPLRKLG7UEXAMPLE"},
            "s3": {
                "s3SchemaVersion": "1.0",
                "configurationId": "testConfigRule",
                "bucket": {"name": BUCKET, "ownerIdentity": {"principalId": "A3NL1KOZZKExample"}, "arn": f"arn:aws:s3:::{BUCKET}"},
                "object": {
                    "key": "sentiment/week+1/%C3%BC%2B1.csv",
                    "size": 1024,
                    "eTag": "d41d8cd98f00b204e9800998ecf8427e",
                    "versionId": "096fKKXTRTtl3on89fVO.nfljtsv6qko",
                    "sequencer": "0055AED6DCD90281E5",
                },
            },
        }
    ]
}


def changed(**fields: object) -> dict:
    """The S3 notification with other fields; those of the object when it has them."""
    content = json.loads(json.dumps(S3))
    record = content["Records"][0]
    for name, value in fields.items():
        if name == "bucket":
            record["s3"]["bucket"]["name"] = value
        elif name in record:
            record[name] = value
        else:
            record["s3"]["object"][name] = value
    return content


@pytest.mark.parametrize(
    ("payload", "key", "etag"),
    [
        ("a new object", "sentiment/a.csv", "980b7ebea4a2cc135e68f69d0950cd04"),
        ("an object written again", "sentiment/a.csv", "e12eca25276f87d5872e438bf7e9a185"),
        ("a new object with a difficult name", "sentiment/week 1/ü+1.csv", "f69f5b72bc79a92dc70c63c9aa142e36"),
        ("a multipart upload done", "sentiment/big.parquet", None),
        ("a renamed object", "sentiment/moved.csv", "e12eca25276f87d5872e438bf7e9a185"),
        ("an object of a renamed folder", "support/b.csv", "e12eca25276f87d5872e438bf7e9a185"),
    ],
)
def test_what_seaweedfs_sends_of_an_object_names_it(payload, key, etag):
    notification = read_notification(SEAWEEDFS[payload], BUCKET)
    assert notification.ignored == ()
    (landed,) = notification.landed
    assert (landed.bucket, landed.key) == (BUCKET, key)
    if etag is None:
        assert landed.etag.endswith("-2")  # of two parts
    else:
        assert landed.etag == etag
    event = to_event(landed)
    assert (event.kind, event.name, event.objects) == ("data.arrived", key.partition("/")[0], (f"s3://{BUCKET}/{key}",))
    assert event.occurred.timestamp() == SEAWEEDFS[payload]["message"]["new_entry"]["attributes"]["mtime"]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ("a deleted object", "deleted"),
        ("an upload part removed", "deleted"),
        ("a renamed folder", "a folder"),
        ("a new folder", "a folder"),
        ("a new bucket", "a folder"),
        ("a folder of upload parts", "a folder"),
        ("an upload part", "not below a model's name"),
        ("an empty object", "empty"),
        ("an object that is no data", "not readable"),
        ("another bucket", "another bucket"),
        ("the owner of a bucket", "empty"),
    ],
)
def test_what_seaweedfs_sends_of_anything_else_is_ignored(payload, reason):
    notification = read_notification(SEAWEEDFS[payload], BUCKET)
    assert (notification.landed, notification.ignored) == ((), (reason,))


def test_every_recorded_payload_is_looked_at():
    assert len(SEAWEEDFS) == 6 + 11


def test_a_repeated_delivery_is_the_same_event_and_another_write_is_not():
    def event_id(content: dict) -> str:
        return to_event(read_notification(content, BUCKET).landed[0]).id

    new = SEAWEEDFS["a new object"]
    assert event_id(new) == event_id(json.loads(json.dumps(new)))
    assert event_id(new) != event_id(SEAWEEDFS["an object written again"])
    again = json.loads(json.dumps(new))  # the same bytes, written later
    again["message"]["new_entry"]["chunks"][0]["modified_ts_ns"] += 1
    assert event_id(new) != event_id(again)
    assert event_id(S3) == event_id(changed())
    assert event_id(S3) != event_id(changed(sequencer="0055AED6DCD90281E6"))
    assert event_id(S3) != event_id(changed(eTag="0" * 32))


@pytest.mark.parametrize("name", ["ObjectCreated:Put", "s3:ObjectCreated:CompleteMultipartUpload", "s3:ObjectCreated:Copy"])
def test_an_s3_notification_names_the_object(name):
    (landed,) = read_notification(changed(eventName=name), BUCKET).landed
    assert (landed.key, landed.etag) == ("sentiment/week 1/ü+1.csv", "d41d8cd98f00b204e9800998ecf8427e")
    event = to_event(landed)
    assert event.objects == (f"s3://{BUCKET}/sentiment/week 1/ü+1.csv",)
    assert event.occurred == datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"eventName": "s3:ObjectRemoved:Delete"}, "deleted"),
        ({"eventName": "s3:ObjectAccessed:Get"}, "not a new object"),
        ({"bucket": "millstream-runs"}, "another bucket"),
        ({"key": "sentiment.csv"}, "not below a model's name"),
        ({"key": "Sentiment/a.csv"}, "not below a model's name"),
        ({"key": "sentiment/.hidden.csv"}, "not readable"),
        ({"key": "sentiment/"}, "not below a model's name"),
        ({"size": 0}, "empty"),
    ],
)
def test_other_s3_notifications_are_ignored(fields, reason):
    assert read_notification(changed(**fields), BUCKET).ignored == (reason,)


def test_every_record_of_an_s3_notification_counts():
    content = {"Records": S3["Records"] + changed(key="support/b.jsonl")["Records"] + changed(size=0)["Records"]}
    notification = read_notification(content, BUCKET)
    assert [to_event(landed).name for landed in notification.landed] == ["sentiment", "support"]
    assert notification.ignored == ("empty",)


def test_the_test_message_of_aws_is_no_error():
    content = {"Service": "Amazon S3", "Event": "s3:TestEvent", "Time": "2014-10-13T15:57:02.089Z", "Bucket": BUCKET}
    assert read_notification(content, BUCKET).ignored == ("a test",)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"kind": "data.arrived", "name": "sentiment"},
        {"Records": [{}]},
        {"Records": ["x"]},
        {"Records": [{"eventName": 7}]},
        changed(eventTime="yesterday"),
        changed(key=None),
        {"key": "/buckets/b/k", "message": {"new_entry": {}, "new_parent_path": "/buckets"}},
        {"key": "/buckets/b/k", "message": {"new_entry": {"name": "k.csv", "attributes": {"mtime": "soon"}}}},
        {"key": "/buckets/b/k", "message": {"new_entry": {"name": "k.csv", "extended": {"Seaweed-X-Amz-ETag": "?"}}}},
        {"key": "/buckets/b/k", "message": {"new_entry": {"name": "k.csv", "attributes": {"mtime": 1e30}}}},
    ],
)
def test_what_is_of_neither_format_is_refused(content):
    with pytest.raises(EventRefused) as refused:
        read_notification(content, BUCKET)
    assert (refused.value.status, refused.value.reason) == (422, "not a store event")
