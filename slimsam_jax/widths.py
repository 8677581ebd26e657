"""How wide each layer stays: from what a channel is worth, and from a ratio or a budget."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from slimsam_jax import metrics
from slimsam_jax.errors import InputError, printable
from slimsam_jax.models.config import Config
from slimsam_jax.models.latency import block_seconds, encoder_seconds
from slimsam_jax.pruning import budget, masks
from slimsam_jax.pruning.masks import Worth
from slimsam_jax.recipes import Recipe

Widths = dict[str, int]
UNITS = {
    "params": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9},
    "macs": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"ms": 1e-3, "s": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a slim SAM may cost.

    Attributes:
      kind: "params", parameters of the whole SAM; "macs", multiply-accumulates of the image encoder for one
        image, attention included; "latency", seconds of the image encoder for one image on this machine, in
        float32.
      amount: in those units.
    """

    kind: Literal["params", "macs", "latency"]
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads "params=9.1M", "macs=47G" or "latency=120ms".

        Raises:
          InputError: it is none of these.
        """
        match = re.fullmatch(r"(params|macs|latency)=([0-9.]+(?:e[0-9]+)?)([a-zA-Z]*)", text.strip())
        try:
            kind, number, unit = match.groups()
            amount = float(number) * UNITS[kind][unit]
        except (AttributeError, KeyError, ValueError):
            raise InputError(
                f"--budget {printable(text, 60)} is not understood; write params=9.1M, macs=47G or latency=120ms"
            ) from None
        if not 0 < amount < math.inf:
            raise InputError(f"--budget {printable(text, 60)} must be more than nothing and less than everything")
        return cls(kind, amount)

    def cost(self, config: Config) -> float:
        """Of a model, in the budget's units; latency is measured."""
        if self.kind == "params":
            return metrics.sam_parameters(config)
        return metrics.encoder_macs(config).total if self.kind == "macs" else encoder_seconds([config])[0]


@dataclasses.dataclass(frozen=True)
class Target:
    """How much to cut: a share of the channels, or as much as a budget asks for."""

    ratio: float | None = None
    budget: Budget | None = None

    def part(self, share: float) -> Target:
        """One of several equal cuts in a row: what is left after it is a root of what is left in the end."""
        return self if share == 1 or self.ratio is None else Target(1 - (1 - self.ratio) ** share)

    def channel_ratio(self, config: Config) -> float:
        """The share of all channels to remove.

        For a budget: the share that meets it if every width of `config` is cut alike, which is
        what fixes the embedding; the bottlenecks then take up what is left exactly.

        Raises:
          InputError: the budget is no less than what the model costs, or less than any cut can reach.
        """
        return self.ratio if self.budget is None else _ratio_of(self.budget, config)


RATIOS = (0.0, 0.2, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94, 0.97)


@functools.lru_cache  # times are measured once
def _ratio_of(wanted: Budget, config: Config) -> float:
    """Interpolates the cost of evenly cut models; exact enough, as the second stage corrects it."""
    models = [even_cut(config, ratio) for ratio in RATIOS]
    costs = encoder_seconds(models) if wanted.kind == "latency" else [wanted.cost(model) for model in models]
    costs = np.minimum.accumulate(costs)
    if not costs[-1] <= wanted.amount < costs[0]:
        raise InputError(
            f"--budget {wanted.kind}={wanted.amount:.8g}: the model costs {costs[0]:.8g}, and can be cut to "
            f"{costs[-1]:.8g} at best; choose something between"
        )
    return float(np.interp(wanted.amount, costs[::-1], RATIOS[::-1]))


def even_cut(config: Config, ratio: float) -> Config:
    """Every width cut by the same share."""
    narrow = lambda width: masks.rounded_width(width, ratio)
    blocks = [dataclasses.replace(b, head_dim=narrow(b.head_dim), mlp_dim=narrow(b.mlp_dim)) for b in config.blocks]
    return dataclasses.replace(config, embed_dim=narrow(config.embed_dim), blocks=tuple(blocks))


def embedding_width(config: Config, target: Target, recipe: Recipe) -> int:
    """A multiple of the heads, so that equal heads can fill it; for a budget wide enough that it can be used up."""
    multiple = math.lcm(config.blocks[0].heads, recipe.multiple)
    width = masks.rounded_width(config.embed_dim, target.channel_ratio(config), multiple)
    if target.budget and target.budget.kind != "latency":
        cost = lambda width: target.budget.cost(dataclasses.replace(config, embed_dim=width))
        while cost(width) < target.budget.amount and width + multiple <= config.embed_dim:
            width += multiple
    return width


def bottleneck_widths(config: Config, worth: Worth, target: Target, recipe: Recipe, uniform: bool) -> Widths:
    """Widths of heads ("blocks_i/attn") and MLPs ("blocks_i/mlp").

    Args:
      config: the model after stage 1.
      worth: {group: [size], falling}, of all of them.
      uniform: equal blocks, with heads * head_dim == embed_dim, as stock SAM wants them.

    Raises:
      InputError: the budget cannot be met.
    """
    if target.budget:
        return _within(target.budget, config, worth, recipe, uniform)
    if uniform:
        width = lambda size: masks.rounded_width(size, target.ratio, recipe.multiple)
        return _uniform(config, worth, width, recipe.multiple)
    if recipe.compete == "block":
        return masks.local_widths(worth, target.ratio, recipe.multiple)
    if recipe.compete in ("params", "macs"):
        even = dataclasses.replace(even_cut(config, target.ratio), embed_dim=config.embed_dim)
        same = Budget(recipe.compete, Budget(recipe.compete, 1).cost(even))
        return _within(same, config, worth, recipe, uniform)
    widths = {}
    for kind in ("attn", "mlp"):
        of_kind = {name: gains for name, gains in worth.items() if name.endswith(kind)}
        widths |= masks.global_widths(of_kind, target.ratio, recipe.multiple, recipe.least * (1 - target.ratio))
    return widths


def check(config: Config, target: Target, recipe: Recipe, uniform: bool) -> None:
    """Raises InputError now for what could not be met later. A latency budget is held against measured times."""
    embed_dim, heads = embedding_width(config, target, recipe), config.blocks[0].heads
    ratio = target.channel_ratio(config)
    if recipe.reference_selection:
        _check_reference_rounding(config, ratio, heads, narrow=uniform or recipe.compete == "block")
    if target.budget is None or target.budget.kind != "latency":
        config = dataclasses.replace(config, embed_dim=embed_dim)
        sizes = {f"blocks_{i}/attn": block.head_dim for i, block in enumerate(config.blocks)}
        sizes |= {f"blocks_{i}/mlp": block.mlp_dim for i, block in enumerate(config.blocks)}
        equal = {name: np.ones(size) for name, size in sizes.items()}
        bottleneck_widths(config, equal, target, recipe, uniform)


def _check_reference_rounding(config: Config, ratio: float, heads: int, narrow: bool) -> None:
    """The reference rounds down, to nothing if need be."""
    kept = {"embedding": config.embed_dim * (1 - ratio) / heads}
    if narrow:
        kept["heads"] = min(block.head_dim for block in config.blocks) * (1 - ratio)
        kept["MLPs"] = min(block.mlp_dim for block in config.blocks) * (1 - ratio) / heads
    vanishing = [name for name, share in kept.items() if share < 1]
    if vanishing:
        raise InputError(f"at ratio {ratio:.3g} the reference's rounding leaves nothing of the {vanishing[0]}")
    if config.embed_dim % heads:
        raise InputError(f"the reference needs an embedding ({config.embed_dim}) that the {heads} heads divide")


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


def _within(wanted: Budget, config: Config, worth: Worth, recipe: Recipe, uniform: bool) -> Widths:
    """The widths that are worth most within a budget."""
    tables = group_costs(config, wanted.kind)
    whole = sum(table[-1] for table in tables.values())
    room = wanted.amount - (wanted.cost(config) - whole)

    def choose(room: float) -> Widths:
        if uniform:
            return _uniform_within(config, worth, room, tables, recipe.multiple)
        return budget.allocate(worth, tables, room, recipe.multiple, recipe.least * max(0.0, room / whole))

    try:
        widths = choose(room)
    except budget.TooSmall as error:
        raise InputError(
            f"the bottlenecks cannot be made as narrow as asked for: of {wanted.kind}, {error}; "
            f"cut less, or choose a smaller multiple ({recipe.multiple}) or least ({recipe.least:g})"
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
        except budget.TooSmall:
            break
    return min(tries, key=lambda tried: tried[0])[1]


def _uniform_within(config: Config, worth: Worth, room: float, tables: budget.Costs, multiple: int) -> Widths:
    """The widest MLPs that fit, all alike, behind heads that fill the embedding."""
    size = min(len(gains) for name, gains in worth.items() if name.endswith("mlp"))
    cost = lambda widths: sum(tables[name][width] for name, width in widths.items())
    step = min(multiple, size)
    for width in range(size // step * step, 0, -step):
        widths = _uniform(config, worth, lambda _, width=width: width, step)
        if cost(widths) <= room:
            return widths
    raise budget.TooSmall(
        f"heads that fill the embedding leave no room for the MLPs ({cost(widths):.4g} of {room:.4g})"
    )


def group_costs(config: Config, kind: str) -> dict[str, np.ndarray]:
    """{group: [size + 1] its cost at each width}; parameters and MACs are linear in a width, times are measured."""
    if kind == "latency":
        return _latency_tables(config)
    cost = Budget(kind, 1).cost
    tables = {}
    for i, block in enumerate(config.blocks):
        for name, field in (("attn", "head_dim"), ("mlp", "mlp_dim")):
            size = getattr(block, field)
            blocks = [*config.blocks[:i], dataclasses.replace(block, **{field: size + 1}), *config.blocks[i + 1 :]]
            slope = cost(dataclasses.replace(config, blocks=tuple(blocks))) - cost(config)
            tables[f"blocks_{i}/{name}"] = slope * np.arange(size + 1.0)
    return tables


def _latency_tables(config: Config) -> dict[str, np.ndarray]:
    """Times single blocks at some widths of heads and of the MLP; lines between."""
    tables: dict[str, np.ndarray] = {}
    measured: dict[tuple, np.ndarray] = {}
    for i, block in enumerate(config.blocks):
        for name, field in (("attn", "head_dim"), ("mlp", "mlp_dim")):
            if (block, field) not in measured:
                measured[block, field] = _time_widths(config, block, field)
            tables[f"blocks_{i}/{name}"] = measured[block, field]
    return tables


def _time_widths(config: Config, block, field: str) -> np.ndarray:
    size = getattr(block, field)
    widths = sorted({max(1, round(size * share)) for share in (0, 0.125, 0.25, 0.5, 0.75, 1.0)})
    seconds = block_seconds(config, [dataclasses.replace(block, **{field: width}) for width in widths])
    # Wider is never faster, but for noise.
    return np.interp(np.arange(size + 1), widths, np.maximum.accumulate(seconds) - min(seconds))
