"""A real HTTP server that takes notifications."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer


class Hook:
    """An HTTP server that takes messages."""

    def __init__(self, status: int = 200):
        received: list[tuple[str, dict]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.received = received
        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"json://user:very-secret@127.0.0.1:{self.server.server_port}/hidden-path"
