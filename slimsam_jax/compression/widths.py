"""Chooses how wide each layer stays: by the gain of its channels, and by a ratio or a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from slimsam_jax.compression.budget import Budget, Target, even_cut, group_costs
from slimsam_jax.compression.steps import Prune
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import Config
from slimsam_jax.pruning import allocation
from slimsam_jax.pruning.allocation import Gains

Widths = dict[str, int]


def embedding_width(config: Config, target: Target, step: Prune) -> int:
    """Returns a multiple of the heads, which equal heads can fill; for a budget wide enough that it can be used up."""
    round_to = math.lcm(config.blocks[0].heads, step.round_to)
    width = allocation.rounded_width(config.embed_dim, target.channel_ratio(config), round_to)
    if target.budget and target.budget.kind != "latency":
        cost = lambda width: target.budget.cost(dataclasses.replace(config, embed_dim=width))
        while cost(width) < target.budget.amount and width + round_to <= config.embed_dim:
            width += round_to
    return width


def bottleneck_widths(config: Config, gains: Gains, target: Target, step: Prune, uniform: bool) -> Widths:
    """Chooses widths of heads ("blocks_i/attn") and MLPs ("blocks_i/mlp").

    Args:
      config: the model, whose embedding is cut already.
      gains: {group: [size], falling}, of all of them.
      uniform: equal blocks, with heads * head_dim == embed_dim, as stock SAM wants them.

    Raises:
      InputError: the budget cannot be met.
    """
    if target.budget:
        return _within(target.budget, config, gains, step, uniform)
    if uniform:
        width = lambda size: allocation.rounded_width(size, target.ratio, step.round_to)
        return _uniform(config, gains, width, step.round_to)
    if step.allocation == "local":
        return allocation.local_widths(gains, target.ratio, step.round_to)
    if step.allocation in ("params", "macs"):
        even = dataclasses.replace(even_cut(config, target.ratio), embed_dim=config.embed_dim)
        same = Budget(step.allocation, Budget(step.allocation, 1).cost(even))
        return _within(same, config, gains, step, uniform)
    widths = {}
    for kind in ("attn", "mlp"):
        of_kind = {name: gain for name, gain in gains.items() if name.endswith(kind)}
        widths |= allocation.global_widths(of_kind, target.ratio, step.round_to, step.min_keep * (1 - target.ratio))
    return widths


def target_of(step: Prune, target: Target) -> Target:
    """Returns how much a step cuts: its own ratio, else the target of the run."""
    return target if step.ratio is None else Target(step.ratio)


def check(config: Config, target: Target, steps: Sequence[Prune], uniform: bool) -> None:
    """Raises InputError now for what could not be met later. A latency budget is held against measured times."""
    for step in steps:
        own, heads = target_of(step, target), config.blocks[0].heads
        width, ratio = embedding_width(config, own, step), own.channel_ratio(config)
        if step.quirks.rounded_selection:
            _check_reference_rounding(config, ratio, heads, step, uniform)
        if step.part == "embedding":
            config = dataclasses.replace(config, embed_dim=width)
        elif own.budget is None or own.budget.kind != "latency":
            sizes = {f"blocks_{i}/attn": block.head_dim for i, block in enumerate(config.blocks)}
            sizes |= {f"blocks_{i}/mlp": block.mlp_dim for i, block in enumerate(config.blocks)}
            equal = {name: np.ones(size) for name, size in sizes.items()}
            config = with_widths(config, bottleneck_widths(config, equal, own, step, uniform))


def _check_reference_rounding(config: Config, ratio: float, heads: int, step: Prune, uniform: bool) -> None:
    """Raises InputError where the reference, which rounds down, would leave nothing."""
    kept: dict[str, float] = {}
    if step.part == "embedding":
        kept = {"embedding": config.embed_dim * (1 - ratio) / heads}
        if config.embed_dim % heads:
            raise InputError(f"the reference needs an embedding ({config.embed_dim}) that the {heads} heads divide")
    elif uniform or step.allocation == "local":
        kept["heads"] = min(block.head_dim for block in config.blocks) * (1 - ratio)
        kept["MLPs"] = min(block.mlp_dim for block in config.blocks) * (1 - ratio) / heads
    if vanishing := [name for name, share in kept.items() if share < 1]:
        raise InputError(f"at ratio {ratio:.3g} the reference's rounding leaves nothing of the {vanishing[0]}")


def _uniform(config: Config, gains: Gains, mlp_width: Callable[[int], int], round_to: int) -> Widths:
    head_dim = config.embed_dim // config.blocks[0].heads
    return {
        name: head_dim
        if name.endswith("attn")
        else stock_mlp_dim(config.embed_dim, mlp_width(len(gain)), min(round_to, len(gain)))
        for name, gain in gains.items()
    }


def stock_mlp_dim(embed_dim: int, width: int, round_to: int = 1) -> int:
    """Returns the width asked for, or the next smaller one that survives stock SAM's int(embed_dim * mlp_ratio).

    Raises:
      InputError: there is none.
    """
    for narrower in range(width, 0, -round_to):
        if int(embed_dim * (narrower / embed_dim)) == narrower:
            return narrower
    raise InputError(
        f"no MLP of at most {width} channels survives stock SAM's rounding; cut less, or without --uniform"
    )


def with_widths(config: Config, widths: Mapping[str, int]) -> Config:
    blocks = [
        dataclasses.replace(block, head_dim=widths[f"blocks_{i}/attn"], mlp_dim=widths[f"blocks_{i}/mlp"])
        for i, block in enumerate(config.blocks)
    ]
    return dataclasses.replace(config, blocks=tuple(blocks))


def _within(budget: Budget, config: Config, gains: Gains, step: Prune, uniform: bool) -> Widths:
    """Chooses the widths that gain most within a budget."""
    tables = group_costs(config, budget.kind)
    whole = sum(table[-1] for table in tables.values())
    room = budget.amount - (budget.cost(config) - whole)

    def choose(room: float) -> Widths:
        if uniform:
            return _uniform_within(config, gains, room, tables, step.round_to)
        return allocation.allocate(gains, tables, room, step.round_to, step.min_keep * max(0.0, room / whole))

    try:
        widths = choose(room)
    except allocation.TooSmall as error:
        raise InputError(
            f"the bottlenecks cannot be made as narrow as asked for: of {budget.kind}, {error}; "
            f"cut less, or choose a smaller round_to ({step.round_to}) or min_keep ({step.min_keep:g})"
        ) from None
    return _measured(budget, config, widths, room, choose) if budget.kind == "latency" else widths


def _measured(
    budget: Budget, config: Config, widths: Widths, room: float, choose: Callable[[float], Widths], rounds: int = 4
) -> Widths:
    """Measures a few tries, and returns the widths of the nearest time: parts do not quite add up to the whole."""
    tries = []
    for _ in range(rounds):
        seconds = budget.cost(with_widths(config, widths))
        tries.append((abs(seconds / budget.amount - 1), widths))
        if tries[-1][0] < 0.005:
            break
        room += budget.amount - seconds
        try:
            widths = choose(room)
        except allocation.TooSmall:
            break
    return min(tries, key=lambda tried: tried[0])[1]


def _uniform_within(config: Config, gains: Gains, room: float, tables: allocation.Costs, round_to: int) -> Widths:
    """Chooses the widest MLPs that fit, all alike, behind heads that fill the embedding."""
    size = min(len(gain) for name, gain in gains.items() if name.endswith("mlp"))
    cost = lambda widths: sum(tables[name][width] for name, width in widths.items())
    step = min(round_to, size)
    for width in range(size // step * step, 0, -step):
        widths = _uniform(config, gains, lambda _, width=width: width, step)
        if cost(widths) <= room:
            return widths
    raise allocation.TooSmall(
        f"heads that fill the embedding leave no room for the MLPs ({cost(widths):.4g} of {room:.4g})"
    )
