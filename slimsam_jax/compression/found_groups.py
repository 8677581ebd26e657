"""The groups of an encoder of any family, from its jaxpr, and which of their channels stay, by importance."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax import pruning
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.steps import Prune, Quirks
from slimsam_jax.errors import InputError
from slimsam_jax.models.encoders import family_of, name_of
from slimsam_jax.models.sam import Architecture, abstract_params, image_encoder
from slimsam_jax.pruning.groups import Keep
from slimsam_jax.pruning.importance import NORMALIZERS


def choose(config: Architecture, encoder: Any, grads: Any, step: Prune, target: Target, seed: int) -> Keep:
    """Parameters and gradients of an encoder -> the channels that stay, for all groups of a step's part."""
    grouping, names = groups_of(config), names_of(config, step)
    scores = pruning.score(encoder, grouping, grads, step.criterion, own_of(grouping, step), seed, only=names)
    scores = {name: NORMALIZERS[step.normalizer](score) for name, score in scores.items()}
    how = {"round_to": step.round_to, "min_keep": step.min_keep * (1 - target.ratio)}
    if step.allocation == "params":
        how["costs"] = parameter_costs(encoder, grouping, scores)
    allocation = {"params": "cost"}.get(step.allocation, step.allocation)
    return pruning.select(scores, target.ratio, allocation, **how)


def check(config: Architecture, target: Target, steps: Sequence[Prune], uniform: bool) -> None:
    """Raises InputError for what only ViTs can do, and for a budget that cannot be met, before anything is computed."""
    check_steps(config, target, steps, uniform)
    if target.budget:
        target.channel_ratio(config)


def check_steps(config: Architecture, target: Target, steps: Sequence[Prune], uniform: bool) -> None:
    """As `check`, but for the budget's amount, which a model that is half cut may be within already."""
    family, rotates = name_of(config.encoder), getattr(family_of(config.encoder), "ROTATES", False)
    for step in steps:
        if (projects := step.criterion == "projection") and not rotates:
            raise InputError(f"a {family}'s streams cannot be rotated, so there is no projection: take --recipe taylor")
        if step.allocation == "macs" and not projects:
            raise InputError(
                f"a {family}'s channels compete globally, locally or by params: set prune.allocation=global"
            )
        if step.quirks != Quirks():
            raise InputError(
                f"the reference's known bugs are of SAM's ViT, and this is a {family}: take --recipe taylor"
            )
    if uniform:
        raise InputError(
            f"--uniform is for SAM's ViT, and this is a {family}: leave it out, or set prune.allocation=local"
        )
    if target.budget:
        _check_budget(config, target, steps, family)


def _check_budget(config: Architecture, target: Target, steps: Sequence[Prune], family: str) -> None:
    """Raises InputError for a budget of a kind that the family or its steps cannot meet."""
    if not hasattr(family_of(config.encoder), "narrowed"):
        raise InputError(f"--budget is for SAM's ViT, TinyViT and SAM 2's Hiera, and this is a {family}: give --ratio")
    if [step.part for step in steps] == ["bottleneck", "embedding"]:
        raise InputError("the bottlenecks take up what a --budget leaves, so that the embedding is cut before them")
    if any(step.criterion != "projection" for step in steps):
        raise InputError(f"a {family} meets a --budget by projection alone: take --recipe default, or give --ratio")
    if target.budget.kind == "latency":
        raise InputError(f"a {family}'s blocks are not timed one by one: give --budget params= or macs=, or --ratio")


@functools.lru_cache(maxsize=8)  # a few seconds each
def groups_of(config: Architecture) -> pruning.Grouping:
    """The groups of its image encoder."""
    module = image_encoder(config, attention="plain")
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    embed = lambda params, images: module.apply({"params": params}, images)[0]
    return pruning.find_groups(embed, abstract_params(config)["image_encoder"], images)


def names_of(config: Architecture, step: Prune) -> list[str]:
    """The groups that a step cuts: those of its part; channels within heads, or whole heads.

    Raises:
      InputError: there is none.
    """
    grouping, holds = groups_of(config), family_of(config.encoder).STAGES[step.part]
    heads = {group.copies for group in grouping.groups if group.copies}
    within = {group.name for group in grouping.groups if group.copies}
    left_out = within if step.head_channels == "whole" else heads
    found = [g.name for g in grouping.groups if g.name not in left_out and holds([m.path for m in g.members])]
    if not found:
        raise InputError(f"a {name_of(config.encoder)} has no channels to cut in its {step.part}")
    return found


def own_of(grouping: pruning.Grouping, step: Prune) -> list[str]:
    """Groups whose heads keep channels of their own."""
    return [group.name for group in grouping.groups if group.copies and step.head_channels == "separate"]


def parameter_costs(encoder: Any, grouping: pruning.Grouping, names: Sequence[str]) -> dict[str, np.ndarray]:
    """{group: [size + 1] parameters at each width, the other groups whole}."""
    arrays, costs = pruning.by_path(encoder), {}
    for group in grouping.groups:
        if group.name in names:
            of_one = sum(arrays[path].size for path in {member.path for member in group.members}) / group.size
            costs[group.name] = of_one * np.arange(group.size + 1.0)
    return costs
