"""Ingest, clean, validate and split one after the other, as a run does, on data such as users bring."""

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from ml.artifacts import CleanDataset, RawDataset, SplitDataset, ValidatedDataset
from ml.config import RunConfig, RunRequest, resolve_config
from ml.data.cleaning import clean
from ml.data.ingest import ingest
from ml.data.near_duplicates import find_near_duplicates
from ml.data.sources import open_source
from ml.data.splitting import SPLITS, split
from ml.data.validation import validate
from ml.errors import DataError
from ml.solution import load_solution
from ml.storage.artifacts import ArtifactStore

ENGLISH = (
    "plot",
    "cast",
    "light",
    "score",
    "scene",
    "pace",
    "joke",
    "fight",
    "town",
    "music",
    "camera",
    "ending",
    "child",
    "storm",
    "ghost",
)
CHINESE = "剧情演员音乐镜头节奏结尾对白故事导演感动无聊精彩温暖紧张幽默画面配乐人物台词回忆"


@dataclass(frozen=True)
class Prepared:
    config: RunConfig
    raw: RawDataset
    cleaned: CleanDataset
    validated: ValidatedDataset
    splits: SplitDataset


def prepare(store: ArtifactStore, source: Path, encoding: str | None = None, overrides: dict | None = None) -> Prepared:
    request = RunRequest(
        data=str(source), name="reviews", text_column="review", label_column="stars", encoding=encoding, overrides=overrides or {}
    )
    config = resolve_config(request)
    raw = ingest(open_source(config.data, store), config.data, store)
    spec, least = load_solution(config.solution), config.split.min_rows_per_class
    cleaned = clean(raw, spec, config.clean, store, min_rows_per_class=least)
    validated = validate(cleaned, config.contract, store)
    assert validated.passed, validated.failures
    return Prepared(config, raw, cleaned, validated, split(validated, config.split, config.data, store))


def reviews(num_rows: int, num_classes: int = 2, *, chinese: bool = False, seed: int = 0) -> pd.DataFrame:
    generator = random.Random(seed)
    texts = ["".join(generator.choices(CHINESE, k=40)) if chinese else " ".join(generator.choices(ENGLISH, k=25)) for _ in range(num_rows)]
    return pd.DataFrame({"review": texts, "stars": [str(row % num_classes + 1) for row in range(num_rows)]})


def write(frame: pd.DataFrame, path: Path, encoding: str = "utf-8") -> Path:
    frame.to_csv(path, index=False, encoding=encoding)
    return path


def rows_of(store: ArtifactStore, prepared: Prepared) -> dict[str, pd.DataFrame]:
    return {name: store.get_frame(getattr(prepared.splits, name)) for name in SPLITS}


def split_of_rows(store: ArtifactStore, prepared: Prepared) -> dict[str, str]:
    return {row_id: name for name, table in rows_of(store, prepared).items() for row_id in table["row_id"]}


def test_seven_classes_in_chinese(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    frame = reviews(500, 7, chinese=True)
    prepared = prepare(artifact_store, write(frame, tmp_path / "a.csv", "gb18030"), encoding="gb18030")
    assert prepared.splits.labels == ("1", "2", "3", "4", "5", "6", "7")
    assert prepared.splits.positive_label is None
    assert all(count > 0 for counts in prepared.splits.counts.values() for count in counts.values())
    texts = {text for table in rows_of(artifact_store, prepared).values() for text in table["text"]}
    assert texts == set(frame["review"])


def test_same_rows_in_any_kind_of_file_are_split_alike(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    frame = reviews(120)
    numbers = frame.assign(stars=frame["stars"].astype(int))
    write(frame, tmp_path / "a.csv")
    frame.to_csv(tmp_path / "b.csv", index=False, sep=";")
    frame.to_csv(tmp_path / "c.tsv", index=False, sep="\t")
    numbers.astype({"stars": float}).to_parquet(tmp_path / "d.parquet")
    lines = "".join(json.dumps(record) + "\n" for record in numbers.to_dict("records"))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "folder").mkdir()
    write(frame.iloc[:50], tmp_path / "folder" / "1.csv")
    write(frame.iloc[50:], tmp_path / "folder" / "2.csv")
    sources = ["a.csv", "b.csv", "c.tsv", "d.parquet", "e.jsonl.gz", "folder"]
    found = [prepare(artifact_store, tmp_path / source).splits for source in sources]
    assert [splits.test.sha256 for splits in found] == [found[0].test.sha256] * len(sources)
    assert [splits.train.sha256 for splits in found] == [found[0].train.sha256] * len(sources)


def test_no_row_moves_when_a_fifth_is_appended(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    """New, repeated, conflicting and slightly changed rows; what stays keeps its split, only a conflict takes rows away."""
    first = reviews(1_000, 3)
    changed = first.iloc[:60].assign(review=first["review"][:60] + " indeed")
    relabelled = first.iloc[60:120].assign(review=first["review"][60:120] + " so", stars="3")
    conflicting = first.iloc[120:125].assign(stars="2")
    added = pd.concat([reviews(60, 3, seed=1), first.iloc[200:215], changed, relabelled, conflicting])
    before = split_of_rows(artifact_store, prepare(artifact_store, write(first, tmp_path / "a.csv")))
    after = split_of_rows(artifact_store, prepare(artifact_store, write(pd.concat([first, added]), tmp_path / "a.csv")))
    gone = set(before) - set(after)
    assert len(gone) == sum(stars != "2" for stars in first["stars"].tolist()[120:125])
    assert {row_id: after[row_id] for row_id in before if row_id not in gone} == {
        row_id: name for row_id, name in before.items() if row_id not in gone
    }


def test_no_row_is_lost_and_no_near_duplicate_crosses_a_split(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    frame = reviews(300)
    near = frame.iloc[:80].assign(review=frame["review"][:80] + " indeed", stars="2")
    prepared = prepare(artifact_store, write(pd.concat([frame, near, frame.iloc[100:120]]), tmp_path / "a.csv"))
    tables = rows_of(artifact_store, prepared)
    aside = [artifact_store.get_frame(ref) for ref in (prepared.cleaned.dropped, prepared.validated.quarantine)]
    kept = [row_id for table in (*tables.values(), *aside) for row_id in table["row_id"]]
    assert sorted(kept) == sorted(artifact_store.get_frame(prepared.raw.table)["row_id"])
    joined = pd.concat([table.assign(split=name) for name, table in tables.items()], ignore_index=True)
    leaders = find_near_duplicates(joined["text"].tolist(), joined.index.tolist(), 0.9).leaders
    splits: dict[int, list[str]] = {}
    for leader, name in zip(leaders, joined["split"], strict=True):
        splits.setdefault(leader, []).append(name)
    assert all(len(set(names)) == 1 for names in splits.values())
    assert max(map(len, splits.values())) == 2


def test_group_column_keeps_its_rows_together(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    frame = reviews(300).assign(writer=[f"writer {row // 6}" for row in range(300)])
    prepared = prepare(artifact_store, write(frame, tmp_path / "a.csv"), overrides={"data.group_column": "writer"})
    writers = dict(zip(frame["review"], frame["writer"], strict=True))
    seen: dict[str, set[str]] = {}
    for name, table in rows_of(artifact_store, prepared).items():
        for text in table["text"]:
            seen.setdefault(writers[text], set()).add(name)
    assert len(seen) == 50
    assert {len(names) for names in seen.values()} == {1}


def test_split_column_decides_and_held_out_rows_win_over_their_copies(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    frame = reviews(200).assign(part=["train", "train", "dev", "test"] * 50)
    copies = frame.query("part == 'train'").head(10).assign(part="test")
    prepared = prepare(artifact_store, write(pd.concat([frame, copies]), tmp_path / "a.csv"), overrides={"data.split_column": "part"})
    found = {text: name for name, table in rows_of(artifact_store, prepared).items() for text in table["text"]}
    expected = dict(zip(frame["review"], frame["part"].replace("dev", "validation"), strict=True))
    assert found == expected | dict.fromkeys(copies["review"], "test")
    assert prepared.cleaned.rule_counts["exact_duplicate"] == 10


def test_rows_that_break_the_contract_are_in_quarantine_and_not_in_a_split(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    frame = pd.concat([reviews(100), pd.DataFrame({"review": ["?!", "a fine film"], "stars": ["1", ""]})])
    prepared = prepare(artifact_store, write(frame, tmp_path / "a.csv"))
    quarantine = artifact_store.get_frame(prepared.validated.quarantine)
    assert dict(zip(quarantine["text"], quarantine["rule"], strict=True)) == {"?!": "text_has_content", "a fine film": "label_present"}
    assert prepared.validated.contract["labels"] == ["1", "2"]
    assert sum(sum(counts.values()) for counts in prepared.splits.counts.values()) == 100


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (reviews(15), "'1' has 8, '2' has 7"),
        (reviews(40).assign(review="one text"), "none of 40 rows.*conflicting_label 40"),
        (reviews(40).assign(review=["fine", "bad"] * 20), "'1' has 1, '2' has 1; .*dropped 38 of 40 rows .*exact_duplicate 38"),
        (pd.concat([reviews(40)[::2], reviews(10)[1::2].assign(review="<br>")]), "found 1 .*'?1.*empty 5"),
    ],
    ids=["few rows", "all conflicting", "few after cleaning", "one class after cleaning"],
)
def test_too_little_data_is_told_as_that(artifact_store: ArtifactStore, tmp_path: Path, frame: pd.DataFrame, told: str) -> None:
    with pytest.raises(DataError, match=told) as raised:
        prepare(artifact_store, write(frame, tmp_path / "a.csv"))
    assert raised.value.exit_code == 2
    assert "a.csv" in str(raised.value)


def test_least_number_of_rows_is_a_setting(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    prepared = prepare(artifact_store, write(reviews(10), tmp_path / "a.csv"), overrides={"split.min_rows_per_class": 5})
    assert all(count > 0 for counts in prepared.splits.counts.values() for count in counts.values())
    assert any("moved there from train" in warning for warning in prepared.splits.warnings)


def test_same_input_gives_the_same_records(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    path = write(reviews(100), tmp_path / "a.csv")
    assert prepare(artifact_store, path) == prepare(artifact_store, path)
