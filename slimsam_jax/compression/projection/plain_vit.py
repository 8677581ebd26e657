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
from slimsam_jax.compression.projection.attention import HeadBases, bases_of_block
from slimsam_jax.compression.projection.embedding import project_embedding
from slimsam_jax.compression.projection.statistics import Moments, like
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
    """

    moments_of: Callable[[Architecture, tuple[statistics.Part, ...]], statistics.Statistic]
    costs: Callable[[Any, str], Costs]
    pooled: Callable[[Any], Collection[int]]


def project_bottleneck(sam: Sam, step: Prune, target: Target, calibration: Calibration, seed: int, ways: Ways) -> Sam:
    """Projects heads, then MLPs, which are refitted behind heads already cut."""
    encoder, config = sam.params["image_encoder"], sam.config.encoder
    weighted = step.importance_loss != "none"
    weighting, further = ("disturbed", ("sensitivity",)) if weighted else ("none", ())
    ask = lambda sam, name, *parts: moments(sam, calibration(name), seed, *parts, moments_of=ways.moments_of)
    found = ask(sam, "statistics of heads", "attention", "mlp", *further)
    bases = head_bases(encoder, found, weighting, ways.pooled(config))
    gains = gains_of(bases, mlp.hidden_units(encoder, found, weighting))
    if target.budget:
        chosen = within_budget(sam.config, gains, target.budget, step, ways.costs)
    else:
        chosen = choose_widths(config, gains, target.ratio, step, ways.costs)
    of_kind = lambda kind: [chosen[f"blocks_{i}/{kind}"] for i in range(len(bases))]
    sam = with_encoder(sam, project_heads(encoder, bases, of_kind("qk"), of_kind("v")))
    found = ask(sam, "statistics of MLPs", "mlp", *further)
    units = mlp.hidden_units(sam.params["image_encoder"], found, weighting, of_kind("mlp"))
    return with_encoder(sam, mlp.project_mlp(sam.params["image_encoder"], units, of_kind("mlp")))


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


def head_bases(
    encoder: Params, found: Moments, weighting: statistics.Weighting = "none", pooled: Collection[int] = ()
) -> list[HeadBases]:
    """Bases of every block at full width, with gains as `attention.attention_bases` has them, q and k's apart.

    Those of q and k of `pooled` blocks are the channels themselves, in an order: maxima turn with no basis.
    """
    bases = []
    for i, variance in enumerate(found["blocks"]):
        basis = bases_of_block(encoder[f"blocks_{i}"]["attn"], found, i, weighting)
        if i in pooled:
            basis = in_order(basis, found, i, weighting)
        share = found["tokens"] / variance if weighting == "none" else 1
        gains = {"logit_gains": basis.logit_gains * share, "value_gains": basis.value_gains * share}
        bases.append(basis._replace(**gains))
    return bases


def in_order(basis: HeadBases, found: Moments, i: int, weighting: statistics.Weighting) -> HeadBases:
    """The basis with the channels of q and k as they are, the best first."""
    moment = found["attention"][i]
    score = np.diag(np.float64(moment["q"])) / moment["tokens"]
    if weighting == "none":
        score = score * np.diag(np.float64(moment["k"])) / moment["keys"]
        score = score / score.sum() * basis.value_gains.sum()  # an error of the logits counts as a like share
    else:
        hurt = np.diag(np.float64(found["sensitivity"]["queries"][i])) / found["embedding"]
        score = score * len(basis.outputs) * hurt
    order = np.argsort(-score, kind="stable")
    turned = np.eye(len(score))[order]
    return basis._replace(query=turned, key=turned, logit_gains=score[order])


def gains_of(bases: Sequence[HeadBases], units: Sequence[mlp.HiddenUnits]) -> Gains:
    """The gain of each further channel of every group."""
    gains = {}
    for i, (basis, unit) in enumerate(zip(bases, units, strict=True)):
        gains |= {
            f"blocks_{i}/qk": basis.logit_gains,
            f"blocks_{i}/v": basis.value_gains,
            f"blocks_{i}/mlp": unit.gains,
        }
    return gains


def project_heads(encoder: Params, bases: Sequence[HeadBases], keys: Sequence[int], values: Sequence[int]) -> Params:
    """Gives q and k one basis per block, v and proj one per head; keeps `keys` and `values` channels of a block's."""
    new = dict(encoder)
    for i, (basis, key_dim, value_dim) in enumerate(zip(bases, keys, values, strict=True)):
        attn = jax.tree.map(np.float64, jax.device_get(encoder[f"blocks_{i}"]["attn"]))
        # The softmax divides by the root of the new width.
        factor = (key_dim / len(basis.query)) ** 0.5
        along = lambda layer, matrix: {name: array @ matrix.T for name, array in layer.items()}
        encode = np.stack([output.encode[:value_dim] for output in basis.outputs])
        decode = np.stack([output.decode[:, :value_dim] for output in basis.outputs])
        kernel = attn["proj"]["kernel"]
        v = {
            "kernel": np.einsum("nrm,Dnm->Dnr", encode, attn["v"]["kernel"]),
            "bias": np.einsum("nrm,nm->nr", encode, attn["v"]["bias"] - basis.means),
        }
        # Attention weights sum to one, so a constant taken from v comes back through proj.
        bias = attn["proj"]["bias"] + np.einsum("nm,nmD->D", basis.means, kernel)
        proj = {"kernel": np.einsum("nmr,nmD->nrD", decode, kernel), "bias": bias}
        q, k = along(attn["q"], factor * basis.query[:key_dim]), along(attn["k"], basis.key[:key_dim])
        new[f"blocks_{i}"] = {**encoder[f"blocks_{i}"], "attn": {"q": q, "k": k, "v": v, "proj": proj}}
    return like(encoder, new)


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
                slope = _parameters_of_one(config.embed_dim, block.heads)[name]
            tables[f"blocks_{i}/{name}"] = slope * np.arange(size + 1.0)
    return tables


def _parameters_of_one(embed_dim: int, heads: int) -> Mapping[str, int]:
    """Of a further channel, in all heads of a block, by the kind of its group."""
    return {"qk": 2 * heads * (embed_dim + 1), "v": heads * (2 * embed_dim + 1), "mlp": 2 * embed_dim + 1}


PLAIN = Ways(statistics.moments_of, group_costs, lambda config: ())
