"""Chooses prompts that show what a model can do: on objects, where it is surest, with masks that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from slimsam_jax.data import Sample
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError
from slimsam_jax.imaging.draw import contrasting, draw_masks, draw_prompts
from slimsam_jax.imaging.geometry import interior_point
from slimsam_jax.imaging.prompts import clicks_at, point_grid
from slimsam_jax.inference.decode import BUCKETS, decode_prompts, encode_image, original_masks
from slimsam_jax.models.sam import Sam

GRID = 8  # points a side, where nothing is annotated
LOOKED_AT = 6  # times as many images as are shown
MASKS = 3  # of an image
SMALLEST, LARGEST = 0.01, 0.5  # shares of the image that a mask is shown of
OVERLAP = 0.1  # of the smaller mask, that two may have in common
AT_EDGE = 0.5  # what a mask at one edge of the image counts, which may be a part of something or background
LOWEST = 0.5  # of the surest mask's score, that the others have
WHOLE = 0.9  # of a mask, that is in one piece


class Shown(NamedTuple):
    """An image with prompts.

    Attributes:
      image: RGB.
      points: [n, 2] (x, y) in its pixels.
      outputs: [n], which mask of each point is shown.
      sureness: of the model that chose, mean over those.
      palette: [n, 3] RGB, a colour of each mask.
    """

    image: Image.Image
    points: np.ndarray
    outputs: np.ndarray
    sureness: float
    palette: np.ndarray

    def drawn(self, sam: Sam) -> Image.Image:
        """Draws the image with the masks of any model for the chosen prompts."""
        if not len(self.points):
            return self.image
        encoded = encode_image(sam, self.image)
        repeated = np.resize(self.points, (max(BUCKETS), 2))  # to a number that is compiled already
        low, _ = decode_prompts(sam, encoded, clicks_at(repeated))
        masks = original_masks(sam, encoded, low[np.arange(len(self.outputs)), self.outputs])
        return draw_prompts(draw_masks(self.image, masks, self.palette), self.points)


def choose(sam: Sam, samples: Sequence[Sample], count: int) -> list[Shown]:
    """Chooses prompts for the `count` images where the model is surest, in their order; unreadable ones are left out.

    Annotations of an image say where its objects are, else a grid of points is tried.
    """
    most, examples = LOOKED_AT * count, []
    for index in np.unique(np.linspace(0, len(samples) - 1, most).astype(int)):
        try:
            image, annotations = read_annotated(samples[index])
        except InputError:
            continue
        largest = sorted(annotations, key=lambda a: -a.mask.sum())[: GRID**2]
        objects = np.array([interior_point(a.mask)[0] for a in largest]).reshape(-1, 2)
        examples.append(surest(sam, image, objects))
    best = np.argsort([-example.sureness for example in examples], kind="stable")[:count]
    return [examples[i] for i in sorted(best)]


def surest(sam: Sam, image: Image.Image, objects: np.ndarray) -> Shown:
    """Chooses points and outputs of the highest predicted IoU times stability, each with a mask of its own.

    Args:
      objects: [n, 2] (x, y) on what is known to be objects; of none a grid, where objects are what many points give.
    """
    points = objects if len(objects) else point_grid((image.height, image.width), GRID)[:, 0]
    encoded = encode_image(sam, image)
    low, scores = decode_prompts(sam, encoded, clicks_at(points))
    rows, columns = (-(-4 * side // sam.config.patch_size) for side in encoded.size)
    low = low[:, :, :rows, :columns]  # beyond is padding
    stability = (low > 1).sum((2, 3)) / np.maximum((low > -1).sum((2, 3)), 1)
    merit = np.nan_to_num(scores * stability * object_likeness(low > 0))
    if not len(objects):
        merit *= support(low > 0, (points / (image.width, image.height) * (columns, rows)).astype(int))
    chosen = distinct(low > 0, merit)
    index, outputs = np.array(chosen, int).reshape(-1, 2).T
    palette = contrasting(np.asarray(image.resize((columns, rows))), [low[place] > 0 for place in chosen])
    return Shown(image, points[index], outputs, float(merit[index, outputs].mean()) if chosen else 0.0, palette)


def distinct(masks: np.ndarray, merit: np.ndarray) -> list[tuple[int, int]]:
    """Picks (point, output) of the best masks of [n, outputs, h, w] that hardly overlap."""
    chosen: list[tuple[int, int]] = []
    for flat in np.argsort(-merit, axis=None, kind="stable"):
        place = tuple(map(int, np.unravel_index(flat, merit.shape)))
        if len(chosen) == MASKS or merit[place] <= (LOWEST * merit[chosen[0]] if chosen else 0):
            break
        if in_one_piece(masks[place]) and all(overlap(masks[place], masks[other]) <= OVERLAP for other in chosen):
            chosen.append(place)
    return chosen


def object_likeness(masks: np.ndarray) -> np.ndarray:
    """Scores masks [..., h, w] -> [...]: 0 of specks, and of background, which reaches two edges; less if at one."""
    areas = masks.mean((-2, -1))
    edges = sum(masks[..., i, :].any(-1).astype(int) + masks[..., :, i].any(-1).astype(int) for i in (0, -1))
    return ((areas >= SMALLEST) & (areas <= LARGEST)) * np.choose(np.minimum(edges, 2), [1.0, AT_EDGE, 0.0])


def support(masks: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Scores how other points agree with masks: mean IoU with the most similar mask of each point that lies inside.

    The mask's own point counts as one that does not, so that few points say less than many.

    Args:
      masks: [n, outputs, h, w] bool, of n points.
      cells: [n, 2] (x, y) of the points in them.

    Returns:
      [n, outputs]; an object gives the same mask wherever it is clicked, a patch of sky another one at each point.
    """
    flat = masks.reshape(*masks.shape[:2], -1).astype(np.float32)
    areas = flat.sum(-1)
    shared = np.einsum("poc,qrc->poqr", flat, flat, optimize=True)
    best = (shared / np.maximum(areas[:, :, None, None] + areas - shared, 1)).max(-1)
    inside = masks[:, :, cells[:, 1], cells[:, 0]]
    return np.maximum((best * inside).sum(-1) - 1, 0) / np.maximum(inside.sum(-1), 1)


def in_one_piece(mask: np.ndarray) -> bool:
    sizes = np.bincount(ndimage.label(mask)[0].ravel())[1:]
    return sizes.max() >= WHOLE * sizes.sum()


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Computes the share of the smaller mask that the other holds as well."""
    return float((one & other).sum() / min(one.sum(), other.sum()))
