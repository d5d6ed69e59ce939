import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import services.local_stack
from ml.errors import ServiceError
from ml.settings import Settings, load_settings
from services import object_store, prefect_server, worker
from services.local_stack import LocalStack, UserLock, check_room, running_stack
from services.predictor import launcher as predictor
from services.processes import read_process
from services.supervisor import launcher as supervisor

# For the tests that are not about Prefect, whose server takes long to start.
SOME_PREFECT = "http://127.0.0.1:9/api"
PARTS = tuple(services.local_stack.PARTS)


@pytest.fixture
def state_dir(tmp_path, monkeypatch):
    for name in supervisor.GIVEN_BY_THE_STACK:
        monkeypatch.delenv(name, raising=False)
    load_settings.cache_clear()
    yield tmp_path / "state"
    LocalStack(tmp_path / "state").down()
    assert processes_of(tmp_path) == []


def processes_of(folder: Path) -> list[list[str]]:
    """Command lines of all processes that have the folder in their command or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            mentions = str(folder) in " ".join([*process.cmdline(), *process.environ().values()])
            if mentions and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


def pids(state_dir: Path) -> dict[str, int]:
    records = {part: read_process(part, state_dir) for part in PARTS}
    return {part: record.pid for part, record in records.items() if record}


def kill_parts(state_dir: Path) -> None:
    for pid in pids(state_dir).values():
        os.kill(pid, signal.SIGKILL)
    while pids(state_dir):
        time.sleep(0.01)
    time.sleep(0.5)  # their sockets are closed a moment after they show as dead


def wait_until(check: Callable[[], bool], what: str, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.2)


def small_stack(state_dir: Path) -> LocalStack:
    return LocalStack(state_dir, prefect_api_url=SOME_PREFECT)


def test_up_keeps_every_part_alive_and_down_leaves_no_process(state_dir):
    stack = LocalStack(state_dir)
    addresses = stack.up()
    first = pids(state_dir)
    assert set(first) == set(PARTS)
    assert [(part.part, part.pid, part.healthy, part.managed) for part in stack.status()] == [
        (name, first[name], True, True) for name in PARTS
    ]
    urls = [addresses.s3_endpoint, addresses.prefect_api_url, addresses.predictor_url, addresses.bridge_url, None, None]
    assert [part.url for part in stack.status()] == urls

    listeners = {item.laddr for pid in first.values() for item in psutil.Process(pid).net_connections("tcp") if item.status == "LISTEN"}
    assert len(listeners) > len(PARTS) - 2 and {address.ip for address in listeners} == {"127.0.0.1"}
    assert stack.up() == addresses
    assert pids(state_dir) == first

    with running_stack(state_dir) as same:
        assert same.prefect_api_url == addresses.prefect_api_url
    assert pids(state_dir) == first, "a run must not stop what `up` started"

    for part in PARTS:  # the supervisor last: the bridge starts it again, and it everything else
        os.kill(first[part], signal.SIGKILL)
        wait_until(lambda part=part: pids(state_dir).get(part, first[part]) != first[part], f"{part} is started again")
    wait_until(lambda: all(part.healthy for part in stack.status()), "every part is healthy")
    log = (state_dir / "logs" / "stack.log").read_text()
    assert f"{object_store.NAME} died: starting again" in log
    assert stack.up() == addresses

    stack.down()
    assert processes_of(state_dir) == []


def test_up_after_all_parts_were_killed_at_once_heals_them(state_dir):
    given = Settings(bridge_url="http://127.0.0.1:9", predictor_url="http://127.0.0.1:9", s3_endpoint="127.0.0.1:9")
    stack = LocalStack(state_dir, settings=given)
    stack.up()
    first = pids(state_dir)
    assert set(first) == {prefect_server.NAME, worker.NAME, supervisor.NAME}
    kill_parts(state_dir)
    stack.up()
    assert set(pids(state_dir)) == set(first)
    assert not set(pids(state_dir).values()) & set(first.values())
    assert [part.healthy for part in stack.status()] == [False, True, False, False, True, True]


def test_a_run_stops_what_it_started_and_gives_its_environment_back(state_dir):
    before = dict(os.environ)
    with small_stack(state_dir).running() as addresses:
        assert load_settings().s3_endpoint == addresses.s3_endpoint
        assert load_settings().predictor_url == addresses.predictor_url
        assert os.environ["PREFECT_API_URL"] == SOME_PREFECT
        assert set(pids(state_dir)) == {object_store.NAME, predictor.NAME}
    assert pids(state_dir) == {}
    assert dict(os.environ) == before


def test_the_last_of_several_users_stops_the_stack(state_dir):
    other = UserLock(state_dir)
    with small_stack(state_dir).running():
        pass
    left = pids(state_dir)
    assert set(left) == {object_store.NAME, predictor.NAME}
    assert other.release()
    with small_stack(state_dir).running():
        assert pids(state_dir) == left
    assert pids(state_dir) == {}


def test_a_run_that_is_told_to_end_stops_what_it_started(state_dir):
    with run_in_child(state_dir) as child:
        child.terminate()
        time.sleep(0.05)
        child.send_signal(signal.SIGINT)  # an impatient second signal must not break off the stopping
        assert child.wait(timeout=30) == 128 + signal.SIGTERM
    assert pids(state_dir) == {}


def test_a_run_after_a_killed_one_adopts_and_then_stops_what_that_left(state_dir):
    with run_in_child(state_dir) as child:
        left = pids(state_dir)
        child.kill()
    assert set(left) == {object_store.NAME, predictor.NAME}
    with small_stack(state_dir).running():
        assert pids(state_dir) == left
    assert pids(state_dir) == {}


def test_a_mark_of_an_earlier_boot_keeps_nothing_up(state_dir):
    stack = small_stack(state_dir)
    state_dir.mkdir()
    supervisor.stays_up_path(state_dir).touch()
    with stack.running():
        assert pids(state_dir)
    assert pids(state_dir) == {}


def test_parts_given_by_the_environment_are_not_started(state_dir):
    settings = Settings(s3_endpoint="127.0.0.1:9", predictor_url="http://127.0.0.1:9")
    stack = LocalStack(state_dir, settings=settings, prefect_api_url=SOME_PREFECT)
    with stack.running() as addresses:
        assert (addresses.s3_endpoint, addresses.predictor_url) == ("127.0.0.1:9", "http://127.0.0.1:9")
        assert pids(state_dir) == {}
    assert [(part.managed, part.healthy) for part in stack.status()][:3] == [(False, False)] * 3


def test_other_settings_replace_the_predictor(state_dir):
    other = LocalStack(state_dir, settings=Settings(threads_per_process=2), prefect_api_url=SOME_PREFECT)
    with small_stack(state_dir).running():
        before = pids(state_dir)
        with other.running():
            after = pids(state_dir)
    assert after[object_store.NAME] == before[object_store.NAME]
    assert after[predictor.NAME] != before[predictor.NAME]


@pytest.mark.parametrize(("limit", "expected"), [("MIN_FREE_DISK_BYTES", "MILLSTREAM_STATE_DIR"), ("MIN_FREE_MEMORY_BYTES", "memory")])
def test_too_little_room_is_said_before_anything_starts(state_dir, monkeypatch, limit, expected):
    check_room(state_dir)
    monkeypatch.setattr(services.local_stack, limit, 10**18)
    with pytest.raises(ServiceError, match=expected), small_stack(state_dir).running():
        pass
    assert pids(state_dir) == {}


class run_in_child:
    """A child process that is inside `running()`."""

    def __init__(self, state_dir: Path):
        code = f"""
            import time
            from pathlib import Path
            from services.local_stack import LocalStack
            with LocalStack(Path({str(state_dir)!r}), prefect_api_url={SOME_PREFECT!r}).running():
                print("inside", flush=True)
                time.sleep(60)
        """
        self.child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)

    def __enter__(self) -> subprocess.Popen:
        assert self.child.stdout is not None
        assert self.child.stdout.readline() == b"inside\n"
        return self.child

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()
