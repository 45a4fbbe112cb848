"""A web server on loopback that serves ranges of files in memory, and misbehaves on request."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What the server sends: a fault may replace any of it, `None` for the body drops the line."""

    status: int
    headers: dict[str, str]
    body: bytes | None


Fault = Callable[[int, Answer], Answer]


@dataclass
class Web:
    """Its files by path, what was asked for, and what goes wrong.

    `fault` is called with the number of the request, from 0, and the proper answer.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    fault: Fault = lambda number, answer: answer
    delay: float = 0.0
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, wanted: str) -> Answer:
        data = self.files.get(path.partition("?")[0])
        if data is None:
            return Answer(404, {}, b"nothing here")
        headers = {"ETag": f'"{hash(data)}"'}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if found is None:
            return Answer(200, headers, data)
        start, end = int(found[1]), min(int(found[2]) + 1, len(data))
        if start >= len(data):
            return Answer(416, headers | {"Content-Range": f"bytes */{len(data)}"}, b"")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return Answer(206, headers, data[start:end])

    @contextmanager
    def request(self) -> Iterator[int]:
        with self._lock:
            number = len(self.asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay)
            yield number
        finally:
            with self._lock:
                self._at_once -= 1


@contextmanager
def serving() -> Iterator[Web]:
    """Run a server as long as the context lasts."""
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            with web.request() as number:
                web.asked.append((self.path, wanted))
                status, headers, body = web.fault(number, web.answer(self.path, wanted))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(body or b"x")))
                self.end_headers()
                self.wfile.write(body or b"")
                web.sent += len(body or b"")
                self.close_connection = body is None or "Content-Length" in headers

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: Any) -> None:
            pass  # the reader has gone

    with Server(("127.0.0.1", 0), Handler) as server:
        web.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()
