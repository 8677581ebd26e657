"""Projects Hiera, whose streams are four, of which the first alone may be rotated.

The first block of a later stage pools the stream by maxima, so the later streams' channels are selected, by Disturbed
Taylor importance. What reads a stream (the layers behind its norms,
the next stage, the neck) is then refitted by least squares, to give what it gave. Heads are as EfficientSAM's
(`plain_vit`), but for q and k of the three blocks that pool: theirs are selected, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.calibration_images import Calibration
from slimsam_jax.compression.projection import plain_vit, streams
from slimsam_jax.compression.projection.hiera_statistics import moments_of
from slimsam_jax.compression.projection.statistics import Moments, like
from slimsam_jax.compression.projection.streams import Change, behind_norm, refitted
from slimsam_jax.compression.steps import Prune
from slimsam_jax.models.encoders import counts
from slimsam_jax.models.encoders.hiera import PATCHES
from slimsam_jax.models.encoders.hiera_config import STAGES, Config, Place, places
from slimsam_jax.models.sam import Params, Sam
from slimsam_jax.pruning import bases
from slimsam_jax.pruning.allocation import Costs


def project(sam: Sam, step: Prune, target: Target, calibration: Calibration, seed: int) -> Sam:
    """As `plain_vit.project`; every stage keeps the same share of its stream, but for the allocation "global"."""
    if step.part == "bottleneck":
        return plain_vit.project_bottleneck(sam, step, target, calibration, seed, WAYS)
    config, encoder = sam.config.encoder, sam.params["image_encoder"]
    norms = [f"blocks_{first}/norm2/scale" for first in config.firsts]
    keep = streams.kept_channels(sam, step, target.channel_ratio(sam.config), calibration, seed, norms)
    found = streams.moments(sam, calibration("statistics of the streams"), seed, moments_of)
    changes = changes_of(config, found, keep)
    found = streams.moments(sam, calibration("statistics of what reads them"), seed, moments_of, changes)
    return plain_vit.with_encoder(sam, project_streams(config, encoder, found, changes))


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
        (new[name],) = refitted(*streams.reading_of(change, found["ends"][stage], normal=False), [encoder[name]])
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
    norm1, layers = behind_norm(source, found["norm1"], old["norm1"], layers, padded)
    norm2, (lin1,) = behind_norm(own, found["norm2"], old["norm2"], [old["mlp_lin1"]], padded=False)
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
