"""Projects heads of any family: one basis per block for q and k, one per head for v and proj."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np

from slimsam_jax.compression.projection.statistics import Moments, Weighting, in_float64, like
from slimsam_jax.models.sam import Params
from slimsam_jax.pruning.bases import Compression, bilinear_basis, output_basis

TABLES = ("rel_pos_h", "rel_pos_w")  # [distances, d], which q reads besides k: of SAM's ViT alone


class HeadBases(NamedTuple):
    """Bases of one block: of its logits, and of each head's output with its mean.

    Attributes:
      logit_gains, value_gains: of each channel, falling; see `head_bases`.
    """

    query: np.ndarray  # [d, d]
    key: np.ndarray  # [d, d]
    outputs: list[Compression]  # of [e, e], one a head
    means: np.ndarray  # [n, e]
    logit_gains: np.ndarray  # [d]
    value_gains: np.ndarray  # [e]

    @property
    def gains(self) -> np.ndarray:
        """Of a channel of q, k and v together, where they are as wide."""
        return self.value_gains + self.logit_gains


def head_bases(
    encoder: Params, moments: Moments, weighting: Weighting = "none", pooled: Collection[int] = ()
) -> list[HeadBases]:
    """Bases of every block at full width, of `encoder`'s "blocks_i"; `project_heads` cuts them.

    Unweighted, q and k get the best bilinear form, the heads' outputs the best approximation in
    the residual stream, and a channel gains the share of the stream's variance that would be
    wrong without it (an error of the logits counting as a like share of the output's).
    Weighted, all errors are measured where they end, in the embedding, by the sensitivity, and
    a channel gains the share of the embedding's variance, as if the errors of different tokens
    were not correlated.

    Args:
      pooled: places of blocks whose queries are pooled by maxima, which turn with no basis: theirs are the channels of
        q and k themselves, in an order.
    """
    bases = []
    for i in range(len(moments["attention"])):
        basis = _bases_of_block(encoder[f"blocks_{i}"]["attn"], moments, i, weighting)
        if i in pooled:
            basis = _in_order(basis, moments, i, weighting)
        share = moments["tokens"] / moments["blocks"][i] if weighting == "none" else 1
        bases.append(basis._replace(logit_gains=basis.logit_gains * share, value_gains=basis.value_gains * share))
    return bases


def _bases_of_block(attn: Params, moments: Moments, i: int, weighting: Weighting) -> HeadBases:
    """As `head_bases`, but for unweighted gains: squared errors of a token in the residual stream."""
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
    tables = [np.float64(attn[name]) for name in TABLES if name in attn]
    keys = m["k"] / m["keys"] / len(queries) + sum(table.T @ table / len(table) for table in tables)
    logits = bilinear_basis(queries, keys)
    read = logits.singular_values**2 / (logits.singular_values**2).sum() * written.sum()
    return HeadBases(logits.left, logits.right, outputs, means, read, written)


def _in_order(basis: HeadBases, moments: Moments, i: int, weighting: Weighting) -> HeadBases:
    """The basis with the channels of q and k as they are, the best first."""
    moment = moments["attention"][i]
    score = np.diag(np.float64(moment["q"])) / moment["tokens"]
    if weighting == "none":
        score = score * np.diag(np.float64(moment["k"])) / moment["keys"]
        score = score / score.sum() * basis.value_gains.sum()  # an error of the logits counts as a like share
    else:
        hurt = np.diag(np.float64(moments["sensitivity"]["queries"][i])) / moments["embedding"]
        score = score * len(basis.outputs) * hurt
    order = np.argsort(-score, kind="stable")
    turned = np.eye(len(score))[order]
    return basis._replace(query=turned, key=turned, logit_gains=score[order])


def project_heads(
    encoder: Params, bases: Sequence[HeadBases], keys: Sequence[int], values: Sequence[int], masked: bool = False
) -> Params:
    """Gives q and k one basis per block, v and proj one per head; keeps `keys` and `values` channels of a block's.

    Args:
      masked: the other channels are zero instead of cut: the same function in the shapes that there were, up to
        rounding. What was compiled for those serves again.
    """
    if masked:
        whole = [len(basis.logit_gains) for basis in bases], [len(basis.value_gains) for basis in bases]
        bases = [_first(*each) for each in zip(bases, keys, values, strict=True)]
        return project_heads(encoder, bases, *whole)
    new = dict(encoder)
    for i, (basis, key_dim, value_dim) in enumerate(zip(bases, keys, values, strict=True)):
        attn = jax.tree.map(np.float64, jax.device_get(encoder[f"blocks_{i}"]["attn"]))
        # The softmax divides by the root of the new width; tables are read by q before that.
        factor = (key_dim / len(basis.query)) ** 0.5
        along = lambda layer, matrix: {name: array @ matrix.T for name, array in layer.items()}
        key = basis.key[:key_dim]
        turned = {"q": along(attn["q"], factor * basis.query[:key_dim]), "k": along(attn["k"], key)}
        turned |= {name: attn[name] @ key.T / factor for name in TABLES if name in attn}
        turned |= _project_values(attn, basis, value_dim)
        new[f"blocks_{i}"] = {**encoder[f"blocks_{i}"], "attn": {**attn, **turned}}
    return like(encoder, new)


def _project_values(attn: Params, basis: HeadBases, width: int) -> Params:
    """v and proj."""
    encode = np.stack([output.encode[:width] for output in basis.outputs])
    decode = np.stack([output.decode[:, :width] for output in basis.outputs])
    kernel = attn["proj"]["kernel"]
    return {
        "v": {
            "kernel": np.einsum("nrm,Dnm->Dnr", encode, attn["v"]["kernel"]),
            "bias": np.einsum("nrm,nm->nr", encode, attn["v"]["bias"] - basis.means),
        },
        # Attention weights sum to one, so a constant taken from v comes back through proj.
        "proj": {
            "kernel": np.einsum("nmr,nmD->nrD", decode, kernel),
            "bias": attn["proj"]["bias"] + np.einsum("nm,nmD->D", basis.means, kernel),
        },
    }


def _first(basis: HeadBases, key_dim: int, value_dim: int) -> HeadBases:
    """With zeros in place of all channels but the first of q and k, and of v."""
    stays = lambda size, width: (np.arange(size) < width).astype(np.float64)
    own, rows = stays(len(basis.value_gains), value_dim), stays(len(basis.query), key_dim)[:, None]
    outputs = [o._replace(encode=own[:, None] * o.encode, decode=o.decode * own) for o in basis.outputs]
    return basis._replace(query=rows * basis.query, key=rows * basis.key, outputs=outputs)
