"""Slimming the image encoder by choosing bases (`pruning.projection`), within the stock architecture.

First the embedding, then the head widths, then the MLPs, each on statistics of the model as
cut so far. With nothing cut, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.models.config import GLOBAL, Config
from slimsam_jax.models.features import run_encoder, stream_features
from slimsam_jax.models.sam import Params
from slimsam_jax.pruning import projection

Batch = dict[str, Any]
LAYERNORM_EPSILON = 1e-6


def accumulate(statistics: Callable[[Params, Batch], Any], encoder: Params, batches: Iterable[Batch]) -> Any:
    """Sum of a tree of statistics over batches, on the device; float64 numpy out.

    Raises:
      ValueError: there was no batch.
    """

    def add(total: Any, encoder: Params, batch: Batch) -> Any:
        with jax.default_matmul_precision("highest"):  # accelerators would round Gram matrices to 10 bits
            return jax.tree.map(jnp.add, total, statistics(encoder, batch))

    add, total = jax.jit(add, donate_argnums=0), None
    for batch in batches:
        if total is None:
            zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=encoder["pos_embed"].sharding)
            total = jax.tree.map(zeros, jax.eval_shape(statistics, encoder, batch))
        total = add(total, encoder, batch)
    if total is None:
        raise ValueError("statistics need at least one batch")
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), total)


# --------------------------------------------------------------------------------------- embedding


def stream_moment(config: Config) -> Callable[[Params, Batch], jax.Array]:
    """Statistic: [D, D] second moment of the residual stream at every layer, centred and scaled per token."""

    def statistics(encoder: Params, batch: Batch) -> jax.Array:
        stream = stream_features(config, run_encoder(config, encoder, batch)[1])["stream"]
        normal = lambda x: (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + LAYERNORM_EPSILON)
        return sum(jnp.einsum("bhwi,bhwj->ij", n, n) for n in map(normal, stream))

    return statistics


def project_embedding(config: Config, encoder: Params, moment: np.ndarray, width: int) -> Params:
    """Rotates the residual stream and keeps `width` of its dimensions."""
    basis = projection.residual_basis(moment, width)
    writes = lambda array: np.asarray(array, np.float64) @ basis.T  # last axis
    new = dict(encoder)
    new["patch_embed_proj"] = {name: writes(array) for name, array in encoder["patch_embed_proj"].items()}
    new["pos_embed"] = writes(encoder["pos_embed"])
    new["neck_0"] = {"kernel": np.einsum("dD,yxDc->yxdc", basis, np.float64(encoder["neck_0"]["kernel"]))}
    for i, block in enumerate(config.blocks):
        old = encoder[f"blocks_{i}"]
        padded = block.window != GLOBAL and any(side % block.window for side in config.grid)
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
    return _float32(new)


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


# --------------------------------------------------------------------------------------- attention


def attention_moments(config: Config) -> Callable[[Params, Batch], list[dict[str, jax.Array]]]:
    """Statistic per block: second moments of q, k (over heads) and of each head's output, its sum, and counts."""
    return _per_block(config, _attention_moments)


def _per_block(config: Config, moments: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]):
    """A statistic of a block's features -> that of all blocks, with the variance of the stream after each."""

    def of_block(features: dict[str, jax.Array]) -> dict[str, jax.Array]:
        stream = features["out"] - features["out"].mean(-1, keepdims=True)
        variance = jnp.square(stream).sum() / stream[..., 0].size
        return {**moments(features), "stream": variance, "batches": jnp.array(1.0)}

    def statistics(encoder: Params, batch: Batch) -> list[dict[str, jax.Array]]:
        features = run_encoder(config, encoder, batch)[1]
        return [of_block(features[f"blocks_{i}"]) for i in range(len(config.blocks))]

    return statistics


def _attention_moments(features: dict[str, jax.Array]) -> dict[str, jax.Array]:
    q, k, o = (features[name].reshape(-1, *features[name].shape[-2:]) for name in ("q", "k", "heads"))
    return {
        "q": jnp.einsum("tni,tnj->ij", q, q) / q.shape[1],
        "k": jnp.einsum("tni,tnj->ij", k, k) / k.shape[1],
        "output": jnp.einsum("tni,tnj->nij", o, o),
        "output_sum": o.sum(0),
        "tokens": jnp.array(float(len(o))),
    }


def attention_spectra(config: Config, encoder: Params, moments: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What each further channel per head is worth in each block: {group: [head_dim], falling}.

    The share of the residual stream's variance that the attention's output would be wrong by
    without it; an error of the logits counts as a like share of the output's variance.
    """
    worth = {}
    for i, (block, m) in enumerate(zip(config.blocks, moments, strict=True)):
        logits, outputs, _ = _attention_bases(encoder[f"blocks_{i}"]["attn"], m, block.head_dim)
        written = sum(o.singular_values**2 for o in outputs)
        read = logits.singular_values**2 / (logits.singular_values**2).sum() * written.sum()
        worth[f"blocks_{i}/attn"] = (written + read) * m["batches"] / m["stream"]
    return worth


def project_attention(config: Config, encoder: Params, moments: list[dict[str, Any]], widths: Sequence[int]) -> Params:
    """Gives q and k one basis per block, v and proj one per head, and keeps `widths[block]` channels of each."""
    new = dict(encoder)
    for i, (block, m, width) in enumerate(zip(config.blocks, moments, widths, strict=True)):
        attn = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), encoder[f"blocks_{i}"]["attn"])
        logits, outputs, means = _attention_bases(attn, m, width)
        # The softmax divides by sqrt(width) instead of sqrt(head_dim); tables are read by q before that.
        factor = (width / block.head_dim) ** 0.5
        along = lambda layer, matrix: {name: array @ matrix.T for name, array in layer.items()}
        encode, decode = (np.stack([getattr(o, side) for o in outputs]) for side in ("encode", "decode"))
        kernel = attn["proj"]["kernel"]
        new[f"blocks_{i}"] = {
            **encoder[f"blocks_{i}"],
            "attn": {
                "q": along(attn["q"], factor * logits.left),
                "k": along(attn["k"], logits.right),
                **{f"rel_pos_{axis}": attn[f"rel_pos_{axis}"] @ logits.right.T / factor for axis in "hw"},
                "v": {
                    "kernel": np.einsum("nrm,Dnm->Dnr", encode, attn["v"]["kernel"]),
                    "bias": np.einsum("nrm,nm->nr", encode, attn["v"]["bias"] - means),
                },
                # Attention weights sum to one, so a constant taken from v comes back through proj.
                "proj": {
                    "kernel": np.einsum("nmr,nmD->nrD", decode, kernel),
                    "bias": attn["proj"]["bias"] + np.einsum("nm,nmD->D", means, kernel),
                },
            },
        }
    return _float32(new)


def _attention_bases(attn: Params, m: dict[str, Any], width: int):
    """Bases of the logits (one), of the heads' outputs (each), and the outputs' means [n, head_dim]."""
    head_dim = attn["rel_pos_h"].shape[1]
    tables = [np.float64(attn[f"rel_pos_{axis}"]) for axis in "hw"]
    keys = m["k"] / m["tokens"] / head_dim + sum(table.T @ table / len(table) for table in tables)
    logits = projection.bilinear_basis(m["q"] / m["tokens"], keys, width)
    means = m["output_sum"] / m["tokens"]
    covariances = m["output"] / m["tokens"] - np.einsum("ni,nj->nij", means, means)
    kernels = np.float64(attn["proj"]["kernel"])
    readers = np.einsum("niD,njD->nij", kernels, kernels)
    outputs = [projection.output_basis(c, r, width) for c, r in zip(covariances, readers, strict=True)]
    return logits, outputs, means


# --------------------------------------------------------------------------------------------- MLP


def mlp_moments(config: Config) -> Callable[[Params, Batch], list[dict[str, jax.Array]]]:
    """Statistic per block: second moment and sum of the hidden activations, and counts."""
    return _per_block(config, _mlp_moments)


def _mlp_moments(features: dict[str, jax.Array]) -> dict[str, jax.Array]:
    hidden = features["mlp"].reshape(-1, features["mlp"].shape[-1])
    return {
        "hidden": hidden.T @ hidden,
        "hidden_sum": hidden.sum(0),
        "tokens": jnp.array(float(len(hidden))),
    }


class HiddenUnits:
    """The hidden units of one MLP in order of worth."""

    def __init__(self, kernel: jax.Array, m: dict[str, Any]):
        self.mean = m["hidden_sum"] / m["tokens"]
        self.covariance = m["hidden"] / m["tokens"] - np.outer(self.mean, self.mean)
        self.kernel = np.float64(kernel)
        self.order, gains = projection.choose_units(self.covariance, self.kernel)
        self.worth = gains * m["batches"] / m["stream"]  # share of the residual stream's variance

    def refit(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kept units (ascending), the kernel on them, and what to add to the bias."""
        kept = np.sort(self.order[:width])
        return kept, *projection.refit(self.covariance, self.mean, self.kernel, kept)


def hidden_units(encoder: Params, moments: list[dict[str, Any]]) -> list[HiddenUnits]:
    return [HiddenUnits(encoder[f"blocks_{i}"]["mlp_lin2"]["kernel"], m) for i, m in enumerate(moments)]


def project_mlp(encoder: Params, units: Sequence[HiddenUnits], widths: Sequence[int]) -> Params:
    """Keeps the `widths[block]` best hidden units of each MLP and refits what reads them."""
    new = dict(encoder)
    for i, (block_units, width) in enumerate(zip(units, widths, strict=True)):
        kept, kernel, bias = block_units.refit(width)
        old = encoder[f"blocks_{i}"]
        new[f"blocks_{i}"] = {
            **old,
            "mlp_lin1": {name: np.asarray(array)[..., kept] for name, array in old["mlp_lin1"].items()},
            "mlp_lin2": {"kernel": kernel, "bias": np.float64(old["mlp_lin2"]["bias"]) + bias},
        }
    return _float32(new)


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
