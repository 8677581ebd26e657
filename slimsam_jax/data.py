"""A folder of images -> batches. uint8 until on the device; decoded in threads ahead of the step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
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

Augment = Callable[[Image.Image, np.random.Generator], Image.Image]


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
    """An endless, shuffled stream of batches, in which every step's pictures follow from seed and step alone.

    So a run is resumed by its step number, on any number of processes. Iterating gives
    {"image": [b, H, W, 3] uint8, "size": [b, 2] int32}, as `sam.preprocess` takes them. In place of a picture
    that cannot be decoded comes the next one in the list; it is noted in `skipped`. When none is left,
    iteration stops with `RunError`.

    Args:
      batch: pictures in a step, over all processes.
      start: the step to begin with.
      part: (i, n): only the i-th of every n pictures, for one of n processes.
      augment: a picture and a random generator -> a picture.
      extra: path -> further arrays of a picture.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        image_size: tuple[int, int],
        batch: int,
        seed: int,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
        augment: Augment | None = None,
        extra: Callable[[Path], dict[str, np.ndarray]] | None = None,
        threads: int = 4,
    ):
        self.paths, self.image_size, self.skipped = list(paths), image_size, {}
        self.batch, self.augment, self.extra = batch, augment, extra
        index, parts = part
        self._order = grain.MapDataset.source(range(len(self.paths))).seed(seed).shuffle().repeat()
        source = self._order.random_map(self._load)[start * batch :][index::parts]
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch // parts + threads)
        self._iterator = iter(source.to_iter_dataset(options).batch(batch // parts, drop_remainder=True))

    def paths_of(self, step: int) -> list[Path]:
        """The pictures of a step, in all processes; unreadable ones still among them."""
        return [self.paths[self._order[step * self.batch + i]] for i in range(self.batch)]

    def _load(self, index: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        for ahead in range(len(self.paths)):
            path = self.paths[(index + ahead) % len(self.paths)]
            if path in self.skipped:
                continue
            try:
                return self._read(path, random)
            except InputError as error:
                self.skipped[path] = str(error)
        last = next(reversed(self.skipped.values()))
        raise RunError(f"none of the {len(self.paths)} images can be used; the last: {last}")

    def _read(self, path: Path, random: np.random.Generator) -> dict[str, np.ndarray]:
        picture = read_image(path)
        if self.augment:
            picture = self.augment(picture, random)
        image, size = resize_and_pad(picture, self.image_size)
        return {"image": image, "size": size, **(self.extra(path) if self.extra else {})}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)


def flip_and_crop(flip: bool, crop: float) -> Augment | None:
    """Mirrors half of the pictures, cuts out rectangles with sides of `crop` to 1 of theirs; None for neither."""
    if not flip and crop == 1:
        return None

    def augment(picture: Image.Image, random: np.random.Generator) -> Image.Image:
        sides = [max(1, round(side * random.uniform(crop, 1))) for side in picture.size]
        left, top = (random.integers(whole - side + 1) for whole, side in zip(picture.size, sides, strict=True))
        picture = picture.crop((left, top, left + sides[0], top + sides[1]))
        return ImageOps.mirror(picture) if flip and random.random() < 0.5 else picture

    return augment
