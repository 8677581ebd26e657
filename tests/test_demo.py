"""The page to click on: its server by itself, and the page in headless Chromium."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.request import urlopen

import chromium
import flax.traverse_util
import numpy as np
import pytest
from conftest import SQUARE, random_sam
from PIL import Image

from slimsam_jax import checkpoint, cli, demo, demo_server, metrics
from slimsam_jax.data import embedded_images, embedded_teacher, read_image
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.inference.predictor import SamPredictor
from slimsam_jax.models.sam import Sam, resize_and_pad

BLOCKS = (dataclasses.replace(SQUARE.blocks[0], mlp_dim=8), SQUARE.blocks[1])
PHOTO = "dog.jpg"


def run(*arguments) -> None:
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo", *map(str, arguments)])
        cli.run(demo.main)


def serving(files: demo_server.Files):
    server = demo_server.Server(0)
    server.files = files
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder with files that have the names of onnxruntime-web's."""
    folder = tmp_path_factory.mktemp("cache")
    dist = folder / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name in demo_server.RUNTIME_FILES:
        (dist / name).write_bytes(name.encode())
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    checkpoint.save(random_sam(SQUARE), folder / "teacher")
    checkpoint.save(random_sam(dataclasses.replace(SQUARE, blocks=BLOCKS), 1), folder / "slim")
    return folder / "slim", folder / "teacher"


@pytest.fixture(scope="module")
def served(cache, models):
    """(port, what was exported) of a server of two models."""
    prepared = demo.prepare(models, "float32", cache)
    server = serving(demo_server.page_files(prepared, demo.find_runtime(cache), threads=1))
    yield server.server_port, prepared
    server.shutdown()
    server.server_close()


def request(port: int, path: str, method: str = "GET", host: str = "") -> tuple[http.client.HTTPResponse, bytes]:
    """Sends the path as it is, dots and all."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_the_server_has_the_page_the_models_and_the_runtime(served):
    port, prepared = served
    described = json.loads(request(port, "/models.json")[1])
    assert [model["name"] for model in described["models"]] == ["slim", "teacher"] and described["threads"] == 1
    for fields, (_, files) in zip(described["models"], prepared, strict=True):
        assert fields["image_size"] == [64, 64]
        assert fields["bytes"] == sum(path.stat().st_size for path in files)
        assert [request(port, fields[part])[1] for part in ("encoder", "decoder")] == [p.read_bytes() for p in files]
    assert PHOTO in described["photos"]
    for path, kind, part in (
        ("/", "text/html; charset=utf-8", b'src="demo.js"'),
        ("/demo.js?again", "text/javascript; charset=utf-8", b"models.json"),
        ("/ort/ort.wasm.min.mjs", "text/javascript; charset=utf-8", b"ort.wasm.min.mjs"),
        ("/ort/ort-wasm-simd-threaded.wasm", "application/wasm", b"ort-wasm-simd-threaded.wasm"),
        (f"/photos/{PHOTO}", "image/jpeg", (embedded_images() / PHOTO).read_bytes()),
    ):
        answer, content = request(port, path)
        assert answer.status == 200 and answer.headers["Content-Type"] == kind and part in content
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        head, nothing = request(port, path, "HEAD")
        assert head.headers["Content-Length"] == str(len(content)) and nothing == b""


def test_the_page_names_only_files_that_are_served(served):
    """What a browser would load: scripts of the page, and modules that scripts import."""
    port, _ = served
    for script in ("demo.js", "panel.js", "inference.js", "resize.js"):
        content = request(port, f"/{script}")[1].decode()
        imported = [line.split('"')[1] for line in content.splitlines() if line.startswith("import ")]
        assert all(request(port, f"/{name.removeprefix('./')}")[0].status == 200 for name in imported)
        assert "http://" not in content and "https://" not in content


@pytest.mark.parametrize(
    "path",
    (
        "/../demo.py",
        "/%2e%2e/demo.py",
        "/photos/../../demo.py",
        "/photos/..%2f..%2fdemo.py",
        "//etc/passwd",
        "/etc/passwd",
        "/photos/",
        "/photos/SOURCES.md",
        "/ort/ort.min.js",
        "/models/2/encoder.onnx",
        "/index.html%00",
        "",
    ),
)
def test_nothing_else_is_served(served, path):
    answer, content = request(served[0], path or f"http://127.0.0.1:{served[0]}/none")
    assert answer.status == 404 and b"import" not in content and b"root:" not in content


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
    monkeypatch.setattr(demo_server, "SECONDS", 2.0)
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
    monkeypatch.setattr(demo_server, "SECONDS", 1.0)
    opened = [
        socket.create_connection(("127.0.0.1", small.server_port), timeout=5) for _ in range(demo_server.CONNECTIONS)
    ]
    for i, connection in enumerate(opened):
        connection.sendall(b"GET / HT"[: i % 9])
    deadline = time.monotonic() + 20
    turned_away = send(small.server_port, b"")
    while b" 503 " not in turned_away and time.monotonic() < deadline:  # until all are accepted
        turned_away = send(small.server_port, b"")
    assert b" 503 " in turned_away and threading.active_count() < demo_server.CONNECTIONS + 20
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
    monkeypatch.setattr(demo_server, "SECONDS", 2.0)
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


def test_only_this_machine_is_listened_to(served):
    server = demo_server.Server(0)
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()


def test_a_model_is_exported_once(served, cache, models, capsys):
    _, prepared = served
    written = {path: path.stat().st_mtime_ns for _, files in prepared for path in files}
    again = demo.prepare(models, "float32", cache)
    assert again == prepared and "largest error" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for _, files in again for path in files} == written
    sam = checkpoint.load(models[0])
    others = (
        (sam, "int8"),
        (random_sam(sam.config, 5), "float32"),
        (Sam(dataclasses.replace(sam.config, pixel_std=(1.0, 2.0, 3.0)), sam.params, {}), "float32"),
    )
    assert len({demo.fingerprint(sam, "float32"), *(demo.fingerprint(*other) for other in others)}) == 4


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, cache, models, capsys, monkeypatch):
    taken = demo_server.Server(0)
    for arguments, part in (
        (("--cache", tmp_path / "none"), "demo --install --cache"),
        (("--cache", cache, "--port", taken.server_port), "cannot be used"),
        (("--cache", cache, "--port", "70000"), "--port 70000 cannot be used"),
        (("--cache", cache, "--port", "0", "--threads", "0"), "--threads 0"),
        (("--cache", cache, "--port", "0", "--model", tmp_path / "absent"), "does not exist"),
        (("--cache", cache, "--port", "0", "--model", models[0], "--against", tmp_path / "absent"), "does not exist"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and part in error
    taken.server_close()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(demo, "LARGEST_FILE", 1000)
    with pytest.raises(InputError, match="in float32; try --dtype float16 or int8"):
        demo.prepare(models[:1], "float32", cache)


def test_installing_needs_npm_and_says_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="npm is not installed"):
        demo.install_runtime(tmp_path / "cache")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error no network' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(RunError, match="npm error no network"):
        demo.install_runtime(tmp_path / "cache")


@pytest.fixture
def interruptible():
    """A shell's background jobs ignore the interrupt, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_command_serves_until_it_is_interrupted(cache, models, interruptible):
    arguments = ("--model", models[0], "--against", models[1], "--port", "0", "--cache", cache)
    command = [sys.executable, "-m", "slimsam_jax.demo", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            url = next(line.split()[1] for line in process.stdout if line.startswith("open http://127.0.0.1:"))
            assert len(json.load(urlopen(f"{url}models.json", timeout=10))["models"]) == 2
            process.send_signal(2)
            assert process.wait(30) == 0
        finally:
            process.kill()


def narrower(sam: Sam) -> Sam:
    """Without every eighth hidden unit of the first block's MLP."""
    flat = flax.traverse_util.flatten_dict(sam.params, sep="/")
    kept = np.flatnonzero(np.arange(sam.config.blocks[0].mlp_dim) % 8)
    for name, axis in (("lin1/kernel", 1), ("lin1/bias", 0), ("lin2/kernel", 0)):
        path = f"image_encoder/blocks_0/mlp_{name}"
        flat[path] = np.asarray(flat[path]).take(kept, axis)
    blocks = (dataclasses.replace(sam.config.blocks[0], mlp_dim=len(kept)), *sam.config.blocks[1:])
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return Sam(dataclasses.replace(sam.config, blocks=blocks), params, {})


@pytest.fixture(scope="module")
def pair():
    """The small SAM, and one that is not uniform."""
    teacher = checkpoint.load(embedded_teacher())
    return narrower(teacher), teacher


@pytest.fixture(scope="module")
def page(tmp_path_factory, pair):
    """The page in Chromium, with two models loaded and a photograph encoded by both."""
    if chromium.executable() is None:
        pytest.skip("needs Chromium: apt install chromium")
    try:
        runtime = demo.find_runtime(demo.default_cache())
    except InputError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("page")
    for name, sam in zip(("slim", "teacher"), pair, strict=True):
        checkpoint.save(sam, root / name)
    prepared = demo.prepare((root / "slim", root / "teacher"), "float32", root / "cache")
    server = serving(demo_server.page_files(prepared, runtime, threads=1))
    with chromium.page(root / "profile") as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/")
        tab.wait_for(SETTLED)
        yield tab
    server.shutdown()
    server.server_close()


SETTLED = "['ready', 'error'].includes(document.documentElement?.dataset.state)"
MASK = """(() => {
  const canvas = document.querySelectorAll('canvas.mask')[%d];
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const bytes = Uint8Array.from({ length: data.length / 4 }, (_, i) => data[4 * i + 3] ? 1 : 0);
  let text = '';
  for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096));
  return { size: [canvas.height, canvas.width], bytes: btoa(text) };
})()"""
FRAME = """(() => {
  document.querySelector('.stack').scrollIntoView({ block: 'center' });
  const { left, top, width } = document.querySelector('.stack').getBoundingClientRect();
  return [left, top, document.querySelector('canvas.picture').width / width];
})()"""


def choose(tab: chromium.Page, photo: str) -> None:
    """Takes one of our photographs."""
    change = f"s => {{ s.value = '{photo}'; s.dispatchEvent(new Event('change')); }}"
    tab.evaluate(f"({change})(document.getElementById('photos'))")
    tab.wait_for(f"document.documentElement.dataset.state == 'ready' && {DRAWN % 0}")


DRAWN = "document.querySelectorAll('[data-value=decoder]')[%d].textContent == '–'"


def on_screen(tab: chromium.Page, *wanted: tuple[float, float]) -> tuple[list, list]:
    """Whole pixels of the screen nearest to points of the picture; and the points that these are."""
    left, top, scale = tab.evaluate(FRAME)
    screen = [(round(x / scale + left), round(y / scale + top)) for x, y in wanted]
    return screen, [((x - left) * scale, (y - top) * scale) for x, y in screen]


def masks(tab: chromium.Page) -> list[np.ndarray]:
    """What is drawn, of both models, once it is."""
    tab.wait_for("document.documentElement.dataset.state != 'busy'")
    assert tab.evaluate("document.documentElement.dataset.state") == "ready", tab.evaluate(chromium.TEXT)
    found = [tab.evaluate(MASK % index) for index in range(2)]
    return [np.frombuffer(base64.b64decode(m["bytes"]), np.uint8).reshape(m["size"]) > 0 for m in found]


def said(tab: chromium.Page, name: str) -> list[str]:
    return tab.evaluate(f"[...document.querySelectorAll('[data-value=\"{name}\"]')].map(e => e.textContent)")


def assert_agree(found, pair, photo=PHOTO, **prompt):
    """Each model's mask with `SamPredictor`'s; the predicted IoU that it gives."""
    scores = []
    for mask, sam in zip(found, pair, strict=True):
        predictor = SamPredictor(sam)
        predictor.set_image(embedded_images() / photo)
        wanted, iou, _ = predictor.predict(**prompt, multimask_output=False)
        assert wanted.any() and metrics.iou(mask, wanted[0]) > 0.999
        scores.append(f"{iou[0]:.3f}")
    return scores


@pytest.mark.slow
def test_a_click_shows_the_masks_of_both_models(page, pair, tmp_path):
    choose(page, PHOTO)
    picture = read_image(embedded_images() / PHOTO)
    (place,), (point,) = on_screen(page, (picture.width / 2, picture.height / 2))
    page.drag(place)
    found = masks(page)
    scores = assert_agree(found, pair, point_coords=[point], point_labels=[1])
    assert np.allclose([float(s) for s in said(page, "predicted IoU")], [float(s) for s in scores], atol=2e-3)
    assert all(value.endswith(" ms") for name in ("encoder", "decoder") for value in said(page, name))
    assert said(page, "agreement") == [f"IoU {metrics.iou(*found):.3f} with the first model's mask"]
    (place,), (background,) = on_screen(page, (5, 5))
    page.drag(place, shift=True)
    assert_agree(masks(page), pair, point_coords=[point, background], point_labels=[1, 0])
    page.evaluate("document.getElementById('undo').click()")
    assert [np.array_equal(a, b) for a, b in zip(masks(page), found, strict=True)] == [True, True]
    page.screenshot(tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").width > 1000


@pytest.mark.slow
def test_a_dragged_box_shows_the_masks_of_both_models(page, pair):
    choose(page, "chelsea_cat.jpg")
    picture = read_image(embedded_images() / "chelsea_cat.jpg")
    ends = (picture.width / 4, picture.height / 5), (picture.width * 0.8, picture.height * 0.9)
    screen, corners = on_screen(page, *ends)
    page.drag(screen[1], screen[0])
    found = masks(page)
    assert_agree(found, pair, "chelsea_cat.jpg", box=np.ravel(corners))
    page.evaluate("document.getElementById('clear').click()")
    assert not any(mask.any() for mask in masks(page))


@pytest.mark.slow
def test_a_file_is_taken_and_what_is_no_picture_is_refused(page, tmp_path):
    choose(page, PHOTO)
    Image.new("RGB", (3000, 1500), (200, 30, 30)).save(tmp_path / "large.png")
    (tmp_path / "words.jpg").write_text("no picture")
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    file = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=file, files=[str(tmp_path / "large.png")])
    page.wait_for("document.querySelector('canvas.picture').width == 1200")
    page.wait_for(SETTLED)
    page.drag(*on_screen(page, (600, 300))[0])
    assert masks(page)[0].shape == (600, 1200)
    page.call("DOM.setFileInputFiles", nodeId=file, files=[str(tmp_path / "words.jpg")])
    page.wait_for("document.documentElement.dataset.state == 'error'")
    assert "cannot read it as a picture" in page.evaluate("document.getElementById('status').textContent")


@pytest.mark.slow
def test_pictures_are_scaled_as_pillow_does(page):
    random = np.random.default_rng(0)
    for size, target in (((37, 53), (256, 256)), ((300, 211), (64, 48)), ((5, 400), (1, 80)), ((64, 40), (64, 64))):
        pixels = random.integers(0, 256, (*size, 3), np.uint8)
        wanted, (height, width) = resize_and_pad(pixels, target)
        rgba = np.dstack([pixels, np.full(size, 255, np.uint8)]).ravel().tolist()
        arguments = f"Uint8Array.from({rgba}), {list(size)}, fit({list(size)}, {list(target)})"
        found = page.evaluate(f"import('/resize.js').then(({{ fit, resize }}) => [...resize({arguments})])")
        assert np.array_equal(np.reshape(found, (3, height, width)), wanted[:height, :width].transpose(2, 0, 1))
