"""FastSAM behind the same calls as SAM: `SamPredictor`'s, and `SamAutomaticMaskGenerator`'s."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.imaging.geometry import bounding_window
from slimsam_jax.inference.automatic_mask_generator import ENCODE
from slimsam_jax.inference.fast_sam import CANDIDATES, Found, Options, choose, draw, find_one, score
from slimsam_jax.inference.fast_sam_masks import MOST_BYTES
from slimsam_jax.inference.fast_sam_prompts import Choice, Clip, by_text, check_box
from slimsam_jax.inference.fast_sam_ultralytics import select
from slimsam_jax.inference.mixed_prompts import Prompt, checked, kind_of
from slimsam_jax.inference.predictor import AnyImage, SamPredictor, as_rgb
from slimsam_jax.limits import quoted
from slimsam_jax.models.fast_sam import FastSam
from slimsam_jax.models.kinds import Model, check_model
from slimsam_jax.models.sam import Sam

NO_CLIP = (
    "FastSAM's text prompts need a CLIP, which is no part of this package: give a folder with one, --clip FOLDER or "
    "FastSamPredictor(model, clip=slimsam_jax.load_clip(FOLDER)); or points or a box"
)


class FastPrediction(NamedTuple):
    """The masks of one prompt.

    Attributes:
      masks: [C, h0, w0] bool. C is 1; with `multimask_output` 1 to 3, the whole masks that suit the prompt, best first;
        of ultralytics' postprocessing all of them.
      scores: [C], the network's confidence, or the similarity with a text, -1 to 1; 0 of an empty mask, as there is
        where nothing lies at the prompt.
      choices: [C], the detections that each mask is made of.
    """

    masks: np.ndarray
    scores: np.ndarray
    choices: list[Choice]


class FastSamPredictor:
    """One image, then any number of prompts: the network runs once an image.

    Compiles once for each size of frame: see `Options.rectangle`.

    Attributes:
      clip: what compares masks with a text, `slimsam_jax.load_clip(folder)`; None if there are no text prompts.
    """

    image_format = "RGB"

    def __init__(self, model: FastSam, options: Options | None = None, clip: Clip | None = None):
        if not isinstance(model, FastSam):
            raise InputError(f"FastSamPredictor takes a FastSAM, as slimsam_jax.load gives it, not {kind_of(model)}")
        self.model, self.options, self.clip = model, options or Options(), check_clip(clip)
        self.reset_image()

    def set_image(self, image: AnyImage, image_format: str = "RGB") -> None:
        """Finds everything in an image.

        Args:
          image: a path, a PIL image, or [h0, w0, 3] uint8, 0 to 255.
          image_format: of an array: "RGB" or "BGR".

        Raises:
          InputError: not an image.
        """
        rgb = as_rgb(image, image_format)
        self.found, self._image = find_one(self.model, rgb, self.options), rgb

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
        box = None if box is None else box[0].tolist()
        if box is not None:
            check_box(box)
        choices, scores = choose(found, points, labels, box)
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

    def text(self, prompt: str, multimask_output: bool = False) -> FastPrediction:
        """The mask whose crop, blank beside it, is most similar to a text; or the three that are.

        Masks of 100 pixels or less take no part. `scores` are the similarities; there is no least one, so that the best
        of all masks may be none of what the text says.

        Raises:
          InputError: no image or no CLIP is set, or not a text that the CLIP can read.
        """
        found = self._found()
        if self.clip is None:
            raise InputError(NO_CLIP)
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"a text prompt is some words, not {quoted(prompt)}")
        if found.masks.shape != found.original_size:
            raise InputError("a text is compared with masks of the image's size: leave retina_masks on")
        chosen, scores = by_text(found.masks, np.asarray(self._image), prompt, self.clip)
        most = CANDIDATES if multimask_output else 1
        choices = [Choice((int(index),), (True,)) for index in chosen[:most]] or [Choice()]
        masks = np.stack([draw(found.masks, choice) for choice in choices])
        return FastPrediction(masks, scores[:most] if len(scores) else np.zeros(1, np.float32), choices)

    def reset_image(self) -> None:
        self.found: Found | None = None
        self._image = None

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
        # Not by the predictor's own image: several threads may ask at once.
        return records(find_one(self.predictor.model, as_rgb(image, "RGB"), self.predictor.options), self.output_mode)


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


def check_clip(clip: Clip | None) -> Clip | None:
    """Returns a CLIP, or None; raises InputError for what is neither, as the folder of one."""
    if clip is not None and not hasattr(clip, "similarity"):
        raise InputError(f"clip is what slimsam_jax.load_clip gives, not {kind_of(clip)}")
    return clip


def check_text(predictor: Any, text: Any, clip: Clip | None, points: Any, labels: Any, box: Any) -> None:
    """Gives a predictor its CLIP; InputError for a text prompt to a SAM, one beside others, or one of two without."""
    if text is None and clip is None:
        return
    if not isinstance(predictor, FastSamPredictor):
        raise InputError("a text prompt is for a FastSAM, and this model is none: give points or a box")
    if text is None or any(other is not None for other in (points, labels, box)):
        raise InputError("a text and its CLIP are a prompt by themselves: give both, or points and a box")
    if clip is None:
        raise InputError(NO_CLIP)
    predictor.clip = check_clip(clip)
