"""Serves a page to click on, models side by side. `python -m slimsam_jax.demo --model slim --against sam.pth`.

The models are exported to ONNX and run in the browser, on onnxruntime-web; nothing is computed here, and no image
leaves the browser.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from slimsam_jax import cli, limits
from slimsam_jax.demo.export import Dtype, prepare
from slimsam_jax.errors import InputError, RunError

if TYPE_CHECKING:
    from slimsam_jax.demo.server import Server

RUNTIME = "onnxruntime-web@^1.30"


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimsam_jax"


def install_runtime(folder: Path) -> None:
    """Fetches onnxruntime-web into `folder`, by npm.

    Raises:
      InputError: there is no npm.
      RunError: npm failed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise InputError("npm is not installed, and onnxruntime-web comes with it; install Node.js first")
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "install", RUNTIME, "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
        raise RunError(f"npm could not install onnxruntime-web: {reason}")
    print(f"installed {RUNTIME} in {folder}")


def find_runtime(folder: Path) -> Path:
    """Finds the folder `dist` of onnxruntime-web in `folder`.

    Raises:
      InputError: it is not there.
    """
    from slimsam_jax.demo.server import RUNTIME_FILES

    dist = folder / "node_modules" / "onnxruntime-web" / "dist"
    if not all((dist / name).is_file() for name in RUNTIME_FILES):
        option = "" if folder == default_cache() else f" --cache {folder}"
        raise InputError(
            f"the page needs onnxruntime-web, which is not in {folder}: {cli.called('demo')} --install{option}"
            f" (or npm install {RUNTIME} --prefix {folder})"
        )
    return dist


def main(
    model: Path | None = None,
    against: tuple[Path, ...] = (),
    port: int = 8000,
    dtype: Dtype = "float32",
    threads: int = 1,
    cache: Path | None = None,
    install: bool = False,
) -> None:
    """Serve a page on this machine on which to click on images and see the masks of models side by side.

    The models run in the browser, which shows their masks, predicted IoU and milliseconds. The first two are on at
    first; the page loads any other when it is ticked.

    Args:
      model: a model folder, a .pth, or a Hugging Face SamModel folder; the small SAM that ships with us if not given.
      against: one or more models to compare it with.
      port: of 127.0.0.1; 0 for any that is free.
      dtype: of the exported models.
      threads: of onnxruntime-web; with 1, times compare best.
      cache: the folder for exported models and onnxruntime-web; slimsam_jax in the user's cache folder if not given.
      install: fetch onnxruntime-web with npm (150 MB) before anything else, once; without --model, nothing else.
    """
    cache = cache or default_cache()
    limits.check("--threads", threads, limits.Range(1, 256, True))
    if install:
        install_runtime(cache)
        if model is None and not against:
            return
    runtime = find_runtime(cache)
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"writing ONNX needs {' and '.join(missing)}: pip install onnx onnxruntime")
    from slimsam_jax import data
    from slimsam_jax.demo.server import Server, page_files

    with Server(port) as server:  # before the export, which may take minutes
        models = prepare((model or data.embedded_teacher(), *against), dtype, cache)
        server.files = page_files(models, runtime, threads)
        serve(server)


def serve(server: Server) -> None:
    """Serves until Ctrl-C."""
    host, port = server.server_address
    print(f"open http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    cli.run(main)
