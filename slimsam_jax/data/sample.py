"""One picture and what is annotated in it, wherever they come from."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from slimsam_jax import rle
from slimsam_jax.errors import InputError, RunError, blaming
from slimsam_jax.regions import deepest


class Annotation(NamedTuple):
    """One mask, in the picture's own pixels.

    Attributes:
      id: as the file says; -1 if it does not.
      mask: [h, w] bool.
      box: (x0, y0, x1, y1), from `bbox`'s x, y, width, height.
      point: (x, y), the first of SA-1B's `point_coords`; the deepest one where the format has none (COCO).
      crop_box: (x0, y0, x1, y1), the part of the picture that SA-1B's generator was shown.
    """

    id: int
    mask: np.ndarray
    box: np.ndarray
    point: np.ndarray
    crop_box: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture that can be read. Two of the same name are the same.

    Attributes:
      name: what messages and results call it: its path, or shard.tar/path, or DIR/split/number.
      load: gives the encoded picture.
      load_annotations: gives the annotations' fields, as SA-1B's JSON has them; None if there are none.
      image_id: COCO's, by which detections refer to it.
    """

    name: str
    load: Callable[[], bytes] = dataclasses.field(compare=False, repr=False)
    load_annotations: Callable[[], list[dict[str, Any]]] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    image_id: int | None = dataclasses.field(default=None, compare=False, repr=False)

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
          InputError: it is missing or cut short.
        """
        with blaming(self.name):
            return self.load()

    def image(self) -> Image.Image:
        """The picture, as `decode` gives it.

        Raises:
          InputError: missing or not decodable.
        """
        return decode(self.read(), self.name)

    def annotations(self) -> list[Annotation]:
        """Its annotations, masks of one size.

        Raises:
          InputError: they are there, but cannot be read.
        """
        if not self.load_annotations:
            return []
        with blaming(f"the annotation of {self.name}"):
            annotations = [parse(fields) for fields in self.load_annotations()]
            if len({a.mask.shape for a in annotations}) > 1:
                raise ValueError("its masks are of different sizes")
            return annotations


def parse(fields: dict[str, Any]) -> Annotation:
    """An annotation from the fields of SA-1B's JSON.

    Raises:
      ValueError, KeyError, TypeError: it is damaged.
    """
    mask = rle.decode(fields["segmentation"])
    box = corners(fields["bbox"])
    crop_box = corners(fields.get("crop_box", [0, 0, mask.shape[1], mask.shape[0]]))
    given = fields.get("point_coords")
    point = deepest(mask)[0] if given is None else np.asarray(given, np.float64).reshape(-1, 2)[0]
    if not np.isfinite(point).all():
        raise ValueError("a point that is none")
    return Annotation(int(fields.get("id", -1)), mask, box, point, crop_box)


def corners(bbox: Sequence[float]) -> np.ndarray:
    """x, y, width, height -> x0, y0, x1, y1.

    Raises:
      ValueError: not a box.
    """
    x, y, width, height = map(float, bbox)
    if not (np.isfinite([x, y, width, height]).all() and width >= 0 and height >= 0):
        raise ValueError("a box that is none")
    return np.array([x, y, x + width, y + height])


def decode(content: bytes, name: object) -> Image.Image:
    """Decodes a picture as 8-bit RGB, upright (EXIF), as `cv2.imread` would give it.

    Raises:
      InputError: not a picture, or damaged.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            ImageOps.exif_transpose(image, in_place=True)  # a copy would take longer than decoding
            image = eight_bits(image)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # decoders have errors of many kinds for damaged files
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{name} is not a readable image: {reason}") from None


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits, or of floats from 0 to 255, in 8 bits, where PIL would clip; any other as it is.

    Raises:
      ValueError: floats that are not in this range, or all of them between 0 and 1.
    """
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode != "F":
        return image
    least, most = image.getextrema()
    pixels = np.asarray(image)
    if not np.isfinite(pixels).all() or least < 0 or most > 255 or 0 < most <= 1:
        raise ValueError(f"floats from {least:g} to {most:g}, and they must be from 0 to 255 (not to 1)")
    return Image.fromarray(pixels.round().astype(np.uint8))


def read_image(path: Path | str) -> Image.Image:
    """Opens and decodes a picture file, as `decode`.

    Raises:
      InputError: missing or not decodable.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} does not exist" if not os.path.exists(path) else f"{path}: {reason}") from None
    return decode(content, path)


def check_one_is_readable(samples: Sequence[Sample]) -> None:
    """Raises InputError if not a single image can be decoded."""
    for sample in samples:
        try:
            sample.image()
            return
        except InputError as error:
            last = error
    raise InputError(f"none of the {len(samples)} images can be read, so there is nothing to work on; the last: {last}")


def check_share(skipped: Mapping[str, str], total: int, limit: float) -> None:
    """Raises RunError if more than `limit` of `total` images are among the `skipped`, {name: reason}."""
    if complaint := too_many(skipped, total, limit):
        raise RunError(complaint)


def too_many(skipped: Mapping[str, str], total: int, limit: float, what: str = "images") -> str | None:
    """What is wrong if more than `limit` of `total` images are among the `skipped`, {name: reason}; else None."""
    if len(skipped) <= limit * total:
        return None
    share = f"more than --max-broken {limit:g}" if limit else "and --strict allows none"
    return f"{len(skipped)} of {total} {what} cannot be used, {share}; the last: {next(reversed(skipped.values()))}"
