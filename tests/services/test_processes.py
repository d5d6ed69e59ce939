"""Real processes: started, recognised, outliving their starter, and ended with all of their children."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ml.errors import ServiceError
from services.processes import ProcessRecord, choose_port, log_path, read_process, start_process, stop_process, wait_until_healthy

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in (tmp_path / "processes").glob("*.json"):
        stop_process(path.stem, tmp_path, grace_seconds=0.5)


def wait_for(condition, timeout_seconds: float = 10) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_started_process_is_read_back_and_stopped(state_dir: Path):
    record = start_process("sleeper", SLEEP, state_dir=state_dir)
    assert read_process("sleeper", state_dir) == record
    assert record.command == tuple(SLEEP)
    assert abs(record.started - time.time()) < 30
    stop_process("sleeper", state_dir)
    assert read_process("sleeper", state_dir) is None
    assert not is_running(record.pid)
    stop_process("sleeper", state_dir)


def test_it_has_no_terminal_its_own_session_its_variables_and_a_log(state_dir: Path):
    facts = "os.getsid(0) == os.getpid(), repr(sys.stdin.read()), os.environ['SPECIAL'], 'PATH' in os.environ"
    code = f"import os, sys; print({facts}, flush=True); sys.stderr.write('to stderr')"
    for _ in range(2):
        start_process("talker", [sys.executable, "-c", code], state_dir=state_dir, env={"SPECIAL": "value"})
        wait_for(lambda: read_process("talker", state_dir) is None)
    assert log_path("talker", state_dir).read_text() == "True '' value True\nto stderr" * 2


def test_it_outlives_its_starter(state_dir: Path):
    code = (
        "import sys; from pathlib import Path; from services.processes import start_process;"
        f"print(start_process('sleeper', {SLEEP!r}, state_dir=Path(sys.argv[1])).pid)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(state_dir)], capture_output=True, text=True, check=True)
    record = read_process("sleeper", state_dir)
    assert record is not None
    assert record.pid == int(done.stdout)
    stop_process("sleeper", state_dir)
    assert not is_running(record.pid)


def test_a_second_one_of_a_name_is_refused(state_dir: Path):
    record = start_process("sleeper", SLEEP, state_dir=state_dir)
    with pytest.raises(ServiceError, match=str(record.pid)):
        start_process("sleeper", SLEEP, state_dir=state_dir)


def test_a_command_that_is_not_there_is_an_error_and_leaves_no_record(state_dir: Path):
    with pytest.raises(ServiceError, match="/no/such/program"):
        start_process("nothing", ["/no/such/program"], state_dir=state_dir)
    assert read_process("nothing", state_dir) is None


def test_a_killed_process_is_dead_though_its_parent_has_not_reaped_it(state_dir: Path):
    record = start_process("sleeper", SLEEP, state_dir=state_dir)
    os.kill(record.pid, signal.SIGKILL)
    wait_for(lambda: read_process("sleeper", state_dir) is None)
    start_process("sleeper", SLEEP, state_dir=state_dir)


def test_a_process_is_not_dead_before_it_let_go_of_its_ports(state_dir: Path):
    for attempt in range(3):
        port = choose_port(f"server-{attempt}", state_dir)
        code = (
            "import socket, threading, time\n"
            f"server = socket.create_server(('127.0.0.1', {port}))\n"
            "for _ in range(60): threading.Thread(target=time.sleep, args=(600,)).start()\n"
            "memory = bytearray(200 << 20); print('listening', flush=True)"
        )
        record = start_process(f"server-{attempt}", [sys.executable, "-c", code], state_dir=state_dir)
        wait_for(lambda name=f"server-{attempt}": "listening" in log_path(name, state_dir).read_text())
        os.kill(record.pid, signal.SIGKILL)
        while read_process(f"server-{attempt}", state_dir) is not None:
            pass
        assert choose_port(f"server-{attempt}", state_dir) == port


def test_a_reused_pid_is_neither_ours_nor_killed(state_dir: Path):
    stranger = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        folder = state_dir / "processes"
        folder.mkdir()
        record = ProcessRecord("sleeper", stranger.pid, psutil.Process(stranger.pid).create_time() - 100, tuple(SLEEP))
        (folder / "sleeper.json").write_text(json.dumps(record.__dict__))
        assert read_process("sleeper", state_dir) is None
        stop_process("sleeper", state_dir)
        assert stranger.poll() is None
        assert not (folder / "sleeper.json").exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_a_damaged_record_is_an_error_that_names_the_file(state_dir: Path):
    (state_dir / "processes").mkdir()
    path = state_dir / "processes" / "sleeper.json"
    path.write_text("{")
    with pytest.raises(ServiceError, match=str(path)):
        read_process("sleeper", state_dir)
    path.unlink()


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)"
STUBBORN_FAMILY = f"""
{STUBBORN}
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STUBBORN + "; time.sleep(600)"!r}])
print(child.pid, flush=True)
time.sleep(600)
"""


def start_family(state_dir: Path) -> tuple[ProcessRecord, int]:
    record = start_process("family", [sys.executable, "-c", STUBBORN_FAMILY], state_dir=state_dir)
    log = log_path("family", state_dir)
    wait_for(lambda: len(log.read_text().split()) == 3)
    return record, next(int(word) for word in log.read_text().split() if word.isdigit())


def test_a_stubborn_process_is_killed_with_its_children(state_dir: Path):
    record, child = start_family(state_dir)
    started = time.monotonic()
    stop_process("family", state_dir, grace_seconds=0.5)
    assert time.monotonic() - started < 5
    assert not is_running(record.pid)
    assert not is_running(child)


def test_children_of_a_killed_process_are_stopped_too(state_dir: Path):
    record, child = start_family(state_dir)
    os.kill(record.pid, signal.SIGKILL)
    wait_for(lambda: read_process("family", state_dir) is None)
    assert is_running(child)
    stop_process("family", state_dir, grace_seconds=0.5)
    assert not is_running(child)


def test_a_process_that_ends_by_itself_on_term_is_given_the_time(state_dir: Path):
    end = "def end(*_): time.sleep(0.5); print('saved', flush=True); sys.exit()"
    code = f"import signal, sys, time\n{end}\nsignal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(600)"
    start_process("saver", [sys.executable, "-c", code], state_dir=state_dir)
    wait_for(lambda: "ready" in log_path("saver", state_dir).read_text())
    stop_process("saver", state_dir)
    assert "saved" in log_path("saver", state_dir).read_text()


def test_a_port_is_chosen_once_per_name(state_dir: Path):
    first = choose_port("one", state_dir)
    second = choose_port("two", state_dir)
    assert first != second
    assert (choose_port("one", state_dir), choose_port("two", state_dir)) == (first, second)
    assert json.loads((state_dir / "ports.json").read_text()) == {"one": first, "two": second}


def test_a_port_that_a_stranger_took_is_chosen_anew(state_dir: Path):
    kept = choose_port("one", state_dir)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", kept))
        stranger.listen()
        chosen = choose_port("one", state_dir)
        assert chosen != kept
    assert choose_port("one", state_dir) == chosen


def test_a_port_with_a_companion_moves_when_either_is_taken(state_dir: Path):
    kept = choose_port("one", state_dir, companion_offset=10_000)
    assert choose_port("one", state_dir, companion_offset=10_000) == kept
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", kept + 10_000))
        stranger.listen()
        moved = choose_port("one", state_dir, companion_offset=10_000)
    assert moved != kept
    assert json.loads((state_dir / "ports.json").read_text()) == {"one": moved, "one+10000": moved + 10_000}


def test_a_port_that_our_own_process_holds_is_kept(state_dir: Path):
    kept = choose_port("server.http", state_dir)
    # The listener is a child of the process that was started, as with a server that has workers.
    code = f"import socket, time; s = socket.create_server(('127.0.0.1', {kept})); print('listening', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    start_process("server", [sys.executable, "-c", parent], state_dir=state_dir)
    wait_for(lambda: "listening" in log_path("server", state_dir).read_text())
    assert choose_port("server.http", state_dir) == kept
    stop_process("server", state_dir)
    assert choose_port("server.http", state_dir) == kept


def test_concurrent_commands_choose_different_ports_and_lose_none(state_dir: Path):
    choose = "[choose_port(f'{sys.argv[2]}.{i}', Path(sys.argv[1])) for i in range(10)]"
    code = f"import sys; from pathlib import Path; from services.processes import choose_port; {choose}"
    started = [subprocess.Popen([sys.executable, "-c", code, str(state_dir), str(number)]) for number in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    ports = json.loads((state_dir / "ports.json").read_text())
    assert len(ports) == len(set(ports.values())) == 40


def test_waiting_ends_when_the_check_is_true(state_dir: Path):
    start_process("sleeper", SLEEP, state_dir=state_dir)
    answers = iter([OSError("refused"), False, True])

    def check() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    wait_until_healthy("sleeper", check, state_dir=state_dir, timeout_seconds=10)
    assert next(answers, "none left") == "none left"


def test_waiting_for_a_process_that_dies_shows_its_last_words(state_dir: Path):
    code = "for i in range(1000): print('line', i)\nraise SystemExit('port is taken')"
    start_process("failing", [sys.executable, "-c", code], state_dir=state_dir)
    with pytest.raises(ServiceError, match="died") as caught:
        wait_until_healthy("failing", lambda: False, state_dir=state_dir, timeout_seconds=30)
    assert "port is taken" in str(caught.value)
    assert "line 999" in str(caught.value)
    assert "line 900" not in str(caught.value)


def test_waiting_in_vain_names_the_time_and_the_last_problem(state_dir: Path):
    start_process("sleeper", SLEEP, state_dir=state_dir)

    def check() -> bool:
        raise ConnectionRefusedError("nobody listens")

    with pytest.raises(ServiceError, match=r"within 0.3 s .*nobody listens"):
        wait_until_healthy("sleeper", check, state_dir=state_dir, timeout_seconds=0.3)
    assert read_process("sleeper", state_dir) is not None
