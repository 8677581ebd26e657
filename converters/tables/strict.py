"""Published state dict <-> parameter tree by a table of rows, every array accounted for in both directions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from converters.tables.rows import Row
from slimsam_jax.errors import InputError

State = dict[str, np.ndarray]
Layer = tuple[str, str, str]  # their name, our path, einops pattern from theirs to ours, within a module


class Converted(NamedTuple):
    """A state dict in our terms.

    Attributes:
      encoder: the image encoder's architecture.
      head: that of prompt encoder and decoder.
      params: {"image_encoder", "prompt_encoder", "mask_decoder"}, float32.
      kept: arrays that nothing of ours reads, under their names, for the way back.
    """

    encoder: Any
    head: Any
    params: dict[str, Any]
    kept: State


class Shape(NamedTuple):
    """Stands for an array that is not read yet."""

    shape: tuple[int, ...]


def placed(name: str, path: str, layers: Iterable[Layer], **sizes: int) -> list[Row]:
    """The rows of a module: below `name` in their names and below `path` in ours.

    Args:
      sizes: of axes that patterns split, by their letters; each goes where its pattern has "(letter ...)".
    """
    return [
        Row(
            f"{name}.{theirs}",
            f"{path}/{ours}",
            pattern,
            {letter: size for letter, size in sizes.items() if f"({letter} " in pattern},
        )
        for theirs, ours, pattern in layers
    ]


def shapes(state: Mapping[str, np.ndarray], table: list[Row], where: str) -> dict[str, Any]:
    """The parameter tree of a state dict as `Shape`s.

    Raises:
      InputError: a name missing or surplus, or a shape that its row cannot take.
    """
    import flax.traverse_util

    from slimsam_jax import checkpoint

    checkpoint.check_names(set(state), {row.name for row in table}, where)
    found = {}
    for row in table:
        try:
            found[row.path] = Shape(row.shape(state[row.name].shape))
        except Exception:  # einops has its own error class; the shape is what the user needs
            message = f"{where}: {row.name} has shape {state[row.name].shape}, which does not fit its place"
            raise InputError(message) from None
    return flax.traverse_util.unflatten_dict(found, sep="/")


def to_params(state: Mapping[str, np.ndarray], table: list[Row], expected: Any, where: str) -> dict[str, Any]:
    """The parameter tree of a state dict; no array is read before the names and shapes of all are right.

    Args:
      state: {their name: array}, nothing surplus.
      table: a row per array.
      expected: the tree as shapes.
      where: what to call the state dict in error messages.

    Raises:
      InputError: a name missing or surplus, a wrong shape, values that are no weights.
    """
    import flax.traverse_util

    from slimsam_jax import checkpoint

    found, wanted = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (shapes(state, table, where), expected))
    checkpoint.check_names(set(found), set(wanted), where)
    checkpoint.check_shapes({path: (leaf.shape, wanted[path].shape) for path, leaf in found.items()}, where)
    return checkpoint.to_device({row.path: row.to_ours(state[row.name]) for row in table}, where)


def to_state(params: Mapping[str, Any], table: list[Row]) -> State:
    """Inverse of `to_params`, exact.

    Raises:
      InputError: an array is missing or surplus.
    """
    import flax.traverse_util

    from slimsam_jax import checkpoint

    flat = flax.traverse_util.flatten_dict(params, sep="/")
    checkpoint.check_names(set(flat), {row.path for row in table}, "the parameter tree")
    return {row.name: row.to_theirs(np.asarray(flat[row.path])) for row in table}


@functools.lru_cache(maxsize=32)  # tracing takes a second or two
def abstract(encoder: Any) -> dict[str, Any]:
    """The parameter tree of an encoder (a Flax module with a `config`) as shapes, not to be changed."""
    import jax
    import jax.numpy as jnp

    images = jax.ShapeDtypeStruct((1, *encoder.config.image_size, 3), jnp.float32)
    return jax.eval_shape(lambda images: encoder.init(jax.random.key(0), images)["params"], images)
