"""Projects the heads: one basis per block for q and k, one per head for v and proj."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from slimsam_jax.compression.projection.statistics import Moments, Weighting, in_float64, like
from slimsam_jax.models.config import Config
from slimsam_jax.models.sam import Params
from slimsam_jax.pruning.bases import Compression, bilinear_basis, output_basis

# --------------------------------------------------------------------------------------- attention


class AttentionBases(NamedTuple):
    """Bases of one block: of its logits, of each head's output, the outputs' means, and the gain of each channel."""

    query: np.ndarray  # [r, m]
    key: np.ndarray  # [r, m]
    outputs: list[Compression]
    means: np.ndarray  # [n, m]
    gains: np.ndarray  # [m], falling


def attention_bases(
    config: Config, encoder: Params, moments: Moments, weighting: Weighting = "none"
) -> list[AttentionBases]:
    """Bases of every block at full width; `project_attention` cuts them.

    Unweighted, q and k get the best bilinear form, the heads' outputs the best approximation in
    the residual stream, and a channel gains the share of the stream's variance that would be
    wrong without it (an error of the logits counting as a like share of the output's).
    Weighted, all errors are measured where they end, in the embedding, by the sensitivity, and
    a channel gains the share of the embedding's variance, as if the errors of different tokens
    were not correlated.
    """
    return [_bases(encoder[f"blocks_{i}"]["attn"], moments, i, weighting) for i in range(len(config.blocks))]


def _bases(attn: Params, moments: Moments, i: int, weighting: Weighting) -> AttentionBases:
    found = bases_of_block(attn, moments, i, weighting, [np.float64(attn[f"rel_pos_{axis}"]) for axis in "hw"])
    gains = found.value_gains + found.logit_gains
    if weighting == "none":
        gains = gains * moments["tokens"] / moments["blocks"][i]
    return AttentionBases(found.query, found.key, found.outputs, found.means, gains)


class HeadBases(NamedTuple):
    """Bases of one block: of its logits, and of each head's output with its mean.

    Attributes:
      logit_gains, value_gains: of each channel, falling: weighted, shares of the embedding's variance; unweighted,
        squared errors of a token in the residual stream (of the logits such as are a like share of the output's).
    """

    query: np.ndarray  # [d, d]
    key: np.ndarray  # [d, d]
    outputs: list[Compression]  # of [e, e], one a head
    means: np.ndarray  # [n, e]
    logit_gains: np.ndarray  # [d]
    value_gains: np.ndarray  # [e]


def bases_of_block(
    attn: Params, moments: Moments, i: int, weighting: Weighting, tables: Sequence[np.ndarray] = ()
) -> HeadBases:
    """Bases of block i of SAM's ViT or EfficientSAM's; `tables`, [distances, d], are what q reads besides k."""
    m, kernels = in_float64(moments["attention"][i]), np.float64(attn["proj"]["kernel"])
    queries, means = m["q"] / m["tokens"], m["output_sum"] / m["tokens"]
    covariances = m["output"] / m["tokens"] - np.einsum("ni,nj->nij", means, means)
    metric = np.eye(kernels.shape[2])
    if weighting == "disturbed":
        metric = in_float64(moments["sensitivity"]["middle"][i]) / moments["embedding"]
    readers = np.einsum("niD,DE,njE->nij", kernels, metric, kernels, optimize=True)
    outputs = [output_basis(c, r) for c, r in zip(covariances, readers, strict=True)]
    written = sum(o.singular_values**2 for o in outputs)
    if weighting == "disturbed":
        hurt = len(kernels) * in_float64(moments["sensitivity"]["queries"][i]) / moments["embedding"]
        logits = output_basis(queries, hurt)
        return HeadBases(logits.encode, logits.decode.T, outputs, means, logits.singular_values**2, written)
    keys = m["k"] / m["keys"] / len(queries) + sum(table.T @ table / len(table) for table in tables)
    logits = bilinear_basis(queries, keys)
    read = logits.singular_values**2 / (logits.singular_values**2).sum() * written.sum()
    return HeadBases(logits.left, logits.right, outputs, means, read, written)


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
    stays = (np.arange(len(basis.gains)) < width).astype(np.float64)
    rows = stays[:, None]
    outputs = [o._replace(encode=rows * o.encode, decode=o.decode * stays) for o in basis.outputs]
    return basis._replace(query=rows * basis.query, key=rows * basis.key, outputs=outputs)
