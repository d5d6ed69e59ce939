import socket
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ml.errors import ConfigError, TrainingError
from ml.training.nodes import JOIN_VARIABLE, Place, check_nodes, find_place, join_seconds, node_of, num_local_ranks, rendezvous_arguments
from ml.training.spec import Nodes, TrainSpec


def spec_of(nodes: Nodes, num_ranks: int = 4) -> TrainSpec:
    return TrainSpec(job="a:B", work_dir=Path("/nowhere"), num_ranks=num_ranks, nodes=nodes)


@pytest.mark.parametrize(
    ("nodes", "num_ranks", "said"),
    [
        (Nodes(count=2, rank=2), 4, "rank 2 of this machine is not one of 2"),
        (Nodes(count=2, rank=-1), 4, "rank -1"),
        (Nodes(count=0), 4, "not one of 0"),
        (Nodes(count=2, min_count=3), 4, "min_count is 3"),
        (Nodes(count=2, min_count=0), 4, "min_count is 0"),
        (Nodes(count=3), 4, "4 ranks cannot be shared out evenly over 3 machines"),
    ],
)
def test_machines_and_ranks_that_do_not_go_together_are_refused(nodes: Nodes, num_ranks: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_nodes(spec_of(nodes, num_ranks))


def test_ranks_are_shared_out_over_the_machines() -> None:
    spec = spec_of(Nodes(count=2, rank=1, min_count=1))
    check_nodes(spec)
    assert num_local_ranks(spec) == 2
    assert node_of(spec) == 1
    assert node_of(spec_of(Nodes())) is None


def test_the_interface_is_that_of_the_route() -> None:
    loopback = next(name for name, entries in psutil.net_if_addrs().items() if any(entry.address == "127.0.0.1" for entry in entries))
    assert find_place(Nodes(count=2, master_addr="127.0.0.1")) == Place("127.0.0.1", loopback)
    assert find_place(Nodes(count=2, master_addr="localhost")).interface == loopback
    assert find_place(Nodes(count=2, master_addr="192.0.2.1", interface=loopback)) == Place("127.0.0.1", loopback)


def test_a_place_that_cannot_be_found_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN_VARIABLE, "0")
    with pytest.raises(TrainingError, match=r"node 0 cannot be found at master_addr 'no\.such\.host\.invalid'"):
        find_place(Nodes(count=2, master_addr="no.such.host.invalid"))
    with pytest.raises(TrainingError, match="there is no network interface 'nothere'"):
        find_place(Nodes(count=2, interface="nothere"))


def test_a_name_that_is_not_known_yet_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, real = iter([True, True, False]), socket.getaddrinfo

    def look_up(host: str, *arguments, **options):
        if next(answers):
            raise socket.gaierror(socket.EAI_NONAME, "not known yet")
        return real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("ml.training.nodes._PAUSE_SECONDS", 0.01)
    assert find_place(Nodes(count=2, master_addr="node-0.of-a-cluster")).address == "127.0.0.1"


def test_torchrun_is_told_where_to_meet_and_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOIN_VARIABLE, "77")
    assert join_seconds() == 77
    first = spec_of(Nodes(count=2, min_count=1, master_addr="10.0.0.1", master_port=1234))
    arguments = rendezvous_arguments(first, Place("10.0.0.1", "eth0"))
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given["--nnodes"] == "1:2"
    assert given["--nproc-per-node"] == "2"
    assert given["--max-restarts"] == str(first.max_restarts)
    assert given["--rdzv-endpoint"] == "10.0.0.1:1234"
    assert given["--local-addr"] == "10.0.0.1"
    settings = dict(setting.split("=") for setting in given["--rdzv-conf"].split(","))
    assert settings["is_host"] == "1"
    assert settings["join_timeout"] == settings["read_timeout"] == "77"
    # The others neither host the store nor meet under another name.
    other = rendezvous_arguments(replace(first, nodes=replace(first.nodes, rank=1)), Place("10.0.0.2", "eth0"))
    assert "is_host=0" in other[other.index("--rdzv-conf") + 1]
    assert other[other.index("--rdzv-id") + 1] == given["--rdzv-id"]
    assert "[fd00::1]:1234" in rendezvous_arguments(
        replace(first, nodes=replace(first.nodes, master_addr="fd00::1")), Place("fd00::2", "e")
    )
