"""The page to click on: what is exported and served, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import resources
from urllib.request import urlopen

import pytest

from helpers.demo_serving import request, serving
from helpers.models import SQUARE, random_sam
from slimsam_jax import checkpoint, cli
from slimsam_jax.data import embedded_images
from slimsam_jax.demo import __main__, export
from slimsam_jax.demo.server import RUNTIME_FILES, Server, page_files
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.sam import Sam

BLOCKS = (dataclasses.replace(SQUARE.blocks[0], mlp_dim=8), SQUARE.blocks[1])
PHOTO = "dog.jpg"


def run(*arguments) -> None:
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo", *map(str, arguments)])
        cli.run(__main__.main)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder with files that have the names of onnxruntime-web's."""
    folder = tmp_path_factory.mktemp("cache")
    dist = folder / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name in RUNTIME_FILES:
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
    prepared = export.prepare(models, "float32", cache)
    server = serving(page_files(prepared, __main__.find_runtime(cache), threads=1))
    yield server.server_port, prepared
    server.shutdown()
    server.server_close()


def test_the_server_has_the_page_the_models_and_the_runtime(served):
    port, prepared = served
    described = json.loads(request(port, "/models.json")[1])
    assert [model["name"] for model in described["models"]] == ["slim", "teacher"] and described["threads"] == 1
    for fields, (_, files) in zip(described["models"], prepared, strict=True):
        assert fields["image_size"] == [64, 64] and fields["family"] == "vit"
        assert fields["thresholds"] == Thresholds().to_json()  # it has none of its own
        assert fields["bytes"] == sum(path.stat().st_size for path in files)
        assert [request(port, fields[part])[1] for part in ("encoder", "decoder")] == [p.read_bytes() for p in files]
    assert PHOTO in described["photos"]
    for path, kind, part in (
        ("/", "text/html; charset=utf-8", b'src="demo.js"'),
        ("/style.css", "text/css; charset=utf-8", b"color-scheme"),
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
    scripts = sorted((resources.files("slimsam_jax") / "assets" / "demo").glob("*.js"))
    assert len(scripts) > 10
    for script in (path.name for path in scripts):
        content = request(port, f"/{script}")[1].decode()
        imported = re.findall(r'^(?:import|}) .*from "([^"]+)";', content, re.MULTILINE)
        assert len(imported) == len(re.findall(r"^import ", content, re.MULTILINE))
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


def test_only_this_machine_is_listened_to(served):
    server = Server(0)
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()


def test_a_model_is_exported_once(served, cache, models, capsys):
    _, prepared = served
    written = {path: path.stat().st_mtime_ns for _, files in prepared for path in files}
    again = export.prepare(models, "float32", cache)
    assert again == prepared and "largest error" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for _, files in again for path in files} == written
    sam = checkpoint.load(models[0])
    others = (
        (sam, "int8"),
        (random_sam(sam.config, 5), "float32"),
        (Sam(dataclasses.replace(sam.config, pixel_std=(1.0, 2.0, 3.0)), sam.params, {}), "float32"),
    )
    assert len({export.fingerprint(sam, "float32"), *(export.fingerprint(*other) for other in others)}) == 4


def test_models_of_one_name_are_called_by_their_paths(tmp_path, cache, models):
    other = tmp_path / models[0].name
    shutil.copytree(models[0], other)
    described = [fields for fields, _ in export.prepare((models[0], other), "float32", cache)]
    assert [fields["name"] for fields in described] == [str(models[0]), str(other)]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, cache, models, capsys, monkeypatch):
    taken = Server(0)
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
    monkeypatch.setattr(export, "LARGEST_FILE", 1000)
    with pytest.raises(InputError, match="in float32; try --dtype float16 or int8"):
        export.prepare(models[:1], "float32", cache)


def test_installing_needs_npm_and_says_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="npm is not installed"):
        __main__.install_runtime(tmp_path / "cache")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error no network' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(RunError, match="npm error no network"):
        __main__.install_runtime(tmp_path / "cache")


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
