"""Reads images with their annotations; what cannot be read is left out and named."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slimsam_jax.data import Annotation, Sample
from slimsam_jax.data.sample import check_share
from slimsam_jax.errors import InputError


def read_annotated(sample: Sample) -> tuple[Image.Image, list[Annotation]]:
    """Reads an image and its annotations ([] if it has none).

    Raises:
      InputError: either cannot be read, or the masks are not of the image's size.
    """
    image = sample.image()
    return image, sample.annotations((image.height, image.width))


def map_readable(
    function: Callable[[Sample], Any], samples: Iterable[Sample], total: int = 0, max_broken: float = 1.0
) -> tuple[dict[Sample, Any], dict[str, str]]:
    """Applies `function` to each sample: {sample: result}; what raises InputError is left out: {name: reason}.

    Two samples at a time after the first, in threads: one is decoded while the other's pixels are counted.

    Raises:
      RunError: that is more than a share `max_broken` of `total` samples.
    """
    results, skipped = {}, {}
    for sample, result in prefetched(function, samples):
        try:
            results[sample] = result()
        except InputError as error:
            skipped[sample.name] = str(error)
            if max_broken < 1:
                check_share(skipped, total, max_broken)
    return results, skipped


def prefetched(
    function: Callable[[Any], Any], items: Iterable[Any], threads: int = 2
) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Yields (item, function that gives its result or raises its error) in order, computed by some threads ahead.

    The first item is computed alone, as it may compile for the others.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Any, Future]] = deque()
        for number, item in enumerate(items):
            waiting.append((item, pool.submit(function, item)))
            if number == 0:
                waiting[0][1].exception()
            if len(waiting) == threads:
                done, future = waiting.popleft()
                yield done, future.result
        yield from ((item, future.result) for item, future in waiting)


def short_names(samples: Sequence[Sample]) -> dict[Sample, str]:
    """Shortens names to their stems, where those differ."""
    stems = Counter(Path(sample.name).stem for sample in samples)
    short = lambda name: Path(name).stem if stems[Path(name).stem] == 1 else name
    return {sample: short(sample.name) for sample in samples}


def digest(image: Image.Image, annotations: Sequence[Annotation]) -> str:
    """Hashes what is measured on, however it is stored: pixels, and annotations as they were understood (sha256)."""
    sha256 = hashlib.sha256(str(image.size).encode())
    sha256.update(np.asarray(image).tobytes())
    for annotation in annotations:
        sha256.update(annotation.point.astype(np.float64).tobytes() + annotation.box.astype(np.float64).tobytes())
        sha256.update(np.packbits(annotation.mask).tobytes())
    return sha256.hexdigest()


def digest_of_all(digests: Iterable[str]) -> str:
    """Hashes a set of images' digests, in any order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
