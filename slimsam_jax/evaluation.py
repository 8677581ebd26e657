"""How good the masks are: against annotations, and against another model's masks.

The encoder runs once per image, all prompts of an image are decoded together, and their
number is padded to one of few, so that few shapes are ever compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from slimsam_jax import metrics
from slimsam_jax.data import Annotation, Sample
from slimsam_jax.errors import InputError
from slimsam_jax.models.prompt_encoder import prompt_points
from slimsam_jax.models.sam import Sam, decode, encode, resize_and_pad, resize_masks, to_model_frame

Prompt = Literal["point", "box"]
BUCKETS = (1, 4, 16, 64)  # numbers of prompts that are ever compiled; the largest bounds memory


class Encoded(NamedTuple):
    """A picture after the encoder: its [h, w, C] embedding, size in the model frame, and own size."""

    embedding: jax.Array
    size: tuple[int, int]
    original_size: tuple[int, int]


def encode_image(sam: Sam, image: Image.Image) -> Encoded:
    """Encodes an RGB picture of any size."""
    frame, size = resize_and_pad(image, sam.config.image_size)
    embedding = encode(sam.config, sam.params, frame[None], size[None], jnp.float32)[0]
    return Encoded(embedding, tuple(int(side) for side in size), (image.height, image.width))


def predict_masks(
    sam: Sam, encoded: Encoded, points: np.ndarray | None = None, labels=None, boxes=None, mask: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Masks of p prompts in the original frame.

    Args:
      points: [p, n, 2] (x, y) in original pixels, or None.
      labels: [p, n], 1 foreground and 0 background; all foreground if None.
      boxes: [p, 4] x0, y0, x1, y1 in original pixels, or None.
      mask: which output: 0 is the single mask (`multimask_output=False`), 1.. the others.

    Returns:
      [p, h0, w0] bool masks and [p] predicted IoU.
    """
    scale = lambda xy: to_model_frame(xy, encoded.size, encoded.original_size)
    if points is not None:
        points = scale(points)
        labels = np.ones(points.shape[:2], np.int32) if labels is None else np.asarray(labels, np.int32)
    if boxes is not None:
        boxes = scale(np.asarray(boxes).reshape(-1, 2, 2)).reshape(-1, 4)
    coordinates, kinds = prompt_points(points, labels, boxes)
    masks, scores = [], []
    for start in range(0, len(coordinates), BUCKETS[-1]):
        part = slice(start, start + BUCKETS[-1])
        low, predicted = _decode_padded(sam, encoded.embedding, coordinates[part], kinds[part])
        masks.append(resize_masks(sam.config, low[:, mask], encoded.size, encoded.original_size) > 0)
        scores.append(predicted[:, mask])
    return np.concatenate(masks), np.concatenate(scores)


def _decode_padded(sam: Sam, embedding: jax.Array, points: np.ndarray, labels: np.ndarray):
    """`decode`, with the prompts padded by repetition to a bucket; numpy out."""
    count = len(points)
    bucket = next(size for size in BUCKETS if size >= count)
    index = np.minimum(np.arange(bucket), count - 1)
    masks, scores = decode(sam.config, sam.params, embedding, points[index], labels[index])
    return np.asarray(masks)[:count], np.asarray(scores)[:count]


def annotation_ious(sam: Sam, encoded: Encoded, annotations: Sequence[Annotation], prompts: Sequence[Prompt]):
    """Mean IoU over one image's annotations, per kind of prompt: {"point": ..., ...}.

    SlimSAM's protocol: prompt with the annotation's point (or box), take the single mask,
    compare at the original size.
    """
    truth = np.stack([a.mask for a in annotations])
    given = {
        "point": {"points": np.stack([a.point for a in annotations])[:, None]},
        "box": {"boxes": np.stack([a.box for a in annotations])},
    }
    return {kind: float(metrics.iou(predict_masks(sam, encoded, **given[kind])[0], truth).mean()) for kind in prompts}


def read_annotated(sample: Sample) -> tuple[Image.Image, list[Annotation]]:
    """An image and its annotations ([] without a file of them).

    Raises:
      InputError: either cannot be read, or the masks are not of the image's size.
    """
    image, annotations = sample.image(), sample.annotations()
    if annotations and annotations[0].mask.shape != (image.height, image.width):
        raise InputError(
            f"{sample.name}: its annotations are of size {annotations[0].mask.shape}, the image of {image.size[::-1]}"
        )
    return image, annotations


def mean_iou(sam: Sam, samples: Iterable[Sample], prompts: Sequence[Prompt] = ("point", "box")) -> dict:
    """mIoU over the annotated images among `samples`.

    Returns:
      {"point": mean over images of the mean over annotations, ..., "images": count,
      "per_image": {name: {"point": ...}}, "skipped": {name: why it could not be read}};
      no means if no image is annotated.
    """

    def measure(sample: Sample) -> dict[str, float]:
        image, annotations = read_annotated(sample)
        return annotation_ious(sam, encode_image(sam, image), annotations, prompts) if annotations else {}

    found, skipped = map_readable(measure, samples)
    stems = Counter(Path(name).stem for name in found)
    short = lambda name: Path(name).stem if stems[Path(name).stem] == 1 else name
    per_image = {short(name): ious for name, ious in found.items() if ious}
    return {**_means(per_image.values()), "images": len(per_image), "per_image": per_image, "skipped": skipped}


def compare_models(teacher: Sam, slim: Sam, samples: Iterable[Sample], side: int = 4) -> dict:
    """Measures two models on the same images, encoding each image once with each.

    Args:
      side: agreement is over a regular grid of side x side points.

    Returns:
      A dict of
        agreement: mean over images of the mean IoU between the two models' masks for the same
          points; needs no labels.
        embedding_error: mean over images of the squared error of the slim embedding, relative
          to the variance of the teacher's.
        images, annotated_images: how many.
        teacher, slim: {"point": mIoU, "box": mIoU} over the annotated images; {} of none.
        skipped: {name: why it could not be read}.

    Raises:
      InputError: not one image could be read.
    """

    def measure(sample: Sample) -> dict[str, Any]:
        image, annotations = read_annotated(sample)
        encoded = [(sam, encode_image(sam, image)) for sam in (teacher, slim)]
        points = point_grid((image.height, image.width), side)
        one, other = (predict_masks(*pair, points)[0] for pair in encoded)
        ious = [annotation_ious(*pair, annotations, ("point", "box")) if annotations else {} for pair in encoded]
        wanted, found = (e.embedding for _, e in encoded)
        return {
            "agreement": float(metrics.iou(one, other).mean()),
            "embedding_error": metrics.relative_error(found, wanted),
            "teacher": ious[0],
            "slim": ious[1],
        }

    found, skipped = map_readable(measure, samples)
    if not found:
        raise InputError(f"no image can be compared on: {next(iter(skipped.values()), 'none was given')}")
    annotated = [image for image in found.values() if image["teacher"]]
    return {
        **{key: float(np.mean([i[key] for i in found.values()])) for key in ("agreement", "embedding_error")},
        "images": len(found),
        "annotated_images": len(annotated),
        **{name: _means([image[name] for image in annotated]) for name in ("teacher", "slim")},
        "skipped": skipped,
    }


def _means(ious: Iterable[dict[str, float]]) -> dict[str, float]:
    """[{"point": ..., "box": ...}, ...] -> their means; {} of none."""
    ious = list(ious)
    return {kind: float(np.mean([image[kind] for image in ious])) for kind in (ious[0] if ious else ())}


def map_readable(function: Callable[[Sample], Any], samples: Iterable[Sample]) -> tuple[dict[str, Any], dict[str, str]]:
    """Applies `function` to each sample: {name: result}; what raises InputError is left out: {name: reason}."""
    found, skipped = {}, {}
    for sample in samples:
        try:
            found[sample.name] = function(sample)
        except InputError as error:
            skipped[sample.name] = str(error)
    return found, skipped


def point_grid(original_size: tuple[int, int], side: int) -> np.ndarray:
    """A regular grid of points inside a picture: [side * side, 1, 2] (x, y) in its pixels."""
    height, width = original_size
    steps = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(steps * width, steps * height), axis=-1).reshape(-1, 1, 2)
