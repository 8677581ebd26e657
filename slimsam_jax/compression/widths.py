"""How wide each layer stays: from what a channel is worth, and from a ratio or a budget."""

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
from slimsam_jax.pruning.allocation import Worth

Widths = dict[str, int]


def embedding_width(config: Config, target: Target, step: Prune) -> int:
    """A multiple of the heads, so that equal heads can fill it; for a budget wide enough that it can be used up."""
    multiple = math.lcm(config.blocks[0].heads, step.round_to)
    width = allocation.rounded_width(config.embed_dim, target.channel_ratio(config), multiple)
    if target.budget and target.budget.kind != "latency":
        cost = lambda width: target.budget.cost(dataclasses.replace(config, embed_dim=width))
        while cost(width) < target.budget.amount and width + multiple <= config.embed_dim:
            width += multiple
    return width


def bottleneck_widths(config: Config, worth: Worth, target: Target, step: Prune, uniform: bool) -> Widths:
    """Widths of heads ("blocks_i/attn") and MLPs ("blocks_i/mlp").

    Args:
      config: the model after stage 1.
      worth: {group: [size], falling}, of all of them.
      uniform: equal blocks, with heads * head_dim == embed_dim, as stock SAM wants them.

    Raises:
      InputError: the budget cannot be met.
    """
    if target.budget:
        return _within(target.budget, config, worth, step, uniform)
    if uniform:
        width = lambda size: allocation.rounded_width(size, target.ratio, step.round_to)
        return _uniform(config, worth, width, step.round_to)
    if step.allocation == "local":
        return allocation.local_widths(worth, target.ratio, step.round_to)
    if step.allocation in ("params", "macs"):
        even = dataclasses.replace(even_cut(config, target.ratio), embed_dim=config.embed_dim)
        same = Budget(step.allocation, Budget(step.allocation, 1).cost(even))
        return _within(same, config, worth, step, uniform)
    widths = {}
    for kind in ("attn", "mlp"):
        of_kind = {name: gains for name, gains in worth.items() if name.endswith(kind)}
        widths |= allocation.global_widths(of_kind, target.ratio, step.round_to, step.min_keep * (1 - target.ratio))
    return widths


def target_of(step: Prune, target: Target) -> Target:
    """How much a step cuts: what it says itself, else what the run is asked for."""
    return target if step.ratio is None else Target(step.ratio)


def check(config: Config, target: Target, steps: Sequence[Prune], uniform: bool) -> None:
    """Raises InputError now for what could not be met later. A latency budget is held against measured times."""
    for step in steps:
        wanted, heads = target_of(step, target), config.blocks[0].heads
        width, ratio = embedding_width(config, wanted, step), wanted.channel_ratio(config)
        if step.quirks.rounded_selection:
            _check_reference_rounding(config, ratio, heads, step, uniform)
        if step.part == "embedding":
            config = dataclasses.replace(config, embed_dim=width)
        elif wanted.budget is None or wanted.budget.kind != "latency":
            sizes = {f"blocks_{i}/attn": block.head_dim for i, block in enumerate(config.blocks)}
            sizes |= {f"blocks_{i}/mlp": block.mlp_dim for i, block in enumerate(config.blocks)}
            equal = {name: np.ones(size) for name, size in sizes.items()}
            config = with_widths(config, bottleneck_widths(config, equal, wanted, step, uniform))


def _check_reference_rounding(config: Config, ratio: float, heads: int, step: Prune, uniform: bool) -> None:
    """The reference rounds down, to nothing if need be."""
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


def _uniform(config: Config, worth: Worth, mlp_width: Callable[[int], int], multiple: int) -> Widths:
    head_dim = config.embed_dim // config.blocks[0].heads
    return {
        name: head_dim
        if name.endswith("attn")
        else stock_mlp_dim(config.embed_dim, mlp_width(len(gains)), min(multiple, len(gains)))
        for name, gains in worth.items()
    }


def stock_mlp_dim(embed_dim: int, width: int, multiple: int = 1) -> int:
    """The width asked for, or the next smaller one that survives stock SAM's int(embed_dim * mlp_ratio).

    Raises:
      InputError: there is none.
    """
    for narrower in range(width, 0, -multiple):
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


def _within(wanted: Budget, config: Config, worth: Worth, step: Prune, uniform: bool) -> Widths:
    """The widths that are worth most within a budget."""
    tables = group_costs(config, wanted.kind)
    whole = sum(table[-1] for table in tables.values())
    room = wanted.amount - (wanted.cost(config) - whole)

    def choose(room: float) -> Widths:
        if uniform:
            return _uniform_within(config, worth, room, tables, step.round_to)
        return allocation.allocate(worth, tables, room, step.round_to, step.min_keep * max(0.0, room / whole))

    try:
        widths = choose(room)
    except allocation.TooSmall as error:
        raise InputError(
            f"the bottlenecks cannot be made as narrow as asked for: of {wanted.kind}, {error}; "
            f"cut less, or choose a smaller round_to ({step.round_to}) or min_keep ({step.min_keep:g})"
        ) from None
    return _measured(wanted, config, widths, room, choose) if wanted.kind == "latency" else widths


def _measured(
    wanted: Budget, config: Config, widths: Widths, room: float, choose: Callable[[float], Widths], rounds: int = 4
) -> Widths:
    """Of a few tries the widths whose time is nearest: times of parts do not quite add up to that of the whole."""
    tries = []
    for _ in range(rounds):
        seconds = wanted.cost(with_widths(config, widths))
        tries.append((abs(seconds / wanted.amount - 1), widths))
        if tries[-1][0] < 0.005:
            break
        room += wanted.amount - seconds
        try:
            widths = choose(room)
        except allocation.TooSmall:
            break
    return min(tries, key=lambda tried: tried[0])[1]


def _uniform_within(config: Config, worth: Worth, room: float, tables: allocation.Costs, multiple: int) -> Widths:
    """The widest MLPs that fit, all alike, behind heads that fill the embedding."""
    size = min(len(gains) for name, gains in worth.items() if name.endswith("mlp"))
    cost = lambda widths: sum(tables[name][width] for name, width in widths.items())
    step = min(multiple, size)
    for width in range(size // step * step, 0, -step):
        widths = _uniform(config, worth, lambda _, width=width: width, step)
        if cost(widths) <= room:
            return widths
    raise allocation.TooSmall(
        f"heads that fill the embedding leave no room for the MLPs ({cost(widths):.4g} of {room:.4g})"
    )
