"""A sample: one image and its annotations, wherever they come from."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from slimsam_jax.errors import InputError, RunError, printable, reading
from slimsam_jax.files import read_bytes
from slimsam_jax.imaging import rle
from slimsam_jax.imaging.geometry import interior_point

MOST_BYTES = 2**28  # of an encoded image
MOST_MASKED = 2**32  # pixels of all masks of an image together, which are in memory at once
# Not EPS, for which PIL would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
BEYOND = 8  # times an image's longer side: what lies farther out is no coordinate of it


class Annotation(NamedTuple):
    """One mask, in the image's own pixels.

    Attributes:
      id: as the file says; -1 if it does not.
      mask: [h, w] bool.
      box: (x0, y0, x1, y1), from `bbox`'s x, y, width, height.
      point: (x, y), the first of SA-1B's `point_coords`; an interior point where the format has none (COCO).
      crop_box: (x0, y0, x1, y1), the part of the image that SA-1B's generator was shown.
    """

    id: int
    mask: np.ndarray
    box: np.ndarray
    point: np.ndarray
    crop_box: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image that can be read. Two of the same name are the same.

    Attributes:
      name: what messages and results call it: its path, or shard.tar/path, or DIR/split/number.
      load: gives the encoded image.
      load_annotations: gives the annotations' fields, as SA-1B's JSON has them; None if there are none.
      image_id: COCO's, by which detections refer to it.
      lost: why there is no image to be read, see `lost`.
    """

    name: str
    load: Callable[[], bytes] = dataclasses.field(compare=False, repr=False)
    load_annotations: Callable[[], list[dict[str, Any]]] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    image_id: int | None = dataclasses.field(default=None, compare=False, repr=False)
    lost: str = dataclasses.field(default="", compare=False, repr=False)

    def read(self) -> bytes:
        """Reads the encoded image.

        Raises:
          InputError: it is missing or cut short.
        """
        if self.lost:
            raise InputError(self.lost)
        with reading(self.name):
            return self.load()

    def image(self) -> Image.Image:
        """Reads and decodes the image, see `decode`.

        Raises:
          InputError: missing or not decodable.
        """
        return decode(self.read(), self.name)

    def annotations(self, size: tuple[int, int] | None = None) -> list[Annotation]:
        """Reads its annotations, with masks of the image's size.

        Args:
          size: (height, width) of the image, by whoever has decoded it already.

        Raises:
          InputError: they are there, but cannot be read, or are not of this image.
        """
        return list(self.each_annotation(size))

    def each_annotation(self, size: tuple[int, int] | None = None) -> Iterator[Annotation]:
        """Yields the annotations, one mask in memory at a time; see `annotations`."""
        if not self.load_annotations:
            return
        if not size:
            image = self.image()
            size = image.height, image.width
        with reading(f"the annotation of {self.name}"):
            for fields in self.rows(size):
                yield parse(fields, size)

    def rows(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Reads its annotations as `parse` takes them; `size` as for `annotations`.

        Raises:
          Exception: of any kind, as they are foreign data. ValueError: together they are too large.
        """
        rows = self.load_annotations() if self.load_annotations else []
        if len(rows) * size[0] * size[1] > MOST_MASKED:
            raise ValueError(f"{len(rows)} masks of {size[1]} x {size[0]} pixels, more than can be held")
        return rows


def lost(name: str, reason: str) -> Sample:
    """Makes a sample for images out of reach, as of a damaged shard: named and counted like a broken image."""
    return Sample(name, lambda: b"", lost=reason)


def parse(fields: dict[str, Any], size: tuple[int, int] | None = None) -> Annotation:
    """Parses an annotation from the fields of SA-1B's JSON.

    Args:
      size: (height, width) of its image, which the mask must have.

    Raises:
      ValueError, KeyError, TypeError: it is damaged.
    """
    mask = rle.decode(fields["segmentation"], size)
    box = corners(fields["bbox"])
    crop_box = corners(fields.get("crop_box", [0, 0, mask.shape[1], mask.shape[0]]))
    given = fields.get("point_coords")
    point = interior_point(mask)[0] if given is None else np.asarray(given, np.float64).reshape(-1, 2)[0]
    if not (np.abs([*box, *crop_box, *point]) <= BEYOND * max(mask.shape)).all():  # a point that is NaN, too
        raise ValueError("a box or a point that is none, or far outside of the image")
    number = int(fields.get("id", -1))
    if not -(2**63) <= number < 2**63:
        raise ValueError("an id of more than 64 bits")
    return Annotation(number, mask, box, point, crop_box)


def corners(bbox: Sequence[float]) -> np.ndarray:
    """Converts a box from x, y, width, height to x0, y0, x1, y1.

    Raises:
      ValueError: not a box.
    """
    x, y, width, height = map(float, bbox)
    if not (np.isfinite([x, y, width, height]).all() and width >= 0 and height >= 0):
        raise ValueError("a box that is none")
    return np.array([x, y, x + width, y + height])


def decode(content: bytes, name: object) -> Image.Image:
    """Decodes an image as 8-bit RGB, upright (EXIF), as `cv2.imread` would give it.

    Raises:
      InputError: not an image, or damaged.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            if image.width * image.height > rle.MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, and at most {rle.MOST_PIXELS} are read")
            _turn_upright(image)
            image = eight_bits(image)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # decoders have errors of many kinds for damaged files
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else printable(error)
        raise InputError(f"{printable(name)} is not a readable image: {reason}") from None


def _turn_upright(image: Image.Image) -> None:
    """Turns an image in place as its EXIF says. EXIF that cannot be parsed says nothing, as to `cv2.imread`."""
    image.load()  # whose faults are the image's own
    try:
        image.getexif()
    except Exception:  # of as many kinds as decoders have
        return
    ImageOps.exif_transpose(image, in_place=True)  # a copy would take longer than decoding


def _formats() -> list[str]:
    """Lists those of `FORMATS` that this PIL can read; it raises for others."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def eight_bits(image: Image.Image) -> Image.Image:
    """Converts an image of 16 bits, or of floats from 0 to 255, to 8 bits, where PIL would clip; no other.

    An image of 32 bits is one of 16, or of 8 if nothing in it exceeds 255.

    Raises:
      ValueError: floats that are not in this range, or all of them between 0 and 1.
    """
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        shift = 0 if image.mode == "I" and pixels.max(initial=0) <= 255 else 8
        return Image.fromarray((pixels >> shift).clip(0, 255).astype(np.uint8))
    if image.mode != "F":
        return image
    low, high = image.getextrema()
    pixels = np.asarray(image)
    if not np.isfinite(pixels).all() or low < 0 or high > 255 or 0 < high <= 1:
        raise ValueError(f"floats from {low:g} to {high:g}, and they must be from 0 to 255 (not to 1)")
    return Image.fromarray(pixels.round().astype(np.uint8))


def read_image(path: Path | str) -> Image.Image:
    """Opens and decodes an image file, as `decode`.

    Raises:
      InputError: missing or not decodable.
    """
    return decode(read_bytes(path, MOST_BYTES), path)


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
    """Returns a complaint if more than `limit` of `total` images are `skipped`, {name: reason}; else None."""
    if len(skipped) <= limit * total:
        return None
    share = f"more than --max-broken {limit:g}" if limit else "and --strict allows none"
    return f"{len(skipped)} of {total} {what} cannot be used, {share}; the last: {next(reversed(skipped.values()))}"
