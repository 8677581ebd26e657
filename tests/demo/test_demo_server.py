"""The server of the page to click on: for this machine alone, whatever is sent to it."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time

import numpy as np
import pytest

from helpers.demo_serving import request, serving
from slimsam_jax.demo import server


@pytest.fixture(scope="module")
def small():
    """A server of one file, without models."""
    server = serving({"/": b"a page"})
    yield server
    server.shutdown()
    server.server_close()


def send(port: int, content: bytes, wait: float = 5.0) -> bytes:
    """Raw bytes to the server; all that it answers until it is silent or has closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        answer = b""
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                answer += part
        except OSError:  # it has hung up before all was sent
            pass
        return answer


@pytest.mark.parametrize(
    "host", ("127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "localhost:1", "localhost")
)
def test_the_page_is_for_this_machine_by_its_names(small, host):
    """Whatever the port: a browser elsewhere may reach it by one that SSH forwards."""
    assert request(small.server_port, "/", host=host.format(port=small.server_port))[1] == b"a page"


HOSTS = (
    *(
        "evil.example",
        "evil.example:{port}",
        "localhost:{port}00",
        "localhost:x",
        "[::1]:{port}",
    ),
    *(
        "127.0.0.1:{port}.evil.example",
        "127.0.0.1:{port}@evil.example",
        "localhost.:{port}",
        "0.0.0.0:{port}",
        "127.1:{port}",
    ),
    *(
        "127.0.0.1 :{port}",
        "2130706433:{port}",
        "",
        ",",
        "localhost:{port},evil.example",
        "\xff:{port}",
        "localhost:{port}#",
    ),
)


@pytest.mark.parametrize("host", HOSTS)
def test_the_page_is_for_nobody_who_calls_it_otherwise(small, host):
    host = host.format(port=small.server_port).encode("latin-1")
    for method in (b"GET", b"HEAD"):
        answer = send(small.server_port, method + b" / HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403 ") and b"a page" not in answer
    url = b"http://evil.example/"
    good = f"127.0.0.1:{small.server_port}".encode()
    for head in (b"Host: " + good + b"\r\nHost: " + host, b"X: y", b"Host: " + good if host else b""):
        target = url if head == b"Host: " + good else b"/"
        answer = send(small.server_port, b"GET " + target + b" HTTP/1.1\r\n" + head + b"\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403 ") and b"a page" not in answer


def hostile_requests(port: int, random: np.random.Generator):
    """Requests that are none, or of somebody who wishes no good: 400 and more."""
    host = f"Host: 127.0.0.1:{port}\r\n".encode()
    line = lambda target, rest=b"", version=b"HTTP/1.1": (
        b"GET " + target + b" " + version + b"\r\n" + host + rest + b"\r\n"
    )
    targets = (
        b"http://[",
        b"http://[::1",
        b"//[",
        b"http://[v1.x]/",
        b"http://a]/",
        b"/%",
        b"/%zz",
        b"/%00",
        b"/\xff\xfe",
        b"*",
        b"?",
        b"#",
        b"/" * 5000,
        b"/..%c0%af..",
        b"http://127.0.0.1:99999999/",
        b"http://user@:x/",
        b"/\x1b[31m",
        b"javascript:alert(1)",
        b"http://\xe2\x84\xaa/",
        b"/" + b"%2e%2e/" * 500 + b"etc/passwd",
        b"/a" * 40_000,
    )
    yield from map(line, targets)
    versions = (
        b"HTTP/9.9",
        b"HTTP/1",
        b"HTTP/-1.1",
        b"HTTP/1.1.1",
        b"HTTP/" + b"9" * 5000 + b".1",
        b"http/1.1",
        b"",
        b"HTTP/1.x",
        b"HTTP/\xb2.1",
        b"HTTP/0.9",
        b"HTTP/2.0",
        b"HTTP/1.1 extra",
    )
    yield from (line(b"/", version=version) for version in versions)
    for method in (
        b"POST",
        b"PUT",
        b"DELETE",
        b"OPTIONS",
        b"CONNECT",
        b"TRACE",
        b"get",
        b"\xff",
        b"A" * 70_000,
        b"__class__",
        b"",
    ):
        yield method + b" / HTTP/1.1\r\n" + host + b"\r\n"
    headers = (
        b"X: y\r\n" * 200,
        b"X: " + b"y" * 70_000 + b"\r\n",
        b": \r\n",
        b"no colon\r\n",
        b"\x00: \x00\r\n",
        b" folded\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"Range: bytes=0-99999999999\r\n",
        b"Connection: \xff\r\n",
        b"Host\r\n",
    )
    yield from (line(b"/", header) for header in headers)
    yield from (
        b"",
        b"\r\n",
        b"\n" * 1000,
        b"\x00" * 1000,
        b"\x16\x03\x01\x02\x00\x01",
        b"GET",
        b"GET /",
        b"GET / HTTP/1.1",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    )
    yield line(b"/") * 50  # one after the other without waiting
    good = line(b"/photos/x?y#z", b"Accept: */*\r\n")
    for _ in range(350):
        noise = bytearray(good)
        for _ in range(random.integers(1, 8)):
            place = random.integers(len(noise))
            noise[place : place + random.integers(0, 3)] = random.bytes(random.integers(0, 4))
        yield bytes(noise[: random.integers(len(noise))] if random.random() < 0.2 else noise)


def test_no_request_breaks_the_server_or_reaches_the_terminal(small, monkeypatch, capfd):
    monkeypatch.setattr(server, "SECONDS", 2.0)
    port, named = small.server_port, f"Host: 127.0.0.1:{small.server_port}\r\n".encode()
    asked = list(hostile_requests(port, np.random.default_rng(0)))
    answers = [send(port, content) for content in asked]
    assert len(answers) > 400
    for content, answer in zip(asked, answers, strict=True):
        assert b"Traceback" not in answer and b"root:" not in answer
        assert b"a page" not in answer or named in content  # though something else of it be odd
    assert request(port, "/")[1] == b"a page"
    assert capfd.readouterr() == ("", "")


def test_connections_that_wait_are_few_and_end(small, monkeypatch):
    """Those who send nothing, or a byte now and then, keep nobody out for long."""
    monkeypatch.setattr(server, "SECONDS", 1.0)
    before = threading.active_count()  # other tests' libraries leave threads, too
    opened = [socket.create_connection(("127.0.0.1", small.server_port), timeout=5) for _ in range(server.CONNECTIONS)]
    for i, connection in enumerate(opened):
        connection.sendall(b"GET / HT"[: i % 9])
    deadline = time.monotonic() + 20
    turned_away = send(small.server_port, b"")
    while b" 503 " not in turned_away and time.monotonic() < deadline:  # until all are accepted
        turned_away = send(small.server_port, b"")
    assert b" 503 " in turned_away and threading.active_count() - before <= server.CONNECTIONS + 1
    ended = 0
    while ended < len(opened) and time.monotonic() < deadline:
        for connection in opened:
            connection.settimeout(0.01)
            with contextlib.suppress(OSError):
                connection.sendall(b"x")
        ended = sum(closed(connection) for connection in opened)
    assert ended == len(opened)
    assert request(small.server_port, "/")[1] == b"a page"


def test_a_connection_that_is_used_stays(small, monkeypatch):
    monkeypatch.setattr(server, "SECONDS", 2.0)
    connection = http.client.HTTPConnection("127.0.0.1", small.server_port, timeout=10)
    for _ in range(3):
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"a page"
        kept = connection.sock
        time.sleep(1.2)
    connection.request("HEAD", "/")
    assert connection.getresponse().status == 200 and connection.sock is kept
    connection.close()


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1000) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_a_fault_of_ours_is_one_line(small, monkeypatch, capfd):
    monkeypatch.setattr(small, "files", None)
    assert send(small.server_port, f"GET / HTTP/1.1\r\nHost: localhost:{small.server_port}\r\n\r\n".encode()) == b""
    error = capfd.readouterr().err
    assert error.startswith("the page's server: AttributeError: ") and error.count("\n") == 1
