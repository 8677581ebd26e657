"""A server of the page to click on in this process, and what is asked of it."""

from __future__ import annotations

import http.client
import threading

from slimsam_jax.demo.server import Files, Server


def serving(files: Files):
    server = Server(0)
    server.files = files
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def request(port: int, path: str, method: str = "GET", host: str = "") -> tuple[http.client.HTTPResponse, bytes]:
    """Sends the path as it is, dots and all."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content
