"""Texts become rows of tokens: none lost, none twice, whatever they came in."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from ml.errors import ConfigError, DataError
from ml.language_model import prepare as preparation
from ml.language_model.prepare import main, prepare, read_pieces
from ml.storage.artifacts import ArtifactStore
from ml.training.shards import FolderShards, ShardedRows
from tests.ml.language_model.texts import make_texts, write_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tok" / "tokenizer.json", make_texts(50))


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


def read_rows(folder: Path, cache: Path) -> list[list[int]]:
    rows = ShardedRows(FolderShards(folder), cache, 10**9)
    return [tokens.tolist() for tokens in rows.tokens(np.arange(rows.index.num_rows))]


def test_packed_rows_are_all_texts_one_after_the_other(tmp_path: Path, tokenizer: Path) -> None:
    texts = make_texts(200)
    pieces = read_pieces([write_jsonl(tmp_path / "a.jsonl", texts)])
    done = prepare(pieces, tokenizer, tmp_path / "out", context=31, validation_share=0.2, shard_bytes=1500)
    assert sum(done.num_texts.values()) == 200
    assert 15 < done.num_texts["validation"] < 70
    reader = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    end = reader.token_to_id("<eos>")
    read = set()
    for name in ("train", "validation"):
        rows = read_rows(tmp_path / "out" / name, tmp_path / "cache" / name)
        assert {len(row) for row in rows} == {32}
        assert len(rows) == done.num_rows[name]
        tokens = [token for row in rows for token in row]
        assert len(tokens) == done.num_tokens[name]
        ends = [i for i, token in enumerate(tokens) if token == end]
        whole = [reader.decode(tokens[a + 1 : b]) for a, b in zip([-1, *ends], ends, strict=False)]
        assert not read & set(whole)
        read |= set(whole)
    # All but what did not fill the last row of a set.
    assert read <= set(texts)
    assert len(read) > 190


def test_rows_of_documents_hold_one_text_each(tmp_path: Path, tokenizer: Path) -> None:
    texts = make_texts(100)
    done = prepare(
        read_pieces([write_jsonl(tmp_path / "a.jsonl", texts)]), tokenizer, tmp_path / "out", context=16, pack=False, validation_share=0.3
    )
    reader = Tokenizer.from_file(str(tokenizer))
    end = reader.token_to_id("<eos>")
    found, unfinished = [], ""
    for name in ("train", "validation"):
        for row in read_rows(tmp_path / "out" / name, tmp_path / "cache" / name):
            assert 2 <= len(row) <= 17
            assert end not in row[:-1]
            unfinished += reader.decode(row, skip_special_tokens=True)
            if row[-1] == end:
                found.append(unfinished)
                unfinished = ""
    # An end token that stood alone in a row is left out, so a text may run into the next one here.
    assert "".join(found) + unfinished == "".join(
        text for name in ("train", "validation") for text in texts if (preparation._position(text) < 0.3) == (name == "validation")
    )
    assert sum(done.num_rows.values()) > 100


def test_all_kinds_of_files_give_the_same_texts(tmp_path: Path) -> None:
    texts = make_texts(30)
    write_jsonl(tmp_path / "jsonl" / "a.jsonl", texts[:20], "body")
    write_jsonl(tmp_path / "jsonl" / "b" / "c.jsonl", texts[20:], "body")
    pq.write_table(pa.table({"body": [*texts, None]}), tmp_path / "a.parquet")
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(text)
    for paths in ([tmp_path / "jsonl"], [tmp_path / "a.parquet"], [tmp_path / "texts"]):
        assert [piece.text for piece in read_pieces(paths, "body")] == texts


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_long_text_is_tokenized_in_pieces_and_is_one_text(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(preparation, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(preparation, "CHARACTERS_TOKENIZED_TOGETHER", 250)
    text = "\n".join(make_texts(30))
    path = tmp_path / f"long.{kind}"
    if kind == "txt":
        path.write_text(text)
    else:
        write_jsonl(path, [text])
    pieces = list(read_pieces([path]))
    assert len(pieces) > 20
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.is_start for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.is_end for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    other = write_jsonl(tmp_path / "other.jsonl", make_texts(60, seed=1))
    done = prepare(read_pieces([path, other]), tokenizer, tmp_path / "out", context=15, validation_share=0.3)
    assert sum(done.num_texts.values()) == 61


def test_a_text_stays_in_its_set_when_others_are_added(tmp_path: Path, tokenizer: Path) -> None:
    texts = make_texts(120)
    first = {text for text in texts[:100] if preparation._position(text) < 0.1}
    assert first == {text for text in texts if preparation._position(text) < 0.1} & set(texts[:100])
    assert 2 <= len(first) <= 25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 3}\n', "line 2: there is no text in 'text'"),
        ('{"text": "a"}\nnot json\n', "is not JSON lines"),
        ("[1]\n", "line 1: there is no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_pieces([path]))


def test_other_bad_input_is_named(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("a.txt", "not UTF-8"),
        ("a.parquet", "not a whole Parquet"),
        ("empty", "no folder with some"),
        ("gone.txt", "no text file"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_pieces([tmp_path / path]))
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text', but body"):
        list(read_pieces([tmp_path / "a.parquet"]))
    texts = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    with pytest.raises(ConfigError, match="no token for the end of a text"):
        prepare(read_pieces([texts]), tokenizer, tmp_path / "out", end_token="<nothing>")
    with pytest.raises(DataError, match="too few for a row of 1025 tokens"):
        prepare(read_pieces([texts]), tokenizer, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("index.json"))


def test_command_line(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_jsonl(tmp_path / "a.jsonl", make_texts(200))
    arguments = [str(texts), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"), "--context", "20", "--validation-share", "0.2"]
    command = [sys.executable, "-m", "ml.language_model.prepare", *arguments]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    rows = told["num_rows"]
    found = ShardedRows(FolderShards(tmp_path / "out" / "validation"), tmp_path / "cache", 10**9)
    assert found.index.digest == told["sha256"]["validation"] != told["sha256"]["train"]
    assert len(read_rows(tmp_path / "out" / "train", tmp_path / "cache")) == rows["train"] > 50
    assert main(arguments) == 2
    assert "holds token shards already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--context", "0"])


def test_sets_go_into_the_store_file_by_file(
    tmp_path: Path, tokenizer: Path, s3_artifact_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ml.storage.connect.open_artifact_store", lambda settings=None: s3_artifact_store)
    place = f"s3://{s3_artifact_store.datasets_bucket}/corpora/films"
    texts = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    arguments = [
        str(texts),
        "--tokenizer",
        str(tokenizer),
        "--out",
        place,
        "--context",
        "20",
        "--validation-share",
        "0.2",
        "--shard-mb",
        "0.002",
    ]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["num_rows"]["train"] > 50
    names = [info.key.removeprefix("corpora/films/") for info in s3_artifact_store.objects.list(s3_artifact_store.datasets_bucket)]
    assert {"tokenizer.json", "train/index.json", "train/lengths.int32", "train/shard-00003.safetensors", "validation/index.json"} <= set(
        names
    )
    assert main(arguments) == 2
    assert "holds token shards already" in capsys.readouterr().err
