"""Measures how soon millions of images in shards are listed, and what they take in memory.

    python -m experiments.bench.shards --folder tars --images 1000000

Makes tars of SA-1B's size and layout, whose files are holes (a header takes a block of the disk: 8 kB an image), if the
folder is not there, and lists them twice, each time in a new process: with an empty cache, and with what that has kept.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import tyro

IN_A_SHARD = 11_186  # images of SA-1B's
FILES = (("jpg", 470_000), ("json", 520_000))  # bytes, about SA-1B's mean


def make(folder: Path, images: int) -> None:
    """Writes the tars; as old as files that do not change any more."""
    folder.mkdir()
    header, first = tarfile.TarInfo(), 0
    while first < images:
        path = folder / f"sa_{first // IN_A_SHARD:06d}.tar"
        with path.open("wb") as file:
            for number in range(first, min(first + IN_A_SHARD, images)):
                for suffix, header.size in FILES:
                    header.name = f"./sa_{number + 1}.{suffix}"
                    file.write(header.tobuf(tarfile.USTAR_FORMAT))
                    file.seek(-(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, os.SEEK_CUR)
            file.write(bytes(2 * tarfile.BLOCKSIZE))
        os.utime(path, (1e9, 1e9))
        first += IN_A_SHARD


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start(folder: Path) -> None:
    """Does what a run does before it reads an image: list them, hold some out, hash the names."""
    from slimsam_jax.data import find
    from slimsam_jax.data.samples import digest_of_names
    from slimsam_jax.training.setup import split_images

    class Options:
        images, val = (str(folder),), ()

    find([Path(__file__).parents[2] / "slimsam_jax" / "assets" / "photos"])  # imports everything
    before, cpu, wall = resident(), time.process_time(), time.perf_counter()
    images, val = split_images(Options)
    digest = digest_of_names(images)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    gc.collect()
    each = (resident() - before) / (len(images) + len(val))
    print(f"{len(images)} + {len(val)} images, {cpu:.2f} CPU s, {wall:.2f} s, {each:.0f} bytes an image, {digest[:8]}")


def main(folder: Path, images: int = 1_000_000) -> None:
    if not folder.exists():
        make(folder, images)
    with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
        code = f"from pathlib import Path; from experiments.bench.shards import start; start(Path({str(folder)!r}))"
        for _ in range(2):
            subprocess.run([sys.executable, "-c", code], env={**os.environ, "XDG_CACHE_HOME": cache}, check=True)


if __name__ == "__main__":
    tyro.cli(main)
