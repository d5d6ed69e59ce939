import random
from collections import Counter, defaultdict

import pandas as pd
import pytest

from ml.artifacts import SplitDataset, ValidatedDataset
from ml.config import DataConfig, SplitConfig
from ml.data.splitting import SPLITS, split
from ml.errors import ConfigError, DataError
from ml.storage.artifacts import ArtifactStore


def rows(num_rows: int, labels: list[str], *, seed: int = 0) -> pd.DataFrame:
    generator = random.Random(seed)
    return pd.DataFrame(
        {
            "row_id": [f"r{seed}-{index}" for index in range(num_rows)],
            "text": [f"text {seed} {index}" for index in range(num_rows)],
            "label": [labels[index % len(labels)] for index in range(num_rows)],
            "group": [f"{generator.getrandbits(64):016x}" for _ in range(num_rows)],
        },
        dtype="str",
    )


def divide(store: ArtifactStore, frame: pd.DataFrame, config: SplitConfig | None = None, positive_label: str | None = None) -> SplitDataset:
    table = store.put_frame(frame)
    validated = ValidatedDataset(
        table=table, quarantine=table, num_rows=len(frame), num_quarantined=0, passed=True, results=(), contract={}
    )
    return split(validated, config or SplitConfig(), DataConfig(source="x", positive_label=positive_label), store)


def members(store: ArtifactStore, dataset: SplitDataset) -> dict[str, str]:
    return {row_id: name for name in SPLITS for row_id in store.get_frame(getattr(dataset, name))["row_id"]}


def test_fractions_are_met_on_average(artifact_store: ArtifactStore) -> None:
    found = Counter(members(artifact_store, divide(artifact_store, rows(5_000, ["a", "b"]))).values())
    assert found["test"] / 5_000 == pytest.approx(0.2, abs=0.02)
    assert found["validation"] / 5_000 == pytest.approx(0.1, abs=0.015)


def test_no_row_changes_its_split_when_data_grows(artifact_store: ArtifactStore) -> None:
    before = rows(1_000, ["a", "b", "c"])
    after = pd.concat([before, rows(200, ["a", "b", "c"], seed=1)], ignore_index=True).sample(frac=1, random_state=0)
    first = members(artifact_store, divide(artifact_store, before))
    second = members(artifact_store, divide(artifact_store, after))
    assert {row_id: second[row_id] for row_id in first} == first


def test_no_group_is_in_two_splits(artifact_store: ArtifactStore) -> None:
    frame = rows(600, ["a", "b"])
    frame["group"] = [f"g{index // 3}" for index in range(600)]
    where = members(artifact_store, divide(artifact_store, frame))
    splits = defaultdict(set)
    for row_id, group in zip(frame["row_id"], frame["group"], strict=True):
        splits[group].add(where[row_id])
    assert {len(found) for found in splits.values()} == {1}


def test_another_salt_is_another_split(artifact_store: ArtifactStore) -> None:
    frame = rows(500, ["a", "b"])
    assert members(artifact_store, divide(artifact_store, frame)) != members(
        artifact_store, divide(artifact_store, frame, SplitConfig(salt="other"))
    )


def test_same_rows_give_the_same_bytes(artifact_store: ArtifactStore) -> None:
    frame = rows(300, ["a", "b"])
    assert divide(artifact_store, frame) == divide(artifact_store, frame)


def test_split_column_is_honoured(artifact_store: ArtifactStore) -> None:
    frame = rows(90, ["a", "b"])
    frame["split"] = ["train", "validation", "test"] * 30
    where = members(artifact_store, divide(artifact_store, frame))
    assert where == dict(zip(frame["row_id"], frame["split"], strict=True))


def test_split_column_without_validation_takes_it_from_train(artifact_store: ArtifactStore) -> None:
    frame = rows(400, ["a", "b"])
    frame["split"] = ["train", "train", "train", "test"] * 100
    dataset = divide(artifact_store, frame)
    assert sum(dataset.counts["validation"].values()) > 0
    assert sum(dataset.counts["test"].values()) == 100
    assert any("validation" in warning for warning in dataset.warnings)


def test_split_column_without_test_is_refused(artifact_store: ArtifactStore) -> None:
    frame = rows(40, ["a", "b"])
    frame["split"] = ["train", "validation"] * 20
    with pytest.raises(DataError, match="test split has no rows"):
        divide(artifact_store, frame)


@pytest.mark.parametrize("seed", range(5))
def test_tiny_data_has_every_class_in_every_split(artifact_store: ArtifactStore, seed: int) -> None:
    dataset = divide(artifact_store, rows(20, ["a", "b"], seed=seed))
    assert all(count > 0 for split_counts in dataset.counts.values() for count in split_counts.values())
    assert sum(sum(split_counts.values()) for split_counts in dataset.counts.values()) == 20


def test_class_with_too_few_rows_is_named(artifact_store: ArtifactStore) -> None:
    frame = rows(100, ["a", "b"])
    frame.loc[:3, "label"] = "rare"
    with pytest.raises(DataError, match=r"at least 10 rows after cleaning, but 'rare' has 4"):
        divide(artifact_store, frame)


def test_one_class_is_refused(artifact_store: ArtifactStore) -> None:
    with pytest.raises(DataError, match="two classes or more, found 1"):
        divide(artifact_store, rows(50, ["only"]))


def test_labels_are_sorted_by_number_when_they_are_numbers(artifact_store: ArtifactStore) -> None:
    dataset = divide(artifact_store, rows(700, ["10", "9", "2", "1", "7", "3", "4"]))
    assert dataset.labels == ("1", "2", "3", "4", "7", "9", "10")
    table = artifact_store.get_frame(dataset.train)
    assert all(dataset.labels[target] == label for target, label in zip(table["target"], table["label"], strict=True))


@pytest.mark.parametrize(("labels", "positive"), [(["neg", "pos"], "pos"), (["0", "1"], "1"), (["no", "yes"], "yes"), (["x", "y"], "y")])
def test_positive_label_is_found(artifact_store: ArtifactStore, labels: list[str], positive: str) -> None:
    assert divide(artifact_store, rows(100, labels)).positive_label == positive


def test_positive_label_is_configured_and_checked(artifact_store: ArtifactStore) -> None:
    assert divide(artifact_store, rows(100, ["x", "y"]), positive_label="x").positive_label == "x"
    with pytest.raises(ConfigError, match="positive_label"):
        divide(artifact_store, rows(100, ["x", "y"]), positive_label="z")


def test_summary_speaks_of_each_class(artifact_store: ArtifactStore) -> None:
    frame = rows(200, ["a", "b"])
    frame["text"] = [f"{'sunny' if label == 'a' else 'rainy'} day {index}" for index, label in enumerate(frame["label"])]
    summary = divide(artifact_store, frame).summary
    assert summary["telling_words"]["a"][0] == "sunny"
    assert summary["telling_words"]["b"][0] == "rainy"
    assert summary["length_words"]["50%"] == 3


def test_group_that_the_split_column_parts_is_refused(artifact_store: ArtifactStore) -> None:
    frame = rows(90, ["a", "b"])
    frame["split"] = ["train", "validation", "test"] * 30
    frame.loc[:1, "group"] = "one person"
    with pytest.raises(DataError, match="a group of rows is in train and in validation"):
        divide(artifact_store, frame)


def test_class_that_cannot_be_learned_is_refused(artifact_store: ArtifactStore) -> None:
    frame = rows(90, ["a", "b"])
    frame["split"] = ["train" if label == "a" else "test" for label in frame["label"]]
    with pytest.raises(DataError, match="no row of class b is in train"):
        divide(artifact_store, frame)
