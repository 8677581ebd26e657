"""The step `Prune` of a SAM: a SAM in, a narrower SAM out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slimsam_jax import pruning, sharding
from slimsam_jax.compression import found_groups, reference, vit_groups, widths
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.calibration_images import Batch, Calibration
from slimsam_jax.compression.gradients import check_finite, gradients
from slimsam_jax.compression.projection import attention, embedding, hiera, mlp, plain_vit, statistics, tiny_vit
from slimsam_jax.compression.selection import choose, grouping_of
from slimsam_jax.compression.steps import Prune
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import family_of, name_of
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import sam_costs
from slimsam_jax.pruning import allocation
from slimsam_jax.pruning.bases import residual_spectrum
from slimsam_jax.pruning.groups import Keep

# Multiply-accumulates of an image, below which compiling a program for narrower heads takes longer than it saves.
MASKED_BELOW = 3e9
PROJECTIONS = {"efficient_sam": plain_vit, "hiera": hiera, "tiny_vit": tiny_vit}


def prune(
    sam: Sam,
    step: Prune,
    target: Target,
    calibration: Calibration,
    seed: int,
    uniform: bool = False,
) -> Sam:
    """Cuts the channels of a step's part out of the image encoder.

    Args:
      target: how much, of the embedding's channels or of all bottleneck channels.
      calibration: what it is for -> batches on the devices, the same images at each call; projection needs
        them more than once. With labels (`data.prompted.AnnotatedBatches`) if its importance_loss is "masks".
      uniform: equal widths in all blocks, as stock SAM needs.

    Raises:
      InputError: the budget cannot be met.
      RunError: the model's statistics are not finite.
    """
    if (family := name_of(sam.config.encoder)) != "vit":
        found_groups.check_steps(sam.config, target, [step], uniform)
    if step.criterion == "projection" and family != "vit":
        return PROJECTIONS[family].project(sam, step, target, calibration, seed)
    if step.criterion == "projection":
        slim = project(sam, step, target, calibration, seed, uniform)
    else:
        # On the host, where no program is compiled for each shape that is scored and cut.
        encoder, grads = jax.device_get((sam.params["image_encoder"], gradients(sam, step, calibration, seed)))
        keep = choose(sam.config, encoder, grads, step, target, uniform, seed)
        slim = cut(_with_encoder(sam, encoder), keep, step)
    return _with_encoder(slim, jax.device_put(jax.device_get(slim.params["image_encoder"])))


def _with_encoder(sam: Sam, encoder: Any) -> Sam:
    own = sam.config.encoder
    config = sam.config.with_encoder(family_of(own).config_of(encoder, like=own))
    return dataclasses.replace(sam, config=config, params={**sam.params, "image_encoder": encoder})


def cut(sam: Sam, keep: Keep, step: Prune) -> Sam:
    """Removes all channels but `keep`, and settles what narrower heads change besides."""
    before, family = sam.params["image_encoder"], family_of(sam.config.encoder)
    encoder = pruning.shrink(before, grouping_of(sam.config, step), keep)
    if hasattr(family, "keep_logit_scale") and not step.quirks.jumping_logit_scale:
        encoder = family.keep_logit_scale(encoder, before)
    if step.quirks.zeroed_rel_pos:
        encoder = reference.zero_rel_pos(encoder)
    return _with_encoder(sam, encoder)


# ------------------------------------------------------------------------------------------- projection


def project(
    sam: Sam,
    step: Prune,
    target: Target,
    calibration: Calibration,
    seed: int,
    uniform: bool,
) -> Sam:
    """Chooses bases before it cuts (`compression.projection`); the MLPs are refitted behind heads already cut."""
    encoder = sam.params["image_encoder"]
    if step.part == "embedding":
        moment = _moments(sam, calibration("statistics of the stream"), seed, "stream")["stream"]
        width = widths.embedding_width(sam.config, target, step)
        return _with_encoder(sam, embedding.project_embedding(sam.config, encoder, moment, width))

    bases, gains = _bases(sam, step, calibration("statistics of heads"), seed)
    chosen = widths.bottleneck_widths(sam.config, gains, target, step, uniform)
    of_kind = lambda kind: [chosen[f"blocks_{i}/{kind}"] for i in range(len(bases))]

    cut = functools.partial(attention.project_heads, encoder, bases, of_kind("attn"), of_kind("attn"))
    masked = sam_costs.encoder_macs(sam.config).total < MASKED_BELOW
    parts = parts_of(step) if masked else parts_of(step)[1:]  # masked: as before, so that the program is the same
    found = _moments(_with_encoder(sam, cut(masked=masked)), calibration("statistics of MLPs"), seed, *parts)
    sam = _with_encoder(sam, cut())
    encoder = sam.params["image_encoder"]
    units = mlp.hidden_units(encoder, found, weighting(step), of_kind("mlp"))
    return _with_encoder(sam, mlp.project_mlp(encoder, units, of_kind("mlp")))


def _moments(sam: Sam, batches: Iterable[Batch], seed: int, *parts: statistics.Part) -> statistics.Moments:
    mesh = sharding.make_mesh()
    encoder = sharding.replicate(sam.params["image_encoder"], mesh)
    return check_finite(statistics.accumulate(statistic_of(sam.config, parts, mesh), encoder, batches, seed))


@functools.lru_cache(maxsize=2)
def statistic_of(config: Config, parts: tuple[statistics.Part, ...], mesh: Mesh) -> statistics.Statistic:
    """The same function for the same question, so that its program is compiled once."""
    return statistics.moments_of(config, parts, mesh)


def weighting(step: Prune) -> statistics.Weighting:
    """Whether what a projection loses is measured in the embedding."""
    return "none" if step.importance_loss == "none" else "disturbed"


def parts_of(step: Prune) -> tuple[statistics.Part, ...]:
    """Of the bottlenecks' moments; attention first."""
    return ("attention", "mlp", *(("sensitivity",) if step.importance_loss != "none" else ()))


def _bases(sam: Sam, step: Prune, batches: Iterable[Batch], seed: int):
    """Returns the bases of the attentions, and the gain of each of their channels and of the hidden units, uncut."""
    encoder = sam.params["image_encoder"]
    found = _moments(sam, batches, seed, *parts_of(step))
    bases = attention.head_bases(encoder, found, weighting(step))
    units = mlp.hidden_units(encoder, found, weighting(step))
    gains = {f"blocks_{i}/attn": basis.gains for i, basis in enumerate(bases)}
    return bases, gains | {f"blocks_{i}/mlp": unit.gains for i, unit in enumerate(units)}


# ------------------------------------------------------------------------------------------- to look at


def channel_gains(sam: Sam, step: Prune, calibration: Calibration, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the gain of each further channel of a step's groups, the best first; nothing is cut or normalised.

    Returns:
      {"embedding": [D]} or {"blocks_i/attn": [head_dim], "blocks_i/mlp": [mlp_dim]}. Of a projection, channels
      are directions (units of an MLP), and a gain is a share of variance: of the residual stream's for the
      embedding, of the image embedding's or the stream's for the others (see `compression.projection`).
    """
    if step.criterion == "projection":
        if step.part == "embedding":
            moment = _moments(sam, calibration("statistics"), seed, "stream")["stream"]
            return {"embedding": residual_spectrum(moment)}
        return _bases(sam, step, calibration("statistics"), seed)[1]
    grads = jax.device_get(gradients(sam, step, calibration, seed))
    grouping = vit_groups.groups_of(sam.config)
    kinds = ("embedding",) if step.part == "embedding" else ("attn", "mlp")
    names = [name for kind in kinds for name in vit_groups.of_kind(grouping, kind)]
    encoder = jax.device_get(sam.params["image_encoder"])
    return allocation.gains_of(pruning.score(encoder, grouping, grads, step.criterion, seed=seed, only=names))
