"""Where rows come from: a file, a folder, an S3 prefix, or a file inside an installed package.

A new kind of source is one more scheme in `open_source`: it gives objects with a name, a digest and their bytes.
"""

import datetime
import difflib
import hashlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ml.config import DataConfig
from ml.errors import DataError, StorageError
from ml.storage.artifacts import ArtifactStore, digest_file

logger = logging.getLogger(__name__)

READABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".jsonlines")
READABLE = "CSV, TSV, Parquet and JSONL, also compressed as .gz"


@dataclass(frozen=True)
class SourceObject:
    """One file or object as it came. `read` gives its bytes, for a compressed file the compressed ones."""

    name: str
    sha256: str
    size_bytes: int
    read: Callable[[], bytes] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Source:
    """Everything that is to be read, in the order in which it is to be read: by name."""

    description: str
    objects: tuple[SourceObject, ...]

    @property
    def digests(self) -> dict[str, str]:
        """Object name -> sha256: what a stage key needs to know of a source."""
        return {item.name: item.sha256 for item in self.objects}


@dataclass(frozen=True)
class _Candidate:
    """An object that was listed but not yet read."""

    name: str
    size_bytes: int
    modified: datetime.datetime
    open: Callable[[], SourceObject]


def open_source(config: DataConfig, store: ArtifactStore) -> Source:
    """Find and digest the objects that `config.source` names.

    Forms: a path (relative to the working folder, `~` allowed), `file://…`, `s3://bucket/key-or-prefix` (through
    the configured object store), `package:<import name>/<file>` (the package is located, never imported).
    Of a folder or prefix, `config.window` takes all readable objects, the last n, or those modified since a date.

    Raises:
        DataError: nothing is there, nothing in it is readable, or it is empty; the message names the fix.
    """
    source = config.source.strip()
    if not source:
        raise DataError("no data was named; say DATA=<file, folder, s3://bucket/prefix or package:name/file>")
    scheme, _, rest = source.partition(":")
    if scheme == "s3" and rest.startswith("//"):
        return _open_s3(source, config, store)
    if scheme == "package":
        return _open_path(_package_path(rest), source, config)
    if scheme == "file" and rest.startswith("//"):
        return _open_path(Path(unquote(urlsplit(source).path)), source, config)
    if rest.startswith("//"):
        raise DataError(f"data source {source!r}: {scheme}:// is not a known kind; known: a path, file://, s3://, package:")
    path = Path(source).expanduser()
    return _open_path(path, str(path.resolve()), config)


def _open_path(path: Path, description: str, config: DataConfig) -> Source:
    path = path.resolve()
    if path.is_file():
        if not is_readable(path.name):
            raise DataError(f"{path} is not of a kind that can be read ({READABLE}); found the name {path.name!r}. Convert or rename it.")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes); check that it was written, or name another file with DATA=")
        return Source(description, (_file_object(path, path.name),))
    if path.is_dir():
        return _open_folder(path, description, config)
    raise DataError(f"there is no file or folder {path}{_near_names(path)}. Check DATA=, relative paths start at {Path.cwd()}")


def _open_folder(folder: Path, description: str, config: DataConfig) -> Source:
    candidates, ignored = [], []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if not is_readable(path.name) or path.stat().st_size == 0:
            ignored.append(name)
            continue
        modified = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
        candidates.append(_Candidate(name, path.stat().st_size, modified, lambda path=path, name=name: _file_object(path, name)))
    return _choose(str(folder), description, candidates, ignored, config)


def _open_s3(source: str, config: DataConfig, store: ArtifactStore) -> Source:
    bucket, _, key = source.removeprefix("s3://").partition("/")
    if not bucket:
        raise DataError(f"{source!r} names no bucket; write s3://bucket/prefix")
    try:
        return _choose_s3(source, bucket, key, config, store)
    except StorageError as error:
        if error.retryable:
            raise
        raise DataError(f"{source} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{source} cannot be read: {error}. Rename the object or check DATA=") from error


def _choose_s3(source: str, bucket: str, key: str, config: DataConfig, store: ArtifactStore) -> Source:
    exact = store.objects.stat(bucket, key) if key and not key.endswith("/") else None
    if exact is not None:
        listed, root = [exact], key.rpartition("/")[0]
    else:
        root = key.rstrip("/")
        listed = list(store.objects.list(bucket, f"{root}/" if root else ""))
        if not listed:
            raise DataError(f"there is no object {source} and nothing below {source.rstrip('/')}/; upload the data there or check DATA=")
    candidates, ignored = [], []
    for info in listed:
        name = info.key.removeprefix(f"{root}/") if root else info.key
        if not is_readable(name.rpartition("/")[2]) or info.size_bytes == 0:
            ignored.append(name)
            continue

        def fetch(key: str = info.key, name: str = name) -> SourceObject:
            return _s3_object(bucket, key, name, store)

        candidates.append(_Candidate(name, info.size_bytes, info.modified, fetch))
    return _choose(source, source, sorted(candidates, key=lambda item: item.name), ignored, config)


def _choose(where: str, description: str, candidates: list[_Candidate], ignored: Sequence[str], config: DataConfig) -> Source:
    if ignored:
        shown = ", ".join(ignored[:10]) + (f" and {len(ignored) - 10} more" if len(ignored) > 10 else "")
        logger.info("%s: left out, hidden, empty or of an unknown kind: %s", where, shown)
    if not candidates:
        found = f"found {len(ignored)} other or empty files, such as {ignored[0]!r}" if ignored else "it is empty"
        raise DataError(f"{where} holds no file that can be read ({READABLE}); {found}. Put files there or check DATA=")
    chosen = _window(where, candidates, config)
    if len(chosen) < len(candidates):
        logger.info("%s: window %s takes %d of %d objects", where, config.window, len(chosen), len(candidates))
    return Source(description, tuple(candidate.open() for candidate in chosen))


def _window(where: str, candidates: list[_Candidate], config: DataConfig) -> list[_Candidate]:
    if config.window == "last_n":
        if config.window_last_n is None:
            raise DataError("data.window is last_n, but data.window_last_n is not set; say how many objects to take")
        latest = sorted(candidates, key=lambda item: (item.modified, item.name))[-config.window_last_n :]
        return sorted(latest, key=lambda item: item.name)
    if config.window == "since":
        since = _parse_date(config.window_since)
        recent = [item for item in candidates if item.modified >= since]
        if not recent:
            newest = max(item.modified for item in candidates)
            raise DataError(f"{where}: no object was modified since {since.isoformat()}; the newest is of {newest.isoformat()}")
        return recent
    return candidates


def _parse_date(text: str | None) -> datetime.datetime:
    try:
        parsed = datetime.datetime.fromisoformat(text or "")
    except ValueError as error:
        raise DataError(f"data.window is since, but data.window_since is {text!r}; give an ISO date such as 2026-01-31") from error
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)


def is_readable(file_name: str) -> bool:
    """Whether a file is read at all: by its extension; hidden files and those that start with _ are not."""
    return not file_name.startswith((".", "_")) and file_name.lower().removesuffix(".gz").endswith(READABLE_SUFFIXES)


def _file_object(path: Path, name: str) -> SourceObject:
    return SourceObject(name, digest_file(path), path.stat().st_size, path.read_bytes)


def _s3_object(bucket: str, key: str, name: str, store: ArtifactStore) -> SourceObject:
    # Read once for the digest, and again when it is wanted: a large prefix is never held in memory as a whole.
    data = store.objects.get(bucket, key)
    return SourceObject(name, hashlib.sha256(data).hexdigest(), len(data), lambda: store.objects.get(bucket, key))


def _package_path(rest: str) -> Path:
    package, _, file = rest.partition("/")
    if not package.isidentifier() or not file:
        raise DataError(f"data source 'package:{rest}': write package:<import name>/<file inside the package>")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"data source 'package:{rest}': the package {package!r} is not installed; install it, or name your own data with DATA="
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise DataError(f"data source 'package:{rest}': the file lies outside the package")
    return path


def _near_names(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        missing = next(parent for parent in (*path.parents, path) if parent.is_dir())
        return f"; the folder {folder} is not there either, the last that is: {missing}"
    names = sorted(item.name for item in folder.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))} in {folder}?"
    readable = [name for name in names if is_readable(name)][:5]
    return f"; in {folder} are {', '.join(readable)}" if readable else f"; {folder} holds no data files"
