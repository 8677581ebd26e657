"""Slimming the image encoder by choosing bases (`pruning.projection`), within the stock architecture.

First the embedding, then the head widths, then the MLPs, each on statistics of the model as
cut so far. With nothing cut, nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from slimsam_jax.models.config import GLOBAL, Config
from slimsam_jax.models.sam import Params
from slimsam_jax.models.statistics import Moments
from slimsam_jax.pruning import projection

Weighting = Literal["none", "disturbed"]


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


# --------------------------------------------------------------------------------------- attention


class AttentionBases(NamedTuple):
    """Bases of one block: of its logits, of each head's output, the outputs' means, and what each channel is worth."""

    query: np.ndarray  # [r, m]
    key: np.ndarray  # [r, m]
    outputs: list[projection.Compression]
    means: np.ndarray  # [n, m]
    worth: np.ndarray  # [m], falling


def attention_bases(
    config: Config, encoder: Params, moments: Moments, weighting: Weighting = "none"
) -> list[AttentionBases]:
    """Bases of every block at full width; `project_attention` cuts them.

    Unweighted, q and k get the best bilinear form, the heads' outputs the best approximation in
    the residual stream, and a channel is worth the share of the stream's variance that would be
    wrong without it (an error of the logits counting as a like share of the output's).
    Weighted, all errors are measured where they end, in the embedding, by the sensitivity, and
    a channel is worth the share of the embedding's variance, as if the errors of different tokens
    were not correlated.
    """
    return [_bases(encoder[f"blocks_{i}"]["attn"], moments, i, weighting) for i in range(len(config.blocks))]


def _bases(attn: Params, moments: Moments, i: int, weighting: Weighting) -> AttentionBases:
    m, kernels = _wide(moments["attention"][i]), np.float64(attn["proj"]["kernel"])
    queries, means = m["q"] / m["tokens"], m["output_sum"] / m["tokens"]
    covariances = m["output"] / m["tokens"] - np.einsum("ni,nj->nij", means, means)
    metric = np.eye(kernels.shape[2])
    if weighting == "disturbed":
        metric = _wide(moments["sensitivity"]["middle"][i]) / moments["embedding"]
    readers = np.einsum("niD,DE,njE->nij", kernels, metric, kernels, optimize=True)
    outputs = [projection.output_basis(c, r) for c, r in zip(covariances, readers, strict=True)]
    written = sum(o.singular_values**2 for o in outputs)
    if weighting == "disturbed":
        hurt = len(kernels) * _wide(moments["sensitivity"]["queries"][i]) / moments["embedding"]
        logits = projection.output_basis(queries, hurt)
        return AttentionBases(logits.encode, logits.decode.T, outputs, means, written + logits.singular_values**2)
    head_dim = attn["rel_pos_h"].shape[1]
    tables = [np.float64(attn[f"rel_pos_{axis}"]) for axis in "hw"]
    keys = m["k"] / m["keys"] / head_dim + sum(table.T @ table / len(table) for table in tables)
    logits = projection.bilinear_basis(queries, keys)
    read = logits.singular_values**2 / (logits.singular_values**2).sum() * written.sum()
    worth = (written + read) * moments["tokens"] / moments["blocks"][i]
    return AttentionBases(logits.left, logits.right, outputs, means, worth)


def project_attention(
    config: Config, encoder: Params, bases: Sequence[AttentionBases], widths: Sequence[int], masked: bool = False
) -> Params:
    """Gives q and k one basis per block, v and proj one per head, and keeps `widths[block]` channels of each.

    Args:
      masked: the other channels are zero instead of cut: the same function in the shapes that there were, up to
        rounding. What was compiled for those serves again.
    """
    if masked:
        whole = [block.head_dim for block in config.blocks]
        bases = [_first(basis, width) for basis, width in zip(bases, widths, strict=True)]
        return project_attention(config, encoder, bases, whole)
    new = dict(encoder)
    for i, (block, basis, width) in enumerate(zip(config.blocks, bases, widths, strict=True)):
        attn = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), encoder[f"blocks_{i}"]["attn"])
        # The softmax divides by sqrt(width) instead of sqrt(head_dim); tables are read by q before that.
        factor = (width / block.head_dim) ** 0.5
        along = lambda layer, matrix: {name: array @ matrix.T for name, array in layer.items()}
        encode = np.stack([output.encode[:width] for output in basis.outputs])
        decode = np.stack([output.decode[:, :width] for output in basis.outputs])
        query, key, kernel = basis.query[:width], basis.key[:width], attn["proj"]["kernel"]
        new[f"blocks_{i}"] = {
            **encoder[f"blocks_{i}"],
            "attn": {
                "q": along(attn["q"], factor * query),
                "k": along(attn["k"], key),
                **{f"rel_pos_{axis}": attn[f"rel_pos_{axis}"] @ key.T / factor for axis in "hw"},
                "v": {
                    "kernel": np.einsum("nrm,Dnm->Dnr", encode, attn["v"]["kernel"]),
                    "bias": np.einsum("nrm,nm->nr", encode, attn["v"]["bias"] - basis.means),
                },
                # Attention weights sum to one, so a constant taken from v comes back through proj.
                "proj": {
                    "kernel": np.einsum("nmr,nmD->nrD", decode, kernel),
                    "bias": attn["proj"]["bias"] + np.einsum("nm,nmD->D", basis.means, kernel),
                },
            },
        }
    return like(encoder, new)


def _first(basis: AttentionBases, width: int) -> AttentionBases:
    """With zeros in place of all channels but the first `width`."""
    stays = (np.arange(len(basis.worth)) < width).astype(np.float64)
    rows = stays[:, None]
    outputs = [o._replace(encode=rows * o.encode, decode=o.decode * stays) for o in basis.outputs]
    return basis._replace(query=rows * basis.query, key=rows * basis.key, outputs=outputs)


# --------------------------------------------------------------------------------------------- MLP


class HiddenUnits:
    """The hidden units of one MLP in order of worth, the `count` best at least; see `attention_bases` for the worth."""

    def __init__(
        self, kernel: jax.Array, moments: Moments, i: int, weighting: Weighting = "none", count: int | None = None
    ):
        self.moments, self.kernel = moments["mlp"][i], np.float64(kernel)
        _, covariance = self._mean_and_covariance()
        if weighting == "disturbed":
            metric = projection.root(_wide(moments["sensitivity"]["out"][i]) / moments["embedding"])
            self.order, self.worth = projection.choose_units(covariance, self.kernel @ metric, count)
        else:
            self.order, gains = projection.choose_units(covariance, self.kernel, count)
            self.worth = gains * moments["tokens"] / moments["blocks"][i]

    def _mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Computed each time: those of all blocks of SAM-H together would be 6.7 GB."""
        m = _wide(self.moments)
        mean = m["hidden_sum"] / m["tokens"]
        return mean, m["hidden"] / m["tokens"] - np.outer(mean, mean)

    def refit(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kept units (ascending), the kernel on them, and what to add to the bias."""
        kept, (mean, covariance) = np.sort(self.order[:width]), self._mean_and_covariance()
        return kept, *projection.refit(covariance, mean, self.kernel, kept)


def hidden_units(
    encoder: Params, moments: Moments, weighting: Weighting = "none", counts: Sequence[int] | None = None
) -> list[HiddenUnits]:
    """Those of every block, or of each the `counts[block]` best."""
    counts = counts or [None] * len(moments["mlp"])
    kernel_of = lambda i: encoder[f"blocks_{i}"]["mlp_lin2"]["kernel"]
    return [HiddenUnits(kernel_of(i), moments, i, weighting, count) for i, count in enumerate(counts)]


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
    return like(encoder, new)


def _wide(tree: Moments) -> Moments:
    """In float64."""
    return jax.tree.map(np.float64, tree)


def like(encoder: Params, new: Params) -> Params:
    """`new` in the dtype of the encoder that it was made from, on the host: nothing is compiled to convert it."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, encoder["pos_embed"].dtype), new)
