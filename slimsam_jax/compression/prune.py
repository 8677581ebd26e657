"""The pruning half of a stage: a SAM in, a narrower SAM out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression import widths
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.calibration import Batch, Calibration
from slimsam_jax.compression.gradients import check_finite, gradients
from slimsam_jax.compression.projection import attention, embedding, mlp, statistics
from slimsam_jax.compression.recipes import Recipe
from slimsam_jax.compression.selection import choose
from slimsam_jax.compression.steps import Stage
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import vit_groups as channels
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import reference_macs
from slimsam_jax.pruning import allocation, importance
from slimsam_jax.pruning.bases import residual_spectrum
from slimsam_jax.pruning.groups import Group, Keep, check_groups
from slimsam_jax.pruning.shrink import shrink

# Multiply-accumulates of an image, below which compiling a program for narrower heads takes longer than it saves.
MASKED_BELOW = 3e9


def prune(
    sam: Sam,
    stage: Stage,
    recipe: Recipe,
    target: Target,
    calibration: Calibration,
    seed: int,
    uniform: bool = False,
) -> Sam:
    """Cuts a stage's channels out of the image encoder.

    Args:
      target: how much, of the embedding's channels or of all bottleneck channels.
      calibration: what it is for -> batches on the devices, the same images at each call; projection needs
        them more than once. With labels (`data.prompted.AnnotatedBatches`) if the recipe's signal is "masks".
      uniform: equal widths in all blocks, as stock SAM needs.

    Raises:
      InputError: the budget cannot be met.
      RunError: the model's statistics are not finite.
    """
    if recipe.criterion == "projection":
        slim = project(sam, stage, recipe, target, calibration, seed, uniform)
    else:
        # On the host, where no program is compiled for each shape that is scored and cut.
        encoder, grads = jax.device_get((sam.params["image_encoder"], gradients(sam, recipe, calibration, seed)))
        keep = choose(sam.config, encoder, grads, stage, recipe, target, uniform, seed)
        slim = cut(_with_encoder(sam, encoder), keep, recipe)
    return _with_encoder(slim, jax.device_put(jax.device_get(slim.params["image_encoder"])))


def _with_encoder(sam: Sam, encoder: Any) -> Sam:
    config = channels.shrunk_config(sam.config, encoder)
    return dataclasses.replace(sam, config=config, params={**sam.params, "image_encoder": encoder})


def all_groups(config: Config) -> list[Group]:
    """Every group that a stage may cut; those of the heads overlap, and `keep` names one kind of them."""
    kinds = (channels.attention_groups, channels.logit_groups, channels.value_groups, channels.head_groups)
    bottlenecks = [group for kind in (*kinds, channels.mlp_groups) for group in kind(config)]
    return [channels.embedding_group(config), *bottlenecks]


def cut(sam: Sam, keep: Keep, recipe: Recipe) -> Sam:
    """Removes all channels but `keep`, and settles what narrower heads change besides."""
    groups = [group for group in all_groups(sam.config) if group.name in keep]
    check_groups(sam.params["image_encoder"], groups)
    encoder = shrink(sam.params["image_encoder"], groups, keep)
    if recipe.keep_logit_scale:
        encoder = channels.keep_logit_scale(encoder, sam.config, channels.shrunk_config(sam.config, encoder))
    if not recipe.slice_rel_pos:
        encoder = channels.zero_rel_pos(encoder)
    return _with_encoder(sam, encoder)


# ------------------------------------------------------------------------------------------- projection


def project(
    sam: Sam,
    stage: Stage,
    recipe: Recipe,
    target: Target,
    calibration: Calibration,
    seed: int,
    uniform: bool,
) -> Sam:
    """Chooses bases before it cuts (`compression.projection`); the MLPs are refitted behind heads already cut."""
    encoder = sam.params["image_encoder"]
    if stage.cuts == "embedding":
        moment = _moments(sam, calibration("statistics of the stream"), seed, "stream")["stream"]
        width = widths.embedding_width(sam.config, target, recipe)
        return _with_encoder(sam, embedding.project_embedding(sam.config, encoder, moment, width))

    bases, worth = _bases(sam, recipe, calibration("statistics of heads"), seed)
    chosen = widths.bottleneck_widths(sam.config, worth, target, recipe, uniform)
    of_kind = lambda kind: [chosen[f"blocks_{i}/{kind}"] for i in range(len(bases))]

    cut = functools.partial(attention.project_attention, sam.config, encoder, bases, of_kind("attn"))
    masked = reference_macs.encoder_macs(sam.config).total < MASKED_BELOW
    parts = _parts(recipe) if masked else _parts(recipe)[1:]  # masked: as before, so that the program is the same
    found = _moments(_with_encoder(sam, cut(masked=masked)), calibration("statistics of MLPs"), seed, *parts)
    sam = _with_encoder(sam, cut())
    encoder = sam.params["image_encoder"]
    units = mlp.hidden_units(encoder, found, recipe.weighting, of_kind("mlp"))
    return _with_encoder(sam, mlp.project_mlp(encoder, units, of_kind("mlp")))


def _moments(sam: Sam, batches: Iterable[Batch], seed: int, *parts: statistics.Part) -> statistics.Moments:
    encoder = sharding.replicate(sam.params["image_encoder"], sharding.make_mesh())
    return check_finite(statistics.accumulate(_statistic(sam.config, parts), encoder, batches, seed))


@functools.lru_cache(maxsize=2)
def _statistic(config: Config, parts: tuple[statistics.Part, ...]) -> statistics.Statistic:
    """The same function for the same question, so that its program is compiled once."""
    return statistics.moments_of(config, parts)


def _parts(recipe: Recipe) -> tuple[statistics.Part, ...]:
    """Of the bottlenecks' moments; attention first."""
    return ("attention", "mlp", *(("sensitivity",) if recipe.weighting == "disturbed" else ()))


def _bases(sam: Sam, recipe: Recipe, batches: Iterable[Batch], seed: int):
    """Those of the attentions, and what each of their channels and of the hidden units is worth, uncut."""
    encoder = sam.params["image_encoder"]
    found = _moments(sam, batches, seed, *_parts(recipe))
    bases = attention.attention_bases(sam.config, encoder, found, recipe.weighting)
    units = mlp.hidden_units(encoder, found, recipe.weighting)
    worth = {f"blocks_{i}/attn": basis.worth for i, basis in enumerate(bases)}
    return bases, worth | {f"blocks_{i}/mlp": unit.worth for i, unit in enumerate(units)}


# ------------------------------------------------------------------------------------------- to look at


def worth(sam: Sam, stage: Stage, recipe: Recipe, calibration: Calibration, seed: int = 0) -> dict[str, np.ndarray]:
    """What each further channel of a stage's groups is worth, the best first; nothing is cut or normalised.

    Returns:
      {"embedding": [D]} or {"blocks_i/attn": [head_dim], "blocks_i/mlp": [mlp_dim]}. Of a projection, channels
      are directions (units of an MLP), and worth is a share of variance: of the residual stream's for the
      embedding, of the image embedding's or the stream's for the others (see `compression.projection`).
    """
    if recipe.criterion == "projection":
        if stage.cuts == "embedding":
            moment = _moments(sam, calibration("statistics"), seed, "stream")["stream"]
            return {"embedding": residual_spectrum(moment)}
        return _bases(sam, recipe, calibration("statistics"), seed)[1]
    grads = jax.device_get(gradients(sam, recipe, calibration, seed))
    groups = [channels.embedding_group(sam.config)]
    if stage.cuts == "bottleneck":
        groups = [*channels.attention_groups(sam.config), *channels.mlp_groups(sam.config)]
    encoder = sam.params["image_encoder"]
    return allocation.worth_of(importance.channel_scores(encoder, grads, groups, recipe.criterion, seed))
