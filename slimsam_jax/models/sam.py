"""The parts of SAM joined, and the way of a picture into the model and of a mask back out.

Frames: the *original* frame is the picture's own (h0, w0) pixels; the *model* frame is
`config.image_size`, into which the picture is scaled so that it fits, top left, the rest
being padding. Points are (x, y), boxes x0, y0, x1, y1, sizes (height, width).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from PIL import Image

from slimsam_jax.models.config import Config
from slimsam_jax.models.image_encoder import ImageEncoder
from slimsam_jax.models.mask_decoder import MaskDecoder
from slimsam_jax.models.prompt_encoder import ABSENT, PromptEncoder

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sam:
    """An architecture with its parameters: what every loader returns and every tool takes.

    Attributes:
      config: the architecture.
      params: {"image_encoder": ..., "prompt_encoder": ..., "mask_decoder": ...}, float32.
      provenance: where it came from; free-form JSON, carried along on disk.
    """

    config: Config
    params: Params
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)


def init(config: Config, key: jax.Array) -> Params:
    """Random parameters of the shapes that `config` asks for; see `abstract_params` for shapes alone."""
    keys = jax.random.split(key, 3)
    images = jnp.zeros((1, *config.image_size, 3))
    embedding = jnp.zeros((*config.grid, config.out_chans))
    points, labels = jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), jnp.int32)
    masks = jnp.zeros((1, 4 * config.grid[0], 4 * config.grid[1], 1))
    prompt_encoder = PromptEncoder(config)
    prompts = prompt_encoder.init(keys[1], points, labels, masks)
    sparse, dense = prompt_encoder.apply(prompts, points, labels, masks)
    return {
        "image_encoder": ImageEncoder(config).init(keys[0], images)["params"],
        "prompt_encoder": prompts["params"],
        "mask_decoder": MaskDecoder(config).init(keys[2], embedding, embedding, sparse, dense)["params"],
    }


@functools.lru_cache(maxsize=32)  # tracing takes a second or two, and a run asks for the same few models
def abstract_params(config: Config) -> Params:
    """The parameter tree as shapes, not to be changed; costs no memory, whatever the size."""
    head = dataclasses.replace(config, embed_dim=1, blocks=())
    if config == head:
        return jax.eval_shape(lambda: init(config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    encoder = jax.eval_shape(lambda images: ImageEncoder(config).init(jax.random.key(0), images)["params"], images)
    return {**abstract_params(head), "image_encoder": encoder}  # the rest is the same for a SAM and its slim ones


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def encode(config: Config, params: Params, images: jax.Array, sizes: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """uint8 images -> embeddings. One compilation per batch size.

    Args:
      params: the whole SAM's, or at least {"image_encoder": ...}.
      images, sizes: as `preprocess` takes them.

    Returns:
      [b, h, w, C] float32.
    """
    pixels = preprocess(config, images, sizes)
    # Where float32 is asked for, accelerators shall not multiply in fewer bits, as they do by default.
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        return ImageEncoder(config, dtype).apply({"params": params["image_encoder"]}, pixels)[0]


def decode(
    config: Config, params: Params, embedding: jax.Array, points: jax.Array, labels: jax.Array, masks=None, masked=None
):
    """Decodes p prompts. One compilation per (p, n), shared by a teacher and its slim models.

    Args:
      embedding: [h, w, C], one image's, or [p, h, w, C], that of each prompt.
      points, labels, masks, masked: as `PromptEncoder` takes them, from `prompt_points`.

    Returns:
      masks: [p, 1 + multimask_outputs, 4h, 4w] logits; the original's `multimask_output=False`
        is index 0, `True` the rest.
      iou: [p, 1 + multimask_outputs] predicted IoU.
    """
    parts = {name: params[name] for name in ("prompt_encoder", "mask_decoder")}
    return _decode(dataclasses.replace(config, embed_dim=0, blocks=()), parts, embedding, points, labels, masks, masked)


@functools.partial(jax.jit, static_argnames="config")
def _decode(config: Config, params: Params, embedding, points, labels, masks, masked):
    prompt_encoder = nn.apply(lambda m: (m(points, labels, masks, masked), m.dense_positions()), PromptEncoder(config))
    with jax.default_matmul_precision("highest"):  # positions are phases of many turns: they bear no rounding
        (sparse, dense), positions = prompt_encoder({"params": params["prompt_encoder"]})
        inputs = (embedding, positions, sparse, dense, labels != ABSENT)
        return MaskDecoder(config).apply({"params": params["mask_decoder"]}, *inputs)


def preprocess(config: Config, images: jax.Array, sizes: jax.Array) -> jax.Array:
    """Normalises a padded batch; padding is zero after normalising, as in the original.

    Args:
      images: [b, H, W, 3] uint8, RGB, each in the top left corner of its frame.
      sizes: [b, 2] int, the part of each frame that is picture.

    Returns:
      [b, H, W, 3] float32.
    """
    height, width = config.image_size
    pixels = (images.astype(jnp.float32) - jnp.array(config.pixel_mean)) / jnp.array(config.pixel_std)
    rows = jnp.arange(height)[:, None] < sizes[:, 0, None, None]
    columns = jnp.arange(width)[None, :] < sizes[:, 1, None, None]
    return jnp.where((rows & columns)[..., None], pixels, 0.0)


def resized_shape(size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """Size in the model frame of a picture of `size`: largest that fits, rounded half up (never below 1)."""
    scale = min(image_size[0] / size[0], image_size[1] / size[1])
    return tuple(max(1, int(side * scale + 0.5)) for side in size)


def resize_and_pad(image: np.ndarray | Image.Image, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Puts a picture into the model frame, to the pixel as the original does (PIL bilinear).

    Args:
      image: [h0, w0, 3] uint8 RGB, or a PIL image in mode RGB.
      image_size: (H, W) of the model frame.

    Returns:
      [H, W, 3] uint8 with zeros below and right of the picture, and the picture's [2] int32 size in it.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    height, width = resized_shape((image.height, image.width), image_size)
    frame = np.zeros((*image_size, 3), np.uint8)
    frame[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return frame, np.array([height, width], np.int32)


def to_model_frame(xy: np.ndarray, size: tuple[int, int], original_size: tuple[int, int]) -> np.ndarray:
    """Scales (x, y) pairs from the original to the model frame: [..., 2] -> [..., 2] float32.

    Args:
      size: the picture's size in the model frame, from `resize_and_pad`.
      original_size: its own size.
    """
    scale = np.array([size[1] / original_size[1], size[0] / original_size[0]])
    return (np.asarray(xy, np.float64) * scale).astype(np.float32)


def resize_masks(config: Config, masks: np.ndarray, size: tuple[int, int], original_size: tuple[int, int]):
    """Low-resolution logits -> logits in the original frame.

    The original enlarges to the model frame, crops the padding and resizes again, all
    bilinear. Each is linear and separable, so the two become one matrix per axis, of
    three weights a row, which costs a fraction and compiles nothing per picture size.

    Args:
      masks: [..., 4h, 4w] logits from `decode`.

    Returns:
      [..., h0, w0] float32; a mask is where they exceed 0.
    """
    rows, columns = (enlarging(masks.shape[i - 2], config.image_size[i], size[i], original_size[i]) for i in (0, 1))
    masks = np.asarray(masks, np.float32)
    enlarged = np.empty((*masks.shape[:-2], *original_size), np.float32)
    for index in np.ndindex(masks.shape[:-2]):
        enlarged[index] = rows @ np.ascontiguousarray((columns @ np.ascontiguousarray(masks[index].T)).T)
    return enlarged


@functools.lru_cache(maxsize=32)
def enlarging(source: int, frame: int, size: int, original: int) -> scipy.sparse.csr_array:
    """[original, source]: one axis of a mask from the decoder to the model frame, and `size` of that to the picture."""
    to_frame, to_picture = bilinear_matrix(source, frame)[:size], bilinear_matrix(size, original)
    return scipy.sparse.csr_array(scipy.sparse.csr_array(to_picture) @ scipy.sparse.csr_array(to_frame))


@functools.lru_cache(maxsize=32)
def bilinear_matrix(source: int, target: int) -> np.ndarray:
    """[target, source] float32 weights of bilinear interpolation, `align_corners=False`, no antialiasing."""
    centres = np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0.0)
    low = np.minimum(centres.astype(int), source - 1)
    high = np.minimum(low + 1, source - 1)
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target), low), 1 - (centres - low))
    np.add.at(weights, (np.arange(target), high), centres - low)
    return weights.astype(np.float32)
