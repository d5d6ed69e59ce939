import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from ml.artifacts import RawDataset
from ml.config import DataConfig, RunRequest, model_name_from, resolve_config
from ml.data.ingest import ingest, read_rows
from ml.data.sources import open_source
from ml.errors import ConfigError, DataError
from ml.storage.artifacts import ArtifactStore

CSV = "review,stars\nfine film,5\ndull noise,1\n"


def read(store: ArtifactStore, source: object, **config: object) -> RawDataset:
    settings = DataConfig.model_validate({"source": str(source), "text_column": "review", "label_column": "stars", **config})
    return ingest(open_source(settings, store), settings, store)


def table(store: ArtifactStore, source: object, **config: object) -> pd.DataFrame:
    return store.get_frame(read(store, source, **config).table)


def pairs(frame: pd.DataFrame) -> list[tuple]:
    return list(zip(frame["text"], frame["label"], strict=True))


EXPECTED = [("fine film", "5"), ("dull noise", "1")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV.encode()),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.csv", CSV.replace(",", ";").encode()),
        ("a.csv", CSV.replace(",", "\t").encode()),
        ("a.tsv", CSV.replace(",", "\t").encode()),
        ("a.csv.gz", gzip.compress(CSV.encode())),
        ("a.csv", CSV.replace("\n", "\r\n").encode()),
        ("a.csv", CSV.encode("utf-16")),
        ("a.jsonl", b'{"review": "fine film", "stars": 5}\n{"review": "dull noise", "stars": 1.0}\n'),
    ],
    ids=["comma", "byte order mark", "semicolon", "tab", "tsv", "gzip", "crlf", "utf-16", "jsonl"],
)
def test_file_kinds_give_the_same_rows(artifact_store: ArtifactStore, tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert pairs(table(artifact_store, path)) == EXPECTED


def test_parquet_gives_the_same_rows(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    pd.DataFrame({"review": ["fine film", "dull noise"], "stars": [5, 1]}).to_parquet(tmp_path / "a.parquet")
    assert pairs(table(artifact_store, tmp_path / "a.parquet")) == EXPECTED


def test_folder_takes_every_readable_file(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "deep" / "b.jsonl").write_text(json.dumps({"review": "warm", "stars": 5}) + "\n")
    (tmp_path / "notes.docx").write_text("not data")
    raw = read(artifact_store, tmp_path)
    assert raw.num_rows == 3
    assert set(raw.objects) == {"a.csv", "deep/b.jsonl"}
    assert artifact_store.get_bytes(raw.objects["a.csv"]) == CSV.encode()


def test_prefix_in_object_storage_is_read_and_windowed(artifact_store: ArtifactStore) -> None:
    bucket = artifact_store.datasets_bucket
    for index in range(3):
        artifact_store.objects.put(bucket, f"reviews/{index}.csv", CSV.replace("film", f"film {index}").encode())
    source = f"s3://{bucket}/reviews"
    assert read(artifact_store, source).num_rows == 6
    latest = read(artifact_store, source, window="last_n", window_last_n=1)
    assert (set(latest.objects), latest.num_rows) == ({"2.csv"}, 2)


def test_quoted_newlines_and_commas_stay_in_the_text(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('review,stars\n"one, two\nthree",5\nplain,1\n')
    assert pairs(table(artifact_store, tmp_path / "a.csv"))[0] == ("one, two\nthree", "5")


def test_one_class_written_in_several_ways_is_one_class(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,stars\na,1\nb,1.0\nc, 1 \nd,2\n")
    assert table(artifact_store, tmp_path / "a.csv")["label"].tolist() == ["1", "1", "1", "2"]


def test_label_names_and_filter(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,stars,site\na,0,x\nb,1,x\nc,1,y\n")
    found = table(artifact_store, tmp_path / "a.csv", label_names={"0": "bad", "1": "good"}, where={"site": ["x"]})
    assert pairs(found) == [("a", "bad"), ("b", "good")]


def test_row_ids_do_not_change_when_rows_are_appended(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV + "fine film,5\n")
    before = table(artifact_store, tmp_path / "a.csv")["row_id"].tolist()
    (tmp_path / "a.csv").write_text(CSV + "fine film,5\nanother,1\nfine film,5\n")
    after = table(artifact_store, tmp_path / "a.csv")["row_id"].tolist()
    assert after[: len(before)] == before
    assert len(set(after)) == len(after)


def test_row_ids_do_not_depend_on_the_order_of_rows(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV + "fine film,5\n")
    (tmp_path / "b.csv").write_text("review,stars\nnew,1\ndull noise,1\nfine film,5\nfine film,5\n")
    first, second = (set(table(artifact_store, tmp_path / name)["row_id"]) for name in ("a.csv", "b.csv"))
    assert first < second


def test_columns_with_common_names_are_found(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,Comment,Rating\n1,fine film,5\n2,dull noise,1\n")
    assert pairs(table(artifact_store, tmp_path / "a.csv", text_column="text", label_column="label")) == EXPECTED


@pytest.mark.parametrize("encoding", ["cp1252", "gb18030", "utf-8"])
def test_given_encoding_is_used(artifact_store: ArtifactStore, tmp_path: Path, encoding: str) -> None:
    text = "这部电影很好看" if encoding == "gb18030" else "café déjà vu"
    (tmp_path / "a.csv").write_bytes(f"review,stars\n{text},5\nx,1\n".encode(encoding))
    assert table(artifact_store, tmp_path / "a.csv", encoding=encoding)["text"].tolist()[0] == text


def test_detected_encoding_is_recorded(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    lines = "".join(f"第{index}部电影的故事非常感人，演员的表演也很出色,5\n这部片子太无聊了，浪费时间{index},1\n" for index in range(60))
    (tmp_path / "a.csv").write_bytes(f"review,stars\n{lines}".encode("gb18030"))
    raw = read(artifact_store, tmp_path / "a.csv")
    assert artifact_store.get_frame(raw.table)["text"].tolist()[1] == "这部片子太无聊了，浪费时间0"
    assert raw.encodings == {"a.csv": "gb18030"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"review,stars\n", "no rows"),
        (b"review,stars\nfine,5\n", "1 row"),
        (b"review,stars\nfine,5\ngood,5\n", "one class"),
        (b"text,rating\nfine,5\nbad,1\n", "TEXT="),
        (b"review,rating\nfine,5\nbad,1\n", "LABEL="),
        (b"review,stars\n,5\n,1\n", "TEXT="),
        (b"review,stars\nfine,5\nbad,1,surplus\n", "line 3"),
        (b"review,stars\ncaf\xe9 \xff\xfe\xfa,5\n", "ENCODING="),
    ],
    ids=["empty", "header only", "one row", "one class", "text column", "label column", "no text", "malformed", "undecodable"],
)
def test_bad_file_is_told_with_its_fix(artifact_store: ArtifactStore, tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=told) as raised:
        read(artifact_store, tmp_path / "a.csv")
    assert "a.csv" in str(raised.value)
    assert raised.value.exit_code == 2


def test_wrong_column_lists_the_columns_found(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("reviews,stars\nfine,5\nbad,1\n")
    with pytest.raises(DataError, match=r"TEXT=reviews"):
        read(artifact_store, tmp_path / "a.csv")


def test_missing_file_names_its_neighbours(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text(CSV)
    with pytest.raises(DataError, match=r"reviews\.csv"):
        read(artifact_store, tmp_path / "review.csv")


def test_given_encoding_that_cannot_read_the_file_is_refused(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("review,stars\n电影,5\nx,1\n".encode("gb18030"))
    with pytest.raises(DataError, match="ascii"):
        read(artifact_store, tmp_path / "a.csv", encoding="ascii")
    with pytest.raises(DataError, match="not a known encoding"):
        read(artifact_store, tmp_path / "a.csv", encoding="gb-nonsense")


def test_rows_for_prediction_need_no_label_and_keep_their_columns(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,review\n1,fine\n2,dull\n")
    found = read_rows(str(tmp_path / "a.csv"), artifact_store, text_column="review")
    assert found.to_dict("list") == {"id": ["1", "2"], "text": ["fine", "dull"]}


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_settings_of_the_demo_data_do_not_reach_the_users_data(profile: str) -> None:
    config = resolve_config(RunRequest(profile=profile, data="/data/My Reviews.csv", text_column="review", label_column="stars"))
    assert config.name == "my-reviews"
    assert config.data == DataConfig(source="/data/My Reviews.csv", text_column="review", label_column="stars")
    assert (config.contract["name"], config.contract["labels"]) == ("sentiment", "infer")


@pytest.mark.parametrize(
    ("source", "name"), [("reviews.csv", "reviews"), ("s3://bucket/2026/Fälle/", "f-lle"), ("/x/a.b.csv.gz", "a"), ("data/", "data")]
)
def test_model_is_named_after_the_data(source: str, name: str) -> None:
    assert model_name_from(source) == name


def test_data_without_a_usable_name_asks_for_one() -> None:
    with pytest.raises(ConfigError, match="NAME="):
        model_name_from("评论.csv")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"train.epoch": 3}, "did you mean 'epochs'"),
        ({"trian.epochs": 3}, "did you mean 'train'"),
        ({"train.epochs": -1}, "train.epochs"),
        ({"compression": ["dynamic_int9"]}, "did you mean 'dynamic_int8'"),
        ({"model.pool": "mean"}, "did you mean 'pooling'"),
    ],
)
def test_unknown_setting_names_the_nearest(overrides: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve_config(RunRequest(overrides=overrides))


def test_unknown_profile_and_solution_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quick'"):
        resolve_config(RunRequest(profile="quik"))
    with pytest.raises(ConfigError, match="sentiment"):
        resolve_config(RunRequest(solution="sentimant"))


def test_text_that_looks_like_a_value_keeps_its_form(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,stars\nTrue,1.0\n1.0,2\n")
    assert pairs(table(artifact_store, tmp_path / "a.csv")) == [("True", "1"), ("1.0", "2")]
    assert read_rows(str(tmp_path / "a.csv"), artifact_store, text_column="review")["text"].tolist() == ["True", "1.0"]


def test_unknown_split_value_is_refused(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,stars,part\nfine,5,train\nbad,1,holdout\n")
    with pytest.raises(DataError, match=r"column 'part'.*'holdout'"):
        read(artifact_store, tmp_path / "a.csv", split_column="part")


def test_file_that_changes_while_it_is_read_is_refused(artifact_store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    settings = DataConfig(source=str(tmp_path / "a.csv"), text_column="review", label_column="stars")
    source = open_source(settings, artifact_store)
    (tmp_path / "a.csv").write_text(CSV + "late,1\n")
    with pytest.raises(DataError, match="changed while it was read"):
        ingest(source, settings, artifact_store)
