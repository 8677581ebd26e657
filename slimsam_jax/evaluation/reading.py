"""Images with their annotations; what cannot be read is left out and named."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slimsam_jax.data import Annotation, read_annotations, read_image
from slimsam_jax.errors import InputError


def read_annotated(path: Path) -> tuple[Image.Image, list[Annotation]]:
    """An image and its annotations ([] without a file of them).

    Raises:
      InputError: either cannot be read, or the masks are not of the image's size.
    """
    image, annotations = read_image(path), read_annotations(path)
    if annotations and annotations[0].mask.shape != (image.height, image.width):
        raise InputError(
            f"{path}: its annotations are of size {annotations[0].mask.shape}, the image of {image.size[::-1]}"
        )
    return image, annotations


def map_readable(function: Callable[[Path], Any], paths: Iterable[Path]) -> tuple[dict[Path, Any], dict[str, str]]:
    """Applies `function` to each path; what raises InputError is left out, with its reason."""
    found, skipped = {}, {}
    for path in paths:
        try:
            found[path] = function(path)
        except InputError as error:
            skipped[str(path)] = str(error)
    return found, skipped


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The stem of each path, or all of it where stems are the same."""
    stems = Counter(path.stem for path in paths)
    return {path: path.stem if stems[path.stem] == 1 else str(path) for path in paths}


def digest(name: str, image: Image.Image, annotations: Sequence[Annotation]) -> str:
    """sha256 of what was measured on, however it is stored: name, pixels, and annotations as they were understood."""
    found = hashlib.sha256(f"{name} {image.size}".encode())
    found.update(np.asarray(image).tobytes())
    for annotation in annotations:
        found.update(annotation.point.astype(np.float64).tobytes() + annotation.box.astype(np.float64).tobytes())
        found.update(np.packbits(annotation.mask).tobytes())
    return found.hexdigest()


def digest_of_all(digests: Iterable[str]) -> str:
    """Of a set of images, in any order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
