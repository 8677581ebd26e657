"""EfficientSAM's prompt encoder and mask decoder: embedding, points -> masks, predicted IoU. One of `heads.HEADS`.

It knows positive points and boxes alone: no background points, no mask, six points at most, of which a box takes two.
The original embeds a background point as a position alone, and cuts off what is more than six, both silently; here
`refusal` says so.
Shapes: p prompts, n points, h x w cells of the embedding, C its channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.imaging.frames import Squashed
from slimsam_jax.models.config import MOST_LAYERS, Config, check_pixel_statistics
from slimsam_jax.models.efficient_sam_transformer import TwoWayTransformer
from slimsam_jax.models.encoders.architecture import AsJson, check_image_size, check_width, check_widths
from slimsam_jax.models.encoders.layers import Params, gelu
from slimsam_jax.models.mask_decoder import Doubling
from slimsam_jax.quantization.codes import dequantize

INVALID, POINT, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 1, 2, 3  # any other label is a position and nothing more
MOST_POINTS = 6  # of a prompt; each is a token, whether given or not


@dataclasses.dataclass(frozen=True)
class HeadConfig(AsJson):
    """Prompt encoder and mask decoder.

    Attributes:
      image_size: (height, width) of the model frame in pixels.
      patch_size: pixels to a cell of the embedding.
      out_chans: channels C of the embedding, and of the tokens.
      decoder_heads, decoder_mlp_dim, decoder_depth: the two-way transformer.
      multimask_outputs: masks of an ambiguous prompt, besides the single one.
      iou_head_dim: hidden width of the IoU head; that of the masks' MLPs is C.
      upscaling_dims: channels after the first and the second doubling.
      pixel_mean, pixel_std: per channel (RGB), in units of 0..255; the same as SAM's.

    Raises:
      ValueError: a size out of range.
    """

    image_size: tuple[int, int]
    patch_size: int = 16
    out_chans: int = 256
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    decoder_depth: int = 2
    multimask_outputs: int = 3
    iou_head_dim: int = 256
    upscaling_dims: tuple[int, int] = (64, 32)
    pixel_mean: tuple[float, float, float] = Config.pixel_mean
    pixel_std: tuple[float, float, float] = Config.pixel_std

    def __post_init__(self):
        check_widths(self, [field.name for field in dataclasses.fields(self) if field.type == "int"])
        if self.decoder_depth > MOST_LAYERS or self.multimask_outputs > MOST_LAYERS:
            raise ValueError(
                f"{self.decoder_depth} layers, {self.multimask_outputs} masks: at most {MOST_LAYERS} are taken"
            )
        if self.out_chans % (2 * self.decoder_heads):
            raise ValueError(f"out_chans {self.out_chans} must be a multiple of twice the decoder's heads")
        if len(self.upscaling_dims) != 2:
            raise ValueError(f"upscaling_dims {self.upscaling_dims!r:.40} must be two widths")
        for dim in self.upscaling_dims:
            check_width("upscaling_dims", dim)
        check_image_size(self.image_size, self.patch_size)
        check_pixel_statistics(self.pixel_mean, self.pixel_std)

    @property
    def frame(self) -> Squashed:
        """How images come into the model frame."""
        return Squashed(self.image_size)

    @property
    def point_tokens(self) -> int:
        """Tokens of a prompt that is one point: all that there ever are."""
        return MOST_POINTS

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the embedding."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


class PromptEncoder(nn.Module):
    """Points and box corners become tokens."""

    config: HeadConfig

    def setup(self):
        normal, width = nn.initializers.normal(1.0), self.config.out_chans
        # Frequencies of the random Fourier features: a buffer in PyTorch, never trained.
        self.positional_encoding = self.param("positional_encoding_gaussian_matrix", normal, (2, width // 2))
        names = ("invalid_points", "point_embeddings", "bbox_top_left_embeddings", "bbox_bottom_right_embeddings")
        self.kinds = [self.param(name, normal, (1, width)) for name in names]

    def __call__(self, points: jax.Array, labels: jax.Array) -> jax.Array:
        """Encodes p prompts.

        Args:
          points: [p, n, 2] (x, y) in pixels of the model frame, n = `MOST_POINTS` from `fill_points`.
          labels: [p, n] int: -1 filled up, 1 foreground, 2 and 3 a box's corners. Any other is its position alone.

        Returns:
          [p, n, C] tokens.
        """
        height, width = self.config.image_size
        encoded = self.encode_positions((points + 0.5) / jnp.array([width, height], jnp.float32))
        for label, kind in zip((INVALID, POINT, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT), self.kinds, strict=True):
            encoded = encoded + jnp.where((labels == label)[..., None], kind, 0)
        return encoded

    def encode_positions(self, coordinates: jax.Array) -> jax.Array:
        """Random Fourier features of (x, y) in 0..1: [..., 2] -> [..., C]."""
        phase = 2 * jnp.pi * ((2 * coordinates - 1) @ self.positional_encoding)
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)

    def dense_positions(self) -> jax.Array:
        """Encoding of the centres of the embedding's cells: [h, w, C]."""
        h, w = self.config.grid
        y, x = jnp.meshgrid((jnp.arange(h) + 0.5) / h, (jnp.arange(w) + 0.5) / w, indexing="ij")
        return self.encode_positions(jnp.stack([x, y], axis=-1))


class MLP(nn.Module):
    """Two hidden layers with GELU, and an output."""

    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = gelu(nn.Dense(self.hidden, name=f"layers_{i}")(x))
        return nn.Dense(self.outputs, name="layers_2")(x)


class MaskDecoder(nn.Module):
    config: HeadConfig

    @nn.compact
    def __call__(self, embedding: jax.Array, image_pe: jax.Array, sparse: jax.Array):
        """Predicts all masks of p prompts.

        Args:
          embedding: [h, w, C] embedding of the one image, or [p, h, w, C] of each prompt's.
          image_pe: [h, w, C] from `PromptEncoder.dense_positions`.
          sparse: [p, n, C] from `PromptEncoder`.

        Returns:
          masks: [p, 1 + multimask_outputs, 4h, 4w] logits; index 0 is the single-mask output.
          iou: [p, 1 + multimask_outputs], the model's own estimate, not bounded.
          tokens: {"layers": those after each block, "out": the last}, [p, t, C].
        """
        c, normal, (h, w) = self.config, nn.initializers.normal(1.0), self.config.grid
        outputs, width, prompts = 1 + c.multimask_outputs, c.out_chans, sparse.shape[0]
        learnt = jnp.concatenate(
            [self.param("iou_token", normal, (1, width)), self.param("mask_tokens", normal, (outputs, width))]
        )
        tokens = jnp.concatenate([jnp.tile(learnt[None], (prompts, 1, 1)), sparse], axis=1)
        image = embedding.reshape(-1, h * w, width)  # once, until the first tokens attend to it
        transformer = TwoWayTransformer(c.decoder_depth, c.decoder_heads, c.decoder_mlp_dim, name="transformer")
        tokens, image, between = transformer(image, image_pe.reshape(1, h * w, width), tokens)
        pixels = self.upscale(image).reshape(prompts, -1, c.upscaling_dims[1])
        names = [f"output_hypernetworks_mlps_{i}" for i in range(outputs)]
        hyper = [MLP(width, c.upscaling_dims[1], name=name)(tokens[:, 1 + i]) for i, name in enumerate(names)]
        masks = jnp.einsum("pmc,pnc->pmn", jnp.stack(hyper, axis=1), pixels)
        # The axes of one position, which has become 4 x 4, in their order only now that they have no channels.
        masks = masks.reshape(prompts, outputs, h, w, 2, 2, 2, 2).transpose(0, 1, 2, 4, 6, 3, 5, 7)
        iou = MLP(c.iou_head_dim, outputs, name="iou_prediction_head")(tokens[:, 0])
        return masks.reshape(prompts, outputs, 4 * h, 4 * w), iou, {"layers": between, "out": tokens}

    def upscale(self, x: jax.Array) -> jax.Array:
        """[p, h*w, C] -> [p, h*w, 2, 2, 2, 2, c], rows and columns of either doubling."""
        first, second = self.config.upscaling_dims
        x = Doubling(first, name="output_upscaling_0")(x)
        # Over channels and positions together, unlike SAM's LayerNorm.
        norm = nn.GroupNorm(num_groups=1, epsilon=1e-5, use_fast_variance=False, name="output_upscaling_1")
        return gelu(Doubling(second, name="output_upscaling_3")(gelu(norm(x))))


def from_json(fields: Mapping[str, Any]) -> HeadConfig:
    """Inverse of `HeadConfig.to_json`."""
    return HeadConfig.from_json(fields)


def refusal(labels: np.ndarray, masked: bool) -> str | None:
    """Why prompts cannot be taken, or None.

    Args:
      labels: [p, n], see `imaging.prompts`.
      masked: whether previous masks are given with them.
    """
    if masked:
        return "EfficientSAM takes no mask as a prompt; give points or a box"
    if (labels == 0).any():
        return "EfficientSAM knows no background points (label 0); leave them out, or use a box"
    counts = (labels >= POINT).sum(axis=1)
    if not counts.all():
        return "EfficientSAM needs a point or a box"
    if (counts > MOST_POINTS).any():
        return f"EfficientSAM takes {MOST_POINTS} points at most, of which a box is two, not {counts.max()}"
    return None


def fill_points(points: Any, labels: Any) -> tuple[Any, Any]:
    """Brings prompts to `MOST_POINTS` points as the original does: fills up with (-1, -1), cuts off what is more.

    Args:
      points: [p, n, 2] (x, y) in the model frame; numpy, or JAX's.
      labels: [p, n]; what is below 0 is no point, whatever it is to SAM, and makes room for those that are. It goes to
        (-1, -1), too, as SAM's padding has no place; the original has what its caller fills up where that says.

    Returns:
      [p, 6, 2] and [p, 6].
    """
    xp = jnp if isinstance(points, jax.Array) or isinstance(labels, jax.Array) else np
    points, labels = xp.asarray(points, xp.float32), xp.asarray(labels, xp.int32)
    missing, void = max(0, MOST_POINTS - labels.shape[1]), labels < 0
    points = xp.pad(xp.where(void[..., None], -1.0, points), ((0, 0), (0, missing), (0, 0)), constant_values=-1.0)
    labels = xp.pad(xp.where(void, INVALID, labels), ((0, 0), (0, missing)), constant_values=INVALID)
    places = xp.arange(labels.shape[1])
    order = xp.argsort((labels < 0) * len(places) + places, axis=1)[:, :MOST_POINTS]
    filled = xp.take_along_axis(points, order[..., None], axis=1)
    return filled.astype(xp.float32), xp.take_along_axis(labels, order, axis=1)


def init(config: HeadConfig, keys: Sequence[jax.Array]) -> Params:
    """Random {"prompt_encoder", "mask_decoder"}, by two keys."""
    first, second = keys
    points, labels = jnp.zeros((1, MOST_POINTS, 2)), jnp.zeros((1, MOST_POINTS), jnp.int32)
    prompts = PromptEncoder(config).init(first, points, labels)
    sparse = PromptEncoder(config).apply(prompts, points, labels)
    embedding = jnp.zeros((*config.grid, config.out_chans))
    decoder = MaskDecoder(config).init(second, embedding, embedding, sparse)
    return {"prompt_encoder": prompts["params"], "mask_decoder": decoder["params"]}


def decode(config: HeadConfig, params: Params, embedding, points, labels, masks=None, masked=None):
    """See `sam.decode`. One compilation per p, whatever the number of points.

    Raises:
      ValueError: masks are given, which `refusal` tells beforehand.
    """
    if masks is not None:
        raise ValueError(refusal(np.zeros((0, 0)), masked=True))
    return run(config, params, embedding, *fill_points(points, labels))[:2]


def decode_tokens(config: HeadConfig, params: Params, embedding, points, labels):
    """See `sam.decode_tokens`."""
    masks, iou, tokens = run(config, params, embedding, *fill_points(points, labels))
    return masks, iou, tokens["out"][:, : 2 + config.multimask_outputs]


@functools.partial(jax.jit, static_argnames="config")
def run(config: HeadConfig, params: Params, embedding: jax.Array, points: jax.Array, labels: jax.Array):
    """Decodes p prompts of six points each; integers among the parameters count as what they stand for.

    Args:
      params: {"prompt_encoder", "mask_decoder"}, at least.
      embedding: [h, w, C], one image's, or [p, h, w, C], that of each prompt: the queries of its image in a row.
      points, labels: as `PromptEncoder` takes them.

    Returns:
      masks, iou and tokens of `MaskDecoder`.
    """
    params = dequantize(params)
    encode = nn.apply(lambda module: (module(points, labels), module.dense_positions()), PromptEncoder(config))
    with jax.default_matmul_precision("highest"):  # positions are phases of many turns: they bear no rounding
        sparse, positions = encode({"params": params["prompt_encoder"]})
        return MaskDecoder(config).apply({"params": params["mask_decoder"]}, embedding, positions, sparse)
