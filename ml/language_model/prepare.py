"""`python -m ml.language_model.prepare`: texts to sets of token shards, one to train on and one to validate with.

Reads and writes as a stream: what is in memory is a few megabytes of text and one shard of each set.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from tokenizers import Tokenizer

from ml.errors import ConfigError, DataError, MillstreamError
from ml.training.folders import sync_file
from ml.training.shards import INDEX_NAME, SHARD_BYTES, ShardWriter

TOKENIZER_FILE = "tokenizer.json"
SETS: tuple[str, ...] = ("train", "validation")
KINDS = (".txt", ".jsonl", ".parquet")
END_TOKENS = ("<|endoftext|>", "<eos>", "</s>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[SEP]")

# Long texts are tokenized piece by piece, cut at the end of a line.
PIECE_CHARACTERS = 2**20
CHARACTERS_TOKENIZED_TOGETHER = 2**21
PARQUET_ROWS_TOGETHER = 1024


@dataclass(frozen=True)
class Piece:
    """A text, or a part of a long one. `is_end`: nothing of the text follows."""

    text: str
    is_start: bool = True
    is_end: bool = True


@dataclass(frozen=True)
class Prepared:
    """What was written: per set, texts, rows, tokens, and the digest that identifies it (`LanguageModelJob.shards_sha256`)."""

    vocabulary: int
    num_texts: dict[str, int]
    num_rows: dict[str, int]
    num_tokens: dict[str, int]
    sha256: dict[str, str]


def prepare(
    pieces: Iterator[Piece],
    tokenizer_path: Path,
    out: Path,
    *,
    context: int = 1024,
    pack: bool = True,
    validation_share: float = 0.01,
    end_token: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    finish_file: Callable[[Path], None] = lambda path: None,
) -> Prepared:
    """Write `out/train`, `out/validation` and `out/tokenizer.json`, which is the last.

    Args:
        context: the most tokens that a model sees at once. Rows have one more: what the last one is followed by.
        pack: rows are cut from all texts one after the other, an end token between them, so all are equally long and nothing is
            padded; otherwise a row holds tokens of one text. Tokens that do not fill the very last row are left out when packed.
        validation_share: of the texts, chosen by their digest: a text stays in its set when others are added.
        end_token: of the tokenizer; one of `END_TOKENS` when not given.
        finish_file: see `ShardWriter`.

    Raises:
        ConfigError: the tokenizer has no such token.
        DataError: a set came out empty, or the folder holds sets already.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end_id = _end_id(tokenizer, tokenizer_path, end_token)
    vocabulary = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    num_texts: dict[str, int] = dict.fromkeys(SETS, 0)
    with ExitStack() as closing:
        cutters = {
            name: _RowCutter(
                closing.enter_context(
                    ShardWriter(out / name, vocabulary=vocabulary, split=name, shard_bytes=shard_bytes, finish_file=finish_file)
                ),
                context + 1,
                pack,
            )
            for name in SETS
        }
        chosen = "train"
        for piece, ids in _tokenized(pieces, tokenizer):
            if piece.is_start:
                chosen = "validation" if _position(piece.text) < validation_share else "train"
                num_texts[chosen] += 1
            cutters[chosen].add([*ids, end_id] if piece.is_end else ids, piece.is_end)
        num_rows = {name: cutter.writer.num_rows for name, cutter in cutters.items()}
        for name in SETS:
            if not num_rows[name]:
                raise DataError(
                    f"{num_texts[name]} of {sum(num_texts.values())} texts are for {name}, too few for a row of {context + 1} tokens; "
                    "give more texts, a smaller --context, or another --validation-share"
                )
    shutil.copyfile(tokenizer_path, out / TOKENIZER_FILE)
    sync_file(out / TOKENIZER_FILE)
    finish_file(out / TOKENIZER_FILE)
    return Prepared(
        vocabulary,
        num_texts,
        num_rows,
        {name: cutter.num_tokens for name, cutter in cutters.items()},
        {name: cutter.writer.index.digest for name, cutter in cutters.items() if cutter.writer.index},
    )


def read_pieces(paths: Sequence[Path], column: str = "text") -> Iterator[Piece]:
    """The texts of files and folders: each .txt file is one text; .jsonl and .parquet have one a row, in `column`.

    Raises:
        DataError: a file cannot be read; the message names it, and the line.
    """
    for path in _files(paths):
        if path.suffix == ".txt":
            yield from _pieces_of_file(path)
            continue
        texts = _jsonl_texts(path, column) if path.suffix == ".jsonl" else _parquet_texts(path, column)
        for text in texts:
            yield from _pieces_of_text(text)


class _RowCutter:
    """Cuts tokens into rows of one length, and into a shorter one where a text ends unless packed."""

    def __init__(self, writer: ShardWriter, row_tokens: int, pack: bool):
        self.writer = writer
        self.num_tokens = 0
        self._row_tokens = row_tokens
        self._pack = pack
        self._left = np.zeros(0, dtype=np.int64)

    def add(self, ids: Sequence[int], is_end: bool) -> None:
        tokens = np.concatenate([self._left, np.asarray(ids, dtype=np.int64)])
        num_whole = len(tokens) // self._row_tokens * self._row_tokens
        for row in tokens[:num_whole].reshape(-1, self._row_tokens):
            self._write(row)
        self._left = tokens[num_whole:]
        if is_end and not self._pack:
            # A single token is the end token, which nothing here predicts.
            if len(self._left) > 1:
                self._write(self._left)
            self._left = self._left[:0]

    def _write(self, row: np.ndarray) -> None:
        self.writer.add(row)
        self.num_tokens += len(row)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        found = sorted(file for file in path.rglob("*") if file.suffix in KINDS) if path.is_dir() else [path]
        if not found or not path.exists() or found[0].suffix not in KINDS:
            raise DataError(f"{path} is no text file and no folder with some; give {', '.join(KINDS)} files")
        yield from found


def _pieces_of_file(path: Path) -> Iterator[Piece]:
    try:
        with path.open(encoding="utf-8") as file:
            text, is_start = _next_piece(file), True
            while text:
                following = _next_piece(file)
                yield Piece(text, is_start, is_end=not following)
                text, is_start = following, False
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start} of a piece); convert it") from error


def _next_piece(file: TextIO) -> str:
    text = file.read(PIECE_CHARACTERS)
    return text + file.readline(PIECE_CHARACTERS) if text else ""


def _pieces_of_text(text: str) -> Iterator[Piece]:
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield Piece(text[start : start + PIECE_CHARACTERS], start == 0, start + PIECE_CHARACTERS >= len(text))


def _jsonl_texts(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get(column), str):
                    raise DataError(f"{path}, line {number}: there is no text in {column!r}; name the column with --text-column")
                yield row[column]
    except ValueError as error:  # of JSON or of the encoding
        raise DataError(f"{path} is not JSON lines in UTF-8: {error}") from error


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path} has no column {column!r}, but {names}; name one with --text-column")
            for batch in file.iter_batches(PARQUET_ROWS_TOGETHER, columns=[column]):
                yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from error


def _tokenized(pieces: Iterator[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, list[int]]]:
    """Pieces that are not empty with their token ids, tokenized some at a time, on all cores."""
    together: list[Piece] = []
    size = 0
    for piece in pieces:
        together.append(piece)
        size += len(piece.text)
        if size >= CHARACTERS_TOKENIZED_TOGETHER:
            yield from _tokenize(together, tokenizer)
            together, size = [], 0
    yield from _tokenize(together, tokenizer)


def _tokenize(pieces: list[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, list[int]]]:
    found = tokenizer.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
    for piece, encoding in zip(pieces, found, strict=True):
        yield piece, encoding.ids


def _position(text: str) -> float:
    """Where in [0, 1) a text stands by its digest."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def _end_id(tokenizer: Tokenizer, path: Path, given: str | None) -> int:
    for token in [given] if given else END_TOKENS:
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    wanted = repr(given) if given else f"one of {', '.join(END_TOKENS)}"
    raise ConfigError(f"{path} has no token for the end of a text, looked for {wanted}; name one with --end-token")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ml.language_model.prepare", description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path, help="files (.txt, .jsonl, .parquet) or folders of them")
    parser.add_argument("--tokenizer", required=True, type=Path, help="a tokenizer.json")
    parser.add_argument("--out", required=True, help="a folder, or s3://bucket/prefix in the store that the environment names")
    parser.add_argument("--text-column", default="text", help="of .jsonl and .parquet (default: text)")
    parser.add_argument("--context", type=int, default=1024, help="the most tokens that a model sees at once (default: 1024)")
    parser.add_argument("--documents", action="store_true", help="rows hold tokens of one text, instead of all texts one after the other")
    parser.add_argument("--validation-share", type=float, default=0.01, help="of the texts (default: 0.01)")
    parser.add_argument("--end-token", help="that stands at the end of a text (default: found by name)")
    parser.add_argument("--shard-mb", type=float, default=SHARD_BYTES / 2**20, help="MiB of tokens in a shard (default: 64)")
    options = parser.parse_args(arguments)
    if options.context < 1 or not 0 < options.validation_share < 1 or options.shard_mb <= 0:
        parser.error("--context and --shard-mb must be above 0, --validation-share between 0 and 1")
    try:
        with _output(options.out) as (out, finish_file):
            prepared = prepare(
                read_pieces(options.texts, options.text_column),
                options.tokenizer,
                out,
                context=options.context,
                pack=not options.documents,
                validation_share=options.validation_share,
                end_token=options.end_token,
                shard_bytes=int(options.shard_mb * 2**20),
                finish_file=finish_file,
            )
    except MillstreamError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(asdict(prepared)))
    return 0


@contextmanager
def _output(place: str) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """A folder to write to, and what to do with each file that is whole: away with it, when `place` is in a store."""
    if not place.startswith("s3://"):
        yield Path(place), lambda path: None
        return
    from ml.storage.connect import open_artifact_store
    from ml.storage.shards import parse_shards_uri, storing

    objects = open_artifact_store().objects
    bucket, prefix = parse_shards_uri(place)
    for name in SETS:
        if objects.stat(bucket, f"{prefix}/{name}/{INDEX_NAME}") is not None:
            raise DataError(f"{place}/{name} holds token shards already; delete it, or write to another prefix")
    with tempfile.TemporaryDirectory(prefix="millstream-shards-") as folder:
        yield Path(folder), storing(objects, bucket, prefix, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
