"""Long-running local processes: started detached, remembered on disk, recognised again, stopped for certain.

A process is known by its pid and its start time together, so a pid that the system gave to somebody else is never
mistaken for ours. State lies in one folder:

    processes/<name>.json   the record of a process
    logs/<name>.log         its output, kept over restarts
    ports.json              ports, chosen once
"""

import contextlib
import fcntl
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ml.errors import ServiceError

# Below the range that Linux gives to outgoing connections, so that a kept port is seldom taken while we are down.
PORT_RANGE = range(20_000, 32_000)
LOG_LIMIT_BYTES = 20 * 2**20
NUM_LOG_LINES_SHOWN = 20
POLL_SECONDS = 0.1
# The socket of a killed process is closed a moment after the process shows as dead.
PORT_RELEASE_SECONDS = 2.0
# psutil derives the start time from the boot time, which moves by up to a second when the clock is adjusted.
START_TIME_TOLERANCE_SECONDS = 2.0

# Children of this very process, kept so that they are reaped when they end.
_children: dict[int, subprocess.Popen] = {}


@dataclass(frozen=True)
class ProcessRecord:
    """A process that was started here. It leads a session, so its pid is also the id of its group."""

    name: str
    pid: int
    started: float
    command: tuple[str, ...]


def start_process(
    name: str, command: Sequence[str], *, state_dir: Path, env: Mapping[str, str] | None = None, without: Collection[str] = ()
) -> ProcessRecord:
    """Start a detached process and remember it.

    Args:
        name: at most one process of a name lives in a state folder.
        env: variables on top of those of this process.
        without: variables of this process that it does not get.

    Raises:
        ServiceError: a process of this name is alive, or the command cannot be run.
    """
    with service_lock(f"{name}.start", state_dir):
        if alive := read_process(name, state_dir):
            raise ServiceError(f"{name} is already running as process {alive.pid}; stop it first")
        log = log_path(name, state_dir)
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            try:
                child = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**{key: value for key, value in os.environ.items() if key not in without}, **(env or {})},
                )
            except OSError as error:
                raise ServiceError(f"{name} could not be started with {command[0]!r}: {error}") from error
        _children[child.pid] = child
        return remember_process(name, child.pid, state_dir, command)


def remember_process(name: str, pid: int, state_dir: Path, command: Sequence[str] = ()) -> ProcessRecord:
    """Write the record of a living process."""
    record = ProcessRecord(name, pid, _start_time(pid), tuple(command))
    write_atomically(_record_path(name, state_dir), json.dumps(asdict(record), indent=1).encode())
    return record


def read_process(name: str, state_dir: Path) -> ProcessRecord | None:
    """The record of a process that is alive; None when there is no record, or its process is dead or a zombie."""
    record = _read_record(name, state_dir)
    return record if record and _is_alive(record) else None


def remembered_process(name: str, state_dir: Path) -> ProcessRecord | None:
    """The record of a name, whether its process is alive or not."""
    return _read_record(name, state_dir)


def process_names(state_dir: Path) -> list[str]:
    """The names of all records."""
    return sorted(path.stem for path in (state_dir / "processes").glob("*.json"))


def signal_process(record: ProcessRecord, number: signal.Signals) -> None:
    """Send a signal to a remembered process: to its whole group when it leads one. Does nothing when it is gone."""
    if not _is_alive(record):
        return
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(record.pid) == record.pid:
            os.killpg(record.pid, number)
        else:
            os.kill(record.pid, number)


def forget_process(name: str, state_dir: Path) -> None:
    """Delete the record of a process."""
    _record_path(name, state_dir).unlink(missing_ok=True)


def stop_process(name: str, state_dir: Path, grace_seconds: float = 10) -> None:
    """End a process and all of its group: TERM, wait, KILL. Does nothing when there is none.

    Raises:
        ServiceError: the group is still there after KILL.
    """
    record = _read_record(name, state_dir)
    if record is None:
        return
    if not _pid_belongs_to_somebody_else(record):
        _signal_group(record.pid, signal.SIGTERM)
        if not _wait_until_group_is_gone(record.pid, grace_seconds):
            _signal_group(record.pid, signal.SIGKILL)
            if not _wait_until_group_is_gone(record.pid, 5):
                raise ServiceError(f"{name}: process group {record.pid} is still there after KILL; look at `ps -g {record.pid}`")
    forget_process(name, state_dir)


def choose_port(name: str, state_dir: Path, *, companion_offset: int = 0) -> int:
    """A loopback port, chosen once per name and kept in `ports.json`.

    The kept port is chosen anew when a process that is none of ours listens on it.

    Args:
        companion_offset: for a server that also takes the port this much above; both are then free and kept.

    Raises:
        ServiceError: no free port was found.
    """
    path = state_dir / "ports.json"
    companion_name = f"{name}+{companion_offset}"
    with service_lock("ports", state_dir):
        ports: dict[str, int] = json.loads(path.read_bytes()) if path.exists() else {}
        kept = [ports[key] for key in (name, companion_name) if key in ports]
        if name in ports and all(_is_free(port) or _is_ours(port, state_dir) for port in kept):
            return ports[name]
        taken = set(ports.values())
        for candidate in random.sample(range(PORT_RANGE.start, PORT_RANGE.stop - companion_offset), k=200):
            wanted = {name: candidate, companion_name: candidate + companion_offset} if companion_offset else {name: candidate}
            if not taken & set(wanted.values()) and all(_is_free(port) for port in wanted.values()):
                write_atomically(path, json.dumps({**ports, **wanted}, indent=1, sort_keys=True).encode())
                return candidate
    raise ServiceError(f"{name}: no free port on 127.0.0.1 among 200 tried in {PORT_RANGE.start}-{PORT_RANGE.stop - 1}")


def reserved_port(name: str, wanted: int | None, state_dir: Path) -> int:
    """The port that a setting asks for, kept like one of `choose_port`; one of `choose_port` when it asks for none.

    A port that is free but kept for another part is taken from it: that part chooses anew when it starts.

    Raises:
        ServiceError: the port is taken by anything but the process of this name; with who has it.
    """
    if wanted is None:
        return choose_port(name, state_dir)
    path = state_dir / "ports.json"
    with service_lock("ports", state_dir):
        record = read_process(name, state_dir)
        deadline = time.monotonic() + PORT_RELEASE_SECONDS
        while not _is_free(wanted) and not (record and _listens(record, wanted)):
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{name} is to listen on 127.0.0.1:{wanted}, which cannot be opened: {_port_holder(wanted)}; "
                    "end it, or give another port (or none, for a free one)"
                )
            time.sleep(POLL_SECONDS)
        ports: dict[str, int] = json.loads(path.read_bytes()) if path.exists() else {}
        others = {key: port for key, port in ports.items() if port != wanted}
        write_atomically(path, json.dumps({**others, name: wanted}, indent=1, sort_keys=True).encode())
    return wanted


def kept_ports(name: str, state_dir: Path) -> dict[str, int]:
    """The ports chosen so far for a process, those named `<name>` and `<name>.<anything>`; nothing is checked or chosen."""
    path = state_dir / "ports.json"
    ports: dict[str, int] = json.loads(path.read_bytes()) if path.exists() else {}
    return {key: port for key, port in ports.items() if key == name or key.startswith(f"{name}.")}


def wait_until_healthy(name: str, check: Callable[[], bool], *, state_dir: Path, timeout_seconds: float) -> None:
    """Poll `check` until it is true. An exception in it counts as "not yet" and is named when time is up.

    Raises:
        ServiceError: the process died, or time is up; with the last lines of its log.
    """
    deadline = time.monotonic() + timeout_seconds
    last_error: Exception | None = None
    while True:
        alive = read_process(name, state_dir) is not None
        if alive:
            try:
                if check():
                    return
            except Exception as error:
                last_error = error
        if not alive or time.monotonic() > deadline:
            what = f"did not become healthy within {timeout_seconds:g} s" if alive else "died while starting"
            reason = f" (last check: {last_error})" if last_error else ""
            path = log_path(name, state_dir)
            raise ServiceError(f"{name} {what}{reason}. The end of its log {path}:\n{_last_lines(path)}")
        time.sleep(POLL_SECONDS)


def log_path(name: str, state_dir: Path) -> Path:
    return state_dir / "logs" / f"{name}.log"


@contextlib.contextmanager
def service_lock(name: str, state_dir: Path) -> Iterator[None]:
    """Hold a lock between processes, so that two commands at once do not both start a service.

    The system releases it when its holder dies. Not re-entrant.
    """
    folder = state_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that readers see whole or not at all, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _record_path(name: str, state_dir: Path) -> Path:
    return state_dir / "processes" / f"{name}.json"


def _read_record(name: str, state_dir: Path) -> ProcessRecord | None:
    path = _record_path(name, state_dir)
    try:
        values = json.loads(path.read_bytes())
        return ProcessRecord(values["name"], values["pid"], values["started"], tuple(values["command"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(f"{path} is damaged ({error}); end the process {name} by hand and delete the file") from error


def _start_time(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:  # died and was reaped already: a record that matches no living process
        return time.time()


def _find(record: ProcessRecord) -> psutil.Process | None:
    """The process with the record's pid, if there is one and it started when the record says."""
    try:
        process = psutil.Process(record.pid)
        return process if abs(process.create_time() - record.started) <= START_TIME_TOLERANCE_SECONDS else None
    except psutil.NoSuchProcess:
        return None


def _is_alive(record: ProcessRecord) -> bool:
    _reap(record.pid)
    process = _find(record)
    try:
        return process is not None and not _has_ended(process)
    except psutil.NoSuchProcess:
        return False


def _has_ended(process: psutil.Process) -> bool:
    """Whether nothing of it runs any more. A killed process is a zombie before its last thread lets go of its ports."""
    return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) and process.num_threads() <= 1


def _pid_belongs_to_somebody_else(record: ProcessRecord) -> bool:
    """The pid was reused, which the system does only once the whole group is gone."""
    return psutil.pid_exists(record.pid) and _find(record) is None


def _reap(pid: int) -> None:
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        del _children[pid]


def _group_members(group: int) -> list[int]:
    """Living processes of a group; zombies are not."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and not _has_ended(process):
                members.append(process.pid)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return members


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _wait_until_group_is_gone(group: int, timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while True:
        _reap(group)
        if not _group_members(group):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Connections of an earlier server that are still closing do not make a port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _is_ours(port: int, state_dir: Path) -> bool:
    """Whether a process that was started from this state folder listens on the port."""
    records = (read_process(path.stem, state_dir) for path in (state_dir / "processes").glob("*.json"))
    return any(_listens(record, port) for record in records if record)


def _listens(record: ProcessRecord, port: int) -> bool:
    """Whether a process, or one of its group, listens on the port."""
    for pid in _group_members(record.pid):
        try:
            connections = psutil.Process(pid).net_connections(kind="tcp")
        except psutil.Error:
            continue
        if any(item.status == psutil.CONN_LISTEN and item.laddr.port == port for item in connections):
            return True
    return False


def _port_holder(port: int) -> str:
    """Who listens on a port, in words."""
    for item in psutil.net_connections(kind="tcp"):
        if item.status == psutil.CONN_LISTEN and item.laddr and item.laddr.port == port and item.pid is not None:
            try:
                return f"process {item.pid} ({shlex.join(psutil.Process(item.pid).cmdline())[:200]}) listens there"
            except psutil.Error:
                break  # it ended, or is not ours to see
    return "it needs more rights, or a process of another user listens there"


def _last_lines(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64_000))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(text.splitlines()[-NUM_LOG_LINES_SHOWN:]) or "(empty)"
