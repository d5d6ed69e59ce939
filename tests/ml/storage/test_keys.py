"""Keys are built in one place, and nothing that is given to it can leave its folder."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.storage import keys


def test_an_artifact_lies_under_its_digest():
    sha256 = "ab" + "0" * 62
    assert keys.artifact(sha256) == f"artifacts/sha256/ab/{'0' * 62}"


def test_checkpoints_of_a_training_lie_under_its_prefix_and_sort_by_step():
    steps = [keys.checkpoint_file("key", step, "manifest.json") for step in (5, 50, 1000, 20_000_000)]
    assert steps == sorted(steps)
    assert all(key.startswith(keys.checkpoint_prefix("key")) for key in steps)


def test_versions_and_aliases_of_a_model_lie_under_its_name():
    assert keys.model_version("reviews", "v").startswith(keys.model_versions_prefix("reviews"))
    assert not keys.model_aliases("reviews").startswith(keys.model_versions_prefix("reviews"))
    assert keys.model_aliases("reviews").startswith(keys.models_prefix())


@settings(max_examples=200)
@given(st.text(alphabet="ab./-_%é \\", max_size=12))
def test_a_key_that_may_be_written_may_be_read_and_stays_in_its_bucket(key: str):
    try:
        keys.check_key(key)
    except ValueError:
        return
    assert keys.check_path(key) == key
    assert not key.startswith("/")
    assert not {"", ".", ".."} & set(key.split("/"))


@pytest.mark.parametrize("key", ["my reviews.csv", "日本語/評価.csv", "100%.csv"])
def test_what_people_put_there_may_be_read_but_not_written(key: str):
    assert keys.check_path(key) == key
    with pytest.raises(ValueError, match="relative path"):
        keys.check_key(key)
