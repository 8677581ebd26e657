"""Finds all masks of images with a FastSAM, and chooses among them by prompts: one pass, then any number of prompts.

It behaves as the original's scripts do, but for the faults that `Options` names; `ORIGINAL` has them, for comparisons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
from PIL import Image

from slimsam_jax.errors import InputError, RunError
from slimsam_jax.imaging.letterbox import Letterbox, fit, letterbox
from slimsam_jax.imaging.prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, Prompts
from slimsam_jax.inference import fast_sam_ultralytics as ultralytics
from slimsam_jax.inference.fast_sam_boxes import Detections, suppress, to_border, to_image
from slimsam_jax.inference.fast_sam_masks import Masks, in_frame, in_image
from slimsam_jax.inference.fast_sam_prompts import (
    Choice,
    box_in_masks,
    box_overlaps,
    by_box,
    by_points,
    consistent,
    draw,
)
from slimsam_jax.limits import Range, check, quoted
from slimsam_jax.models.fast_sam import FastSam, detect
from slimsam_jax.models.fast_sam_config import STRIDE

CANDIDATES = 3  # whole masks that a prompt may mean, as SAM's three
Postprocessing = Literal["fast_sam", "ultralytics"]
FAULTS = ("several_full_boxes", "border_of_every_image", "empty_list", "drop_empty")  # of the original, if False
LIMITS = {"conf": Range(0, 1), "iou": Range(0, 1), "max_det": Range(1, 30_000, True)}


@dataclasses.dataclass(frozen=True)
class Options:
    """How masks are detected, and which faults of the original are mended.

    Attributes:
      postprocessing: what becomes of detections. "fast_sam", the default, as the original's own code, which published
        results are of; "ultralytics" as that package's FastSAM of version 8.4 (`fast_sam_ultralytics`): boxes are moved
        onto the image's border last, and prompts select whole masks. It has none of the faults below.
      conf: what a detection's score must exceed. 0.4, 0.9 and whole resolution are the original's scripts'; its
        `predict` by itself takes 0.25, 0.7 and `retina_masks=False`.
      iou: of boxes, above which the worse one is a duplicate.
      max_det: detections that are kept, the best.
      retina_masks: masks at the image's size. Without it at the frame's, grey bars and all, softened at their boxes.
      rectangle: frames as small as the network takes them, if all images have one size. Square frames compile once for
        all sizes of images, and take a third longer for one of 3 : 4.
      several_full_boxes: more than one box may fill the image. (The original fails with two.)
      border_of_every_image: boxes near the border are moved onto it in every image. (The original: in the first of a
        batch alone, so that a mask depends on the image's place in it.)
      empty_list: nothing detected gives no masks. (The original gives None for the whole batch, without a word.)
      drop_empty: masks without a pixel are left out. (The original keeps them.)

    Raises:
      InputError: a number out of its range, a switch that is none, or a fault that ultralytics' does not have.
    """

    postprocessing: Postprocessing = "fast_sam"
    conf: float = 0.4
    iou: float = 0.9
    max_det: int = 300
    retina_masks: bool = True
    rectangle: bool = True
    several_full_boxes: bool = True
    border_of_every_image: bool = True
    empty_list: bool = True
    drop_empty: bool = True

    def __post_init__(self):
        words = get_args(Postprocessing)
        if not isinstance(self.postprocessing, str) or self.postprocessing not in words:
            raise InputError(f"postprocessing {quoted(self.postprocessing)} is none of {', '.join(words)}")
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name in LIMITS:
                check(field.name, value, LIMITS[field.name])
            elif not isinstance(value, bool | np.bool_):
                raise InputError(f"{field.name} {quoted(value)} is neither True nor False")
        wrong = [name for name in FAULTS if not getattr(self, name)]
        if self.postprocessing == "ultralytics" and wrong:
            raise InputError(f"{wrong[0]}=False is a fault of the original's that ultralytics' FastSAM does not have")


ORIGINAL = Options(**dict.fromkeys(FAULTS, False))


class Found(NamedTuple):
    """n detections of an image, the best first. To FastSAM what `decode.Encoded` is to SAM.

    Attributes:
      boxes: [n, 4] x0, y0, x1, y1 in pixels of the image.
      scores: [n] in 0..1.
      masks: n masks, of the image's size or the frame's.
      points: [n, 2] (x, y) in pixels of the image: the centre of the cell that each comes from.
      original_size: (height, width) of the image.
    """

    boxes: np.ndarray
    scores: np.ndarray
    masks: Masks
    points: np.ndarray
    original_size: tuple[int, int]


def find(model: FastSam, images: Sequence[Image.Image], options: Options | None = None) -> list[Found] | None:
    """Finds everything in images of a batch; the network sees one at a time.

    Args:
      images: in mode RGB, of any sizes.

    Returns:
      What is found in each; None of `ORIGINAL`'s options if one image has nothing, or two boxes that fill it.

    Raises:
      InputError: the masks of an image would not fit into memory.
    """
    options = options or Options()
    sizes = [(image.height, image.width) for image in images]
    rectangle = options.rectangle and len(set(sizes)) <= 1
    found = []
    for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
        place = fit(size, model.config.image_size, rectangle, STRIDE)
        try:
            found.append(_find(model, image, place, options, border=options.border_of_every_image or i == 0))
        except RunError:  # of two full boxes, which the original passes over so
            return None
        if not len(found[-1].scores) and not options.empty_list:
            return None
    return found


def find_one(model: FastSam, image: Image.Image, options: Options | None = None) -> Found:
    """Finds everything in an image; see `find`."""
    found = find(model, [image], options)
    if found is None:
        raise RunError("the original gives None for this image: nothing is detected, or two boxes fill it")
    return found[0]


def _find(model: FastSam, image: Image.Image, place: Letterbox, options: Options, border: bool) -> Found:
    size = (image.height, image.width)
    # OpenCV's resize takes channels one by one, so that red and blue need no swapping and back.
    frame = letterbox(np.asarray(image), place)
    decoded, prototypes = (array[0] for array in jax.device_get(detect(model.config, model.params, frame[None])))
    detections = suppress(decoded, options.conf, options.iou, options.max_det)
    if border and options.postprocessing == "fast_sam":
        detections = detections._replace(boxes=to_border(detections.boxes, place.frame, options.several_full_boxes))
    return assemble(detections, prototypes, decoded[detections.cells, :2], place, size, options)


def assemble(
    detections: Detections,
    prototypes: np.ndarray,
    centres: np.ndarray,
    place: Letterbox,
    size: tuple[int, int],
    options: Options,
) -> Found:
    """Makes masks of detections.

    Args:
      prototypes: [h, w, m].
      centres: [n, 2] of the boxes in pixels of the frame.
      size: (height, width) of the image.
    """
    boxes, masks = _OF[options.postprocessing](detections, prototypes, place, size, options.retina_masks)
    points = to_image(np.tile(centres, 2), place, size)[:, :2]
    found = Found(boxes, detections.scores, masks, points, size)
    if not options.drop_empty:
        return found
    kept = np.flatnonzero(masks.areas)
    return Found(boxes[kept], detections.scores[kept], masks.take(kept), points[kept], size)


def _original(
    detections: Detections, prototypes: np.ndarray, place: Letterbox, size: tuple[int, int], retina: bool
) -> tuple[np.ndarray, Masks]:
    """Boxes in the image, and masks within them; see `Options.postprocessing`."""
    boxes = to_image(detections.boxes, place, size)
    if retina:
        return boxes, in_image(detections.coefficients, prototypes, boxes, size)
    return boxes, in_frame(detections.coefficients, prototypes, detections.boxes, place)


def _ultralytics(
    detections: Detections, prototypes: np.ndarray, place: Letterbox, size: tuple[int, int], retina: bool
) -> tuple[np.ndarray, Masks]:
    boxes = ultralytics.to_image(detections.boxes, place, size)
    if retina:
        masks = ultralytics.in_image(detections.coefficients, prototypes, boxes, place, size)
    else:
        masks = ultralytics.in_frame(detections.coefficients, prototypes, detections.boxes, place)
    return to_border(boxes, size), masks


_OF = {"fast_sam": _original, "ultralytics": _ultralytics}


def choose(
    found: Found, points: np.ndarray | None, labels: Sequence[int], box: Sequence[float] | None
) -> tuple[list[Choice], np.ndarray]:
    """Chooses masks by a prompt.

    Args:
      points: [n, 2] (x, y) in pixels of the image, or None.
      labels: [n] 1 on the object, 0 beside it.
      box: x0, y0, x1, y1 in the same, or None. With points (the original takes either): of the masks that hold them.

    Returns:
      A single mask as the original makes it, of points several joined, and up to three whole masks that suit the
      prompt: by their overlap with the box, or else by their scores. Then empty ones, up to four in all.
      [4] their scores: of a joined mask the best, of an empty one 0.
    """
    points = np.zeros((0, 2)) if points is None else points
    suits = consistent(found.masks, points, labels, found.original_size)
    whole = np.flatnonzero(suits)
    if box is None:
        single = by_points(found.masks, points, labels, found.original_size)
    else:
        own = box_overlaps(found.masks, box_in_masks(box, found.masks.shape, found.original_size))
        suits &= own > 0  # where no mask overlaps the box the original takes the first, wherever it lies
        # A box without a pixel suits none: of an annotation or a detector it is no fault, and by_box would refuse it.
        best = by_box(found.masks, box, found.original_size, suits) if suits.any() else None
        single = Choice() if best is None else Choice((best,), (True,))
        whole = np.flatnonzero(suits)
        whole = whole[np.argsort(-own[whole], kind="stable")]
    several = [Choice((int(index),), (True,)) for index in whole[:CANDIDATES]]
    choices = [single, *several, *[Choice()] * (CANDIDATES - len(several))]
    return choices, np.array([score(found, choice) for choice in choices], np.float32)


def score(found: Found, choice: Choice) -> float:
    """The best score of the masks that are set; 0 of none."""
    return max((float(found.scores[i]) for i, value in zip(*choice, strict=True) if value), default=0.0)


def decode_prompts(model: FastSam, found: Found, prompts: Prompts, masks: None = None) -> tuple[np.ndarray, np.ndarray]:
    """As `decode.decode_prompts` for p prompts: choices [p, 4] instead of logits, and their scores [p, 4]."""
    choices = np.empty((len(prompts.points), 1 + CANDIDATES), object)
    scores = np.zeros(choices.shape, np.float32)
    for i, (points, labels) in enumerate(zip(*prompts, strict=True)):
        is_point, corners = np.isin(labels, (0, 1)), np.isin(labels, (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT))
        box = points[corners].reshape(4).tolist() if corners.any() else None
        chosen, scores[i] = choose(found, points[is_point], labels[is_point], box)
        for k, choice in enumerate(chosen):
            choices[i, k] = choice
    return choices, scores


def original_masks(model: FastSam, found: Found, choices: np.ndarray | Choice) -> np.ndarray:
    """As `decode.original_masks`: choices [...] -> [..., h, w] bool."""
    if isinstance(choices, Choice):
        return draw(found.masks, choices)
    masks = np.empty((*choices.shape, *found.masks.shape), bool)
    for index in np.ndindex(choices.shape):
        masks[index] = draw(found.masks, choices[index])
    return masks
