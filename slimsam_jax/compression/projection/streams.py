"""Streams whose channels are selected by importance, and what reads them refitted by least squares, norms and all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from slimsam_jax.compression import found_groups
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.calibration_images import Batch, Calibration
from slimsam_jax.compression.gradients import gradients
from slimsam_jax.compression.projection import plain_vit
from slimsam_jax.compression.projection.statistics import Moments
from slimsam_jax.compression.steps import Prune
from slimsam_jax.models.sam import Architecture, Params, Sam

# Relative to the mean power of a channel. Errors of earlier cuts lie in directions that vary little, and with a smaller
# one readers magnify them: at 1e-6 a random SAM 2 tiny is off by 5e5 of the embedding's variance, at 1e-2 by 1e-3.
RIDGE = 1e-2


def kept_channels(
    sam: Sam, step: Prune, ratio: float, calibration: Calibration, seed: int, norms: Sequence[str]
) -> list[np.ndarray]:
    """Ascending indices of the channels of each stream that stay, by importance.

    With the allocation "global" streams compete; else every stream keeps the same share. Scores of first order let a
    stage's stream vanish, which is all that later ones have of the image (experiments/LOG.md).

    Args:
      norms: the path of an array along each stream.
    """
    how = "global" if step.allocation == "global" else "local"
    scoring = dataclasses.replace(step, criterion="taylor", allocation=how, importance_loss="disturbance")
    # On the host, where no program is compiled for each shape that is scored.
    encoder, grads = jax.device_get((sam.params["image_encoder"], gradients(sam, scoring, calibration, seed)))
    keep = found_groups.choose(sam.config, encoder, grads, scoring, Target(ratio), seed)
    return [np.asarray(keep[name]) for name in groups_along(sam.config, norms)]


def groups_along(config: Architecture, paths: Sequence[str]) -> list[str]:
    """The groups that arrays are along, by their paths."""
    of = {member.path: group.name for group in found_groups.groups_of(config).groups for member in group.members}
    return [of[path] for path in paths]


def moments(sam: Sam, batches: Iterable[Batch], seed: int, moments_of: Any, changes: Sequence[Change] = ()) -> Moments:
    """The part "stream" of a family's `moments_of`, of the streams alone or of what changes leave of them."""
    encoder = sam.params["image_encoder"]
    if changes:
        dtype = jax.tree.leaves(encoder)[0].dtype
        encoder = {**encoder, "changes": [change.writes.astype(dtype) for change in changes]}
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


def reading_of(change: Change, moment: Moments, normal: bool) -> tuple[np.ndarray, np.ndarray]:
    """What a reader of a stream takes for it: x ~ x' @ turned + constant, [d, D] and [D], of what is left, x'.

    Args:
      moment: `statistics.across`.
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
    # A single channel is nothing behind a norm, and readers are left the constant.
    inner += (RIDGE * np.trace(second) / width or 1.0) * np.eye(width)
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


def behind_norm(
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
