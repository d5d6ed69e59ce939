"""Object storage at any S3 endpoint, through the `minio` client."""

import contextlib
import io
import logging
import random
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

import urllib3
from minio import Minio
from minio.datatypes import Object
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError
from urllib3.response import BaseHTTPResponse

from ml.errors import ConfigError, ObjectNotFoundError, StorageError, StorageUnavailableError, WriteConflictError
from ml.storage import keys
from ml.storage.base import ObjectInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Together the slowest line that will do: a part is sent within this time.
PART_BYTES = 8 * 2**20
SEND_TIMEOUT_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 64 * 2**10
READ_CHUNK_BYTES = 2**18
PRESIGNED_LIFETIME = timedelta(minutes=10)
CONNECT_TIMEOUT_SECONDS = 5.0
FIRST_BACKOFF_SECONDS = 0.25
# No attempt begins later than this after the first one, whatever the store asks for.
MAX_SECONDS = 120.0

BUSY_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted", "TooManyRequests"}
# Some servers, the embedded one among them, say no more than InternalError when they are full.
BUSY_ADVICE = "try again later; if it lasts, look at the store's log, and whether its disk or the bucket's quota is full"
FULL_ADVICE = "delete what is not needed, enlarge its disk or raise the quota, then run again: finished stages are reused"

CREDENTIAL_CODES = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
FULL_CODES = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage"}
CONFLICT_CODES = {"PreconditionFailed", "ConditionalRequestConflict"}


class _PlainConnection(HTTPConnection):
    """urllib3 gives a new connection the connect timeout for sending, too: 5 s for a whole part."""

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(SEND_TIMEOUT_SECONDS)


class _TlsConnection(HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(SEND_TIMEOUT_SECONDS)


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection  # type: ignore[assignment]


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection  # type: ignore[assignment]


class S3Store:
    """See `ml.storage.base.ObjectStore`. May be shared between threads, not between forked processes.

    Every call ends in finite time. Calls that can be repeated safely are, `num_attempts` times with growing, jittered pauses
    or as long as the store asks for (Retry-After), but not beyond MAX_SECONDS. A conditional write is repeated only when no
    connection was made, since a lost reply does not say whether it was done.

    Args:
        endpoint: `host:port` (plain HTTP) or `http(s)://host:port`.
        ca_file: private CA for an https endpoint.
        timeout_seconds: longest silence of the store before a call fails.
        num_attempts: the default rides out a restart of the store.
    """

    def __init__(
        self,
        endpoint: str,
        access_key: str,
        secret_key: str,
        *,
        region: str = "us-east-1",
        ca_file: Path | None = None,
        timeout_seconds: float = 30,
        num_attempts: int = 6,
    ):
        scheme, _, address = endpoint.rpartition("://")
        if scheme not in ("", "http", "https") or not address.strip("/") or "/" in address.rstrip("/"):
            raise ConfigError(f"the S3 endpoint must be host:port or http(s)://host:port, found {endpoint!r}; set MILLSTREAM_S3_ENDPOINT")
        self.endpoint = f"{scheme or 'http'}://{address.rstrip('/')}"
        self._num_attempts = num_attempts
        self._timeout_seconds = timeout_seconds
        self._http = urllib3.PoolManager(
            maxsize=16,
            timeout=urllib3.Timeout(connect=min(CONNECT_TIMEOUT_SECONDS, timeout_seconds), read=timeout_seconds),
            retries=False,
            cert_reqs="CERT_REQUIRED",
            ca_certs=str(ca_file) if ca_file else None,
        )
        self._http.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
        try:
            self._client = Minio(
                address.rstrip("/"),
                access_key=access_key,
                secret_key=secret_key,
                secure=scheme == "https",
                region=region,
                http_client=self._http,
            )
        except ValueError as error:
            raise ConfigError(f"the S3 endpoint {endpoint!r} cannot be used: {error}; set MILLSTREAM_S3_ENDPOINT") from error

    def ensure_bucket(self, bucket: str) -> None:
        def ensure() -> None:
            if self._client.bucket_exists(bucket):
                return
            try:
                self._client.make_bucket(bucket)
            except S3Error as error:
                if error.code != "BucketAlreadyOwnedByYou" and not self._client.bucket_exists(bucket):
                    raise

        self._call(f"create bucket {bucket}", ensure)

    def put(self, bucket: str, key: str, data: bytes | Path, *, if_match: str | None = None, if_none_match: bool = False) -> ObjectInfo:
        keys.check_key(key)
        if if_match is not None or if_none_match:
            if not isinstance(data, bytes):
                raise ValueError(f"a conditional write of {key!r} takes bytes, not a file")
            return self._put_if(bucket, key, data, "If-Match" if if_match is not None else "If-None-Match", if_match)

        def upload() -> ObjectInfo:
            if isinstance(data, bytes):
                size_bytes = len(data)
                result = self._client.put_object(bucket, key, io.BytesIO(data), size_bytes, part_size=PART_BYTES)
            else:
                size_bytes = data.stat().st_size
                result = self._client.fput_object(bucket, key, str(data), part_size=PART_BYTES)
            return ObjectInfo(bucket, key, size_bytes, result.etag or "", datetime.now(UTC))

        return self._call(f"write {bucket}/{key}", upload)

    def get(self, bucket: str, key: str) -> bytes:
        return self.get_with_info(bucket, key)[0]

    def get_with_info(self, bucket: str, key: str) -> tuple[bytes, ObjectInfo]:
        keys.check_path(key)

        def read() -> tuple[bytes, ObjectInfo]:
            with self._open(bucket, key) as response:
                data = b"".join(self._chunks(response))
                modified = parsedate_to_datetime(response.headers["Last-Modified"])
                return data, ObjectInfo(bucket, key, len(data), response.headers["ETag"].strip('"'), modified)

        return self._call(f"read {bucket}/{key}", read)

    def download(self, bucket: str, key: str, path: Path) -> None:
        keys.check_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)

        def copy() -> None:
            # A folder, not a temporary file: the file in it then gets the usual permissions.
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
                part = Path(folder) / "part"
                with self._open(bucket, key) as response, part.open("wb") as file:
                    file.writelines(self._chunks(response))
                part.replace(path)

        self._call(f"download {bucket}/{key}", copy)

    def stat(self, bucket: str, key: str) -> ObjectInfo | None:
        keys.check_path(key)

        try:
            return self._call(f"look up {bucket}/{key}", lambda: _info(bucket, self._client.stat_object(bucket, key)))
        except ObjectNotFoundError:
            return None

    def list(self, bucket: str, prefix: str = "") -> Iterator[ObjectInfo]:
        def read() -> list[ObjectInfo]:
            found = self._client.list_objects(bucket, prefix=prefix, recursive=True)
            return [_info(bucket, item) for item in found if not item.is_dir]

        # Some servers list folder by folder, which is not the order of the keys.
        return iter(sorted(self._call(f"list {bucket}/{prefix}", read), key=lambda info: info.key))

    def delete(self, bucket: str, key: str) -> None:
        keys.check_path(key)
        with contextlib.suppress(ObjectNotFoundError):
            self._call(f"delete {bucket}/{key}", lambda: self._client.remove_object(bucket, key))

    def _put_if(self, bucket: str, key: str, data: bytes, header: str, etag: str | None) -> ObjectInfo:
        """The one conditional write. The client has no argument for it, so the header goes with a presigned PUT."""

        def write() -> ObjectInfo:
            url = self._client.presigned_put_object(bucket, key, expires=PRESIGNED_LIFETIME)
            value = "*" if etag is None else f'"{etag}"'
            response = self._http.request("PUT", url, body=data, headers={header: value, "Content-Type": "application/octet-stream"})
            if response.status >= 300:
                raise _reply_error(response, bucket, key)
            return ObjectInfo(bucket, key, len(data), response.headers["ETag"].strip('"'), datetime.now(UTC))

        what = f"write {bucket}/{key} on condition"
        try:
            return self._call(what, write, repeatable=False)
        except ObjectNotFoundError as error:  # some servers answer so when If-Match meets no object
            raise WriteConflictError(f"could not {what}: the object is gone") from error

    @contextlib.contextmanager
    def _open(self, bucket: str, key: str) -> Iterator[BaseHTTPResponse]:
        response = self._client.get_object(bucket, key)
        try:
            yield response
        finally:
            response.close()
            response.release_conn()

    def _chunks(self, response: BaseHTTPResponse) -> Iterator[bytes]:
        """The body. The socket bounds each silence; this bounds a body that comes drop by drop."""
        seconds = self._timeout_seconds + int(response.headers.get("Content-Length") or 0) / SLOWEST_BYTES_PER_SECOND
        deadline = time.monotonic() + seconds
        while chunk := response.read1(READ_CHUNK_BYTES):
            yield chunk
            if time.monotonic() > deadline:
                raise HTTPError(f"the body did not arrive within {seconds:.0f} s")

    def _call(self, what: str, operation: Callable[[], T], *, repeatable: bool = True) -> T:
        started = time.monotonic()
        for attempt in range(1, self._num_attempts + 1):
            try:
                return operation()
            except (MinioException, HTTPError, ET.ParseError, ValueError) as error:
                failure = _translate(error, f"could not {what} at {self.endpoint}", maybe_done=not repeatable)
                never_arrived = isinstance(error, NewConnectionError | ConnectTimeoutError)
                pause = FIRST_BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                pause = max(pause, _asked_pause(error) * random.uniform(1, 1.1))
                too_late = time.monotonic() - started + pause > MAX_SECONDS
                if not failure.retryable or attempt == self._num_attempts or too_late or not (repeatable or never_arrived):
                    raise failure from error
                logger.log(logging.INFO if pause > 1 else logging.DEBUG, "attempt %d, next in %.1f s: %s", attempt, pause, failure)
            time.sleep(pause)
        raise AssertionError("num_attempts must be at least 1")


def _asked_pause(error: Exception) -> float:
    """How long the store asks to be left alone, in seconds; 0 when it does not say."""
    headers = error.response.headers if isinstance(error, S3Error) else {}
    asked = headers.get("Retry-After", "")
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _info(bucket: str, found: Object) -> ObjectInfo:
    modified = found.last_modified or datetime.now(UTC)
    return ObjectInfo(bucket, found.object_name or "", found.size or 0, (found.etag or "").strip('"'), modified)


def _reply_error(response: BaseHTTPResponse, bucket: str, key: str) -> MinioException:
    """The same exception that the client would have raised for this reply."""
    try:
        return S3Error.fromxml(response)
    except ET.ParseError:
        if response.status == 412:
            return S3Error(response, "PreconditionFailed", "a condition did not hold", None, None, None, bucket, key)
        return ServerError(f"HTTP status {response.status}", response.status)


def _translate(error: Exception, what: str, *, maybe_done: bool) -> StorageError:
    """Our error for one of the client's, of urllib3's or of the XML parser's."""
    if isinstance(error, S3Error):
        return _translate_s3_error(error, what)
    if isinstance(error, SSLError):
        return StorageError(f"{what}: TLS failed ({error}); for a private CA set MILLSTREAM_S3_CA_FILE to its certificate")
    if isinstance(error, HTTPError):
        doubt = ", and the write may have been done or not: read the object before trying again" if maybe_done else ""
        return StorageUnavailableError(f"{what}: no answer ({error}){doubt}; check that the object store runs (MILLSTREAM_S3_ENDPOINT)")
    status = getattr(error, "_code", None) if isinstance(error, InvalidResponseError) else getattr(error, "status_code", None)
    if status == 507:
        return StorageError(f"{what}: the store is full (HTTP status 507); {FULL_ADVICE}")
    if status is not None and _is_busy(status):
        return StorageUnavailableError(f"{what}: the store answered with HTTP status {status}; {BUSY_ADVICE}")
    if isinstance(error, ET.ParseError | InvalidResponseError | ServerError):
        return StorageError(f"{what}: the answer is not S3 ({error}); check MILLSTREAM_S3_ENDPOINT")
    return StorageError(f"{what}: {error}")


def _translate_s3_error(error: S3Error, what: str) -> StorageError:
    code, status = error.code or "", error.response.status
    said = f"{code}: {error.message}"
    if code == "NoSuchKey":
        return ObjectNotFoundError(f"{what}: there is no such object")
    if code == "NoSuchBucket":
        return StorageError(f"{what}: there is no such bucket; create it, or check MILLSTREAM_BUCKET_PREFIX")
    if code in CONFLICT_CODES or status == 412:
        return WriteConflictError(f"{what}: somebody else wrote it first; read it again and decide anew")
    if code in FULL_CODES or status == 507:
        return StorageError(f"{what}: the store is full, or over a quota ({said}); {FULL_ADVICE}")
    if code in BUSY_CODES or _is_busy(status):
        return StorageUnavailableError(f"{what}: the store is busy or failing ({said}); {BUSY_ADVICE}")
    if code == "RequestTimeTooSkewed":
        return StorageError(f"{what}: the clocks of this machine and of the store differ too much; set this machine's clock")
    if code in CREDENTIAL_CODES or status in (401, 403):
        advice = "check MILLSTREAM_S3_ACCESS_KEY and MILLSTREAM_S3_SECRET_KEY, and what the key is allowed to do"
        return StorageError(f"{what}: access refused ({said}); {advice}")
    return StorageError(f"{what}: refused ({said}, HTTP status {status})")


def _is_busy(status: int) -> bool:
    """Whether a reply with this HTTP status may be another one later. 501 says that the store cannot do it at all, 507 that it is full."""
    return status == 429 or (status >= 500 and status not in (501, 507))
