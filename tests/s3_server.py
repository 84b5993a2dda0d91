"""A local S3 server, spoken to over HTTP through a proxy that can fail."""

from __future__ import annotations

import http.client
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest
from moto.server import ThreadedMotoServer

from merge_ray.checkpoints import s3

SECRETS = {"AWS_ACCESS_KEY_ID": "AKIDTESTONLY", "AWS_SECRET_ACCESS_KEY": "never-to-be-seen"}
ERROR = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0}</Message></Error>"
REFUSALS = {
    "error": (500, ERROR.format("InternalError")),
    "slow_down": (503, ERROR.format("SlowDown")),
    "denied": (403, ERROR.format("AccessDenied")),
    "bad_key": (403, ERROR.format("InvalidAccessKeyId")),
    "redirect": (301, ERROR.format("PermanentRedirect")),
    "echo": (403, ERROR.format("SignatureDoesNotMatch").replace("</M", f": {' '.join(SECRETS.values())}</M")),
    "html": (200, "<!doctype html><p>Welcome"),
}


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    headers: dict[str, str]


class S3Server:
    """moto behind a proxy. ``endpoint`` is the proxy's, ``requests`` are all that came.

    ``fail("error", "truncate", ...)`` is for the requests to come, one each: ``error`` (500), ``slow_down`` (503),
    ``denied`` and ``bad_key`` (403), ``redirect`` (301, to eu-central-1), ``echo`` (403, with the credentials in its
    message), ``html`` (a page), ``timeout`` (no answer for ``patience`` seconds), ``truncate`` (half of the body),
    ``cut`` (the connection closed without an answer), ``lost`` (done, but the answer cut), ``pass`` (none). ``outage``
    cuts all.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.patience = 3.0
        self.down = False
        self._faults: deque[tuple[str, str]] = deque()
        self._moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self._upstream = self._moto.get_host_and_port()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                server._handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._proxy.server_address[1]}"

    def stop(self) -> None:
        """Shut both servers down."""
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    def reset(self) -> None:
        """Forget buckets, faults and requests."""
        self.down = False
        self._faults.clear()
        self._forward("POST", "/moto-api/reset", {}, b"")
        self.requests.clear()

    def fail(self, *faults: str, method: str = "") -> None:
        """The next requests (of ``method``, where it is given) meet these faults, one each."""
        self._faults.extend((method, fault) for fault in faults)

    @contextmanager
    def outage(self) -> Iterator[None]:
        """No request is answered inside."""
        self.down = True
        try:
            yield
        finally:
            self.down = False

    def _next_fault(self, method: str) -> str:
        if self.down:
            return "cut"
        for index, (wanted, fault) in enumerate(self._faults):
            if wanted in ("", method):
                del self._faults[index]
                return fault
        return "pass"

    def _forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(*self._upstream, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            answer.content = answer.read()  # type: ignore[attr-defined]
            return answer
        finally:
            connection.close()

    def _handle(self, asked: BaseHTTPRequestHandler) -> None:
        headers = dict(asked.headers.items())
        headers.pop("Expect", None)  # http.server has answered it
        body = self._body(asked)
        self.requests.append(Request(asked.command, asked.path, headers))
        fault = self._next_fault(asked.command)
        if fault == "timeout":
            time.sleep(self.patience)
        if fault in ("timeout", "cut"):
            asked.close_connection = True
            return
        if fault in REFUSALS:
            status, text = REFUSALS[fault]
            region = [("x-amz-bucket-region", "eu-central-1")] if fault == "redirect" else []
            self._send(asked, status, region, text.encode(), len(text))
            return
        headers.pop("Transfer-Encoding", None)
        answer = self._forward(asked.command, asked.path, {**headers, "Content-Length": str(len(body))}, body)
        if fault == "lost":
            asked.close_connection = True
            return
        content: bytes = answer.content  # type: ignore[attr-defined]
        length = int(answer.getheader("Content-Length", str(len(content))))
        if fault == "truncate":
            asked.close_connection = True
            content = content[: length // 2]
        kept = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("content-length", "transfer-encoding", "connection")
        ]
        self._send(asked, answer.status, kept, content, length)

    @staticmethod
    def _body(asked: BaseHTTPRequestHandler) -> bytes:
        if asked.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return asked.rfile.read(int(asked.headers.get("Content-Length", 0)))
        parts = []
        while size := int(asked.rfile.readline().split(b";")[0], 16):
            parts.append(asked.rfile.read(size))
            asked.rfile.readline()
        while asked.rfile.readline().strip():
            pass
        return b"".join(parts)

    @staticmethod
    def _send(
        asked: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], content: bytes, length: int
    ) -> None:
        try:
            asked.send_response_only(status)
            for name, value in headers:
                asked.send_header(name, value)
            asked.send_header("Content-Length", str(length))
            asked.end_headers()
            if asked.command != "HEAD":
                asked.wfile.write(content)
        except ConnectionError:
            asked.close_connection = True  # the client gave up, as those do that have what they want


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    """The servers, started once."""
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3_server(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An empty S3 server that the environment names, with quick retries."""
    s3_process.reset()
    s3._answered.clear()
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_NO_SIGN_REQUEST", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SECRETS, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": s3_process.endpoint}.items():
        monkeypatch.setenv(name, value)
    return s3_process
