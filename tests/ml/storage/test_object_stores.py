"""What every object store promises, checked on the one in memory and on the real embedded server."""

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ml.errors import ObjectNotFoundError, StorageError, WriteConflictError
from ml.storage.base import ObjectStore
from ml.storage.s3 import S3Store
from tests.conftest import remove_bucket


@pytest.fixture
def bucket(object_store: ObjectStore) -> Iterator[str]:
    name = f"conformance-{uuid.uuid4().hex[:10]}"
    object_store.ensure_bucket(name)
    yield name
    if isinstance(object_store, S3Store):
        remove_bucket(object_store, name)


def test_an_object_comes_back_as_it_was_put(object_store: ObjectStore, bucket: str):
    data = bytes(range(256)) * 10
    put = object_store.put(bucket, "a/b=1/c_d-e.f+g@h", data)
    got, info = object_store.get_with_info(bucket, "a/b=1/c_d-e.f+g@h")
    stat = object_store.stat(bucket, "a/b=1/c_d-e.f+g@h")
    assert got == data == object_store.get(bucket, "a/b=1/c_d-e.f+g@h")
    assert stat is not None
    assert put.etag == info.etag == stat.etag
    assert put.size_bytes == info.size_bytes == stat.size_bytes == len(data)
    assert abs((put.modified - stat.modified).total_seconds()) < 5


def test_an_empty_object_is_an_object(object_store: ObjectStore, bucket: str):
    object_store.put(bucket, "empty", b"")
    assert object_store.get(bucket, "empty") == b""
    assert object_store.stat(bucket, "empty") is not None


def test_a_later_put_replaces_the_bytes_and_the_etag(object_store: ObjectStore, bucket: str):
    first = object_store.put(bucket, "key", b"first")
    second = object_store.put(bucket, "key", b"second")
    assert object_store.get(bucket, "key") == b"second"
    assert first.etag != second.etag


def test_a_missing_object_is_not_found(object_store: ObjectStore, bucket: str, tmp_path: Path):
    with pytest.raises(ObjectNotFoundError, match="nothing/here"):
        object_store.get(bucket, "nothing/here")
    with pytest.raises(ObjectNotFoundError):
        object_store.download(bucket, "nothing/here", tmp_path / "file")
    assert object_store.stat(bucket, "nothing/here") is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_objects_is_no_object(object_store: ObjectStore, bucket: str):
    object_store.put(bucket, "folder/object", b"x")
    assert object_store.stat(bucket, "folder") is None
    with pytest.raises(ObjectNotFoundError):
        object_store.get(bucket, "folder")


def test_an_object_and_objects_below_its_key_live_side_by_side(object_store: ObjectStore, bucket: str):
    object_store.put(bucket, "model", b"above")
    object_store.put(bucket, "model/part", b"below")
    assert object_store.get(bucket, "model") == b"above"
    object_store.delete(bucket, "model")
    assert object_store.get(bucket, "model/part") == b"below"


def test_a_missing_bucket_is_an_error_that_names_it(object_store: ObjectStore):
    for call in (
        lambda: object_store.put("no-such-bucket", "key", b"x"),
        lambda: object_store.get("no-such-bucket", "key"),
        lambda: list(object_store.list("no-such-bucket")),
    ):
        with pytest.raises(StorageError, match="no-such-bucket") as caught:
            call()
        assert not isinstance(caught.value, ObjectNotFoundError)
        assert not caught.value.retryable


def test_making_a_bucket_twice_keeps_its_objects(object_store: ObjectStore, bucket: str):
    object_store.put(bucket, "key", b"x")
    object_store.ensure_bucket(bucket)
    assert object_store.get(bucket, "key") == b"x"


@pytest.mark.parametrize(
    "key", ["", "/absolute", "a//b", "a/", "../up", "a/../b", "a/.", "sp ace", "ümlaut", "a\\b", "new\nline", "per%cent"]
)
def test_writing_under_an_odd_key_is_refused(object_store: ObjectStore, bucket: str, key: str):
    with pytest.raises(ValueError, match="relative path"):
        object_store.put(bucket, key, b"x")


@pytest.mark.parametrize("key", ["../other/key", "a/./b", "a//b", ""])
def test_reading_outside_the_bucket_is_refused(object_store: ObjectStore, bucket: str, key: str, tmp_path: Path):
    for call in (
        lambda: object_store.get(bucket, key),
        lambda: object_store.stat(bucket, key),
        lambda: object_store.delete(bucket, key),
        lambda: object_store.download(bucket, key, tmp_path / "file"),
    ):
        with pytest.raises(ValueError, match="relative path"):
            call()


def test_a_list_holds_the_keys_of_a_prefix_in_order(object_store: ObjectStore, bucket: str):
    for key in ["b/2", "b/1", "b.c", "b", "ba", "a", "b/1/x", "B", "b-1"]:
        object_store.put(bucket, key, key.encode())
    assert [info.key for info in object_store.list(bucket)] == ["B", "a", "b", "b-1", "b.c", "b/1", "b/1/x", "b/2", "ba"]
    assert [info.key for info in object_store.list(bucket, "b/")] == ["b/1", "b/1/x", "b/2"]
    assert [info.key for info in object_store.list(bucket, "nothing")] == []
    listed = {info.key: info for info in object_store.list(bucket)}
    stat = object_store.stat(bucket, "b/1/x")
    assert stat is not None
    assert (listed["b/1/x"].etag, listed["b/1/x"].size_bytes) == (stat.etag, 5)


def test_a_list_is_whole_beyond_one_page(object_store: ObjectStore, bucket: str):
    names = [f"many/{number:04d}" for number in range(1050)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: object_store.put(bucket, name, b""), names))
    assert [info.key for info in object_store.list(bucket, "many/")] == names


def test_deleting_twice_is_fine(object_store: ObjectStore, bucket: str):
    object_store.put(bucket, "key", b"x")
    object_store.delete(bucket, "key")
    object_store.delete(bucket, "key")
    assert object_store.stat(bucket, "key") is None


def test_a_large_file_goes_up_and_comes_down(object_store: ObjectStore, bucket: str, tmp_path: Path):
    source = tmp_path / "source"
    source.write_bytes(b"0123456789abcdef" * (40 * 2**16) + b"tail")
    info = object_store.put(bucket, "large", source)
    object_store.download(bucket, "large", tmp_path / "new" / "folder" / "copy")
    assert (tmp_path / "new" / "folder" / "copy").read_bytes() == source.read_bytes()
    assert info.size_bytes == source.stat().st_size
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["copy"]


def test_a_download_replaces_an_older_file(object_store: ObjectStore, bucket: str, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"older and longer")
    object_store.put(bucket, "key", b"newer")
    object_store.download(bucket, "key", path)
    assert path.read_bytes() == b"newer"


def test_if_none_match_writes_only_the_first_time(object_store: ObjectStore, bucket: str):
    first = object_store.put(bucket, "key", b"first", if_none_match=True)
    with pytest.raises(WriteConflictError, match="key"):
        object_store.put(bucket, "key", b"second", if_none_match=True)
    data, info = object_store.get_with_info(bucket, "key")
    assert (data, info.etag) == (b"first", first.etag)


def test_if_match_writes_only_over_what_was_read(object_store: ObjectStore, bucket: str):
    first = object_store.put(bucket, "key", b"first")
    second = object_store.put(bucket, "key", b"second", if_match=first.etag)
    with pytest.raises(WriteConflictError):
        object_store.put(bucket, "key", b"third", if_match=first.etag)
    with pytest.raises(WriteConflictError):
        object_store.put(bucket, "missing", b"x", if_match=first.etag)
    assert object_store.get_with_info(bucket, "key")[1].etag == second.etag
    assert object_store.stat(bucket, "missing") is None


def test_a_conditional_write_into_a_missing_bucket_is_no_conflict(object_store: ObjectStore):
    with pytest.raises(StorageError, match="no such bucket") as caught:
        object_store.put("no-such-bucket", "key", b"x", if_none_match=True)
    assert not isinstance(caught.value, WriteConflictError)


def test_a_conditional_write_takes_no_file(object_store: ObjectStore, bucket: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ValueError, match="bytes"):
        object_store.put(bucket, "key", tmp_path / "file", if_none_match=True)


@pytest.mark.parametrize("condition", ["if_match", "if_none_match"])
def test_of_racing_conditional_writes_exactly_one_wins(object_store: ObjectStore, bucket: str, condition: str):
    num_writers = 5
    for round_number in range(2):
        key = f"race-{round_number}"
        etag = object_store.put(bucket, key, b"before").etag if condition == "if_match" else None
        barrier = threading.Barrier(num_writers)
        winners, losers = [], []

        def write(number: int, key: str = key, etag: str | None = etag, barrier=barrier, winners=winners, losers=losers) -> None:
            data = f"writer {number}".encode()
            barrier.wait()
            try:
                object_store.put(bucket, key, data, if_match=etag, if_none_match=etag is None)
                winners.append(data)
            except WriteConflictError:
                losers.append(data)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(num_writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(winners), len(losers)) == (1, num_writers - 1)
        assert object_store.get(bucket, key) == winners[0]


def test_a_reader_never_sees_a_part_of_a_write(object_store: ObjectStore, bucket: str):
    versions = [bytes([value]) * 300_000 for value in range(12)]
    object_store.put(bucket, "key", versions[0])
    seen = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(object_store.get(bucket, "key"))

    reader = threading.Thread(target=read)
    reader.start()
    for data in versions:
        object_store.put(bucket, "key", data)
    done.set()
    reader.join()
    assert seen
    assert all(data in versions for data in seen)
