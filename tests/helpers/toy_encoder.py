"""A family of encoders in a file: a few convolutions with a neck. What `models.encoders` asks of one, and no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
    image_size: tuple[int, int] = (64, 64)
    dim: int = 12
    hidden: tuple[int, ...] = (20, 16)
    out_chans: int = 32

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // 16, self.image_size[1] // 16

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Config:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


class ImageEncoder(nn.Module):
    config: Config
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, list[jax.Array]]]:
        c, found = self.config, {"hidden": [], "stream": []}
        conv = lambda width, size, name, stride=1: nn.Conv(
            width, (size, size), (stride, stride), "VALID" if stride > 1 else "SAME", dtype=self.dtype, name=name
        )
        x = conv(c.dim, 16, "patch_embed", 16)(images)
        for i, width in enumerate(c.hidden):
            hidden = jax.nn.gelu(conv(width, 3, f"blocks_{i}_in")(x))
            x = x + conv(c.dim, 3, f"blocks_{i}_out")(hidden)
            found["hidden"].append(hidden)
            found["stream"].append(x)
        return conv(c.out_chans, 1, "neck")(x).astype(jnp.float32), found


def config_of(params: Any, image_size: tuple[int, int] = (64, 64), like: Config | None = None) -> Config:
    blocks = sorted(name for name in params if name.endswith("_in"))
    return Config(
        like.image_size if like else image_size,
        params["patch_embed"]["bias"].shape[0],
        tuple(params[name]["bias"].shape[0] for name in blocks),
        params["neck"]["bias"].shape[0],
    )


def features(config: Config, features: Any) -> dict[str, dict[str, list[jax.Array]]]:
    return {"embedding": {"hidden": features["hidden"]}, "bottleneck": {"stream": features["stream"]}}


FEATURES = {"embedding": ("hidden",), "bottleneck": ("stream",)}


def _embedding(paths: Collection[str]) -> bool:
    return "patch_embed/bias" in paths


def _bottleneck(paths: Collection[str]) -> bool:
    return any(path.endswith("_in/bias") for path in paths)


STAGES = {"embedding": _embedding, "bottleneck": _bottleneck}
