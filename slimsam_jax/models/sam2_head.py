"""SAM 2's prompt encoder and mask decoder in image mode: maps, prompts -> masks, predicted IoU. One of `heads.HEADS`.

The prompt encoder is SAM's, but that a box ends in a padding point, too. The decoder is SAM's with a token that says
whether there is an object, finer maps added while it enlarges, and a single mask that gives way to the best of the
others where it is unstable.
Shapes: p prompts, n points, h x w cells of the embedding, C its channels, t tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.imaging.frames import Stretched
from slimsam_jax.imaging.prompts import ABSENT, BOX_TOP_LEFT, NOT_A_POINT
from slimsam_jax.models.config import MOST_LAYERS, Config, check_pixel_statistics
from slimsam_jax.models.encoders.architecture import AsJson, check_image_size, check_widths
from slimsam_jax.models.encoders.layers import Params, gelu
from slimsam_jax.models.mask_decoder import MLP, Doubling
from slimsam_jax.models.prompt_encoder import PromptEncoder
from slimsam_jax.models.transformer import TwoWayTransformer
from slimsam_jax.quantization.codes import dequantize

LARGEST_LOW_RES = 32.0  # logits of the low resolution are given back within it, and enlarged before
Maps = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class HeadConfig(AsJson):
    """Prompt encoder and mask decoder.

    Attributes:
      image_size: (height, width) of the model frame in pixels.
      patch_size: pixels to a cell of the embedding.
      out_chans: channels C of the embedding, and of the tokens; the finer maps have C / 4 and C / 8.
      mask_in_chans: channels after the last strided convolution of a mask prompt.
      decoder_heads, decoder_mlp_dim, decoder_depth: the two-way transformer.
      multimask_outputs: masks of an ambiguous prompt, besides the single one.
      iou_head_dim: hidden width of the IoU head; that of all other MLPs is C.
      iou_sigmoid: whether predicted IoU is brought to 0..1, which no array tells.
      dynamic_multimask: whether an unstable single mask gives way to the best of the others.
      pixel_mean, pixel_std: per channel (RGB), in units of 0..255; the same as SAM's.

    Raises:
      ValueError: a size out of range.
    """

    image_size: tuple[int, int]
    patch_size: int = 16
    out_chans: int = 256
    mask_in_chans: int = 16
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    decoder_depth: int = 2
    multimask_outputs: int = 3
    iou_head_dim: int = 256
    iou_sigmoid: bool = True
    dynamic_multimask: bool = True
    pixel_mean: tuple[float, float, float] = Config.pixel_mean
    pixel_std: tuple[float, float, float] = Config.pixel_std

    MAPS: ClassVar = 3

    def __post_init__(self):
        check_widths(self, [field.name for field in dataclasses.fields(self) if field.type == "int"])
        if self.decoder_depth > MOST_LAYERS or self.multimask_outputs > MOST_LAYERS:
            raise ValueError(
                f"{self.decoder_depth} layers, {self.multimask_outputs} masks: at most {MOST_LAYERS} are taken"
            )
        if self.out_chans % 8 or self.out_chans % (2 * self.decoder_heads) or self.mask_in_chans < 4:
            raise ValueError(f"out_chans {self.out_chans} must be a multiple of 8 and of twice the decoder's heads")
        for name in ("iou_sigmoid", "dynamic_multimask"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} {getattr(self, name)!r:.40} is neither true nor false")
        check_image_size(self.image_size, self.patch_size)
        check_pixel_statistics(self.pixel_mean, self.pixel_std)

    @property
    def frame(self) -> Stretched:
        """How images come into the model frame."""
        return Stretched(self.image_size)

    @property
    def point_tokens(self) -> int:
        """Tokens of a prompt that is one point: itself and the padding."""
        return 2

    @property
    def object_tokens(self) -> int:
        """Tokens besides those of a SAM's decoder."""
        return 1

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the embedding."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def from_json(fields: Mapping[str, Any]) -> HeadConfig:
    """Inverse of `HeadConfig.to_json`.

    Raises:
      ValueError: an unknown field, or one out of range.
    """
    return HeadConfig.from_json(fields)


class MaskDecoder(nn.Module):
    config: HeadConfig

    @nn.compact
    def __call__(self, maps: Maps, image_pe: jax.Array, sparse: jax.Array, dense: jax.Array, present: jax.Array):
        """Predicts all masks of p prompts.

        Args:
          maps: see `run`.
          image_pe: [h, w, C] from `PromptEncoder.dense_positions`.
          sparse, dense: from `PromptEncoder`.
          present: [p, n] bool, False for tokens of `sparse` that fill up and shall change nothing.

        Returns:
          masks: [p, 1 + multimask_outputs, 4h, 4w] logits; index 0 is the single mask.
          iou: [p, 1 + multimask_outputs], the model's own estimate.
          object_score: [p] logits of whether there is an object at all, by which image mode hides nothing.
          tokens: [p, 1 + multimask_outputs, C], of the masks, behind the transformer.
        """
        c, normal = self.config, nn.initializers.normal(1.0)
        outputs, width, prompts, (h, w) = 1 + c.multimask_outputs, c.out_chans, sparse.shape[0], c.grid
        counts = {"obj_score_token": 1, "iou_token": 1, "mask_tokens": outputs}
        learnt = jnp.concatenate([self.param(name, normal, (count, width)) for name, count in counts.items()])
        tokens = jnp.concatenate([jnp.tile(learnt[None], (prompts, 1, 1)), sparse], axis=1)
        present = jnp.concatenate([jnp.ones((prompts, len(learnt)), bool), present], axis=1)
        image = (maps["embedding"] + dense).reshape(-1, h * w, width)
        transformer = TwoWayTransformer(c.decoder_depth, c.decoder_heads, c.decoder_mlp_dim, name="transformer")
        tokens, image = transformer(image, image_pe.reshape(1, h * w, width), tokens, present)
        masks = self.masks(tokens[:, 2 : 2 + outputs], self.upscale(image.reshape(-1, h, w, width), maps))
        iou = MLP((c.iou_head_dim, c.iou_head_dim, outputs), name="iou_prediction_head")(tokens[:, 1])
        object_score = MLP((width, width, 1), name="pred_obj_score_head")(tokens[:, 0])[:, 0]
        iou = jax.nn.sigmoid(iou) if c.iou_sigmoid else iou
        return masks, iou, object_score, tokens[:, 2 : 2 + outputs]

    def upscale(self, x: jax.Array, maps: Maps) -> jax.Array:
        """[p, h, w, C] -> [p, 4h, 4w, C/8]; the finer maps join before what bends: norm and GELU, and GELU."""
        width = x.shape[-1]
        x = enlarged(Doubling(width // 4, name="output_upscaling_0")(x)) + maps["high_res_1"]
        norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="output_upscaling_1")  # of few channels
        x = gelu(norm(x))
        return gelu(enlarged(Doubling(width // 8, name="output_upscaling_3")(x)) + maps["high_res_0"])

    def masks(self, tokens: jax.Array, pixels: jax.Array) -> jax.Array:
        """[p, m, C] tokens on [p, 4h, 4w, c] -> [p, m, 4h, 4w]."""
        width, channels = tokens.shape[-1], pixels.shape[-1]
        names = [f"output_hypernetworks_mlps_{i}" for i in range(tokens.shape[1])]
        hyper = [MLP((width, width, channels), name=name)(tokens[:, i]) for i, name in enumerate(names)]
        return jnp.einsum("pmc,phwc->pmhw", jnp.stack(hyper, axis=1), pixels)


def enlarged(x: jax.Array) -> jax.Array:
    """Puts the four of each position side by side: [p, h, w, 2, 2, c] -> [p, 2h, 2w, c]."""
    p, h, w, _, _, c = x.shape
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(p, 2 * h, 2 * w, c)


def refusal(labels: np.ndarray, masked: bool) -> str | None:
    """SAM 2 takes all prompts."""
    return None


def init(config: HeadConfig, keys: Sequence[jax.Array]) -> Params:
    """Random {"prompt_encoder", "mask_decoder"}, by two keys."""
    (h, w), width = config.grid, config.out_chans
    finer = {"high_res_1": (2 * h, 2 * w, width // 4), "high_res_0": (4 * h, 4 * w, width // 8)}
    maps = {name: jnp.zeros(shape) for name, shape in {"embedding": (h, w, width), **finer}.items()}
    points, labels = jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), jnp.int32)
    inputs = (points, labels, jnp.zeros((1, 4 * h, 4 * w, 1)))
    prompts = PromptEncoder(config).init(keys[0], *inputs)
    sparse, dense = PromptEncoder(config).apply(prompts, *inputs)
    decoder = MaskDecoder(config).init(keys[1], maps, maps["embedding"], sparse, dense, labels == 0)["params"]
    return {"prompt_encoder": prompts["params"], "mask_decoder": decoder}


def decode(config: HeadConfig, params: Params, embedding: Maps, points, labels, masks=None, masked=None):
    """See `sam.decode`; `embedding` are the maps that `run` takes."""
    low, iou, _, _ = run(config, params, embedding, points, labels, masks, masked)
    return stable_first(low, iou) if config.dynamic_multimask else (low, iou)


@functools.partial(jax.jit, static_argnames="config")
def run(config: HeadConfig, params: Params, maps: Maps, points, labels, masks=None, masked=None):
    """Decodes p prompts.

    Args:
      params: {"prompt_encoder", "mask_decoder"}, at least.
      maps: {"embedding": [h, w, C], "high_res_1": [2h, 2w, C/4], "high_res_0": [4h, 4w, C/8]}, one image's, or each
        with a first axis, those of each prompt: what `hiera.ImageEncoder` gives.
      points, labels, masks, masked: as SAM's `PromptEncoder` takes them.

    Returns:
      masks, iou, object_score and tokens of `MaskDecoder`; the single mask as it is, stable or not.
    """
    points, labels = padded(points, labels)
    params = dequantize(params)
    encode = nn.apply(lambda m: (m(points, labels, masks, masked), m.dense_positions()), PromptEncoder(config))
    with jax.default_matmul_precision("highest"):  # positions are phases of many turns: they bear no rounding
        (sparse, dense), positions = encode({"params": params["prompt_encoder"]})
        inputs = (maps, positions, sparse, dense, labels != ABSENT)
        return MaskDecoder(config).apply({"params": params["mask_decoder"]}, *inputs)


def padded(points: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ends prompts with a box in a padding point, which `prompt_points` gives those without one alone: n + 1 tokens."""
    boxed = (labels == BOX_TOP_LEFT).any(axis=1, keepdims=True)
    last = jnp.where(boxed, NOT_A_POINT, ABSENT).astype(labels.dtype)
    return jnp.pad(points, ((0, 0), (0, 1), (0, 0))), jnp.concatenate([labels, last], axis=1)


STABILITY_OFFSET, STABLE = 0.05, 0.98


@jax.jit
def stable_first(masks: jax.Array, iou: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[p, m, h, w], [p, m] with the best of 1.. by predicted IoU, and its IoU, at 0 where mask 0 is unstable.

    A mask is stable if it hardly changes with the threshold: those of its pixels that are above both thresholds, by
    those that are above the lower one.
    """
    inner, outer = ((masks[:, 0] > cut).sum((1, 2)) for cut in (STABILITY_OFFSET, -STABILITY_OFFSET))
    stable = jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0) >= STABLE
    first = jnp.where(stable, 0, 1 + iou[:, 1:].argmax(1))[:, None]
    given = jnp.take_along_axis(masks, first[..., None, None], 1), jnp.take_along_axis(iou, first, 1)
    return tuple(jnp.concatenate([own, rest[:, 1:]], 1) for own, rest in zip(given, (masks, iou), strict=True))
