"""Both sides of `experiments.bench --what data`: JPEGs of SA-1B's size, decoded, resized as SAM does, and batched.

Ours are threads (`data/batches.py`), PyTorch's a `DataLoader` with a process for each core, doing the same by Pillow.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.bench.options import Options, Step
from slimsam_jax import data
from slimsam_jax.imaging.transforms import resize_and_pad

SIZE = (2250, 1500)  # of SA-1B's files
FILES = 32


def make_step(options: Options, image_size: tuple[int, int]) -> Step:
    folder = tempfile.TemporaryDirectory()
    files = write_images(Path(folder.name))
    side = threads if options.side == "jax" else data_loader
    next_batch = side(files, image_size, options.batch)
    where = f"{len(os.sched_getaffinity(0))} cores, {image_size[0]} px"
    # The folder lives as long as the step that reads it.
    return Step(lambda _=folder: next_batch(), options.batch, peak, where)


def write_images(folder: Path) -> list[Path]:
    """Writes the package's photographs, enlarged."""
    photos = data.find([data.embedded_images()])
    files = [folder / f"sa_{i}.jpg" for i in range(FILES)]
    for i, file in enumerate(files):
        photos[i % len(photos)].image().resize(SIZE, Image.Resampling.BICUBIC).save(file, quality=90)
    return files


def peak() -> int:
    """Returns the peak memory in bytes, of this process or of the largest of its workers."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def threads(files: list[Path], image_size: tuple[int, int], batch: int) -> Callable[[], object]:
    from slimsam_jax.data.batches import Batches

    batches = Batches(data.find([files[0].parent]), image_size, batch, seed=0)
    return lambda: next(batches)


def data_loader(files: list[Path], image_size: tuple[int, int], batch: int) -> Callable[[], object]:
    import torch
    from torch.utils.data import DataLoader, Dataset, RandomSampler

    class Images(Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            with Image.open(files[index]) as image:
                return resize_and_pad(image.convert("RGB"), image_size)

    torch.set_num_threads(1)
    sampler = RandomSampler(files, replacement=True, num_samples=10**6)
    workers = len(os.sched_getaffinity(0))
    batches = iter(DataLoader(Images(), batch, sampler=sampler, num_workers=workers))
    return lambda: next(batches)
