import gzip
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.data.readers import read_columns
from ml.errors import DataError


def csv_columns(text: str) -> dict[str, list[object]]:
    return read_columns("a.csv", text.encode()).cells


def test_quoted_cells_hold_separators_quotes_and_line_breaks() -> None:
    assert csv_columns('text,label\n"a, ""b""\nc",1\n')["text"] == ['a, "b"\nc']


def test_separator_inside_texts_does_not_mislead() -> None:
    text = "id;text\n" + "".join(f"{row};one, two, three, and {row}\n" for row in range(5))
    assert csv_columns(text)["text"] == [f"one, two, three, and {row}" for row in range(5)]


def test_single_column_is_a_column() -> None:
    assert csv_columns("text\nfine\nbad\n") == {"text": ["fine", "bad"]}


def test_cell_longer_than_the_parsers_default_limit_is_read() -> None:
    assert csv_columns(f"text,label\n{'x' * 200_000},1\n")["text"] == ["x" * 200_000]


def test_blank_lines_and_surplus_separators_are_no_rows() -> None:
    assert csv_columns("text,label,,\n\nfine,1,,\n,,,\nbad,0,,\n") == {"text": ["fine", "bad"], "label": ["1", "0"]}


def test_index_column_without_a_name_is_kept_apart() -> None:
    assert csv_columns(",text\n0,fine\n") == {"column 1": ["0"], "text": ["fine"]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('text,label\n"two\nlines",1\nfine,1,surplus\n', r"a\.csv, line 4: found 3 cells"),
        ("text,label\nfine,1\nlonely\n", r"line 3: found 1 cells"),
        ('text,label\nfine,1\n"never closed,1\nbad,0\n', r"line 3: .*closing"),
        ("text,text\nfine,1\n", "'text' twice"),
    ],
)
def test_malformed_record_is_told_with_its_first_line(text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        csv_columns(text)


@pytest.mark.parametrize(("line", "told"), [("not json", "line 2: not JSON"), ('["a", 1]', "line 2: .*not an object")])
def test_malformed_json_line_is_told(line: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_columns("a.jsonl", f'{{"text": "a"}}\n{line}\n'.encode())


def test_json_lines_may_lack_keys() -> None:
    columns = read_columns("a.jsonl", b'{"text": "a"}\n\n{"label": 1}\n')
    assert columns.cells == {"text": ["a", None], "label": [None, 1]}


def test_half_of_a_surrogate_pair_becomes_the_replacement_character() -> None:
    assert read_columns("a.jsonl", rb'{"text": "a\ud83d b \ud83d\ude00"}').cells["text"] == ["a\ufffd b 😀"]


def test_damaged_files_are_told() -> None:
    packed = gzip.compress(b"text,label\nfine,1\n" * 100)
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_columns("a.csv.gz", packed[:-12])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_columns("a.parquet", b"PAR1 but no more")


def test_parquet_with_bytes_that_are_no_text_is_told() -> None:
    buffer = io.BytesIO()
    invalid = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": invalid}), buffer)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_columns("a.parquet", buffer.getvalue())
