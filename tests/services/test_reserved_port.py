import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from ml.errors import ServiceError
from services.processes import choose_port, log_path, reserved_port, start_process, stop_process


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_without_a_wish_a_port_is_chosen(tmp_path: Path):
    assert reserved_port("server", None, tmp_path) == choose_port("server", tmp_path)


def test_the_wanted_port_is_kept(free_port: int, tmp_path: Path):
    choose_port("server", tmp_path)
    assert reserved_port("server", free_port, tmp_path) == free_port
    assert choose_port("server", tmp_path) == free_port


def test_a_port_that_another_part_merely_remembers_changes_hands(tmp_path: Path):
    remembered = choose_port("other", tmp_path)
    assert reserved_port("server", remembered, tmp_path) == remembered
    assert json.loads((tmp_path / "ports.json").read_text()) == {"server": remembered}
    assert choose_port("other", tmp_path) != remembered


def test_a_stranger_is_named(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"127\.0\.0\.1:{port}, .*process {os.getpid()} \(.*pytest.*another port"):
            reserved_port("server", port, tmp_path)
    assert not (tmp_path / "ports.json").exists()


def test_a_port_that_is_just_being_let_go_is_waited_for(tmp_path: Path):
    dying = socket.create_server(("127.0.0.1", 0))
    port = dying.getsockname()[1]
    threading.Timer(0.3, dying.close).start()
    assert reserved_port("server", port, tmp_path) == port


def test_the_own_process_may_hold_it_and_another_part_may_not(free_port: int, tmp_path: Path):
    code = f"import socket, time; s = socket.create_server(('127.0.0.1', {free_port})); print('listening', flush=True); time.sleep(600)"
    record = start_process("server", [sys.executable, "-c", code], state_dir=tmp_path)
    try:
        while "listening" not in log_path("server", tmp_path).read_text():
            time.sleep(0.02)
        assert reserved_port("server", free_port, tmp_path) == free_port
        with pytest.raises(ServiceError, match=f"process {record.pid} "):
            reserved_port("other", free_port, tmp_path)
    finally:
        stop_process("server", tmp_path)
