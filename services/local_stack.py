"""The services of Millstream on this machine.

`make up` starts all of them and leaves them running: object store, Prefect server, worker, predictor, event bridge, and
the supervisor that restarts what dies. A run by itself needs three: object store, Prefect server, predictor; it starts what
is missing and, at its end, stops it again unless `make up` wants it or another run still uses it. A part whose address
is given by the environment is never started: `MILLSTREAM_S3_ENDPOINT`, `PREFECT_API_URL`, `MILLSTREAM_PREDICTOR_URL`,
`MILLSTREAM_BRIDGE_URL`.

Everything is known by its state folder. Starting and stopping is done under one lock; every user holds a second lock,
shared, which the system releases when the user dies in whatever way.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from ml.errors import ServiceError
from ml.settings import TELEMETRY_OFF, Settings, load_settings
from services import object_store, prefect_server, worker
from services.event_bridge import launcher as event_bridge
from services.health import accepts_connections, answers
from services.predictor import launcher as predictor
from services.processes import read_process, service_lock
from services.supervisor import launcher as supervisor
from services.supervisor.watchdog import end_flow_runs

MIN_FREE_DISK_BYTES = 2 * 10**9
MIN_FREE_MEMORY_BYTES = 1_500_000_000
LOCK_NAME = "stack"


@dataclass(frozen=True)
class Part:
    """What can be asked of a part that runs here, all by state folder.

    Args:
        address: None for a part that listens nowhere.
    """

    address: Callable[[Path], str] | None
    is_healthy: Callable[[Path], bool]
    stop: Callable[[Path], None]


def _store_address(state_dir: Path) -> str:
    return object_store.object_store_endpoint(state_dir).endpoint


PARTS = {
    object_store.NAME: Part(_store_address, object_store.is_healthy, object_store.stop_object_store),
    prefect_server.NAME: Part(prefect_server.prefect_api_address, prefect_server.is_healthy, prefect_server.stop_prefect_server),
    predictor.NAME: Part(predictor.predictor_address, predictor.is_healthy, predictor.stop_predictor),
    event_bridge.NAME: Part(event_bridge.event_bridge_address, event_bridge.is_healthy, event_bridge.stop_event_bridge),
    worker.NAME: Part(None, worker.is_healthy, worker.stop_worker),
    supervisor.NAME: Part(None, supervisor.is_healthy, supervisor.stop_supervisor),
}
"""Process name -> part, in the order in which they need each other."""


@dataclass(frozen=True)
class StackAddresses:
    """Where the parts are, as settings for whoever uses them."""

    s3_endpoint: str
    prefect_api_url: str
    predictor_url: str
    bridge_url: str | None
    environment: dict[str, str]

    @property
    def prefect_ui_url(self) -> str:
        return self.prefect_api_url.removesuffix("/api")


@dataclass(frozen=True)
class PartStatus:
    """One part of the stack.

    Args:
        pid: None when it does not run, or is not ours.
        url: None when it has none yet.
        since: when its process started, ISO 8601 UTC.
        managed: false for a part whose address the environment gives.
    """

    part: str
    pid: int | None
    url: str | None
    healthy: bool
    since: str | None
    managed: bool = True


class LocalStack:
    """The stack of one state folder.

    Args:
        settings: which parts are given from outside; by default those of the environment.
        prefect_api_url: a Prefect server to use; by default the environment's.
    """

    def __init__(self, state_dir: Path, *, settings: Settings | None = None, prefect_api_url: str | None = None):
        self.state_dir = state_dir.resolve()
        self._settings = settings or load_settings()
        self._given_prefect_api_url = prefect_api_url or os.environ.get("PREFECT_API_URL") or None

    @property
    def prefect_api_url(self) -> str:
        """Where the Prefect server of this stack listens, or will listen."""
        return self._given_prefect_api_url or prefect_server.prefect_api_address(self.state_dir)

    @property
    def own_parts(self) -> list[str]:
        """The parts that run here once the stack is up, by name: all but those that the environment gives."""
        return [name for name in PARTS if self._given(name) is None]

    def up(self) -> StackAddresses:
        """Start whatever does not run, heal what is ill, and let it run until `down`. May be repeated at any time.

        Raises:
            ServiceError: too little disk or memory, a taken port, or a part that does not start.
        """
        with _signals_end_the_block(), service_lock(LOCK_NAME, self.state_dir):
            was_running = self._anything_runs()
            if not was_running:
                check_room(self.state_dir)
            try:
                addresses = self._start()
                addresses = self._start_operation(addresses, register=True)
            except BaseException:
                if not was_running:
                    self._stop()
                raise
            return addresses

    def heal(self) -> None:
        """Start again what died since `up`. Does nothing once `down` was called.

        Raises:
            ServiceError: a part does not start.
        """
        with service_lock(LOCK_NAME, self.state_dir):
            if self.stays_up:
                self._start_operation(self._start(), register=False)

    def down(self) -> None:
        """Stop every part that was started here, whoever uses it, flow runs included. Does nothing when there is none."""
        with _signals_wait():
            supervisor.stays_up_path(self.state_dir).unlink(missing_ok=True)
            supervisor.stop_supervisor(self.state_dir)  # before the lock, which it may hold while it heals
            with service_lock(LOCK_NAME, self.state_dir):
                self._stop()

    def status(self) -> list[PartStatus]:
        """Every part as it is right now."""
        return [self._part_status(name) for name in PARTS]

    @contextlib.contextmanager
    def running(self) -> Iterator[StackAddresses]:
        """Use the stack: started if need be, and stopped at the end unless it is to stay up or is used by another.

        While inside, the environment of this process names the parts, and SIGTERM and SIGHUP raise SystemExit.
        Enter before Prefect is imported: it reads its settings once.

        Raises:
            ServiceError: too little disk or memory, or a part that does not start.
        """
        with _signals_end_the_block():
            user = UserLock(self.state_dir)
            try:
                check_room(self.state_dir)
                with service_lock(LOCK_NAME, self.state_dir):
                    if not self._anything_runs():
                        # "make up" of an earlier boot, or one that was killed: nothing was up before us.
                        supervisor.stays_up_path(self.state_dir).unlink(missing_ok=True)
                    addresses = self._start()
                with _environment(addresses.environment):
                    yield addresses
            finally:
                with _signals_wait(), service_lock(LOCK_NAME, self.state_dir):
                    if user.release() and not self.stays_up:
                        self._stop()

    @property
    def stays_up(self) -> bool:
        """Whether `up` wants the stack to run on."""
        return supervisor.stays_up_path(self.state_dir).exists()

    def _start(self) -> StackAddresses:
        """What every run needs."""
        # The Prefect server takes longest by far: it starts while the others do.
        prefect_api_url = self._given_prefect_api_url or prefect_server.launch_prefect_server(self.state_dir, self._settings)
        environment = dict(TELEMETRY_OFF) | self._store_environment()
        s3_endpoint = environment["MILLSTREAM_S3_ENDPOINT"]
        predictor_url = self._settings.predictor_url or predictor.start_predictor(self.state_dir, environment)
        if not self._given_prefect_api_url:
            prefect_server.wait_for_prefect_server(self.state_dir)
            environment["PREFECT_HOME"] = str(prefect_server.prefect_home(self.state_dir))
        environment |= {"PREFECT_API_URL": prefect_api_url, "MILLSTREAM_PREDICTOR_URL": predictor_url}
        # Prefect keeps the exception of a failed run: as JSON, never pickled.
        environment["PREFECT_RESULTS_DEFAULT_SERIALIZER"] = "json"
        return StackAddresses(s3_endpoint, prefect_api_url, predictor_url, None, environment)

    def _start_operation(self, addresses: StackAddresses, *, register: bool) -> StackAddresses:
        """What makes a service of it: deployments, worker, event bridge, supervisor."""
        environment = addresses.environment | self._bridge_environment()
        if register:
            _register(environment)
        bridge_url = self._settings.bridge_url or event_bridge.start_event_bridge(self.state_dir, environment)
        worker.start_worker(self.state_dir, environment)
        supervisor.mark_stays_up(self.state_dir)
        supervisor.start_supervisor(self.state_dir)
        return replace(addresses, bridge_url=bridge_url, environment=environment)

    def _bridge_environment(self) -> dict[str, str]:
        if self._settings.bridge_url is None:
            url, token = event_bridge.event_bridge_address(self.state_dir), event_bridge.bridge_token(self.state_dir)
        else:
            secret = self._settings.bridge_token
            url, token = self._settings.bridge_url, secret.get_secret_value() if secret else ""
        return {"MILLSTREAM_BRIDGE_URL": url, "MILLSTREAM_BRIDGE_TOKEN": token}

    def _store_environment(self) -> dict[str, str]:
        """The settings of the object store for every process of this stack."""
        environment = {
            "MILLSTREAM_STATE_DIR": str(self.state_dir),
            "MILLSTREAM_BUCKET_PREFIX": self._settings.bucket_prefix,
            "MILLSTREAM_THREADS_PER_PROCESS": str(self._settings.threads_per_process),
            "MILLSTREAM_S3_REGION": self._settings.s3_region,
            "MILLSTREAM_PREDICTION_LOG_SHARE": str(self._settings.prediction_log_share),
            "MILLSTREAM_PREDICTION_LOG_ROWS_PER_HOUR": str(self._settings.prediction_log_rows_per_hour),
        }
        if self._settings.s3_endpoint is None:
            endpoint = object_store.start_object_store(self.state_dir)
            return environment | {
                "MILLSTREAM_S3_ENDPOINT": endpoint.endpoint,
                "MILLSTREAM_S3_ACCESS_KEY": endpoint.access_key,
                "MILLSTREAM_S3_SECRET_KEY": endpoint.secret_key,
            }
        environment["MILLSTREAM_S3_ENDPOINT"] = self._settings.s3_endpoint
        if self._settings.s3_access_key is not None:
            environment["MILLSTREAM_S3_ACCESS_KEY"] = self._settings.s3_access_key.get_secret_value()
        if self._settings.s3_secret_key is not None:
            environment["MILLSTREAM_S3_SECRET_KEY"] = self._settings.s3_secret_key.get_secret_value()
        if self._settings.s3_ca_file is not None:
            environment["MILLSTREAM_S3_CA_FILE"] = str(self._settings.s3_ca_file)
        return environment

    def _stop(self) -> None:
        """Stop the parts in the order in which they need each other; one that will not stop does not keep the others alive."""
        errors = []
        for name in reversed(PARTS):
            try:
                PARTS[name].stop(self.state_dir)
                if name == event_bridge.NAME:
                    # Nothing starts runs any more, and the server still takes in how they end.
                    end_flow_runs(self.state_dir, self.prefect_api_url)
            except ServiceError as error:
                errors.append(str(error))
        if errors:
            raise ServiceError("; ".join(errors))

    def _anything_runs(self) -> bool:
        return any(read_process(part, self.state_dir) is not None for part in PARTS)

    def _given(self, name: str) -> str | None:
        """The address that the environment gives for a part, if it does."""
        addresses = {
            object_store.NAME: self._settings.s3_endpoint,
            prefect_server.NAME: self._given_prefect_api_url,
            predictor.NAME: self._settings.predictor_url,
            event_bridge.NAME: self._settings.bridge_url,
        }
        return addresses.get(name)

    def _part_status(self, name: str) -> PartStatus:
        if (given := self._given(name)) is not None:
            return PartStatus(name, None, given, _given_is_healthy(name, given), since=None, managed=False)
        process, part = read_process(name, self.state_dir), PARTS[name]
        if process is None:
            return PartStatus(name, None, None, False, since=None)
        since = datetime.fromtimestamp(process.started, UTC).isoformat(timespec="seconds")
        address = part.address(self.state_dir) if part.address else None
        return PartStatus(name, process.pid, address, part.is_healthy(self.state_dir), since)


def running_stack(state_dir: Path) -> contextlib.AbstractContextManager[StackAddresses]:
    """Use the local stack of a state folder; see `LocalStack.running`."""
    return LocalStack(state_dir).running()


def _register(environment: dict[str, str]) -> None:
    """In a process of its own: Prefect reads its settings once, and this one may have read others."""
    command = [sys.executable, "-m", "services.registration"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ServiceError(f"the deployments could not be registered with the Prefect server:\n{done.stderr.strip()[-3000:]}")


def _given_is_healthy(name: str, address: str) -> bool:
    if name == object_store.NAME:
        return accepts_connections(address)
    return answers(f"{address}/ready" if name == prefect_server.NAME else f"{address}/healthz")


class UserLock:
    """A shared lock that says "the stack is in use"; freed by the system when its holder dies."""

    def __init__(self, state_dir: Path):
        path = state_dir / "locks" / f"{LOCK_NAME}-users.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def release(self) -> bool:
        """Give up the lock; whether nobody else holds it. To be called under the stack's lock."""
        fcntl.flock(self._file, fcntl.LOCK_UN)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            self._file.close()
        return True


def check_room(state_dir: Path) -> None:
    """
    Raises:
        ServiceError: too little free disk or memory for the stack and a small run.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    free_disk = shutil.disk_usage(state_dir).free
    if free_disk < MIN_FREE_DISK_BYTES:
        raise ServiceError(
            f"{state_dir} has {free_disk / 1e9:.1f} GB free, {MIN_FREE_DISK_BYTES / 1e9:.1f} GB are needed; "
            "free some, or set MILLSTREAM_STATE_DIR to a larger disk"
        )
    free_memory = psutil.virtual_memory().available
    if free_memory < MIN_FREE_MEMORY_BYTES:
        raise ServiceError(
            f"{free_memory / 1e9:.1f} GB of memory are free, {MIN_FREE_MEMORY_BYTES / 1e9:.1f} GB are needed; close other programs first"
        )


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables of this process, and put them back at the end."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    load_settings.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        load_settings.cache_clear()


@contextlib.contextmanager
def _signals_end_the_block() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that `finally` runs; Ctrl-C raises KeyboardInterrupt anyway."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    with _handlers({signal.SIGTERM: end, signal.SIGHUP: end}):
        yield


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Let no impatient second signal break off the stopping of the parts, which is bounded in time."""
    with _handlers(dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), signal.SIG_IGN)):
        yield


@contextlib.contextmanager
def _handlers(handlers: dict) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change how signals are handled
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
