"""FastSAM behind the same calls as SAM: `SamPredictor`'s, and `SamAutomaticMaskGenerator`'s."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.imaging.geometry import bounding_window
from slimsam_jax.inference.automatic_mask_generator import ENCODE
from slimsam_jax.inference.fast_sam import Found, Options, choose, draw, find_one, score
from slimsam_jax.inference.fast_sam_masks import MOST_BYTES
from slimsam_jax.inference.fast_sam_prompts import Choice
from slimsam_jax.inference.fast_sam_ultralytics import select
from slimsam_jax.inference.mixed_prompts import Prompt, checked, kind_of
from slimsam_jax.inference.predictor import AnyImage, SamPredictor, as_rgb
from slimsam_jax.limits import quoted
from slimsam_jax.models.fast_sam import FastSam
from slimsam_jax.models.kinds import Model, check_model
from slimsam_jax.models.sam import Sam

NO_TEXT = (
    "FastSAM's text prompts need CLIP, which is no part of this package: ask for everything() and rank the crops with "
    "a CLIP of your own, or give points or a box"
)


class FastPrediction(NamedTuple):
    """The masks of one prompt.

    Attributes:
      masks: [C, h0, w0] bool. C is 1; with `multimask_output` 1 to 3, the whole masks that suit the prompt, best first;
        of ultralytics' postprocessing all of them.
      scores: [C], the network's confidence; 0 of an empty mask, as there is where nothing lies at the prompt.
      choices: [C], the detections that each mask is made of.
    """

    masks: np.ndarray
    scores: np.ndarray
    choices: list[Choice]


class FastSamPredictor:
    """One image, then any number of prompts: the network runs once an image.

    Compiles once for each size of frame: see `Options.rectangle`.
    """

    image_format = "RGB"

    def __init__(self, model: FastSam, options: Options | None = None):
        if not isinstance(model, FastSam):
            raise InputError(f"FastSamPredictor takes a FastSAM, as slimsam_jax.load gives it, not {kind_of(model)}")
        self.model, self.options = model, options or Options()
        self.reset_image()

    def set_image(self, image: AnyImage, image_format: str = "RGB") -> None:
        """Finds everything in an image.

        Args:
          image: a path, a PIL image, or [h0, w0, 3] uint8, 0 to 255.
          image_format: of an array: "RGB" or "BGR".

        Raises:
          InputError: not an image.
        """
        self.found = find_one(self.model, as_rgb(image, image_format), self.options)

    def predict(
        self,
        point_coords=None,
        point_labels=None,
        box=None,
        mask_input=None,
        multimask_output=True,
        return_logits=False,
    ) -> FastPrediction:
        """Chooses masks by one prompt on the image; arguments as in `Prompt`.

        A single mask is as the original makes it: at points the masks with label 1 joined, less those with
        label 0, from large to small; of a box the mask that overlaps it most. As ultralytics makes it, it is the surest
        of all that the prompt selects (`fast_sam_ultralytics.select`).

        Args:
          mask_input: None: masks are chosen, not made.
          multimask_output: up to three whole masks instead, that hold all points with label 1 and none with label 0.
          return_logits: False: there are none.

        Raises:
          InputError: no image is set, the prompt is none that FastSAM can take, or its masks would fill the memory.
        """
        found = self._found()
        if mask_input is not None:
            raise InputError("FastSAM takes no mask as a prompt; give points or a box")
        for name, flag in (("multimask_output", multimask_output), ("return_logits", return_logits)):
            if not (isinstance(flag, bool | np.bool_) or (type(flag) is int and flag in (0, 1))):
                raise InputError(f"{name} {quoted(flag)} is neither True nor False")
        if return_logits:
            raise InputError("FastSAM joins masks, which have no logits: leave out return_logits")
        points, labels, box = checked(Prompt(point_coords, point_labels, box), found.original_size)
        real = np.zeros(0, bool) if points is None else labels[0] >= 0
        points, labels = (None, ()) if points is None else (points[0][real], labels[0][real])
        if self.options.postprocessing == "ultralytics":
            return self._selected(points, labels, box, bool(multimask_output))
        choices, scores = choose(found, points, labels, None if box is None else box[0].tolist())
        several = max(1, sum(bool(choice.indices) for choice in choices[1:]))
        part = slice(1, 1 + several) if multimask_output else slice(0, 1)
        masks = np.stack([draw(found.masks, choice) for choice in choices[part]])
        return FastPrediction(masks, scores[part], choices[part])

    def _selected(
        self, points: np.ndarray | None, labels: np.ndarray, box: np.ndarray | None, several: bool
    ) -> FastPrediction:
        """All masks that a prompt means, or the best of them; an empty one if there is none."""
        found, (height, width) = self._found(), self._found().original_size
        if found.masks.shape != found.original_size:  # how it resizes them before it selects is not described
            raise InputError("prompts of ultralytics' FastSAM select masks of the image's size: leave retina_masks on")
        chosen = select(found.masks, points, labels, [] if box is None else box.tolist())[: None if several else 1]
        if (size := len(chosen) * height * width) > MOST_BYTES:
            raise InputError(
                f"{len(chosen)} masks at this prompt take {size >> 20} MB, and at most {MOST_BYTES >> 20} are taken: "
                "set multimask_output=False, or ask for everything('coco_rle')"
            )
        choices = [Choice((index,), (True,)) for index in chosen] or [Choice()]
        masks = np.stack([draw(found.masks, choice) for choice in choices])
        return FastPrediction(masks, np.array([score(found, choice) for choice in choices], np.float32), choices)

    def everything(self, output_mode: str = "binary_mask") -> list[dict[str, Any]]:
        """All masks of the image that is set; see `FastSamMaskGenerator.generate`."""
        return records(self._found(), output_mode)

    def text(self, prompt: str) -> FastPrediction:
        """Raises InputError: there is no CLIP here."""
        raise InputError(NO_TEXT)

    def reset_image(self) -> None:
        self.found: Found | None = None

    @property
    def is_image_set(self) -> bool:
        return self.found is not None

    def _found(self) -> Found:
        if self.found is None:
            raise InputError("no image is set; call set_image first")
        return self.found


class FastSamMaskGenerator:
    """Everything in an image, called as `SamAutomaticMaskGenerator`; of its numbers FastSAM knows `Options`' alone."""

    def __init__(self, model: FastSam, options: Options | None = None, output_mode: str = "binary_mask"):
        check_mode(output_mode)
        self.predictor, self.output_mode = FastSamPredictor(model, options), output_mode

    def generate(self, image: AnyImage) -> list[dict[str, Any]]:
        """Finds the masks of an image, best first; [] if there are none.

        Returns:
          A dict of each mask: segmentation, area, bbox, predicted_iou, point_coords and crop_box as
          `SamAutomaticMaskGenerator.generate` gives them. predicted_iou is the network's confidence, and the point the
          centre of the cell that found the mask; there is no stability_score.

        Raises:
          InputError: not an image.
        """
        self.predictor.set_image(image)
        return self.predictor.everything(self.output_mode)


def records(found: Found, output_mode: str = "binary_mask") -> list[dict[str, Any]]:
    """A dict of each mask, see `FastSamMaskGenerator.generate`; one mask at a time is unpacked."""
    check_mode(output_mode)
    listed, (height, width) = [], found.masks.shape
    for i, mask in enumerate(found.masks):
        rows, columns = bounding_window(mask)
        box = [columns.start, rows.start, columns.stop - columns.start - 1, rows.stop - rows.start - 1]
        listed.append(
            {
                "segmentation": ENCODE[output_mode](mask),
                "area": int(found.masks.areas[i]),
                "bbox": [max(0, int(side)) for side in box],
                "predicted_iou": float(found.scores[i]),
                "point_coords": [found.points[i].tolist()],
                "crop_box": [0, 0, width, height],
            }
        )
    return listed


def check_mode(output_mode: Any) -> None:
    """Raises InputError for what is no way to write a mask."""
    if not isinstance(output_mode, str) or output_mode not in ENCODE:
        raise InputError(f"output_mode {quoted(output_mode)} is none of {', '.join(ENCODE)}")


PREDICTORS = {Sam: SamPredictor, FastSam: FastSamPredictor}


def predictor_for(model: Model) -> SamPredictor | FastSamPredictor:
    """The predictor of a model of any kind; raises InputError if it is of none."""
    return PREDICTORS[type(check_model(model))](model)
