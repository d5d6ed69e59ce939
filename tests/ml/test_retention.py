"""What is kept for how long."""

import os
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ml.retention import CleanUpReport, CleanUpRequest, Garbage, clean_monitoring, join_reports, retained_runs, sum_up
from ml.storage import keys
from ml.storage.artifacts import ArtifactStore
from ml.storage.memory import MemoryStore
from tests.ml.stored_runs import all_keys

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def test_nothing_is_deleted_unless_asked_for():
    request = CleanUpRequest()
    assert request.dry_run and not request.delete_versions


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_runs": 0},
        {"keep_versions": 0},
        {"keep_run_days": -1},
        {"grace_hours": -1},
        {"monitoring_days": -1},
        {"log_megabytes": 0},
        {"keep": 3},
    ],
)
def test_what_is_out_of_bounds_is_refused(wrong: dict):
    with pytest.raises(ValidationError):
        CleanUpRequest.model_validate(wrong)


def test_every_field_of_the_form_is_described_and_has_a_default():
    properties = CleanUpRequest.model_json_schema()["properties"]
    assert all(field["description"] and "default" in field for field in properties.values())


@given(
    ages=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 100)), max_size=30),
    keep_runs=st.integers(1, 10),
    keep_run_days=st.integers(0, 100),
    grace_hours=st.integers(0, 1000),
    data=st.data(),
)
def test_runs_stay_when_they_are_the_last_or_young_or_needed(
    ages: list[tuple[str, int]], keep_runs: int, keep_run_days: int, grace_hours: int, data: st.DataObject
):
    request = CleanUpRequest(keep_runs=keep_runs, keep_run_days=keep_run_days, grace_hours=grace_hours)
    ages.sort(key=lambda age: -age[1])
    runs = {f"{number:04d}": (name, NOW - timedelta(days=days)) for number, (name, days) in enumerate(ages)}
    needed = set(data.draw(st.lists(st.sampled_from(sorted(runs)), unique=True))) if runs else set()
    kept = retained_runs(runs, needed, request, NOW)
    assert needed <= kept <= runs.keys()
    for name in "ab":
        of_name = [run_id for run_id in sorted(runs) if runs[run_id][0] == name]
        last, others = of_name[-keep_runs:], of_name[:-keep_runs]
        assert set(last) <= kept
        for run_id in others:
            age = NOW - runs[run_id][1]
            young = age <= timedelta(days=keep_run_days) or age <= timedelta(hours=grace_hours)
            assert (run_id in kept) == (young or run_id in needed)


def test_monitoring_data_goes_by_age_and_the_state_of_checks_stays(artifact_store: ArtifactStore, memory_store: MemoryStore):
    bucket = artifact_store.monitoring_bucket
    old = {
        keys.prediction_log("reviews", "2026-01-01", "00", "a"),
        keys.feedback_log("reviews", "2026-01-01", "b"),
        keys.check_file("reviews", "20260101T000000Z", "report.html"),
        keys.check_state("reviews"),
        "something/else.txt",
    }
    new = {key.replace("2026", "2027") for key in old if "2026" in key}
    for key in old | new:
        artifact_store.objects.put(bucket, key, b"12345")
    objects = memory_store._buckets[bucket]
    for key in old:
        data, info = objects[key]
        objects[key] = (data, type(info)(bucket, key, info.size_bytes, info.etag, datetime.now(UTC) - timedelta(days=40)))

    told = clean_monitoring(artifact_store, CleanUpRequest(), default_days=30)
    assert all_keys(artifact_store) == old | new
    assert {total.kind: (total.count, total.size_bytes) for total in told.totals} == dict.fromkeys(
        ("drift check", "feedback", "prediction log"), (1, 5)
    )
    deleting = CleanUpRequest(dry_run=False)
    assert clean_monitoring(artifact_store, deleting, default_days=50).totals == ()
    assert clean_monitoring(artifact_store, deleting.model_copy(update={"monitoring_days": 45}), default_days=30).totals == ()
    assert clean_monitoring(artifact_store, deleting, default_days=30).totals == told.totals
    assert all_keys(artifact_store) == new | {keys.check_state("reviews"), "something/else.txt"}


def test_monitoring_data_on_the_server_goes(s3_artifact_store: ArtifactStore):
    key = keys.prediction_log("reviews", "2026-01-01", "00", os.urandom(4).hex())
    s3_artifact_store.objects.put(s3_artifact_store.monitoring_bucket, key, b"1")
    assert clean_monitoring(s3_artifact_store, CleanUpRequest(dry_run=False), default_days=1).totals == ()
    report = clean_monitoring(s3_artifact_store, CleanUpRequest(dry_run=False, monitoring_days=0), default_days=1)
    assert report.totals[0].examples == (key,)
    assert all_keys(s3_artifact_store) == set()


def test_a_report_sums_up_by_kind():
    garbage = [Garbage("run", f"r{number}", 10, "old") for number in range(9)] + [Garbage("artifact", "a", 5, "alone")]
    report = sum_up([*garbage, Garbage("run", "r", 1, "very old")], dry_run=False)
    assert [(total.kind, total.count, total.size_bytes, total.reasons) for total in report.totals] == [
        ("run", 10, 91, {"old": 9, "very old": 1}),
        ("artifact", 1, 5, {"alone": 1}),
    ]
    assert report.totals[0].examples == ("r0", "r1", "r2", "r3", "r4")
    assert report.size_bytes == 96
    joined = join_reports([report, CleanUpReport(dry_run=False, remarks=("later",)), report])
    assert (joined.size_bytes, joined.remarks, joined.dry_run) == (192, ("later",), False)
