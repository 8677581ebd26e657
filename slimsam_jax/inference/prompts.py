"""Prompts of mixed kinds and lengths, decoded together: points, a box and a mask, each of them or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.inference.masks import Encoded, padded
from slimsam_jax.models.prompt_encoder import ABSENT, prompt_points
from slimsam_jax.models.sam import Sam, decode, to_model_frame

TOKENS = (2, 4, 8, 16, 32, 64, 128)  # numbers of points and box corners per prompt that are ever compiled


class Prompt(NamedTuple):
    """What one object is asked for by; at least one of points, box and mask.

    Attributes:
      point_coords: [n, 2] (x, y) in pixels of the picture, or None.
      point_labels: [n], 1 foreground and 0 background; all foreground if None.
      box: [4] x0, y0, x1, y1 in the same frame, or None.
      mask_input: [1, 4h, 4w] (or without the 1) logits of an earlier mask, as `predict` gives them, or None.
    """

    point_coords: np.ndarray | Sequence[Sequence[float]] | None = None
    point_labels: np.ndarray | Sequence[int] | None = None
    box: np.ndarray | Sequence[float] | None = None
    mask_input: np.ndarray | None = None


def decode_mixed(
    sam: Sam, encoded: Sequence[Encoded], prompts: Sequence[Prompt]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Decodes each prompt on the picture beside it, all together.

    Returns:
      [1 + multimask_outputs, 4h, 4w] logits and as many predicted IoU, of each prompt.

    Raises:
      InputError: a prompt is none.
    """
    if not prompts:
        return []
    points, labels = _join([_tokens(*pair) for pair in zip(encoded, prompts, strict=True)])
    masks, masked = _masks(sam, prompts)
    found = []
    for index, count in padded(len(prompts)):
        # The embedding of the one picture where there is but one: a decoder shares its projections among prompts.
        alone = all(encoded[i] is encoded[index[0]] for i in index)
        embedding = encoded[index[0]].embedding if alone else jnp.stack([encoded[i].embedding for i in index])
        previous = (masks[index], masked[index]) if masked[index].any() else (None, None)
        low, scores = decode(sam.config, sam.params, embedding, points[index], labels[index], *previous)
        found += list(zip(np.asarray(low)[:count], np.asarray(scores)[:count], strict=True))
    return found


def _tokens(encoded: Encoded, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """[m, 2] points in the model frame and [m] labels of one prompt.

    Raises:
      InputError: it asks for nothing, or not in numbers of the right shapes.
    """
    if prompt.point_coords is None and prompt.point_labels is not None:
        raise InputError("point_labels without point_coords")
    if prompt.point_coords is None and prompt.box is None and prompt.mask_input is None:
        raise InputError("a prompt needs points, a box or a mask")
    points, labels = prompt.point_coords, prompt.point_labels
    if points is not None:
        points = _numbers(points, "point_coords", (None, 2))
        labels = _numbers(np.ones(len(points)) if labels is None else labels, "point_labels", (len(points),))
        if not np.isin(labels, (-1, 0, 1)).all():
            raise InputError("point_labels are 1 (foreground) and 0 (background)")
        points, labels = points[None], labels[None]
    box = None if prompt.box is None else _numbers(np.squeeze(prompt.box), "box", (4,))[None]
    xy, kinds = prompt_points(points, labels, box)
    return to_model_frame(xy[0], encoded.size, encoded.original_size), kinds[0]


def _numbers(values, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """float64 values of a shape, in which None is any length but 0.

    Raises:
      InputError: they are not.
    """
    try:
        array = np.asarray(values, np.float64)
    except (ValueError, TypeError):
        array = np.full((), np.nan)
    fits = array.ndim == len(shape) and all(n in (None, side) for n, side in zip(shape, array.shape, strict=True))
    if not (fits and array.size and np.isfinite(array).all()):
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise InputError(f"{name} must be finite numbers of shape [{wanted}]")
    return array


def _join(tokens: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as [p, n, 2] and [p, n], filled up with what the decoder passes by."""
    longest = max(len(labels) for _, labels in tokens)
    length = next((n for n in TOKENS if n >= longest), longest)
    points = np.zeros((len(tokens), length, 2), np.float32)
    labels = np.full((len(tokens), length), ABSENT, np.int32)
    for i, (xy, kinds) in enumerate(tokens):
        points[i, : len(xy)], labels[i, : len(kinds)] = xy, kinds
    return points, labels


def _masks(sam: Sam, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """[p, 4h, 4w, 1] logits, zero where a prompt has none, and [p] which have some.

    Raises:
      InputError: a mask of another size.
    """
    shape = tuple(4 * side for side in sam.config.grid)
    masks, masked = np.zeros((len(prompts), *shape, 1), np.float32), np.zeros(len(prompts), bool)
    for i, prompt in enumerate(prompts):
        if prompt.mask_input is not None:
            given = np.asarray(prompt.mask_input, np.float32)
            if given.shape not in (shape, (1, *shape)):
                raise InputError(
                    f"mask_input must be logits of shape [1, {shape[0]}, {shape[1]}], not {list(given.shape)}"
                )
            masks[i, ..., 0], masked[i] = given.reshape(shape), True
    return masks, masked
