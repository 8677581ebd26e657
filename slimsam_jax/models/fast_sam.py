"""FastSAM: YOLOv8-seg with one class, which finds all masks of an image in one pass; prompts then choose among them.

Written from a description of the layers in words and from arrays that the original computed. No code of FastSAM,
ultralytics or EdgeSAM was read, copied or run for it: those are under AGPL-3.0 and a non-commercial licence. So is what
they publish: FastSAM's weights are under AGPL-3.0, whatever code reads them.

Shapes: b images, h x w pixels of a layer, H x W of the frame, n cells of the three levels together, m prototypes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.models.encoders import layers
from slimsam_jax.models.fast_sam_config import (
    BINS,
    CONVS,
    JOINED,
    LEVELS,
    PRESETS,
    SHORTCUTS,
    STAGES,
    STRIDES,
    Config,
    Stage,
    config_of,
    scaled,
)
from slimsam_jax.models.fast_sam_layers import EPSILON, Branch, C2f, Conv, Pool, Prototypes, twice
from slimsam_jax.models.relative_attention import at_least_float32

__all__ = ["PRESETS", "Config", "FastSam", "Network", "Outputs", "Stage", "config_of", "decode", "detect", "scaled"]

Params = dict[str, Any]
FAMILY = "fast_sam"  # no image encoder with a head; its name on disk


@dataclasses.dataclass(frozen=True)
class FastSam:
    """An architecture with its parameters, as `models.sam.Sam`.

    Attributes:
      config: the architecture.
      params: the tree of a `Network`, float32.
      provenance: where it came from; free-form JSON, carried along on disk.

    Of a SAM's it has neither `thresholds` nor arrays that are `kept` aside.
    """

    config: Config
    params: Params
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    family: ClassVar[str] = FAMILY
    thresholds: ClassVar[None] = None
    kept: ClassVar[dict[str, Any]] = {}

    @property
    def encoder(self) -> Params:
        """All parameters: a FastSAM is nothing else."""
        return self.params

    def refusal(self, labels: Any, masked: bool) -> None:
        """As `Sam.refusal`; any prompt can be taken, and previous masks are not read."""


QUANTIZES = False  # see `models.kinds`


def make(config: Config, params: Params, provenance: dict[str, Any], *_: Any) -> FastSam:
    """A `FastSam`, without what a SAM has besides."""
    return FastSam(config, params, provenance)


class Outputs(NamedTuple):
    """What the network gives, before anything is decoded.

    Attributes:
      boxes: of each level [b, h, w, 4 * bins], logits of the distances to left, top, right and bottom.
      scores: of each level [b, h, w, 1], logits.
      coefficients: of each level [b, h, w, m], by which a mask is made of prototypes.
      prototypes: [b, H / 4, W / 4, m].
    """

    boxes: tuple[jax.Array, ...]
    scores: tuple[jax.Array, ...]
    coefficients: tuple[jax.Array, ...]
    prototypes: jax.Array


class Network(nn.Module):
    """images -> (outputs, what each layer gives).

    Attributes:
      config: the architecture.
      dtype: of the computation; parameters stay float32.
      of_batch: batch norms normalise by the batch's statistics and sow them, see `encoders.layers.BatchNorm`.
    """

    config: Config
    dtype: Any = jnp.float32
    of_batch: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[Outputs, dict[int, jax.Array]]:
        """Runs all layers.

        Args:
          images: [b, H, W, 3] RGB in 0..1, sides multiples of 32.

        Returns:
          outputs: see `Outputs`.
          layers: {number: [b, h, w, c]} of those that join or have parameters; under `jit` they cost nothing.
        """
        c = self.config
        conv = functools.partial(Conv, batch_norm=c.batch_norm, of_batch=self.of_batch, dtype=self.dtype)
        x, given = images, {}
        for number in range(LEVELS[-1] + 1):
            x = self._layer(number, x, given, conv)
            given[number] = x
        read = [given[number] for number in LEVELS]
        prototypes = Prototypes(c.prototypes, conv, self.dtype, name="prototypes")(read[0])
        kinds = {"boxes": 4 * BINS, "scores": 1, "coefficients": c.prototypes[-1]}
        branches = {
            kind: tuple(
                Branch(getattr(c, kind)[i], count, conv, self.dtype, name=f"{kind}_{i}")(x) for i, x in enumerate(read)
            )
            for kind, count in kinds.items()
        }
        return Outputs(**branches, prototypes=prototypes.astype(at_least_float32(prototypes))), given

    def _layer(self, number: int, x: jax.Array, given: dict[int, jax.Array], conv: Any) -> jax.Array:
        """Applies a layer by its number; within a compact module."""
        c, name = self.config, f"layers_{number}"
        if number in CONVS:
            return conv(c.convs[CONVS.index(number)], 3, 2, name=name)(x)
        if number in STAGES:
            return C2f(c.stages[STAGES.index(number)], number in SHORTCUTS, conv, name=name)(x)
        if number in JOINED:
            return jnp.concatenate([x, given[JOINED[number]]], axis=-1)
        return twice(x) if number in (10, 13) else Pool(c.pool, conv, name=name)(x)


def decode(outputs: Outputs) -> jax.Array:
    """Boxes, scores and coefficients of all cells: [b, n, 4 + 1 + m], levels from fine to coarse, cells row by row.

    A box is its centre (x, y), width and height in pixels of the frame. The distance to a side is the mean over bins
    by the softmax of their logits (distribution focal loss), in cells.
    """
    rows = []
    for logits, scores, coefficients, stride in zip(*outputs[:3], STRIDES, strict=True):
        b, h, w, _ = logits.shape
        shares = jax.nn.softmax(logits.reshape(b, h * w, 4, -1), axis=-1)
        distances = shares @ jnp.arange(shares.shape[-1], dtype=shares.dtype)
        y, x = np.divmod(np.arange(h * w), w)
        centres = jnp.asarray(np.stack([x, y], axis=-1) + 0.5, shares.dtype)
        low, high = centres - distances[..., :2], centres + distances[..., 2:]
        boxes = jnp.concatenate([(low + high) / 2, high - low], axis=-1) * stride
        flat = [boxes, jax.nn.sigmoid(scores.reshape(b, h * w, 1)), coefficients.reshape(b, h * w, -1)]
        rows.append(jnp.concatenate(flat, axis=-1))
    return jnp.concatenate(rows, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def detect(config: Config, params: Params, images: jax.Array, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Finds everything in letterboxed images, batch norms folded. One compilation for each shape.

    Args:
      images: [b, H, W, 3] uint8, RGB.

    Returns:
      decoded: [b, n, 4 + 1 + m], see `decode`.
      prototypes: [b, H / 4, W / 4, m].
    """
    pixels = images.astype(jnp.float32) / 255
    if config.batch_norm:
        config, params = dataclasses.replace(config, batch_norm=False), layers.fold_batch_norm(params, EPSILON)
    # Where float32 is asked for, accelerators shall not multiply in fewer bits, as they do by default.
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        outputs, _ = Network(config, dtype).apply({"params": params}, pixels)
        return decode(outputs), outputs.prototypes


def init(config: Config, key: jax.Array) -> Params:
    """Random parameters of the shapes that `config` asks for."""
    return Network(config).init(key, jnp.zeros((1, 32, 32, 3)))["params"]


@functools.lru_cache(maxsize=32)  # tracing takes a second or two
def abstract_params(config: Config) -> Params:
    """The parameter tree as shapes, not to be changed; costs no memory, whatever the size."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(lambda images: Network(config).init(jax.random.key(0), images)["params"], images)


def architecture(family: str, fields: dict[str, Any]) -> Config:
    """As `sam.architecture`; the family is the only one."""
    return Config.from_json(fields)


def last_arrays(config: Config) -> set[str]:
    """As `sam.last_arrays`: a path in the last block of each stage."""
    depths = zip(STAGES, (len(stage.blocks) for stage in config.stages), strict=True)
    return {f"layers_{number}/blocks_{count - 1}/cv1/kernel" for number, count in depths}


def folded(model: FastSam) -> FastSam:
    """The same model for inference: batch norms are multiplied into their convolutions."""
    if not model.config.batch_norm:
        return model
    params = layers.fold_batch_norm(model.params, EPSILON)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, batch_norm=False), params=params)
