"""A folder of images -> batches. uint8 until on the device; decoded in threads ahead of the step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from PIL import Image, ImageOps

from slimsam_jax import rle
from slimsam_jax.errors import InputError, RunError, blaming
from slimsam_jax.models.sam import resize_and_pad

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


class Annotation(NamedTuple):
    """One mask of an SA-1B file, in the picture's own pixels.

    Attributes:
      point: (x, y), the first of `point_coords`.
      box: (x0, y0, x1, y1), from `bbox`'s x, y, width, height.
      mask: [h, w] bool.
    """

    point: np.ndarray
    box: np.ndarray
    mask: np.ndarray


def find_images(folders: Sequence[Path]) -> list[Path]:
    """All images below the folders, sorted, hidden files left out.

    Raises:
      InputError: a folder is missing or holds no image.
    """
    found: list[Path] = []
    for folder in folders:
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder of images")
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not images:
            raise InputError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
        found += images
    return list(dict.fromkeys(found))


def embedded_images() -> Path:
    """The photographs that ship with the package; their sources and licences lie beside them."""
    return Path(str(resources.files("slimsam_jax") / "assets" / "photos"))


def embedded_teacher() -> Path:
    """The small SAM (256 px) that ships with the package."""
    return Path(str(resources.files("slimsam_jax") / "assets" / "sam_small_256"))


def read_image(path: Path) -> Image.Image:
    """Opens and decodes a picture as RGB, upright (EXIF), as `cv2.imread` would give it.

    Raises:
      InputError: missing or not decodable.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which PIL would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # decoders have errors of many kinds for damaged files
        raise InputError(f"{path} is not a readable image: {error}") from None


def read_annotations(path: Path) -> list[Annotation]:
    """The SA-1B annotations beside an image (same name, .json); [] without such a file.

    Raises:
      InputError: the file is there, but is not one.
    """
    path = path.with_suffix(".json")
    if not path.exists():
        return []
    with blaming(f"the SA-1B annotation {path}"):
        annotations = [_annotation(fields) for fields in json.loads(path.read_text())["annotations"]]
        if len({a.mask.shape for a in annotations}) > 1:
            raise ValueError("its masks are of different sizes")
        return annotations


def _annotation(fields: dict[str, Any]) -> Annotation:
    x, y, width, height = fields["bbox"]
    point = np.asarray(fields["point_coords"], np.float64).reshape(-1, 2)[0]
    box = np.array([x, y, x + width, y + height], np.float64)
    if not (np.isfinite([*point, *box]).all() and width >= 0 and height >= 0):
        raise ValueError("a point or box that is none")
    return Annotation(point, box, rle.decode(fields["segmentation"]))


def check_one_is_readable(paths: Sequence[Path]) -> None:
    """Raises InputError if not a single image can be decoded."""
    for path in paths:
        try:
            read_image(path)
            return
        except InputError as error:
            last = error
    raise InputError(f"none of the {len(paths)} images can be read, so there is nothing to work on; the last: {last}")


class Batches:
    """An endless, shuffled, resumable stream of batches.

    Iterating gives {"image": [b, H, W, 3] uint8, "size": [b, 2] int32}, as `sam.preprocess`
    takes them. The order depends on the seed alone. A picture that cannot be decoded is
    left out and noted in `skipped`; when none is left, iteration stops with `RunError`.
    """

    def __init__(self, paths: Sequence[Path], image_size: tuple[int, int], batch: int, seed: int, threads: int = 4):
        self.paths, self.image_size, self.skipped = list(paths), image_size, {}
        source = grain.MapDataset.source(self.paths).seed(seed).shuffle().repeat().map(self._load)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch + threads)
        self._iterator = iter(source.to_iter_dataset(options).batch(batch, drop_remainder=True))

    def _load(self, path: Path) -> dict[str, np.ndarray] | None:
        try:
            return self._read(path)
        except InputError as error:
            self.skipped[path] = str(error)
            if len(self.skipped) == len(self.paths):
                raise RunError(f"none of the {len(self.paths)} images can be used; the last: {error}") from None
            return None

    def _read(self, path: Path) -> dict[str, np.ndarray]:
        image, size = resize_and_pad(read_image(path), self.image_size)
        return {"image": image, "size": size}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, for `set_state`; JSON."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)
