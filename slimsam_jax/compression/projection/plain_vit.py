"""Projects EfficientSAM's ViT: as SAM's, with neither windows nor tables, and with a width of v of its own.

On its residual stream lie linear maps and LayerNorms alone, no norm follows the last block, and positions are resized
channel by channel: a basis change is exact, as in SAM's. As nothing ties v to q and k, the three kinds of channels of
a block, "blocks_i/qk", "blocks_i/v" and "blocks_i/mlp", get widths of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression.budget import Budget, Target
from slimsam_jax.compression.calibration_images import Batch, Calibration
from slimsam_jax.compression.gradients import check_finite
from slimsam_jax.compression.projection import mlp, statistics
from slimsam_jax.compression.projection.attention import HeadBases, head_bases, project_heads
from slimsam_jax.compression.projection.embedding import project_embedding
from slimsam_jax.compression.projection.statistics import Moments
from slimsam_jax.compression.steps import Prune
from slimsam_jax.errors import InputError
from slimsam_jax.models.encoders import counts, family_of
from slimsam_jax.models.encoders.efficient_sam_vit import Config
from slimsam_jax.models.sam import Architecture, Params, Sam
from slimsam_jax.pruning import allocation
from slimsam_jax.pruning.allocation import Costs, Gains

FIELDS = {"qk": "key_dim", "v": "value_dim", "mlp": "mlp_dim"}  # of a `Block`, by the kind of a group


def project(sam: Sam, step: Prune, target: Target, calibration: Calibration, seed: int) -> Sam:
    """Chooses bases and cuts the channels of a step's part, by a ratio; arguments as `compression.prune.prune`.

    Raises:
      InputError: the widths cannot be made as narrow as asked for.
      RunError: the model's statistics are not finite.
    """
    if step.part == "bottleneck":
        return project_bottleneck(sam, step, target, calibration, seed, PLAIN)
    encoder, config = sam.params["image_encoder"], sam.config.encoder
    moment = moments(sam, calibration("statistics of the stream"), seed, "stream")["stream"]
    width = allocation.rounded_width(config.embed_dim, target.ratio, step.round_to)
    return with_encoder(sam, project_embedding(config, encoder, moment, width))


class Ways(NamedTuple):
    """In what families differ.

    Attributes:
      moments_of: as `statistics.moments_of`.
      costs: as `group_costs`.
      pooled: of an encoder's `Config`: places of the blocks whose queries are pooled by maxima.
      blocks: an encoder's tree -> "blocks_i" as a plain ViT has them; after those with heads may come some of a hidden
        layer alone ("mlp_lin1", what makes it, along the last axis, and "mlp_lin2").
      whole: a tree and other `blocks` -> the tree with those.
    """

    moments_of: Callable[[Architecture, tuple[statistics.Part, ...]], statistics.Statistic]
    costs: Callable[[Any, str], Costs]
    pooled: Callable[[Any], Collection[int]] = lambda config: ()
    blocks: Callable[[Params], Params] = lambda encoder: encoder
    whole: Callable[[Params, Params], Params] = lambda encoder, blocks: blocks


def project_bottleneck(sam: Sam, step: Prune, target: Target, calibration: Calibration, seed: int, ways: Ways) -> Sam:
    """Projects heads, then MLPs, which are refitted behind heads already cut."""
    encoder, config = sam.params["image_encoder"], sam.config.encoder
    weighted = step.importance_loss != "none"
    weighting, further = ("disturbed", ("sensitivity",)) if weighted else ("none", ())
    ask = lambda sam, name, *parts: moments(sam, calibration(name), seed, *parts, moments_of=ways.moments_of)
    found, blocks = ask(sam, "statistics of heads", "attention", "mlp", *further), ways.blocks(encoder)
    bases = head_bases(blocks, found, weighting, ways.pooled(config))
    gains = gains_of(bases, mlp.hidden_units(blocks, found, weighting))
    if target.budget:
        chosen = within_budget(sam.config, gains, target.budget, step, ways.costs)
    else:
        chosen = choose_widths(config, gains, target.ratio, step, ways.costs)
    of_kind = lambda kind, count: [chosen[f"blocks_{i}/{kind}"] for i in range(count)]
    heads, hidden = len(bases), of_kind("mlp", len(found["mlp"]))
    blocks = project_heads(blocks, bases, of_kind("qk", heads), of_kind("v", heads))
    sam = with_encoder(sam, ways.whole(encoder, blocks))
    found = ask(sam, "statistics of MLPs", "mlp", *further)
    blocks = mlp.project_mlp(blocks, mlp.hidden_units(blocks, found, weighting, hidden), hidden)
    return with_encoder(sam, ways.whole(encoder, blocks))


def with_encoder(sam: Sam, encoder: Params) -> Sam:
    """The SAM with an encoder of other widths, on the default device."""
    own = sam.config.encoder
    config = sam.config.with_encoder(family_of(own).config_of(encoder, like=own))
    return dataclasses.replace(sam, config=config, params={**sam.params, "image_encoder": jax.device_put(encoder)})


def moments(
    sam: Sam, batches: Iterable[Batch], seed: int, *parts: statistics.Part, moments_of: Any = statistics.moments_of
) -> Moments:
    """`statistics.moments_of`, or a family's own, over batches."""
    encoder = sharding.replicate(sam.params["image_encoder"], sharding.make_mesh())
    return check_finite(statistics.accumulate(_statistic(moments_of, sam.config, parts), encoder, batches, seed))


@functools.lru_cache(maxsize=2)
def _statistic(moments_of: Any, config: Architecture, parts: tuple[statistics.Part, ...]) -> statistics.Statistic:
    """The same function for the same question, so that its program is compiled once."""
    return moments_of(config, parts)


def gains_of(bases: Sequence[HeadBases], units: Sequence[mlp.HiddenUnits]) -> Gains:
    """The gain of each further channel of every group."""
    gains = {}
    for i, basis in enumerate(bases):
        gains |= {f"blocks_{i}/qk": basis.logit_gains, f"blocks_{i}/v": basis.value_gains}
    return gains | {f"blocks_{i}/mlp": unit.gains for i, unit in enumerate(units)}


def choose_widths(
    config: Any, gains: Gains, ratio: float, step: Prune, costs_of: Callable[[Any, str], Costs] | None = None
) -> dict[str, int]:
    """{group: width} by the step's allocation; see `compression.steps.Prune`.

    Raises:
      InputError: of the cost that is asked for not even the narrowest widths are left.
    """
    least = step.min_keep * (1 - ratio)
    if step.allocation == "local":
        return allocation.local_widths(gains, ratio, step.round_to)
    if step.allocation == "global":
        widths: dict[str, int] = {}
        for kind in FIELDS:
            of_kind = {name: gain for name, gain in gains.items() if name.endswith(kind)}
            widths |= allocation.global_widths(of_kind, ratio, step.round_to, least)
        return widths
    costs = (costs_of or group_costs)(config, step.allocation)
    room = sum(costs[name][allocation.rounded_width(len(gain), ratio)] for name, gain in gains.items())
    return _allocate(gains, costs, room, step, least, step.allocation)


def within_budget(
    config: Architecture, gains: Gains, budget: Budget, step: Prune, costs_of: Callable[[Any, str], Costs]
) -> dict[str, int]:
    """{group: width} that together use a budget up; the streams are cut already.

    Raises:
      InputError: the narrowest widths exceed it.
    """
    costs = costs_of(config.encoder, budget.kind)
    room = budget.amount - budget.cost(config) + sum(table[-1] for table in costs.values())
    return _allocate(gains, costs, room, step, step.min_keep * (1 - _share(room, costs)), budget.kind)


def _share(room: float, costs: Costs) -> float:
    """Of the channels that go if all groups lose alike."""
    return float(np.clip(1 - room / sum(table[-1] for table in costs.values()), 0, 1))


def _allocate(gains: Gains, costs: Costs, room: float, step: Prune, least: float, kind: str) -> dict[str, int]:
    try:
        return allocation.allocate(gains, costs, room, step.round_to, least)
    except allocation.TooSmall as error:
        raise InputError(
            f"the bottlenecks cannot be made as narrow as asked for: of {kind}, {error}; "
            f"cut less, or choose a smaller round_to ({step.round_to}) or min_keep ({step.min_keep:g})"
        ) from None


def group_costs(config: Config, kind: str) -> Costs:
    """Each group's parameters ("params") or multiply-accumulates ("macs") at each width, {group: [size + 1]}."""
    tables = {}
    for i, block in enumerate(config.blocks):
        for name, field in FIELDS.items():
            size = getattr(block, field)
            blocks = [*config.blocks[:i], dataclasses.replace(block, **{field: size + 1}), *config.blocks[i + 1 :]]
            wider = dataclasses.replace(config, blocks=tuple(blocks))
            slope = counts.macs(wider).total - counts.macs(config).total
            if kind == "params":
                slope = parameters_of_one(config.embed_dim, block.heads)[name]
            tables[f"blocks_{i}/{name}"] = slope * np.arange(size + 1.0)
    return tables


def parameters_of_one(embed_dim: int, heads: int) -> Mapping[str, int]:
    """Of a further channel, in all heads of a block, by the kind of its group."""
    return {"qk": 2 * heads * (embed_dim + 1), "v": heads * (2 * embed_dim + 1), "mlp": 2 * embed_dim + 1}


PLAIN = Ways(statistics.moments_of, group_costs)
