"""A proxy in front of an S3 server that fails some of the requests, in the ways in which object stores and networks do."""

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = ("500", "503", "reset before", "reset after", "slow", "cut")
"""An answer of InternalError or SlowDown; the connection reset before the server saw the request, or after it did what was
asked; an answer that takes SLOW_SECONDS; a body that ends in the middle."""

SLOW_SECONDS = 1.0

ERRORS = {"500": "InternalError", "503": "SlowDown"}

HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")


class FailingProxy:
    """Answers at `port` for the server at `server_port`; `fail` says which share of the requests fails from then on."""

    def __init__(self, port: int, server_port: int) -> None:
        self.server_port = server_port
        self.rate, self.draw = 0.0, random.Random(0)
        self.failed: Counter[str] = Counter()
        self.num_requests = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="failing-s3", daemon=True).start()

    def fail(self, rate: float, *, seed: int = 0) -> None:
        """From now on `rate` of the requests fail; what was counted is forgotten."""
        with self._lock:
            self.rate, self.draw = rate, random.Random(seed)
            self.failed.clear()
            self.num_requests = 0

    def fate(self) -> str | None:
        """How the next request fails; None where it doesn't."""
        with self._lock:
            self.num_requests += 1
            if self.draw.random() >= self.rate:
                return None
            kind = self.draw.choice(KINDS)
            self.failed[kind] += 1
            return kind

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: FailingProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        body = self._body()
        fate = self.proxy.fate()
        if fate == "reset before":
            self._reset()
            return
        if fate in ERRORS:
            content = f"<?xml version='1.0'?><Error><Code>{ERRORS[fate]}</Code><Message>as told</Message></Error>".encode()
            self._send(int(fate), [("Content-Type", "application/xml")], content)
            return
        status, headers, content = self._ask(body)
        if fate == "slow":
            time.sleep(SLOW_SECONDS)
        if fate == "reset after" or (fate == "cut" and not content):
            self._reset()
            return
        self._send(status, headers, content, cut=fate == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # the names that http.server calls

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the server answers. The Host header stays the client's, which has signed it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.server_port, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("transfer-encoding", "content-length", "connection", "expect"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP]
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return answer.status, headers, content

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """Ends the connection by a RST, as a machine that went away does."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile.flush()
            self.connection.close()

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the other end hung up, or we did
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *words: Any) -> None:
        """No lines in the tests' output."""
