"""An HTTP proxy in front of a real object store that breaks what it is told to break, when it is told to.

    with FaultyProxy(endpoint) as proxy:
        store = S3Store(proxy.endpoint, ...)
        proxy.choose = always(refuse(503, "SlowDown"))

Every fault is what a client sees of a real server in trouble: replies, resets, silence. Nothing in the client is replaced.
"""

import contextlib
import http.client
import http.server
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    method: str
    path: str

    @property
    def writes(self) -> bool:
        return self.method in ("PUT", "POST", "DELETE")


@dataclass(frozen=True)
class Reply:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Exchange(http.server.BaseHTTPRequestHandler):
    """One connection. A fault gets it with the request's head read, and does with it what it likes."""

    protocol_version = "HTTP/1.1"
    proxy: "FaultyProxy"

    def answer(self) -> None:
        self.left = int(self.headers.get("Content-Length") or 0)
        with contextlib.suppress(ConnectionError):
            self.proxy.pick(Request(self.command, self.path))(self)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def log_message(self, format: str, *args: object) -> None: ...

    def read_body(self, share: float = 1.0) -> bytes:
        body = self.rfile.read(int(self.left * share))
        self.left -= len(body)
        return body

    def ask_store(self) -> Reply:
        """What the real store says to this request. The signature covers the Host header, which stays the client's."""
        store = http.client.HTTPConnection(self.proxy.store_address, timeout=60)
        store.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            store.putheader(name, value)
        store.endheaders(self.read_body())
        answer = store.getresponse()
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in ("connection", "transfer-encoding")]
        reply = Reply(answer.status, headers, answer.read())
        store.close()
        return reply

    def send(self, reply: Reply, share: float = 1.0) -> None:
        """Send the head, which promises the whole body, and a share of the body."""
        self.send_response_only(reply.status)
        for name, value in reply.headers:
            self.send_header(name, value)
        if self.command != "HEAD" and not any(name.lower() == "content-length" for name, _ in reply.headers):
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body[: int(len(reply.body) * share)])
        self.close_connection = share < 1

    def reset(self) -> None:
        """End the connection as a host that is gone does: RST, not FIN."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


Fault = Callable[[Exchange], None]
Choice = Callable[[Request], Fault]


def forward(exchange: Exchange) -> None:
    """No fault."""
    exchange.send(exchange.ask_store())


def refuse(status: int, code: str, *, retry_after: str | None = None) -> Fault:
    """An S3 error, without asking the store."""

    def fault(exchange: Exchange) -> None:
        exchange.read_body()
        body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        headers = [("Content-Type", "application/xml")] + ([("Retry-After", retry_after)] if retry_after else [])
        exchange.send(Reply(status, headers, body if exchange.command != "HEAD" else b""))

    return fault


def reset_in_request(exchange: Exchange) -> None:
    """Gone in the middle of an upload: the store never sees it."""
    exchange.read_body(0.5)
    exchange.reset()


def lose_reply(exchange: Exchange) -> None:
    """Done by the store, and the client never learns it."""
    exchange.ask_store()
    exchange.reset()


def reset_in_reply(exchange: Exchange) -> None:
    """Half a body, then gone. A reply without a body is lost instead."""
    reply = exchange.ask_store()
    if reply.body:
        exchange.send(reply, share=0.5)
        exchange.wfile.flush()
    exchange.reset()


def cut_reply(exchange: Exchange) -> None:
    """Half a body, then a clean end. A reply without a body is lost instead."""
    reply = exchange.ask_store()
    if reply.body:
        exchange.send(reply, share=0.5)
    exchange.close_connection = True


def hang(exchange: Exchange) -> None:
    """Silence."""
    exchange.proxy.closing.wait(60)
    exchange.reset()


def drip(exchange: Exchange) -> None:
    """A body that comes one byte at a time, never silent for long and never done."""
    reply = exchange.ask_store()
    exchange.send(reply, share=0)
    for place in range(len(reply.body)):
        if exchange.proxy.closing.wait(0.05):
            break
        exchange.wfile.write(reply.body[place : place + 1])


def drain_slowly(bytes_per_second: int) -> Fault:
    """Take an upload at the pace of a slow line, then pass it on."""

    def fault(exchange: Exchange) -> None:
        exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        body = b""
        while exchange.left:
            piece = exchange.rfile.read(min(exchange.left, bytes_per_second // 10))
            exchange.left -= len(piece)
            body += piece
            time.sleep(0.1)
        exchange.read_body = lambda share=1.0: body  # type: ignore[method-assign]
        forward(exchange)

    return fault


def always(fault: Fault) -> Choice:
    return lambda request: fault


def first(count: int, fault: Fault, only: Callable[[Request], bool] = lambda request: True) -> Choice:
    """The fault for the first requests that match, none after."""
    left = iter(range(count))
    return lambda request: fault if only(request) and next(left, None) is not None else forward


class RandomFaults:
    """Each request meets one of the faults with a probability; from a seed, so that a failure can be looked at again."""

    def __init__(self, seed: int, share: float, faults: tuple[Fault, ...]):
        self._random = random.Random(seed)
        self._share = share
        self._faults = faults

    def __call__(self, request: Request) -> Fault:
        return self._random.choice(self._faults) if self._random.random() < self._share else forward


class FaultyProxy:
    """
    Args:
        store_endpoint: of the real store, http://host:port.

    Attributes:
        choose: which fault a request meets; may be changed at any time.
        faults_met: how many requests met one.
    """

    def __init__(self, store_endpoint: str):
        self.store_address = urlsplit(store_endpoint).netloc
        self.choose: Choice = always(forward)
        self.faults_met = 0
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("BoundExchange", (Exchange,), {"proxy": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def pick(self, request: Request) -> Fault:
        with self._lock:
            self.requests.append(request)
            fault = self.choose(request)
            self.faults_met += fault is not forward
            return fault

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
