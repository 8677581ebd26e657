"""Scores -> the channels of a SAM that stay, for all groups that a step `Prune` cuts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from slimsam_jax import pruning
from slimsam_jax.compression import found_groups, reference, vit_groups, widths
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.steps import Prune
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import name_of
from slimsam_jax.models.sam import Architecture
from slimsam_jax.pruning import Grouping, allocation
from slimsam_jax.pruning.groups import Keep, Scores
from slimsam_jax.pruning.selection import keep_global, keep_widths


def choose(
    config: Architecture,
    encoder: Any,
    grads: Any,
    step: Prune,
    target: Target,
    uniform: bool = False,
    seed: int = 0,
) -> Keep:
    """Parameters and gradients of an image encoder -> the channels that stay, for all groups of the step.

    Returns:
      {group of `grouping_of`: ascending indices}.
    """
    if name_of(config.encoder) != "vit":
        return found_groups.choose(config, encoder, grads, step, target, seed)
    keep = _choose(config, functools.partial(_score, config, encoder, grads, step, seed), step, target, uniform)
    return {name: kept for name, kept in keep.items() if name in grouping_of(config, step).widths}


def _choose(config: Config, score: Callable[[str], Scores], step: Prune, target: Target, uniform: bool) -> Keep:
    """Of a ViT; `score` takes a kind of group."""
    if step.part == "embedding":
        return _choose_embedding(config, score("embedding"), step, target)
    attention, mlp = score("attn"), score("mlp")
    if step.quirks.rounded_selection and target.budget is None:
        return _choose_as_reference(config, attention, mlp, step, target.ratio, uniform)
    if step.head_channels == "whole":
        return _choose_heads(score("attn/heads"), mlp, step, target)
    normal = reference.normalize(attention, step.normalizer) | reference.normalize(mlp, step.normalizer)
    chosen = widths.bottleneck_widths(config, allocation.gains_of(normal), target, step, uniform)
    keep = keep_widths(attention | mlp, chosen)
    if step.head_channels == "shared":
        return keep
    return _choose_values(keep, score("attn/qk"), score("attn/v"))


def grouping_of(config: Architecture, step: Prune) -> Grouping:
    """The groups that a step may cut."""
    if name_of(config.encoder) == "vit":
        return vit_groups.groups_of(config, tied=step.head_channels != "separate")
    return found_groups.groups_of(config)


def _score(config: Config, encoder: Any, grads: Any, step: Prune, seed: int, kind: str) -> Scores:
    """Of the groups of one kind. Those of a single channel, which the graph does not list, stay: one score each."""
    grouping = vit_groups.groups_of(config, tied=kind == "attn")
    names = vit_groups.of_kind(grouping, kind)
    own = found_groups.own_of(grouping, step) if kind == "attn/v" else ()
    found = pruning.score(encoder, grouping, grads, step.criterion, own, seed, only=names)
    whole = {f"blocks_{i}/{kind}": np.ones(1) for i in range(len(config.blocks))}
    return found if kind == "embedding" else {name: found.get(name, one) for name, one in whole.items()}


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
