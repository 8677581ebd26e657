"""Computes image encoders by something else than JAX, where a model brings that along."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from slimsam_jax.models.sam import Embedding, Sam, encode


@dataclasses.dataclass(frozen=True)
class Engine:
    """Another way to compute one model's image encoder.

    Attributes:
      name: what computes.
      params: the model's, of which it was made; with others, such as those of a cut model, it is not used.
      run: a frame [H, W, 3] uint8 and the (height, width) of it that is image -> its embedding [h, w, C] float32.
    """

    name: str
    params: Any
    run: Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def name_of(sam: Any) -> str:
    """What computes a model's image encoder."""
    engine = getattr(sam, "engine", None)
    return engine.name if engine is not None and engine.params is sam.params else "jax"


def embed(sam: Sam, images: np.ndarray, sizes: np.ndarray, count: int | None = None) -> Embedding:
    """`models.sam.encode` of a model's first `count` images, or by its engine; of all if None."""
    if name_of(sam) == "jax":
        return encode(sam.config, sam.params, images, sizes)
    pairs = list(zip(images, sizes, strict=True))[:count]
    return jnp.stack([sam.engine.run(image, tuple(map(int, size))) for image, size in pairs])
