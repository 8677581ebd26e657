"""The pruning half of a stage: a SAM in, a narrower SAM out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax import distill
from slimsam_jax.errors import RunError
from slimsam_jax.models import groups as channels
from slimsam_jax.models import projection
from slimsam_jax.models.config import Config
from slimsam_jax.models.features import run_encoder
from slimsam_jax.models.sam import Sam
from slimsam_jax.pruning import importance, masks, reference
from slimsam_jax.pruning.group import Keep, Scores, check_groups
from slimsam_jax.recipes import Recipe, Stage

Batch = dict[str, Any]


def prune(
    sam: Sam,
    stage: Stage,
    recipe: Recipe,
    ratio: float,
    calibration: Callable[[str], Iterable[Batch]],
    seed: int,
    uniform: bool = False,
) -> Sam:
    """Cuts a stage's channels out of the image encoder.

    Args:
      ratio: share of the embedding's (stage 1) or of all bottleneck (stage 2) channels to remove.
      calibration: what it is for -> batches on the devices, the same images at each call; projection needs
        them more than once.
      uniform: equal widths in all blocks, as stock SAM needs.

    Raises:
      RunError: the model's statistics are not finite.
    """
    mesh_sam = _with_encoder(sam, distill.replicate(sam.params["image_encoder"], distill.data_mesh()))
    if recipe.criterion == "projection":
        slim = project(mesh_sam, stage, ratio, calibration, uniform)
    else:
        embed = lambda params, batch: run_encoder(sam.config, params, batch)[0]
        grads = importance.disturbed_gradients(
            embed,
            mesh_sam.params["image_encoder"],
            calibration("importance"),
            jax.random.key(seed),
            recipe.noise_std,
            recipe.gradients,
        )
        _check_finite(grads)
        keep = choose(sam.config, sam.params["image_encoder"], jax.device_get(grads), stage, recipe, ratio, uniform)
        slim = cut(sam, keep, recipe)
    return _with_encoder(slim, jax.tree.map(jnp.asarray, jax.device_get(slim.params["image_encoder"])))


def _with_encoder(sam: Sam, encoder: Any) -> Sam:
    config = channels.shrunk_config(sam.config, encoder)
    return dataclasses.replace(sam, config=config, params={**sam.params, "image_encoder": encoder})


def _check_finite(statistics: Any) -> None:
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(statistics)):
        raise RunError("the statistics of the model are not finite; does it give finite embeddings for these images?")


def project(sam: Sam, stage: Stage, ratio: float, calibration: Callable[[str], Iterable[Batch]], uniform: bool) -> Sam:
    """Chooses bases before it cuts (`models.projection`); each cut works on statistics of the model so far."""

    def statistics(kind: Callable[[Config], Any], name: str) -> Any:
        found = projection.accumulate(kind(sam.config), sam.params["image_encoder"], calibration(name))
        _check_finite(found)
        return found

    config, heads = sam.config, sam.config.blocks[0].heads
    if stage.name == "embedding":
        width = masks.rounded_width(config.embed_dim, ratio, multiple=heads)
        moment = statistics(projection.stream_moment, "statistics")
        return _with_encoder(sam, projection.project_embedding(config, sam.params["image_encoder"], moment, width))

    moments = statistics(projection.attention_moments, "attention statistics")
    worth = projection.attention_spectra(config, sam.params["image_encoder"], moments)
    widths = [config.embed_dim // heads] * len(worth) if uniform else _global_widths(worth, ratio)
    sam = _with_encoder(sam, projection.project_attention(config, sam.params["image_encoder"], moments, widths))

    moments = statistics(projection.mlp_moments, "MLP statistics")
    units = projection.hidden_units(sam.params["image_encoder"], moments)
    worth = {str(i): unit.worth for i, unit in enumerate(units)}
    if uniform:
        widths = [_stock_mlp_dim(config.embed_dim, len(w), ratio) for w in worth.values()]
    else:
        widths = _global_widths(worth, ratio)
    return _with_encoder(sam, projection.project_mlp(sam.params["image_encoder"], units, widths))


def _global_widths(worth: Scores, ratio: float) -> list[int]:
    return [len(kept) for kept in masks.keep_global(worth, ratio, least=LEAST_SHARE).values()]


def choose(config: Config, encoder: Any, grads: Any, stage: Stage, recipe: Recipe, ratio: float, uniform: bool) -> Keep:
    """Parameters and gradients -> the channels that stay, for all groups of a stage."""
    heads = config.blocks[0].heads
    if stage.name == "embedding":
        scores = importance.channel_scores(encoder, grads, [channels.embedding_group(config)], recipe.criterion)
        if recipe.tie_embedding:
            return reference.keep_local_tied(scores, ratio, round_to=heads, ties=heads)
        return masks.keep_local(scores, ratio, multiple=heads)  # a multiple, so that equal heads can fill it
    attention = importance.channel_scores(encoder, grads, channels.attention_groups(config), recipe.criterion)
    mlp = importance.channel_scores(encoder, grads, channels.mlp_groups(config), recipe.criterion)
    if uniform:
        # Stock SAM has heads * head_dim == embed_dim.
        head_dim = {name: config.embed_dim // heads for name in attention}
        if recipe.reference_selection:
            return masks.keep_widths(attention, head_dim) | reference.keep_local(mlp, ratio, heads)
        mlp_dim = {name: _stock_mlp_dim(config.embed_dim, len(score), ratio) for name, score in mlp.items()}
        return masks.keep_widths(attention, head_dim) | masks.keep_widths(mlp, mlp_dim)
    if recipe.reference_selection:
        choose_kind = functools.partial(_reference_global, recipe=recipe, ratio=ratio, heads=heads)
        return choose_kind(attention, copies=heads) | choose_kind(mlp, copies=1)
    return _global(attention, recipe, ratio) | _global(mlp, recipe, ratio)


# At least this share of every block stays: scores are first-order and cannot see a block vanish.
LEAST_SHARE = 1 / 8


def _global(scores: Scores, recipe: Recipe, ratio: float) -> Keep:
    return masks.keep_global(reference.normalize(scores, recipe.normalizer), ratio, least=LEAST_SHARE)


def _stock_mlp_dim(embed_dim: int, mlp_dim: int, ratio: float) -> int:
    """The width asked for, or the next smaller one that survives stock SAM's int(embed_dim * mlp_ratio)."""
    width = masks.rounded_width(mlp_dim, ratio)
    while int(embed_dim * (width / embed_dim)) != width:
        width -= 1
    return width


def _reference_global(scores: Scores, recipe: Recipe, ratio: float, heads: int, copies: int) -> Keep:
    return reference.keep_global(reference.normalize(scores, recipe.normalizer, copies), ratio, heads, copies)


def cut(sam: Sam, keep: Keep, recipe: Recipe) -> Sam:
    """Removes all channels but `keep`, and settles what narrower heads change besides."""
    groups = [
        channels.embedding_group(sam.config),
        *channels.attention_groups(sam.config),
        *channels.mlp_groups(sam.config),
    ]
    check_groups(sam.params["image_encoder"], groups)
    encoder = masks.shrink(sam.params["image_encoder"], groups, keep)
    if recipe.keep_logit_scale:
        encoder = channels.keep_logit_scale(encoder, sam.config, channels.shrunk_config(sam.config, encoder))
    if not recipe.slice_rel_pos:
        encoder = channels.zero_rel_pos(encoder)
    return _with_encoder(sam, encoder)
