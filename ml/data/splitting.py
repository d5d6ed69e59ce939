"""Assigns every row to train, validation or test, for good.

A group of near-duplicates goes where the hash of its name and the salt says, so a row stays in its split when data grows.
"""

import hashlib
import logging
from collections import Counter
from typing import TYPE_CHECKING

from ml.artifacts import SplitDataset, ValidatedDataset
from ml.config import DataConfig, SplitConfig
from ml.data.summary import summarize
from ml.data.values import sort_labels
from ml.errors import ConfigError, DataError
from ml.storage.artifacts import ArtifactStore

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_TOO_FEW_GROUPS = "give more rows or more groups of it, or correct the split column"
POSITIVE_NAMES = ("positive", "pos", "1", "yes", "true")


def split(validated: ValidatedDataset, config: SplitConfig, data: DataConfig, store: ArtifactStore) -> SplitDataset:
    """Split a table by near-duplicate group; a `split` column of the user's is honoured.

    Where a class has no row in validation or test (tiny data), its groups with the smallest hash move there from
    train, never the other way, and `warnings` says so: only such rows may change their split when data grows.

    Raises:
        DataError: fewer than two classes, a class with fewer than `config.min_rows_per_class` rows, a class without a
            row in train (held-out rows are never moved there), or a group that the user's split column parts.
        ConfigError: `data.positive_label` is not one of two classes.
    """
    frame = store.get_frame(validated.table)
    labels = sort_labels(frame["label"])
    check_learnable(frame["label"].tolist(), config.min_rows_per_class)
    warnings: list[str] = []
    if "split" in frame.columns:
        frame["split"] = _given_splits(frame, config, warnings)
    else:
        hashes = {group: hash_fraction(group, config.salt) for group in frame["group"].unique()}
        frame["split"] = [split_of(hashes[group], config) for group in frame["group"]]
        _fill_empty_classes(frame, hashes, labels, warnings)

    targets = {label: index for index, label in enumerate(labels)}
    frame["target"] = [targets[label] for label in frame["label"]]
    tables = {}
    for name in SPLITS:
        table = frame.loc[frame["split"] == name, ["row_id", "text", "label", "target"]].sort_values("row_id", ignore_index=True)
        if table.empty:
            raise DataError(f"the {name} split has no rows; give more data, or fill the split column with {name}")
        if missing := [label for label in labels if label not in set(table["label"])]:
            warnings.append(f"no row of {', '.join(missing)} is in {name}; its figures do not speak of them")
        tables[name] = table
    if unlearnable := [label for label in labels if label not in set(tables["train"]["label"])]:
        raise DataError(f"no row of class {', '.join(unlearnable)} is in train, so it cannot be learned; {_TOO_FEW_GROUPS}")
    for warning in warnings:
        logger.warning(warning)
    counts = {name: {label: int((table["label"] == label).sum()) for label in labels} for name, table in tables.items()}
    logger.info("split: %s rows", ", ".join(f"{name} {len(table)}" for name, table in tables.items()))
    return SplitDataset(
        train=store.put_frame(tables["train"]),
        validation=store.put_frame(tables["validation"]),
        test=store.put_frame(tables["test"]),
        labels=tuple(labels),
        positive_label=choose_positive_label(labels, data.positive_label),
        counts=counts,
        summary=summarize(tables["train"], labels),
        warnings=tuple(warnings),
    )


def check_learnable(labels: list[str], min_rows_per_class: int) -> None:
    """
    Raises:
        DataError: fewer than two classes, or a class with too few rows; names the class and its count.
    """
    counts = Counter(labels)
    if len(counts) < 2:
        raise DataError(
            f"a classifier needs two classes or more, found {len(counts)} ({', '.join(counts) or 'no rows'}); add rows of another class"
        )
    if small := {label: count for label, count in sort_counts(counts) if count < min_rows_per_class}:
        named = ", ".join(f"{label!r} has {count}" for label, count in small.items())
        raise DataError(
            f"each class needs at least {min_rows_per_class} rows after cleaning, but {named}; add rows of it, or leave these rows out"
        )


def sort_counts(counts: Counter) -> list[tuple[str, int]]:
    return [(label, counts[label]) for label in sort_labels(counts)]


def hash_fraction(group: str, salt: str) -> float:
    """A number in [0, 1) that depends on nothing but the group and the salt."""
    digest = hashlib.sha256(f"{salt}\n{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(fraction: float, config: SplitConfig) -> str:
    """Test below `test_fraction`, validation in the next `validation_fraction`, train above."""
    if fraction < config.test_fraction:
        return "test"
    return "validation" if fraction < config.test_fraction + config.validation_fraction else "train"


def choose_positive_label(labels: list[str], configured: str | None) -> str | None:
    """For two classes, the one that *_positive metrics speak of: as configured, by a common name, or the last."""
    if configured is not None and configured not in labels:
        if len(labels) == 2:
            raise ConfigError(f"data.positive_label is {configured!r}, but the classes are {', '.join(labels)}")
        return None
    if len(labels) != 2:
        return None
    named = [label for label in labels if label.lower() in POSITIVE_NAMES]
    return configured or (named[0] if len(named) == 1 else labels[-1])


def _given_splits(frame: "pd.DataFrame", config: SplitConfig, warnings: list[str]) -> list[str]:
    """The user's splits; where there is no validation (as in many published data sets), a part of train is taken for it."""
    first_split: dict[str, str] = {}
    for group, name, text in frame[["group", "split", "text"]].itertuples(index=False, name=None):
        if first_split.setdefault(group, name) != name:
            raise DataError(
                f"a group of rows is in {first_split[group]} and in {name}, e.g. {text[:60]!r}; "
                "correct the split or the group column, or give only one of them"
            )
    given = frame["split"].fillna("train").tolist()
    if "validation" not in given:
        share = config.validation_fraction / (1 - config.test_fraction)
        hashes = {group: hash_fraction(group, config.salt) for group in frame["group"].unique()}
        chosen = [
            "validation" if name == "train" and hashes[group] < share else name for name, group in zip(given, frame["group"], strict=True)
        ]
        warnings.append(f"the split column names no validation rows; {share:.0%} of train is used for it")
        return chosen
    return given


def _fill_empty_classes(frame: "pd.DataFrame", hashes: dict[str, float], labels: list[str], warnings: list[str]) -> None:
    """Move groups from train where a class would be absent from validation or test."""
    for name in ("test", "validation"):
        for label in labels:
            if label in set(frame.loc[frame["split"] == name, "label"]):
                continue
            in_train = frame.loc[(frame["split"] == "train") & (frame["label"] == label), "group"]
            groups = sorted(in_train.unique(), key=lambda group: hashes[group])
            # One group must stay to learn from.
            if len(groups) < 2:
                continue
            frame.loc[(frame["group"] == groups[0]) & (frame["split"] == "train"), "split"] = name
            warnings.append(
                f"class {label!r} had no row in {name}, so one group of it was moved there from train; more rows make this needless"
            )
