"""Projects the residual stream onto its leading directions (`pruning.bases.residual_basis`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slimsam_jax.compression.projection.statistics import like
from slimsam_jax.models.config import GLOBAL
from slimsam_jax.models.sam import Params
from slimsam_jax.pruning import bases


def project_embedding(config: Any, encoder: Params, moment: np.ndarray, width: int) -> Params:
    """Rotates the residual stream and keeps `width` of its dimensions.

    Args:
      config: of the encoder, SAM's ViT or EfficientSAM's.
      moment: [D, D] second moment of the stream, see `statistics.moments_of`.
    """
    basis = bases.residual_basis(moment, width)
    writes = lambda array: np.asarray(array, np.float64) @ basis.T  # last axis
    new = dict(encoder)
    new["patch_embed_proj"] = {name: writes(array) for name, array in encoder["patch_embed_proj"].items()}
    new["pos_embed"] = writes(encoder["pos_embed"])
    new["neck_0"] = {"kernel": np.einsum("dD,yxDc->yxdc", basis, np.float64(encoder["neck_0"]["kernel"]))}
    for i, block in enumerate(config.blocks):
        old = encoder[f"blocks_{i}"]
        window = getattr(block, "window", GLOBAL)  # EfficientSAM's blocks have none
        padded = window != GLOBAL and any(side % window for side in config.grid)
        norm1, attn = _rotate_reader(basis, old["norm1"], [old["attn"][name] for name in "qkv"], padded)
        norm2, (lin1,) = _rotate_reader(basis, old["norm2"], [old["mlp_lin1"]], padded=False)
        new[f"blocks_{i}"] = {
            "norm1": norm1,
            "attn": {
                **old["attn"],
                **dict(zip("qkv", attn, strict=True)),
                "proj": {name: writes(array) for name, array in old["attn"]["proj"].items()},
            },
            "norm2": norm2,
            "mlp_lin1": lin1,
            "mlp_lin2": {name: writes(array) for name, array in old["mlp_lin2"].items()},
        }
    return like(encoder, new)


def _rotate_reader(
    basis: np.ndarray, norm: Params, layers: Sequence[Params], padded: bool
) -> tuple[Params, list[Params]]:
    """A LayerNorm and the linear layers behind it, reading the rotated stream.

    LayerNorm of Q x is sqrt(d/D) Q LayerNorm(x), so its scale becomes sqrt(D/d) throughout and
    the old scale moves into the kernels. Its bias moves into theirs, unless padding comes between: padded
    tokens must stay zero there, so as much as possible stays in the norm (all of it if d = D),
    and the rest goes to the layers' biases, right for all but the padding.
    """
    width, size = basis.shape
    scale, shift = np.float64(norm["scale"]), np.float64(norm["bias"])
    flat = [np.float64(layer["kernel"]).reshape(size, -1) for layer in layers]
    rotated = [basis @ (scale[:, None] * kernel) for kernel in flat]
    kept = np.zeros(width)
    if padded:
        kept, *_ = np.linalg.lstsq(np.concatenate(rotated, 1).T, np.concatenate(flat, 1).T @ shift, rcond=None)
    moved = [shift @ kernel - kept @ new for kernel, new in zip(flat, rotated, strict=True)]
    rewritten = [
        {
            "kernel": new.reshape(width, *layer["kernel"].shape[1:]),
            "bias": np.float64(layer["bias"]) + rest.reshape(layer["bias"].shape),
        }
        for layer, new, rest in zip(layers, rotated, moved, strict=True)
    ]
    return {"scale": np.full(width, (size / width) ** 0.5), "bias": kept}, rewritten
