"""Serves the demo: exactly the files it was given, on this machine only."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from slimsam_jax.data import embedded_images
from slimsam_jax.errors import InputError, printable

Files = Mapping[str, Path | bytes]

HOST = "127.0.0.1"
# By no other may the page be asked for, else any page's name could be pointed here. Of any port: ours may be forwarded.
NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", re.ASCII | re.IGNORECASE)
SECONDS = 10.0  # for a request to come in, however slowly its bytes do; and for each megabyte that is sent
CONNECTIONS = 32  # at a time; a browser opens six
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".onnx": "application/octet-stream",
    ".wasm": "application/wasm",
}
HEADERS = {
    "Cache-Control": "no-store",  # models change under the same address
    "Cross-Origin-Embedder-Policy": "require-corp",  # these two: threads, and clocks finer than 0.1 ms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def page_files(models: Sequence[tuple[dict[str, Any], Sequence[Path]]], runtime: Path, threads: int) -> Files:
    """Lists what is served, by path: the page, photographs, onnxruntime-web, the models and models.json.

    Args:
      models: of each, its entry in models.json, and its encoder.onnx and decoder.onnx.
      runtime: the folder `dist` of onnxruntime-web.
    """
    page = Path(str(resources.files("slimsam_jax") / "assets" / "demo"))
    photos = sorted(embedded_images().glob("*.jpg"))
    files: dict[str, Path | bytes] = {f"/{path.name}": path for path in page.iterdir()}
    files["/"] = page / "index.html"
    files |= {f"/photos/{path.name}": path for path in photos}
    files |= {f"/ort/{name}": runtime / name for name in RUNTIME_FILES}
    described = []
    for index, (fields, (encoder, decoder)) in enumerate(models):
        urls = {"encoder": f"/models/{index}/encoder.onnx", "decoder": f"/models/{index}/decoder.onnx"}
        files |= {urls["encoder"]: encoder, urls["decoder"]: decoder}
        described.append({**fields, **urls})
    content = {"threads": threads, "photos": [path.name for path in photos], "models": described}
    return {**files, "/models.json": json.dumps(content).encode()}


class Server(ThreadingHTTPServer):
    """Listens on `port` of this machine from the start, 0 for any that is free; set `files` before it serves.

    Raises:
      InputError: the port cannot be used.
    """

    files: Files = MappingProxyType({})
    request_queue_size = CONNECTIONS

    def __init__(self, port: int):
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--port {port} cannot be used: {reason}; try another one, or 0 for any") from None

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        """Answers a request in a thread, as long as there are not too many; else it is turned away."""
        if self.free.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except RuntimeError:  # no thread can be started
                self.free.release()
                self.shutdown_request(request)
        else:
            request.settimeout(0.1)  # nobody else is served meanwhile
            with contextlib.suppress(OSError):
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints a line for what nobody foresaw; nothing where the browser has left or does not come on."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"the page's server: {type(error).__name__}: {printable(error)}", file=sys.stderr, flush=True)


class _Incoming(io.RawIOBase):
    """Bytes of a connection, until a moment that `wait` sets; each byte on its own could come late enough."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.wait()

    def wait(self) -> None:
        self.until = time.monotonic() + SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(max(0.001, self.until - time.monotonic()))
        return self.connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """Looks paths up in a table, so there is nothing outside it to be reached."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "slimsam_jax", ""
    server: Server
    rfile: BinaryIO

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.incoming = _Incoming(self.connection)
        self.rfile = io.BufferedReader(self.incoming)

    def handle_one_request(self) -> None:
        self.incoming.wait()
        super().handle_one_request()

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def _answer(self, with_content: bool) -> None:
        self.connection.settimeout(SECONDS)
        try:
            path = self._path()
            content = self.server.files.get(path)
            if content is None:
                self.send_error(404)
            elif isinstance(content, bytes):
                self._head(path, len(content))
                self.wfile.write(content if with_content else b"")
            else:
                self._send_file(path, content, with_content)
        except PermissionError as error:
            self.send_error(403, str(error))
        except ValueError as error:  # brackets that are no IPv6 address, say
            self.send_error(400, f"No address: {error}")
        except ConnectionError:  # the browser has left
            self.close_connection = True

    def _path(self) -> str:
        """Parses the path that is asked for.

        Raises:
          ValueError: not an address.
          PermissionError: it is asked of somebody else.
        """
        url, hosts = urlsplit(self.path), self.headers.get_all("Host", [])
        if len(hosts) != 1 or not all(NAMES.fullmatch(host.strip()) for host in (*hosts, url.netloc or hosts[0])):
            raise PermissionError(f"This is {HOST}:{self.server.server_port} and no other host")
        return unquote(url.path)

    def _send_file(self, path: str, source: Path, with_content: bool) -> None:
        try:
            file = source.open("rb")
        except OSError:
            self.send_error(404)
            return
        with file:
            self._head(source.name if path == "/" else path, source.stat().st_size)
            if with_content:
                shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _head(self, name: str, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(Path(name).suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: the terminal shows the address, not every file."""
