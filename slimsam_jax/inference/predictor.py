"""Predicts masks as `segment_anything`'s `SamPredictor`, with any model of ours; and many images at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from slimsam_jax.data import read_image
from slimsam_jax.data.sample import eight_bits
from slimsam_jax.errors import InputError, reading
from slimsam_jax.inference.decode import Encoded, as_mask_input, padded
from slimsam_jax.inference.engine import embed
from slimsam_jax.inference.mixed_prompts import Prompt, check, decode_mixed, kind_of, real_array
from slimsam_jax.inference.ranking import outputs_of, stability_scores
from slimsam_jax.limits import IMAGE_SIDE, quoted
from slimsam_jax.models.kinds import check_sam
from slimsam_jax.models.sam import Sam, embedding_of

AnyImage = str | Path | Image.Image | np.ndarray


class Prediction(NamedTuple):
    """The masks of one prompt: C = 3, or 1 if `multimask_output` is false.

    Attributes:
      masks: [C, h0, w0] bool, or float32 logits, in the image's frame.
      iou_predictions: [C].
      low_res_masks: [C, 4h, 4w] float32 logits, to be given back as `mask_input`.
    """

    masks: np.ndarray
    iou_predictions: np.ndarray
    low_res_masks: np.ndarray


class SamPredictor:
    """One image, then any number of prompts; the image is encoded once.

    Compiles once for the encoder, and once for each bucket of prompts and tokens.
    """

    mask_threshold = 0.0
    image_format = "RGB"

    def __init__(self, sam_model: Sam):
        self.model = check_sam(sam_model)
        self.reset_image()

    def set_image(self, image: AnyImage, image_format: str = "RGB") -> None:
        """Encodes an image.

        Args:
          image: a path, which is turned upright by its EXIF, a PIL image, which is taken as it lies, or [h0, w0, 3]
            uint8, 0 to 255.
          image_format: of an array: "RGB" or "BGR".

        Raises:
          InputError: not an image.
        """
        (self.encoded,) = encode_images(self.model, [as_rgb(image, image_format)])

    def predict(
        self,
        point_coords=None,
        point_labels=None,
        box=None,
        mask_input=None,
        multimask_output=True,
        return_logits=False,
        num_multimask_outputs=None,
        use_stability_score=False,
    ) -> Prediction:
        """Predicts masks for one prompt on the image; arguments as in `Prompt`.

        Args:
          multimask_output: three masks of different extent, which suits an ambiguous prompt such as one point.
          return_logits: masks as logits instead of bool.
          num_multimask_outputs: in place of multimask_output, as EdgeSAM asks: 1, 3, or 4 for all of them.
          use_stability_score: give masks' stability as their scores (`inference.ranking`), not predicted IoU.

        Raises:
          InputError: no image is set, or the prompt is invalid.
        """
        prompt = Prompt(point_coords, point_labels, box, mask_input)
        how = (multimask_output, return_logits, num_multimask_outputs, use_stability_score)
        return predict(self.model, [self._encoded()], [[prompt]], *how)[0][0]

    def predict_batch(
        self,
        images: Sequence[AnyImage],
        prompts: Sequence[Sequence[Prompt]],
        multimask_output: bool = True,
        return_logits: bool = False,
        num_multimask_outputs: int | None = None,
        use_stability_score: bool = False,
    ) -> list[list[Prediction]]:
        """Predicts masks for all prompts of many images, of mixed kinds; leaves the image that is set alone.

        Args:
          images: as `set_image` takes them, in a list; or [b, h0, w0, 3] uint8.
          prompts: those of each image.
          multimask_output, return_logits, num_multimask_outputs, use_stability_score: as `predict` takes them.

        Raises:
          InputError: not as many lists of prompts as images, or an invalid one.
        """
        check_list(images, "images", axes=4)
        images = [as_image(image) for image in images]
        sizes = [(image.height, image.width) for image in images]
        check_prompts(self.model, sizes, prompts)  # before anything is encoded
        how = (multimask_output, return_logits, num_multimask_outputs, use_stability_score)
        return predict(self.model, encode_images(self.model, images), prompts, *how)

    def get_image_embedding(self) -> np.ndarray:
        """Returns the embedding of the image that is set, [1, C, h, w] float32, as the original gives it.

        Of SAM 2 it is the one at stride 16; `encoded.embedding` has the finer maps, too.
        """
        embedding = self._encoded().embedding
        coarse = embedding["embedding"] if isinstance(embedding, dict) else embedding
        return np.asarray(coarse).transpose(2, 0, 1)[None]

    def reset_image(self) -> None:
        self.encoded: Encoded | None = None

    @property
    def is_image_set(self) -> bool:
        return self.encoded is not None

    def _encoded(self) -> Encoded:
        if self.encoded is None:
            raise InputError("no image is set; call set_image first")
        return self.encoded


def encode_images(sam: Sam, images: Sequence[AnyImage]) -> list[Encoded]:
    """Encodes images of any sizes, in batches of few sizes."""
    images = [as_image(image) for image in images]
    frames = [sam.config.frame.place(image) for image in images]
    encoded: list[Encoded] = []
    for index, count in padded(len(frames)):
        pixels, sizes = (np.stack([frames[i][part] for i in index]) for part in (0, 1))
        embeddings = embed(sam, pixels, sizes, count)
        for i in range(count):
            image = images[index[i]]
            encoded.append(Encoded(embedding_of(embeddings, i), tuple(map(int, sizes[i])), (image.height, image.width)))
    return encoded


def as_image(image: AnyImage) -> Image.Image:
    """Converts a path, a PIL image or an array to an RGB PIL image.

    Raises:
      InputError: it does not.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        check_sides(image.height, image.width)
        with reading("the image"):
            image.load()  # a file that PIL has opened is read here, and may be cut short
            return image if image.mode == "RGB" else eight_bits(image).convert("RGB")
    array = real_array(image, kinds="biuf")
    if array is None:
        raise InputError(f"an image is a path, a PIL image or an array uint8 [height, width, 3], not {kind_of(image)}")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        more = "; floats must be brought to 0 to 255 and converted" if array.dtype.kind == "f" else ""
        raise InputError(f"an image is uint8 [height, width, 3], and this is {array.dtype} {list(array.shape)}{more}")
    check_sides(*array.shape[:2])
    return Image.fromarray(array)


def check_sides(height: int, width: int) -> None:
    """Raises InputError for an image in memory that has no pixel or too many; from a file somewhat fewer are read."""
    most = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
    if not height * width:
        raise InputError(f"an image of {width} x {height} pixels has none; each side needs at least 1")
    if height * width > most or max(height, width) > IMAGE_SIDE:
        raise InputError(
            f"an image of {width} x {height} pixels; sides of at most {IMAGE_SIDE} and {most} pixels are taken"
        )


def as_rgb(image: AnyImage, image_format: str) -> Image.Image:
    """Reads an image for `set_image`, whose arguments these are; of an array the channels may be in BGR order."""
    if not isinstance(image_format, str) or image_format not in ("RGB", "BGR"):
        raise InputError(f"image_format {quoted(image_format)} is neither RGB nor BGR")
    rgb = as_image(image)
    if image_format == "BGR" and not isinstance(image, str | Path | Image.Image):
        rgb = Image.fromarray(np.ascontiguousarray(np.asarray(rgb)[..., ::-1]))
    return rgb


def check_list(values: Any, name: str, axes: int | None = None) -> None:
    """Raises InputError unless `values` are a list, or an array of so many axes."""
    if isinstance(values, np.ndarray) and values.ndim == axes:
        return
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | Prompt):
        raise InputError(f"{name} must be a list, not {kind_of(values)}")


def check_prompts(sam: Sam, sizes: Sequence[tuple[int, int]], prompts: Sequence[Sequence[Prompt]]) -> None:
    """Raises InputError unless there is a list of prompts for each image, of the given (height, width)."""
    check_list(prompts, "prompts")
    if len(sizes) != len(prompts):
        raise InputError(f"{len(sizes)} images and {len(prompts)} lists of prompts: one list for each image")
    for size, of_image in zip(sizes, prompts, strict=True):
        check_list(of_image, "the prompts of an image")
        for prompt in of_image:
            check(sam, prompt, size)


def predict(
    sam: Sam,
    encoded: Sequence[Encoded],
    prompts: Sequence[Sequence[Prompt]],
    multimask_output: bool = True,
    return_logits: bool = False,
    num_multimask_outputs: int | None = None,
    use_stability_score: bool = False,
) -> list[list[Prediction]]:
    """Decodes the prompts of all images together; see `SamPredictor.predict`.

    Raises:
      InputError: not as many lists of prompts as images, or an invalid one.
    """
    flags = {"multimask_output": multimask_output, "return_logits": return_logits}
    for name, flag in (flags | {"use_stability_score": use_stability_score}).items():
        if not (isinstance(flag, bool | np.bool_) or (type(flag) is int and flag in (0, 1))):
            raise InputError(f"{name} {quoted(flag)} is neither True nor False")
    check_prompts(sam, [image.original_size for image in encoded], prompts)
    flat = [(image, prompt) for image, of_image in zip(encoded, prompts, strict=True) for prompt in of_image]
    outputs = slice(1, None) if multimask_output else slice(0, 1)
    outputs = outputs if num_multimask_outputs is None else outputs_of(sam, num_multimask_outputs)
    decoded = iter(decode_mixed(sam, [image for image, _ in flat], [prompt for _, prompt in flat]))

    def finished(image: Encoded, low: np.ndarray, scores: np.ndarray) -> Prediction:
        scores = stability_scores(low) if use_stability_score else scores
        masks = sam.config.frame.resize_masks(low[outputs], image.size, image.original_size)
        given = masks if return_logits else masks > 0
        return Prediction(given, scores[outputs], as_mask_input(sam, low[outputs]))

    pairs = zip(encoded, prompts, strict=True)
    return [[finished(image, *next(decoded)) for _ in of_image] for image, of_image in pairs]
