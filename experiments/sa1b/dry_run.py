"""Proves that the runs of this folder start, checkpoint and resume: random weights in the real layout, few images.

    python -m experiments.sa1b.dry_run --scripts sam_b_77.sh sam_h_50.sh --size 256

Each script runs as it stands, but for six steps a distillation: stopped by SIGTERM once there is a checkpoint, then
continued with --resume, and what it writes is loaded. `--size 1024` takes the models' own size; the weights' layout is
the real one at any, but for the tables of positions.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from converters.from_torch import load
from converters.to_torch import save_sam
from slimsam_jax import cli
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.models.config import preset
from slimsam_jax.models.sam import Sam, init

FOLDER = Path(__file__).parent
ALL = tuple(sorted(path.name for path in FOLDER.glob("*.sh")))
IMAGES = 4
STEPS = 6  # enough for the request to stop to come within the distillation of the first checkpoint


def main(scripts: tuple[str, ...] = ALL, size: int = 1024, wait: float = 3600) -> None:
    """Run, stop, resume.

    Args:
      scripts: of this folder.
      size: of the image, pixels.
      wait: seconds, at most, for the first checkpoint.
    """
    for script in scripts:
        if script not in ALL:
            raise InputError(f"{script} is none of {', '.join(ALL)}")
        with tempfile.TemporaryDirectory() as folder:
            seconds = stop_and_resume(script, size, Path(folder), wait)
        print(f"{script}: started, stopped, resumed and loaded, {seconds:.0f} s", flush=True)


def stop_and_resume(script: str, size: int, folder: Path, wait: float) -> float:
    """Returns the seconds that both parts of the run took.

    Raises:
      RunError: it did not do what is to be proved.
    """
    teacher, images, out = folder / "teacher.pth", folder / "sa_000000.tar", folder / "slim"
    # In a process of its own, for the memory: of SAM-H's weights 8 GB stay behind.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        other.submit(write_teacher, f"vit_{script.split('_')[1]}", size, teacher).result()
    write_images(images, size)
    variables = {**os.environ, "TEACHER": str(teacher), "IMAGES": str(images), "VAL": str(images), "OUT": str(out)}
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    command = [FOLDER / script, "--steps", str(STEPS), "--batch", str(jax.device_count()), "--save-every", "1"]
    start = time.perf_counter()
    run = subprocess.Popen(command, env=variables)
    while run.poll() is None and not checkpoints(out) and time.perf_counter() < start + wait:
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    # The request is heeded while distilling; between the stages it ends the process, which is no harm either.
    if run.wait() not in (128 + signal.SIGTERM, -signal.SIGTERM) or not checkpoints(out):
        raise RunError(f"{script} did not stop at a checkpoint (exit code {run.returncode})")
    if subprocess.run([*command, "--resume"], env=variables, check=False).returncode:
        raise RunError(f"{script} did not resume")
    slim, whole = load(out).config, load(teacher).config
    if not slim.embed_dim < whole.embed_dim or len(slim.blocks) != len(whole.blocks):
        raise RunError(f"{script} has written another model than it should: {slim}")
    return time.perf_counter() - start


def checkpoints(out: Path) -> list[Path]:
    """Lists the whole checkpoints of all distillations."""
    return [path for path in out.glob("checkpoints/*/steps/*") if path.name.isdigit()]


def write_teacher(name: str, size: int, path: Path) -> None:
    config = preset(name, size)
    save_sam(Sam(config, jax.device_get(jax.jit(lambda key: init(config, key))(jax.random.key(0)))), path)


def write_images(path: Path, size: int) -> None:
    """Writes a shard of noise in the layout of SA-1B, without annotations."""
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(IMAGES):
            file = io.BytesIO()
            pixels = random.integers(0, 256, (size * 3 // 4, size, 3), np.uint8)
            Image.fromarray(pixels).save(file, "jpeg")
            member = tarfile.TarInfo(f"sa_{i}.jpg")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)


if __name__ == "__main__":
    cli.run(main)
