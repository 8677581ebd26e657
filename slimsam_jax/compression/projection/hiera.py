"""Projects Hiera, whose streams are four, of which the first alone may be rotated.

The first block of a later stage pools the stream by maxima, so the later streams' channels are selected, by Disturbed
Taylor importance, by which the four streams also compete for widths. What reads a stream (the layers behind its norms,
the next stage, the neck) is then refitted by least squares, to give what it gave. Heads are as EfficientSAM's
(`plain_vit`), but for q and k of the three blocks that pool: theirs are selected, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from slimsam_jax.compression import found_groups
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.calibration_images import Batch, Calibration
from slimsam_jax.compression.gradients import gradients
from slimsam_jax.compression.projection import plain_vit
from slimsam_jax.compression.projection.hiera_statistics import moments_of
from slimsam_jax.compression.projection.statistics import Moments, like
from slimsam_jax.compression.steps import Prune
from slimsam_jax.models.encoders import counts
from slimsam_jax.models.encoders.hiera import PATCHES
from slimsam_jax.models.encoders.hiera_config import STAGES, Config, Place, places
from slimsam_jax.models.sam import Params, Sam
from slimsam_jax.pruning import bases
from slimsam_jax.pruning.allocation import Costs

# Relative to the mean power of a channel. Errors of earlier cuts lie in directions that vary little, and with a smaller
# one readers magnify them: at 1e-6 a random SAM 2 tiny is off by 5e5 of the embedding's variance, at 1e-2 by 1e-3.
RIDGE = 1e-2


def project(sam: Sam, step: Prune, target: Target, calibration: Calibration, seed: int) -> Sam:
    """As `plain_vit.project`; with the allocation "local" every stage keeps the same share of its stream."""
    if step.part == "bottleneck":
        return plain_vit.project_bottleneck(sam, step, target, calibration, seed, WAYS)
    config, encoder = sam.config.encoder, sam.params["image_encoder"]
    keep = kept_channels(sam, step, target.channel_ratio(sam.config), calibration, seed)
    changes = changes_of(config, moments(sam, calibration("statistics of the streams"), seed), keep)
    found = moments(sam, calibration("statistics of what reads them"), seed, changes)
    return plain_vit.with_encoder(sam, project_streams(config, encoder, found, changes))


def kept_channels(sam: Sam, step: Prune, ratio: float, calibration: Calibration, seed: int) -> list[np.ndarray]:
    """Ascending indices of the channels of each stream that stay, by importance."""
    how = "local" if step.allocation == "local" else "global"
    scoring = dataclasses.replace(step, criterion="taylor", allocation=how, importance_loss="disturbance")
    # On the host, where no program is compiled for each shape that is scored.
    encoder, grads = jax.device_get((sam.params["image_encoder"], gradients(sam, scoring, calibration, seed)))
    keep = found_groups.choose(sam.config, encoder, grads, scoring, Target(ratio), seed)
    groups = found_groups.groups_of(sam.config).groups
    of = {member.path: group.name for group in groups for member in group.members}
    return [np.asarray(keep[of[f"blocks_{first}/norm2/scale"]]) for first in sam.config.encoder.firsts]


def moments(sam: Sam, batches: Iterable[Batch], seed: int, changes: Sequence[Change] = ()) -> Moments:
    """The part "stream" of `hiera_statistics.moments_of`, of the streams alone or of what changes leave of them."""
    encoder = sam.params["image_encoder"]
    if changes:
        encoder = {**encoder, "changes": [change.writes.astype(encoder["pos_embed"].dtype) for change in changes]}
    asked = dataclasses.replace(sam, params={**sam.params, "image_encoder": encoder})
    return plain_vit.moments(asked, batches, seed, "stream", moments_of=moments_of)["stream"]


class Change(NamedTuple):
    """How a stream changes.

    Attributes:
      writes: [d, D], what stays of it: x -> writes x.
      rotated: whether its rows are orthonormal directions, as those of the whole are; else it is a selection.
    """

    writes: np.ndarray
    rotated: bool


def changes_of(config: Config, found: Moments, keep: Sequence[np.ndarray]) -> list[Change]:
    """Selects channels, ascending; of the first stream leading directions by its `moments`, as many."""
    dims = [stage.dim for stage in config.stages]
    first = bases.residual_basis(sum(_readers(config, found)), len(keep[0]))
    later = [np.eye(dim)[kept] for dim, kept in zip(dims[1:], keep[1:], strict=True)]
    whole = lambda matrix: matrix.shape[0] == matrix.shape[1]
    return [Change(first, rotated=True), *(Change(matrix, rotated=whole(matrix)) for matrix in later)]


def project_streams(config: Config, encoder: Params, found: Moments, changes: Sequence[Change]) -> Params:
    """Changes the four streams, and refits what reads them by `moments` of what is left."""
    spots = places(config)
    new = dict(encoder)
    first = changes[0]
    new[PATCHES] = written(first, encoder[PATCHES])
    new |= {name: written(first, encoder[name]) for name in ("pos_embed", "pos_embed_window")}
    for i, place in enumerate(spots):
        new[f"blocks_{i}"] = _block(changes, place, encoder[f"blocks_{i}"], found["blocks"][i])
    for stage, change in enumerate(changes):
        name = f"neck_{STAGES - 1 - stage}"
        (new[name],) = refitted(*reading_of(change, found["ends"][stage], normal=False), [encoder[name]])
    return like(encoder, new)


def _readers(config: Config, found: Moments) -> list[np.ndarray]:
    """Second moments of the first stream behind each norm that reads it."""
    second = lambda i, name: np.float64(found["blocks"][i][name]["second"])
    readers = []
    for i, place in enumerate(places(config)):
        if place.stage - place.pools == 0:
            readers.append(second(i, "norm1"))
        if place.stage == 0:
            readers.append(second(i, "norm2"))
    return readers


def _block(changes: Sequence[Change], place: Place, old: Params, found: Moments) -> Params:
    source, own = changes[place.stage - place.pools], changes[place.stage]
    padded = bool(place.window) and any(side % place.window for side in place.grid)
    layers = [old["attn"][name] for name in "qkv"] + ([old["proj"]] if place.pools else [])
    norm1, layers = _behind_norm(source, found["norm1"], old["norm1"], layers, padded)
    norm2, (lin1,) = _behind_norm(own, found["norm2"], old["norm2"], [old["mlp_lin1"]], padded=False)
    new = {
        "norm1": norm1,
        "attn": {**dict(zip("qkv", layers, strict=False)), "proj": written(own, old["attn"]["proj"])},
        "norm2": norm2,
        "mlp_lin1": lin1,
        "mlp_lin2": written(own, old["mlp_lin2"]),
    }
    return new | ({"proj": written(own, layers[3])} if place.pools else {})


def written(change: Change, layer: Params | np.ndarray) -> Params | np.ndarray:
    """What writes to a stream: the last axis of its arrays."""
    if isinstance(layer, dict):
        return {name: written(change, array) for name, array in layer.items()}
    return np.float64(layer) @ change.writes.T


def reading_of(change: Change, moment: Moments, normal: bool) -> tuple[np.ndarray, np.ndarray]:
    """What a reader of a stream takes for it: x ~ x' @ turned + constant, [d, D] and [D], of what is left, x'.

    Args:
      moment: `hiera_statistics._across`.
      normal: x is behind a LayerNorm's scaling, and x' behind that of the narrower stream.
    """
    names = ("second", "cross", "sum", "wide_sum")
    second, cross, mean, wide = (np.float64(moment[name]) / float(moment["tokens"]) for name in names)
    width, size = change.writes.shape
    if change.rotated:
        scale = (size / width) ** 0.5 if normal else 1.0
        return scale * change.writes, wide - (wide @ change.writes.T) @ change.writes
    inner = second - np.outer(mean, mean)
    # Of the uncentred moment, which was summed in float32: a share of it is rounding, whatever the variance.
    inner += RIDGE * np.trace(second) / width * np.eye(width)
    turned = np.linalg.solve(inner, cross - np.outer(mean, wide))
    return turned, wide - mean @ turned


def refitted(turned: np.ndarray, constant: np.ndarray, layers: Sequence[Params]) -> list[Params]:
    """Layers that read x ~ x' @ turned + constant, for those that read x."""
    new = []
    for layer in layers:
        kernel, bias = np.float64(layer["kernel"]), np.float64(layer["bias"])
        flat = kernel.reshape(len(kernel), -1)
        shape = (len(turned), *kernel.shape[1:])
        new.append({"kernel": (turned @ flat).reshape(shape), "bias": bias + (constant @ flat).reshape(bias.shape)})
    return new


def _behind_norm(
    change: Change, moment: Moments, norm: Params, layers: Sequence[Params], padded: bool
) -> tuple[Params, list[Params]]:
    """A LayerNorm and the layers behind it: its scale and bias move into them.

    Of what is constant as much as possible stays in the norm if padding comes between: padded tokens do not have it.
    """
    turned, constant = reading_of(change, moment, normal=True)
    scale, width = np.float64(norm["scale"]), len(turned)
    turned, constant = turned * scale, constant * scale + np.float64(norm["bias"])
    kept = np.zeros(width)
    if padded:
        flat = np.concatenate([np.float64(layer["kernel"]).reshape(len(scale), -1) for layer in layers], axis=1)
        kept, *_ = np.linalg.lstsq((turned @ flat).T, flat.T @ constant, rcond=None)
    return {"scale": np.ones(width), "bias": kept}, refitted(turned, constant - kept @ turned, layers)


def group_costs(config: Config, kind: str) -> Costs:
    """As `plain_vit.group_costs`."""
    tables: Costs = {}
    before = counts.macs(config).total if kind == "macs" else 0
    for i, place in enumerate(places(config)):
        heads, inputs, dim = place.block.heads, place.inputs, place.dim
        own = {"qk": 2 * heads * (inputs + 1), "v": heads * (inputs + dim + 1), "mlp": 2 * dim + 1}
        for name, field in plain_vit.FIELDS.items():
            size = getattr(place.block, field)
            slope = own[name] if kind == "params" else counts.macs(_wider(config, i, field)).total - before
            tables[f"blocks_{i}/{name}"] = slope * np.arange(size + 1.0)
    return tables


def _wider(config: Config, index: int, field: str) -> Config:
    """With one channel more in a block."""
    stage = sum(index >= first for first in config.firsts[1:])
    blocks = list(config.stages[stage].blocks)
    block = blocks[index - config.firsts[stage]]
    blocks[index - config.firsts[stage]] = dataclasses.replace(block, **{field: getattr(block, field) + 1})
    stages = list(config.stages)
    stages[stage] = dataclasses.replace(stages[stage], blocks=tuple(blocks))
    return dataclasses.replace(config, stages=tuple(stages))


WAYS = plain_vit.Ways(moments_of, group_costs, lambda config: config.firsts[1:])
