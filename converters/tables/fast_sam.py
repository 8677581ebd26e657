"""FastSAM's names and layouts (`FastSAM-s.pt`, `FastSAM-x.pt`) <-> ours, strict both ways.

The published files are pickles of whole modules in half precision, under AGPL-3.0; of them arrays alone are read. Names
are `model.<layer>...`, the head is layer 22. A fused file has biases in the place of batch norms.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from converters.tables.rows import CONV, VECTOR, Row, _layer
from converters.tables.strict import Layer, State, placed, shapes, to_params, to_state
from slimsam_jax.errors import InputError
from slimsam_jax.models.fast_sam_config import BINS, CONVS, LEVELS, MOST_BLOCKS, STAGES, Config, config_of

POINTWISE, TRANSPOSED = "o i 1 1 -> i o", "i o h w -> h w i o"
FIRST = "model.0.conv.weight"
BINS_NAME = "model.22.dfl.conv.weight"  # 0, 1, ..., 15: fixed
BRANCHES = {"cv2": "boxes", "cv3": "scores", "cv4": "coefficients"}
COUNTER = ".num_batches_tracked"


def _conv(name: str, path: str, kernel: str, fused: bool) -> list[Layer]:
    if fused:
        return _layer(f"{name}.conv", path, kernel)
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    norm = [(f"{name}.bn.{theirs}", f"{path}/bn/{ours}", VECTOR) for theirs, ours in leaves.items()]
    return [(f"{name}.conv.weight", f"{path}/kernel", kernel), *norm]


def _stage(blocks: int, fused: bool) -> list[Layer]:
    layers = [*_conv("cv1", "cv1", POINTWISE, fused), *_conv("cv2", "cv2", POINTWISE, fused)]
    for i in range(blocks):
        for conv in ("cv1", "cv2"):
            layers += _conv(f"m.{i}.{conv}", f"blocks_{i}/{conv}", CONV, fused)
    return layers


def _head(fused: bool) -> list[Row]:
    proto = [
        *_conv("cv1", "cv1", CONV, fused),
        *_layer("upsample", "upsample", TRANSPOSED),
        *_conv("cv2", "cv2", CONV, fused),
        *_conv("cv3", "cv3", POINTWISE, fused),
    ]
    branch = [
        *_conv("0", "conv_0", CONV, fused),
        *_conv("1", "conv_1", CONV, fused),
        *_layer("2", "out", POINTWISE),
    ]
    table = placed("model.22.proto", "prototypes", proto)
    for theirs, ours in BRANCHES.items():
        for level in range(len(LEVELS)):
            table += placed(f"model.22.{theirs}.{level}", f"{ours}_{level}", branch)
    return table


def rows(blocks: tuple[int, ...], fused: bool = False) -> list[Row]:
    """The table: a row per array, but for counters and bins.

    Args:
      blocks: bottlenecks of each of `STAGES`.
      fused: whether batch norms are in the convolutions.
    """
    table = []
    for number in CONVS:
        table += [Row(*layer, {}) for layer in _conv(f"model.{number}", f"layers_{number}", CONV, fused)]
    for number, count in zip(STAGES, blocks, strict=True):
        table += placed(f"model.{number}", f"layers_{number}", _stage(count, fused))
    table += placed("model.9", "layers_9", _stage(0, fused))
    return table + _head(fused)


def rows_of(config: Config) -> list[Row]:
    """The table of an architecture."""
    return rows(tuple(len(stage.blocks) for stage in config.stages), not config.batch_norm)


def recognises(names: Container[str]) -> bool:
    """Whether a state dict of these names is a FastSAM's; "model.model.", as modules in modules have it, will do."""
    return any(f"{prefix}{FIRST}" in names for prefix in ("", "model."))


def from_state_dict(
    state: Mapping[str, np.ndarray], where: str = "the state dict", image_size: int = 1024
) -> tuple[Config, dict[str, Any]]:
    """Converts a state dict, of any widths; in half precision, too.

    Args:
      state: {name: array}.
      where: what to call it in error messages.
      image_size: the longer side of the model frame in pixels.

    Returns:
      The architecture, and parameters in float32.

    Raises:
      InputError: a name missing or surplus, a shape that fits no such model, or bins that are not 0 to 15.
    """
    from slimsam_jax.models.fast_sam import abstract_params

    state = {name.removeprefix("model.") if f"model.{FIRST}" in state else name: a for name, a in state.items()}
    _check_bins(state.pop(BINS_NAME, None), where)
    counters = {name: array for name, array in state.items() if name.endswith(COUNTER)}
    used = {name: array for name, array in state.items() if name not in counters}
    try:
        table = rows(_blocks(used), fused="model.0.conv.bias" in used)
        _check_counters(counters, table, where)
        config = config_of(shapes(used, table, where), image_size)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{where}: {error}") from None
    return config, to_params(used, table, abstract_params(config), where)


def to_state_dict(config: Config, params: Mapping[str, Any]) -> State:
    """Inverse of `from_state_dict`, exact; counters of batch norms are zero.

    Raises:
      InputError: an array is missing or surplus.
    """
    table = rows_of(config)
    state = to_state(params, table)
    norms = (row.name.removesuffix(".running_var") for row in table if row.name.endswith(".running_var"))
    state |= {f"{norm}{COUNTER}": np.zeros((), np.int64) for norm in norms}
    return {**state, BINS_NAME: np.arange(BINS, dtype=np.float32).reshape(1, BINS, 1, 1)}


def _blocks(state: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """Bottlenecks of each stage, by their names."""
    found = [re.match(r"model\.(\d{1,2})\.m\.(\d{1,4})\.", name) for name in state]
    places = {(int(match[1]), int(match[2])) for match in found if match}
    counts = tuple(sum(number == stage for number, _ in places) for stage in STAGES)
    if not all(1 <= count <= MOST_BLOCKS for count in counts):
        raise ValueError(f"its stages have {', '.join(map(str, counts))} blocks; 1 to {MOST_BLOCKS} are taken")
    return counts


def _check_bins(bins: np.ndarray | None, where: str) -> None:
    if bins is None:
        raise InputError(f"{where} does not hold a FastSAM: it has no {BINS_NAME}")
    if bins.shape != (1, BINS, 1, 1) or not (bins.ravel() == np.arange(BINS)).all():
        raise InputError(f"{where}: {BINS_NAME} must be the numbers 0 to {BINS - 1}; another head is not ours")


def _check_counters(counters: Mapping[str, np.ndarray], table: list[Row], where: str) -> None:
    """All or none of them: half of them, or one of another name, is another model."""
    from slimsam_jax import checkpoint

    norms = {row.name.removesuffix(".running_var") for row in table if row.name.endswith(".running_var")}
    if counters:
        checkpoint.check_names(set(counters), {f"{norm}{COUNTER}" for norm in norms}, where)
