"""Projects TinyViT: its heads in the best basis, its streams and hidden layers by the best channels.

Nothing but linear maps lies between q and k (biases are added to the logits) or between v and proj: heads are as
EfficientSAM's (`plain_vit`). A GELU lies on the first stream and a depthwise convolution in every block of the others,
which no rotation passes: their channels are selected, by Disturbed Taylor importance, and what reads them is refitted
(`streams`). Hidden layers, of MLPs and of convolutions, keep the units that explain most, and what reads them is
refitted, too; a batch norm behind it stays, but for its mean, which takes up the constant.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from slimsam_jax import pruning
from slimsam_jax.compression import found_groups
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.calibration_images import Calibration
from slimsam_jax.compression.projection import plain_vit, streams
from slimsam_jax.compression.projection.statistics import Moments, like
from slimsam_jax.compression.projection.streams import Change, behind_norm, refitted
from slimsam_jax.compression.projection.tiny_vit_statistics import (
    PATCHES,
    blocks_of,
    convolutions_of,
    moments_of,
    readers_of,
)
from slimsam_jax.compression.steps import Prune
from slimsam_jax.models.encoders import counts
from slimsam_jax.models.encoders.layers import BATCH_NORM_EPSILON
from slimsam_jax.models.encoders.tiny_vit_config import Config, config_of
from slimsam_jax.models.sam import Architecture, Params, Sam
from slimsam_jax.pruning.allocation import Costs


def project(sam: Sam, step: Prune, target: Target, calibration: Calibration, seed: int) -> Sam:
    """As `plain_vit.project`; every stage keeps the same share of its stream, but for the allocation "global"."""
    if step.part == "bottleneck":
        return plain_vit.project_bottleneck(sam, step, target, calibration, seed, WAYS)
    ratio, along = target.channel_ratio(sam.config), along_streams(sam.config.encoder)
    keep = streams.kept_channels(sam, step, ratio, calibration, seed, along)
    changes = changes_of(sam.config.encoder, keep)
    found = streams.moments(sam, calibration("statistics of what reads the streams"), seed, moments_of, changes)
    return plain_vit.with_encoder(sam, project_streams(sam.config, sam.params["image_encoder"], found, keep))


def along_streams(config: Config) -> list[str]:
    """The path of an array along each stream."""
    first = "patch_embed_2/bn/bias" if config.batch_norm else "patch_embed_2/bias"
    return [first, *(f"layers_{i}/blocks_0/mlp/norm/scale" for i in range(1, len(config.stages) + 1))]


def changes_of(config: Config, keep: Sequence[np.ndarray]) -> list[Change]:
    """Selections of the streams' channels, ascending."""
    dims = (config.conv_dim, *(stage.dim for stage in config.stages))
    return [Change(np.eye(dim)[kept], len(kept) == dim) for dim, kept in zip(dims, keep, strict=True)]


def project_streams(config: Architecture, encoder: Params, found: Moments, keep: Sequence[np.ndarray]) -> Params:
    """Selects channels of the streams, and refits what reads them by the `moments_of` what is left."""
    own, changes = config.encoder, changes_of(config.encoder, keep)
    groups = dict(zip(streams.groups_along(config, along_streams(own)), keep, strict=True))
    old = jax.device_get(encoder)
    new = pruning.shrink(old, found_groups.groups_of(config), groups)
    for reader in readers_of(own):
        before, after = _at(old, reader.path), _at(new, reader.path)
        change, moment = changes[reader.stream], found[reader.path]
        layers = [linear_of(before[name]) for name in reader.layers]
        if reader.norm:  # what pads a window passes it: constants may go to the layers behind
            after["norm"], layers = behind_norm(change, moment, before["norm"], layers, padded=False)
        else:
            if not reader.path:  # the neck's convolution has no bias
                moment = {**moment, "sum": 0 * moment["sum"], "wide_sum": 0 * moment["wide_sum"]}
            layers = refitted(*streams.reading_of(change, moment, normal=False), layers)
        for name, layer in zip(reader.layers, layers, strict=True):
            after[name] = with_linear(before[name], layer)
    return like(encoder, new)


def _at(tree: Params, path: str) -> Params:
    for name in path.split("/") if path else ():
        tree = tree[name]
    return tree


def linear_of(layer: Params) -> Params:
    """A layer, or a convolution and its batch norm, as kernel [inputs, taps, outputs] (a dense one's is itself), bias.

    Of a batch norm it has what multiplies and the mean; its own bias stays outside.
    """
    kernel = np.float64(layer["kernel"])
    if "bn" not in layer and kernel.ndim != 4:
        return {"kernel": kernel, "bias": np.float64(layer["bias"])}
    factor = _factor(layer)
    kernel = (kernel * factor).reshape(-1, *kernel.shape[-2:]).swapaxes(0, 1)
    norm = layer.get("bn")
    bias = -np.float64(norm["mean"]) * factor if norm else np.float64(layer.get("bias", np.zeros(kernel.shape[-1])))
    return {"kernel": kernel, "bias": bias}


def with_linear(layer: Params, linear: Params) -> Params:
    """The layer with what `linear_of` would give of it, of more or fewer inputs."""
    old = layer["kernel"]
    if "bn" not in layer and old.ndim != 4:
        return linear
    factor, kernel = _factor(layer), linear["kernel"]
    kernel = kernel.swapaxes(0, 1).reshape(*old.shape[:-2], len(kernel), old.shape[-1]) / factor
    if "bn" in layer:
        return {"kernel": kernel, "bn": {**layer["bn"], "mean": -linear["bias"] / factor}}
    return {**layer, "kernel": kernel, **({"bias": linear["bias"]} if "bias" in layer else {})}


def _factor(layer: Params) -> np.ndarray | float:
    """By which a batch norm multiplies; 1 where by nothing, as nobody can divide by that."""
    if "bn" not in layer:
        return 1.0
    factor = np.float64(layer["bn"]["scale"]) * (np.float64(layer["bn"]["var"]) + BATCH_NORM_EPSILON) ** -0.5
    return np.where(np.abs(factor) > 1e-12, factor, 1.0)


# ------------------------------------------------------------------------------------------- bottlenecks


def plain_blocks(encoder: Params) -> Params:
    """The blocks of attention, and then hidden layers of convolutions, as `plain_vit.Ways.blocks` wants them."""
    encoder = jax.device_get(encoder)
    config, blocks = config_of(encoder), []
    for path, *_ in blocks_of(config):
        block = _at(encoder, path)
        blocks.append({"attn": block["attn"], "mlp_lin1": block["mlp"]["fc1"], "mlp_lin2": block["mlp"]["fc2"]})
    for path in convolutions_of(config):
        *first, last = _names(path)
        module = _at(encoder, "" if path == PATCHES else path)
        blocks.append({"mlp_lin1": {name: module[name] for name in first}, "mlp_lin2": linear_of(module[last])})
    return {f"blocks_{i}": block for i, block in enumerate(blocks)}


def with_blocks(encoder: Params, blocks: Params) -> Params:
    """The encoder with other `plain_blocks`; a hidden layer that is as wide as it was stays as it was."""
    encoder = jax.device_get(encoder)
    config, new = config_of(encoder), copy.deepcopy(encoder)
    heads = blocks_of(config)
    for i, (path, *_) in enumerate(heads):
        block, module = blocks[f"blocks_{i}"], _at(new, path)
        module["attn"] = block["attn"]
        if len(block["mlp_lin2"]["kernel"]) < len(module["mlp"]["fc2"]["kernel"]):
            module["mlp"] = {**module["mlp"], "fc1": block["mlp_lin1"], "fc2": block["mlp_lin2"]}
    for i, path in enumerate(convolutions_of(config), len(heads)):
        block, module, last = blocks[f"blocks_{i}"], _at(new, "" if path == PATCHES else path), _names(path)[-1]
        if len(block["mlp_lin2"]["kernel"]) < module[last]["kernel"].shape[-2]:
            module.update({**block["mlp_lin1"], last: with_linear(module[last], block["mlp_lin2"])})
    return like(encoder, new)


def _names(path: str) -> tuple[str, ...]:
    """The convolutions that make a hidden layer, and the one that reads it."""
    return ("patch_embed_0", "patch_embed_2") if path == PATCHES else ("conv1", "conv2", "conv3")


def group_costs(config: Config, kind: str) -> Costs:
    """As `plain_vit.group_costs`."""
    tables: Costs = {}
    before = counts.macs(config).total if kind == "macs" else 0
    for name, (size, parameters) in _groups(config).items():
        slope = parameters if kind == "params" else counts.macs(widened(config, name)).total - before
        tables[name] = slope * np.arange(size + 1.0)
    return tables


def _groups(config: Config) -> dict[str, tuple[int, int]]:
    """{group: its width, and the parameters of a channel more}."""
    groups, heads = {}, blocks_of(config)
    for i, (_, stage, block) in enumerate(heads):
        own = plain_vit.parameters_of_one(stage.dim, block.heads)
        groups |= {f"blocks_{i}/{kind}": (getattr(block, f), own[kind]) for kind, f in plain_vit.FIELDS.items()}
    dims = (config.conv_dim, *(stage.dim for stage in config.stages))
    norm = 1 + config.batch_norm  # a bias, or a batch norm's scale and bias
    hidden = [(config.stem_dim, 27 + 9 * config.conv_dim + norm)]
    hidden += [(width, 2 * config.conv_dim + 9 + 2 * norm) for width in config.conv_blocks]
    hidden += [(s.entry_dim, a + b + 9 + 2 * norm) for s, a, b in zip(config.stages, dims, dims[1:], strict=False)]
    return groups | {f"blocks_{i}/mlp": each for i, each in enumerate(hidden, len(heads))}


def widened(config: Config, name: str) -> Config:
    """With one channel more in a group."""
    place, kind = name.removeprefix("blocks_").split("/")
    more = lambda record, field: dataclasses.replace(record, **{field: getattr(record, field) + 1})
    changed = lambda items, i, new: (*items[:i], new, *items[i + 1 :])
    numbered, i = [(s, b) for s, stage in enumerate(config.stages) for b in range(len(stage.blocks))], int(place)
    if i < len(numbered):
        s, b = numbered[i]
        stage = config.stages[s]
        blocks = changed(stage.blocks, b, more(stage.blocks[b], plain_vit.FIELDS[kind]))
        return dataclasses.replace(config, stages=changed(config.stages, s, dataclasses.replace(stage, blocks=blocks)))
    i -= len(numbered) + 1
    if i < 0:
        return more(config, "stem_dim")
    if i < (convs := len(config.conv_blocks)):
        return dataclasses.replace(config, conv_blocks=changed(config.conv_blocks, i, config.conv_blocks[i] + 1))
    i -= convs
    return dataclasses.replace(config, stages=changed(config.stages, i, more(config.stages[i], "entry_dim")))


WAYS = plain_vit.Ways(moments_of, group_costs, blocks=plain_blocks, whole=with_blocks)
