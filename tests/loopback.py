"""A real server on the loopback device, for the tests of whatever speaks to OpenAI-compatible endpoints."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def good(text: str | None = r"I go \boxed{bet}", finish: str | None = "stop", **more: Any) -> bytes:
    """The body of a chat completion; `more` are further fields of its top level."""
    choice = {"index": 0, "message": {"content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice], **more}).encode()


@dataclass
class Answer:
    """What the server does with one request."""

    status: int = 200
    body: bytes = field(default_factory=good)
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    trickle: bool = False  # a byte every 0.05 s, for ever
    cut: bool = False  # announces more than it sends


@dataclass
class Server:
    """What a server saw."""

    url: str
    seen: list[dict[str, Any]] = field(default_factory=list)  # bodies of the requests
    headers: list[dict[str, str]] = field(default_factory=list)  # names in small letters
    times: list[float] = field(default_factory=list)
    most: int = 0  # requests in hand at once

    @property
    def keys(self) -> list[str | None]:
        return [headers.get("authorization") for headers in self.headers]


class _Quick(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Returning(_Quick):
    allow_reuse_port = True  # beside the socket of `closed`


@contextmanager
def closed() -> Iterator[int]:
    """A port that refuses connections and that no other process is given; `serve` may open it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


@contextmanager
def serve(answer: Callable[[int, dict[str, Any]], Answer], port: int = 0) -> Iterator[Server]:
    """A server on `port`, which `closed` gave (0: a free one); `answer(n, body)` says what it does with its
    n-th request.
    """
    lock, inside = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal inside
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                inside += 1
                server.most = max(server.most, inside)
                server.seen.append({**body, "path": self.path})
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server.times.append(time.monotonic())
                todo = answer(len(server.seen) - 1, body)
            time.sleep(todo.delay)
            with lock:
                inside -= 1
            try:
                self.send_response(todo.status)
                for name, value in todo.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(todo.body) + (100 if todo.cut else 0)))
                self.end_headers()
                if todo.trickle:
                    for byte in todo.body:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.05)
                else:
                    self.wfile.write(todo.body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client lost patience: that is the test

        def log_message(self, *args: object) -> None:
            pass

    httpd = (_Returning if port else _Quick)(("127.0.0.1", port), Handler)
    server = Server(f"http://127.0.0.1:{httpd.server_port}/v1")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.socket.close()
