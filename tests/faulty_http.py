"""HTTP servers that fail on demand: one in front of another server, one for a folder of files with byte ranges."""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

Fault = Literal["500", "cut", "hang", "refuse"]
HANG_S = 3.0


class Faults:
    """Decides which request fails: `choose(number, method)`, and counts what it did."""

    def __init__(self, choose: Callable[[int, str], Fault | None]) -> None:
        self.choose = choose
        self.requests = 0
        self.sent_bytes = 0
        """Of answers to GET"""
        self.injected: Counter[str] = Counter()
        self.methods: Counter[str] = Counter()
        self._lock = threading.Lock()

    def next(self, method: str) -> Fault | None:
        with self._lock:
            self.requests += 1
            self.methods[method] += 1
            fault = self.choose(self.requests, method)
            if fault is not None:
                self.injected[fault] += 1
            return fault

    def count(self, sent_bytes: int) -> None:
        with self._lock:
            self.sent_bytes += sent_bytes


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults
    respond: Callable[[bytes], tuple[int, list[tuple[str, str]], bytes]]

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.faults.next(self.command)
        if fault == "refuse":
            self.close_connection = True
            return
        if fault == "hang":
            time.sleep(HANG_S)
            self.close_connection = True
            return
        if fault == "500":
            status, headers, answer = 500, [], b"<Error><Code>InternalError</Code><Message>injected</Message></Error>"
        else:
            status, headers, answer = self.respond(body)
        self.send_response(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            answer = answer[: len(answer) // 2]
            self.close_connection = True
        self.faults.count(len(answer))
        self.wfile.write(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def _serving(handler: type[_Handler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def faulty_proxy(upstream: tuple[str, int], faults: Faults) -> Iterator[str]:
    """URL of a proxy; what fails never reaches the server behind it, but for a cut answer."""

    class Proxy(_Handler):
        def respond(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(*upstream, timeout=20)
            connection.request(self.command, self.path, body=body or None, headers=dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            skipped = {"connection", "transfer-encoding", "server", "date"}
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in skipped]
            connection.close()
            return answer.status, headers, data

    Proxy.faults = faults
    with _serving(Proxy) as url:
        yield url


@contextmanager
def faulty_files(folder: Path, faults: Faults) -> Iterator[str]:
    """URL under which the files of a folder are, with ranges."""

    class Files(_Handler):
        def respond(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            path = folder / unquote(self.path).lstrip("/")
            if not path.is_file():
                return 404, [], b"not found"
            data = path.read_bytes()
            span = self.headers.get("Range")
            if span is None:
                return 200, [("Content-Length", str(len(data))), ("Accept-Ranges", "bytes")], data
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
            return 206, [("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")], data[start:stop]

    Files.faults = faults
    with _serving(Files) as url:
        yield url
