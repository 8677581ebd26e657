"""The demo's server: exactly the files it was given, on this machine only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

from slimsam_jax.data import embedded_images
from slimsam_jax.errors import InputError

Files = Mapping[str, Path | bytes]

HOST = "127.0.0.1"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
TYPES = {
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
    """What is served, by path: the page, photographs, onnxruntime-web, the models and models.json.

    Args:
      models: of each, what models.json says of it, and its encoder.onnx and decoder.onnx.
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

    def __init__(self, port: int):
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--port {port} cannot be used: {reason}; try another one, or 0 for any") from None


class _Handler(BaseHTTPRequestHandler):
    """Looks paths up in a table, so there is nothing outside it to be reached."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def _answer(self, with_content: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            found = self.server.files.get(path)
            if found is None:
                self.send_error(404)
            elif isinstance(found, bytes):
                self._head(path, len(found))
                self.wfile.write(found if with_content else b"")
            else:
                self._send_file(path, found, with_content)
        except ConnectionError:  # the browser has left
            self.close_connection = True

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
