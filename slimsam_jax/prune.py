"""The pruning half of a stage: a SAM in, a narrower SAM out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from slimsam_jax import labels, metrics, sharding, widths
from slimsam_jax.errors import RunError
from slimsam_jax.models import groups as channels
from slimsam_jax.models import projection, statistics
from slimsam_jax.models.config import Config
from slimsam_jax.models.features import run_encoder
from slimsam_jax.models.sam import Sam
from slimsam_jax.pruning import importance, masks, reference
from slimsam_jax.pruning.group import Group, Keep, Scores, check_groups
from slimsam_jax.pruning.projection import residual_spectrum
from slimsam_jax.recipes import Recipe
from slimsam_jax.stages import Stage
from slimsam_jax.widths import Target

Batch = dict[str, Any]
# Multiply-accumulates of an image, below which compiling a program for narrower heads takes longer than it saves.
MASKED_BELOW = 3e9
Calibration = Callable[[str], Iterable[Batch]]  # what it is for -> batches, the same images at each call


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
        them more than once. With labels (`labels.AnnotatedBatches`) if the recipe's signal is "masks".
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


def _check_finite(found: Any) -> Any:
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
        raise RunError("the statistics of the model are not finite; does it give finite embeddings for these images?")
    return found


# ------------------------------------------------------------------------------------- whole channels


def gradients(sam: Sam, recipe: Recipe, calibration: Calibration, seed: int) -> Any:
    """What the criterion reads besides the parameters; nothing but the parameters themselves if it reads none."""
    if recipe.criterion in ("magnitude", "random"):
        return sam.params["image_encoder"]
    mesh, batches = sharding.make_mesh(), calibration("importance")
    encoder = sharding.replicate(sam.params["image_encoder"], mesh)
    if recipe.needs_labels:
        loss = functools.partial(labels.mask_loss, sam)
        return _check_finite(importance.loss_gradients(loss, encoder, batches, recipe.gradients, mesh))
    embed = lambda params, batch: run_encoder(sam.config, params, batch)[0]
    options = (recipe.noise_std, recipe.gradients, recipe.probes, mesh)
    return _check_finite(importance.disturbed_gradients(embed, encoder, batches, jax.random.key(seed), *options))


def choose(
    config: Config,
    encoder: Any,
    grads: Any,
    stage: Stage,
    recipe: Recipe,
    target: Target,
    uniform: bool = False,
    seed: int = 0,
) -> Keep:
    """Parameters and gradients -> the channels that stay, for all groups of a stage."""
    score = lambda groups: importance.channel_scores(encoder, grads, groups, recipe.criterion, seed)
    if stage.cuts == "embedding":
        return _choose_embedding(config, score([channels.embedding_group(config)]), recipe, target)
    attention, mlp = score(channels.attention_groups(config)), score(channels.mlp_groups(config))
    if recipe.reference_selection and target.budget is None:
        return _choose_as_reference(config, attention, mlp, recipe, target.ratio, uniform)
    if recipe.whole_heads:
        return _choose_heads(score(channels.head_groups(config)), mlp, recipe, target)
    normal = reference.normalize(attention, recipe.normalizer) | reference.normalize(mlp, recipe.normalizer)
    chosen = widths.bottleneck_widths(config, masks.worth_of(normal), target, recipe, uniform)
    keep = masks.keep_widths(attention | mlp, chosen)
    if not recipe.values_apart:
        return keep
    return _choose_values(keep, score(channels.logit_groups(config)), score(channels.value_groups(config)))


def _choose_embedding(config: Config, scores: Scores, recipe: Recipe, target: Target) -> Keep:
    heads = config.blocks[0].heads
    if recipe.tie_embedding:
        return reference.keep_local_tied(scores, target.channel_ratio(config), round_to=heads, ties=heads)
    if recipe.reference_selection:
        return reference.keep_local(scores, target.channel_ratio(config), round_to=heads)
    return masks.keep_widths(scores, {"embedding": widths.embedding_width(config, target, recipe)})


def _choose_as_reference(
    config: Config, attention: Scores, mlp: Scores, recipe: Recipe, ratio: float, uniform: bool
) -> Keep:
    heads = config.blocks[0].heads
    if uniform:
        # Stock SAM has heads * head_dim == embed_dim, which stage 1 has fixed.
        head_dim = dict.fromkeys(attention, config.embed_dim // heads)
        return masks.keep_widths(attention, head_dim) | reference.keep_local(mlp, ratio, heads)
    if recipe.compete == "block":
        return reference.keep_local(attention, ratio, 1) | reference.keep_local(mlp, ratio, heads)

    def over_blocks(scores: Scores, copies: int) -> Keep:
        normal = reference.normalize(scores, recipe.normalizer, copies)
        return reference.keep_global(normal, ratio, heads, copies, recipe.round_by_index, recipe.skip_vanishing)

    return over_blocks(attention, heads) | over_blocks(mlp, 1)


def _choose_heads(heads: Scores, mlp: Scores, recipe: Recipe, target: Target) -> Keep:
    """Whole heads compete with heads, MLP channels with MLP channels, over all blocks."""
    normal = lambda scores: reference.normalize(scores, recipe.normalizer)
    least = recipe.least * (1 - target.ratio)
    kept = masks.keep_global(normal(heads), target.ratio, least=least)
    return kept | masks.keep_global(normal(mlp), target.ratio, recipe.multiple, least)


def _choose_values(keep: Keep, logits: Scores, values: Scores) -> Keep:
    """Splits what the heads share (q and k) from what they need not (v and proj), at the same widths."""
    width = {name: len(kept) for name, kept in keep.items()}
    apart = masks.keep_widths(logits, {name: width[name.removesuffix("/qk")] for name in logits})
    apart |= masks.keep_widths(values, {name: width[name.removesuffix("/v")] for name in values})
    return {name: kept for name, kept in keep.items() if name.endswith("/mlp")} | apart


def all_groups(config: Config) -> list[Group]:
    """Every group that a stage may cut; those of the heads overlap, and `keep` names one kind of them."""
    kinds = (channels.attention_groups, channels.logit_groups, channels.value_groups, channels.head_groups)
    bottlenecks = [group for kind in (*kinds, channels.mlp_groups) for group in kind(config)]
    return [channels.embedding_group(config), *bottlenecks]


def cut(sam: Sam, keep: Keep, recipe: Recipe) -> Sam:
    """Removes all channels but `keep`, and settles what narrower heads change besides."""
    groups = [group for group in all_groups(sam.config) if group.name in keep]
    check_groups(sam.params["image_encoder"], groups)
    encoder = masks.shrink(sam.params["image_encoder"], groups, keep)
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
    """Chooses bases before it cuts (`models.projection`); the MLPs are refitted behind heads already cut."""
    encoder = sam.params["image_encoder"]
    if stage.cuts == "embedding":
        moment = _moments(sam, calibration("statistics of the stream"), seed, "stream")["stream"]
        width = widths.embedding_width(sam.config, target, recipe)
        return _with_encoder(sam, projection.project_embedding(sam.config, encoder, moment, width))

    bases, worth = _bases(sam, recipe, calibration("statistics of heads"), seed)
    chosen = widths.bottleneck_widths(sam.config, worth, target, recipe, uniform)
    of_kind = lambda kind: [chosen[f"blocks_{i}/{kind}"] for i in range(len(bases))]

    cut = functools.partial(projection.project_attention, sam.config, encoder, bases, of_kind("attn"))
    masked = metrics.encoder_macs(sam.config).total < MASKED_BELOW
    parts = _parts(recipe) if masked else _parts(recipe)[1:]  # masked: as before, so that the program is the same
    found = _moments(_with_encoder(sam, cut(masked=masked)), calibration("statistics of MLPs"), seed, *parts)
    sam = _with_encoder(sam, cut())
    encoder = sam.params["image_encoder"]
    units = projection.hidden_units(encoder, found, recipe.weighting, of_kind("mlp"))
    return _with_encoder(sam, projection.project_mlp(encoder, units, of_kind("mlp")))


def _moments(sam: Sam, batches: Iterable[Batch], seed: int, *parts: statistics.Part) -> statistics.Moments:
    encoder = sharding.replicate(sam.params["image_encoder"], sharding.make_mesh())
    return _check_finite(statistics.accumulate(_statistic(sam.config, parts), encoder, batches, seed))


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
    bases = projection.attention_bases(sam.config, encoder, found, recipe.weighting)
    units = projection.hidden_units(encoder, found, recipe.weighting)
    worth = {f"blocks_{i}/attn": basis.worth for i, basis in enumerate(bases)}
    return bases, worth | {f"blocks_{i}/mlp": unit.worth for i, unit in enumerate(units)}


# ------------------------------------------------------------------------------------------- to look at


def worth(sam: Sam, stage: Stage, recipe: Recipe, calibration: Calibration, seed: int = 0) -> dict[str, np.ndarray]:
    """What each further channel of a stage's groups is worth, the best first; nothing is cut or normalised.

    Returns:
      {"embedding": [D]} or {"blocks_i/attn": [head_dim], "blocks_i/mlp": [mlp_dim]}. Of a projection, channels
      are directions (units of an MLP), and worth is a share of variance: of the residual stream's for the
      embedding, of the image embedding's or the stream's for the others (see `models.projection`).
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
    return masks.worth_of(importance.channel_scores(encoder, grads, groups, recipe.criterion, seed))
