"""Scores -> the channels of a SAM that stay, for all groups of a stage."""

from __future__ import annotations

from typing import Any

from slimsam_jax.compression import reference, widths
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.steps import Prune
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import vit_groups as channels
from slimsam_jax.pruning import allocation, importance
from slimsam_jax.pruning.groups import Keep, Scores
from slimsam_jax.pruning.selection import keep_global, keep_widths


def choose(
    config: Config,
    encoder: Any,
    grads: Any,
    step: Prune,
    target: Target,
    uniform: bool = False,
    seed: int = 0,
) -> Keep:
    """Parameters and gradients -> the channels that stay, for all groups of a stage."""
    score = lambda groups: importance.channel_scores(encoder, grads, groups, step.criterion, seed)
    if step.part == "embedding":
        return _choose_embedding(config, score([channels.embedding_group(config)]), step, target)
    attention, mlp = score(channels.attention_groups(config)), score(channels.mlp_groups(config))
    if step.quirks.rounded_selection and target.budget is None:
        return _choose_as_reference(config, attention, mlp, step, target.ratio, uniform)
    if step.head_channels == "whole":
        return _choose_heads(score(channels.head_groups(config)), mlp, step, target)
    normal = reference.normalize(attention, step.normalizer) | reference.normalize(mlp, step.normalizer)
    chosen = widths.bottleneck_widths(config, allocation.gains_of(normal), target, step, uniform)
    keep = keep_widths(attention | mlp, chosen)
    if step.head_channels == "shared":
        return keep
    return _choose_values(keep, score(channels.logit_groups(config)), score(channels.value_groups(config)))


def _choose_embedding(config: Config, scores: Scores, step: Prune, target: Target) -> Keep:
    heads = config.blocks[0].heads
    if step.quirks.tied_embedding:
        return reference.keep_local_tied(scores, target.channel_ratio(config), round_to=heads, ties=heads)
    if step.quirks.rounded_selection:
        return reference.keep_local(scores, target.channel_ratio(config), round_to=heads)
    return keep_widths(scores, {"embedding": widths.embedding_width(config, target, step)})


def _choose_as_reference(
    config: Config, attention: Scores, mlp: Scores, step: Prune, ratio: float, uniform: bool
) -> Keep:
    heads = config.blocks[0].heads
    if uniform:
        # Stock SAM has heads * head_dim == embed_dim, which stage 1 has fixed.
        head_dim = dict.fromkeys(attention, config.embed_dim // heads)
        return keep_widths(attention, head_dim) | reference.keep_local(mlp, ratio, heads)
    if step.allocation == "local":
        return reference.keep_local(attention, ratio, 1) | reference.keep_local(mlp, ratio, heads)

    def over_blocks(scores: Scores, copies: int) -> Keep:
        normal = reference.normalize(scores, step.normalizer, copies)
        quirks = step.quirks
        return reference.keep_global(normal, ratio, heads, copies, quirks.rounded_by_index, quirks.vanishing_kept)

    return over_blocks(attention, heads) | over_blocks(mlp, 1)


def _choose_heads(heads: Scores, mlp: Scores, step: Prune, target: Target) -> Keep:
    """Whole heads compete with heads, MLP channels with MLP channels, over all blocks."""
    normal = lambda scores: reference.normalize(scores, step.normalizer)
    min_keep = step.min_keep * (1 - target.ratio)
    kept = keep_global(normal(heads), target.ratio, min_keep=min_keep)
    return kept | keep_global(normal(mlp), target.ratio, step.round_to, min_keep)


def _choose_values(keep: Keep, logits: Scores, values: Scores) -> Keep:
    """Splits what the heads share (q and k) from what they need not (v and proj), at the same widths."""
    width = {name: len(kept) for name, kept in keep.items()}
    apart = keep_widths(logits, {name: width[name.removesuffix("/qk")] for name in logits})
    apart |= keep_widths(values, {name: width[name.removesuffix("/v")] for name in values})
    return {name: kept for name, kept in keep.items() if name.endswith("/mlp")} | apart
