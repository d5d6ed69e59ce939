"""Several machines: what each of them must know to meet the others. Needs no torch."""

import os
import socket
import time
from dataclasses import dataclass

import psutil

from ml.errors import ConfigError, TrainingError
from ml.training.spec import Nodes, TrainSpec

JOIN_VARIABLE = "MILLSTREAM_JOIN_SECONDS"
DEFAULT_JOIN_SECONDS = 600
# With enough machines for `min_count`, so long is waited for more of them.
LAST_CALL_SECONDS = 10
CLOSE_SECONDS = 30
KEEP_ALIVE_SECONDS = 5
# A machine whose torchrun is silent for this many times is counted out.
KEEP_ALIVE_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Place:
    """Where this machine is reached by the others."""

    address: str
    interface: str


def join_seconds() -> int:
    """How long a machine waits for the others, at the start and after one was lost; from `MILLSTREAM_JOIN_SECONDS`."""
    return int(os.environ.get(JOIN_VARIABLE, DEFAULT_JOIN_SECONDS))


def check_nodes(spec: TrainSpec) -> None:
    """
    Raises:
        ConfigError: the machines and ranks of the spec do not go together.
    """
    nodes = spec.nodes
    if nodes.count < 1 or not 0 <= nodes.rank < nodes.count:
        raise ConfigError(f"rank {nodes.rank} of this machine is not one of {nodes.count}; machines are counted from 0")
    if nodes.min_count is not None and not 1 <= nodes.min_count <= nodes.count:
        raise ConfigError(f"min_count is {nodes.min_count}; it must be from 1 to the number of machines, {nodes.count}")
    if spec.num_ranks % nodes.count:
        raise ConfigError(
            f"{spec.num_ranks} ranks cannot be shared out evenly over {nodes.count} machines; take a multiple of {nodes.count}"
        )


def num_local_ranks(spec: TrainSpec) -> int:
    return spec.num_ranks // spec.nodes.count


def node_of(spec: TrainSpec) -> int | None:
    """The rank of this machine where there are several, else None."""
    return spec.nodes.rank if spec.nodes.count > 1 else None


def find_place(nodes: Nodes) -> Place:
    """The address and the interface by which packets go to `master_addr`, or those of the interface that is given.

    A name that cannot be resolved yet is tried again: in a cluster the machines start in any order.

    Raises:
        TrainingError: the name cannot be resolved, there is no route, or there is no such interface.
    """
    if nodes.interface is not None:
        return Place(_address_of(nodes.interface), nodes.interface)
    deadline = time.monotonic() + join_seconds()
    while True:
        try:
            address = _address_towards(nodes.master_addr, nodes.master_port)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"node 0 cannot be found at master_addr {nodes.master_addr!r}: {error}. "
                    "Give an address or a name that every machine knows"
                ) from error
            time.sleep(_PAUSE_SECONDS)
    for interface, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return Place(address, interface)
    raise TrainingError(f"no network interface has the address {address}, by which {nodes.master_addr} is reached; give `interface`")


def rendezvous_arguments(spec: TrainSpec, place: Place) -> list[str]:
    """Arguments of torchrun: all machines meet at `master_addr`, where node 0 listens. Every wait is bounded."""
    nodes, join = spec.nodes, join_seconds()
    settings = {
        # Said outright: what torchrun guesses from the host's name is wrong in containers.
        "is_host": int(nodes.rank == 0),
        "join_timeout": join,
        "read_timeout": join,
        "last_call_timeout": LAST_CALL_SECONDS,
        "close_timeout": CLOSE_SECONDS,
        "keep_alive_interval": KEEP_ALIVE_SECONDS,
        "keep_alive_max_attempt": KEEP_ALIVE_ATTEMPTS,
    }
    host = f"[{nodes.master_addr}]" if ":" in nodes.master_addr else nodes.master_addr
    return [
        *("--nnodes", f"{nodes.min_count or nodes.count}:{nodes.count}"),
        *("--nproc-per-node", str(num_local_ranks(spec)), "--max-restarts", str(spec.max_restarts)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{nodes.master_port}", "--rdzv-id", spec.fingerprint[:16]),
        *("--rdzv-conf", ",".join(f"{name}={value}" for name, value in settings.items()), "--local-addr", place.address),
    ]


def _address_towards(host: str, port: int) -> str:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # Sends nothing: connecting a datagram socket only picks the route.
        probe.connect(address)
        return probe.getsockname()[0].partition("%")[0]


def _address_of(interface: str) -> str:
    known = psutil.net_if_addrs()
    if interface not in known:
        raise TrainingError(f"there is no network interface {interface!r}; this machine has {', '.join(sorted(known))}")
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in known[interface]:
            if entry.family == family:
                return entry.address.partition("%")[0]
    raise TrainingError(f"network interface {interface!r} has no address")
