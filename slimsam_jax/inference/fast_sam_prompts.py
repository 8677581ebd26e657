"""Chooses among FastSAM's masks by prompts, as the original does. numpy alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.imaging.geometry import bounding_window
from slimsam_jax.inference.fast_sam_masks import Masks

Size = tuple[int, int]
LEAST_AREA = 100  # pixels: only masks of more are compared with a text, as the original does
BLANK = 255  # what stands beside the mask in its crop: white


class Clip(Protocol):
    """What compares images with a text; `converters.clip` has it."""

    def similarity(self, images: Iterable[np.ndarray], text: str) -> np.ndarray:
        """Cosine [n] of the embeddings of images [h, w, 3] uint8 RGB and that of a text.

        Raises:
          InputError: not a text that it can read.
        """
        ...


class Choice(NamedTuple):
    """A mask made of masks: pixels of those at `indices` are set or cleared, one after the other.

    Attributes:
      indices: of the masks, in their order of detection.
      values: whether each is set.
    """

    indices: tuple[int, ...] = ()
    values: tuple[bool, ...] = ()


def draw(masks: Masks, choice: Choice) -> np.ndarray:
    """[h, w] bool."""
    image = np.zeros(masks.shape, bool)
    for index, value in zip(*choice, strict=True):
        masks.assign(image, index, value)
    return image


def by_points(masks: Masks, points: np.ndarray, labels: Sequence[int], size: Size) -> Choice:
    """Joins the masks at points: masks from large to small, of each the points in their order.

    A point with label 1 sets the pixels of a mask on which it lies, one with label 0 clears them. So a
    smaller mask that is set later stands in a larger one that was cleared, and nothing but label 0 gives nothing.

    Args:
      points: [n, 2] (x, y) in pixels of the image.
      labels: [n] 1 or 0.
      size: (height, width) of the image, which the masks may differ from.
    """
    held = [masks.holds(x, y) for x, y in _in_masks(points, masks.shape, size)]
    steps = [
        (int(index), bool(label))
        for index in np.argsort(-masks.areas, kind="stable")
        for on, label in zip(held, labels, strict=True)
        if on[index]
    ]
    return Choice(tuple(index for index, _ in steps), tuple(value for _, value in steps))


def by_box(masks: Masks, box: Sequence[float], size: Size, among: np.ndarray | None = None) -> int | None:
    """The index of the mask with the largest IoU with a box, the first of equal ones; None if there are no masks.

    Args:
      box: x0, y0, x1, y1 in pixels of the image.
      among: [n] bool, which masks to choose from; all if None.

    Raises:
      InputError: the box ends at the image's left or upper edge, which the original refuses.
    """
    check_box(box)
    if not len(masks) or (among is not None and not among.any()):
        return None
    scores = box_overlaps(masks, box_in_masks(box, masks.shape, size))
    return int((scores if among is None else np.where(among, scores, -1)).argmax())


def check_box(box: Sequence[float]) -> None:
    """Raises InputError for a box that ends at the image's left or upper edge, as the original refuses it."""
    if box[2] == 0 or box[3] == 0:
        raise InputError("a box that ends at 0 holds no pixel: x1 and y1 must lie inside of the image")


def by_boxes(masks: Masks, boxes: Sequence[Sequence[float]], size: Size) -> list[int]:
    """The masks of several boxes: ascending, each once, not in the order of the boxes."""
    found = {by_box(masks, box, size) for box in boxes}
    return sorted(found - {None})


def box_overlaps(masks: Masks, box: tuple[int, int, int, int]) -> np.ndarray:
    """IoU [n] of masks with a box of whole numbers in their frame; 0 where neither has a pixel."""
    shared = masks.shared(box)
    union = (box[2] - box[0]) * (box[3] - box[1]) + masks.areas - shared
    return np.divide(shared, union, out=np.zeros(len(masks)), where=union > 0)


def consistent(masks: Masks, points: np.ndarray, labels: Sequence[int], size: Size) -> np.ndarray:
    """Which masks [n] hold all points with label 1 and none with label 0."""
    good = np.ones(len(masks), bool)
    for (x, y), label in zip(_in_masks(points, masks.shape, size), labels, strict=True):
        good &= masks.holds(x, y) == bool(label)
    return good


def _in_masks(points: np.ndarray, shape: Size, size: Size) -> list[tuple[int, int]]:
    """Points of the image in pixels of the masks, cut off to whole numbers."""
    scale = lambda value, axis: value if shape == size else value * shape[axis] / size[axis]
    return [(int(scale(x, 1)), int(scale(y, 0))) for x, y in np.asarray(points, float).reshape(-1, 2)]


def box_in_masks(box: Sequence[float], shape: Size, size: Size) -> tuple[int, int, int, int]:
    """A box of the image in pixels of the masks: cut off to whole numbers if they differ, else rounded; and clipped."""
    if shape != size:
        box = [int(value * shape[axis] / size[axis]) for value, axis in zip(box, (1, 0, 1, 0), strict=True)]
    return tuple(min(max(0, round(float(value))), shape[axis]) for value, axis in zip(box, (1, 0, 1, 0), strict=True))


def by_text(masks: Masks, image: np.ndarray, text: str, clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """Compares what lies under each mask of more than `LEAST_AREA` pixels with a text.

    Args:
      image: [h, w, 3] uint8 RGB, of the masks' size.

    Returns:
      Indices [n] of the masks, the most similar first, and their similarities [n].
    """
    large = np.flatnonzero(masks.areas > LEAST_AREA)
    similarity = np.asarray(clip.similarity(crops(masks, image, large), text), np.float32)
    order = np.argsort(-similarity, kind="stable")
    return large[order], similarity[order]


def crops(masks: Masks, image: np.ndarray, indices: Iterable[int]) -> Iterator[np.ndarray]:
    """The image within the window of each mask, `BLANK` beside the mask; one at a time."""
    for index in indices:
        mask = masks[index]
        window = bounding_window(mask)
        yield np.where(mask[window][..., None], image[window], np.uint8(BLANK))
