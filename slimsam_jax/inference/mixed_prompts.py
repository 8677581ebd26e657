"""Decodes prompts of mixed kinds and lengths together: points, a box and a mask, each of them or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.imaging.prompts import ABSENT, prompt_points
from slimsam_jax.inference.decode import Encoded, check_labels, padded
from slimsam_jax.limits import PROMPT_POINTS
from slimsam_jax.models.sam import Sam, decode

LARGEST_LOGIT = 1e6  # beyond it the encoder's sums of squares leave float32
TOKENS = (2, 4, 8, 16, 32, 64, 128)  # numbers of points and box corners per prompt that are ever compiled


class Prompt(NamedTuple):
    """A prompt for one object: at least one of points, box and mask.

    Attributes:
      point_coords: [n, 2] (x, y) in pixels of the image, no farther from it than it is large; or None.
      point_labels: [n], 1 foreground and 0 background; all foreground if None.
      box: [4] x0, y0, x1, y1 in the same frame, x0 < x1 and y0 < y1; or None.
      mask_input: [1, 4h, 4w] (or without the 1) logits of an earlier mask, as `predict` gives them, or None.
    """

    point_coords: np.ndarray | Sequence[Sequence[float]] | None = None
    point_labels: np.ndarray | Sequence[int] | None = None
    box: np.ndarray | Sequence[float] | None = None
    mask_input: np.ndarray | None = None


def decode_mixed(
    sam: Sam, encoded: Sequence[Encoded], prompts: Sequence[Prompt]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Decodes each prompt on the image beside it, all together.

    Returns:
      [1 + multimask_outputs, 4h, 4w] logits and as many predicted IoU, of each prompt.

    Raises:
      InputError: a prompt is invalid.
    """
    if not prompts:
        return []
    points, labels = _join([_tokens(sam, *pair) for pair in zip(encoded, prompts, strict=True)])
    masks, masked = _masks(sam, prompts)
    decoded = []
    for index, count in padded(len(prompts)):
        # The embedding of the one image where there is but one: a decoder shares its projections among prompts.
        alone = all(encoded[i] is encoded[index[0]] for i in index)
        each = [encoded[i].embedding for i in index]
        embedding = each[0] if alone else jax.tree.map(lambda *maps: jnp.stack(maps), *each)
        previous = (masks[index], masked[index]) if masked[index].any() else (None, None)
        low, scores = decode(sam.config, sam.params, embedding, points[index], labels[index], *previous)
        decoded += list(zip(np.asarray(low)[:count], np.asarray(scores)[:count], strict=True))
    return decoded


def check(sam: Sam, prompt: Prompt, original_size: tuple[int, int]) -> None:
    """Raises InputError unless a prompt suits this model and an image of (height, width)."""
    if not isinstance(prompt, Prompt):
        raise InputError(f"a prompt is a Prompt(point_coords, point_labels, box, mask_input), not {kind_of(prompt)}")
    _, labels = prompt_points(*checked(prompt, original_size))
    check_labels(sam, labels, prompt.mask_input is not None)
    _mask(sam, prompt)


def _tokens(sam: Sam, encoded: Encoded, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Makes the tokens of one prompt: [m, 2] points in the model frame and [m] labels.

    Raises:
      InputError: it asks for nothing, or not in numbers of the right shapes.
    """
    xy, kinds = prompt_points(*checked(prompt, encoded.original_size))
    check_labels(sam, kinds, prompt.mask_input is not None)
    return sam.config.frame.points(xy[0], encoded.size, encoded.original_size), kinds[0]


def checked(prompt: Prompt, original_size: tuple[int, int]) -> tuple[np.ndarray | None, ...]:
    """Checks points [1, n, 2], labels [1, n] and box [1, 4] of a prompt, each or None, and returns them."""
    points, labels, box, mask = prompt
    if points is None and labels is not None:
        raise InputError("point_labels without point_coords")
    if points is None and box is None and mask is None:
        raise InputError("a prompt needs points, a box or a mask")
    if points is not None:
        points = _numbers(points, "point_coords", (None, 2))
        labels = np.ones(len(points)) if labels is None else _numbers(labels, "point_labels", (len(points),), "biuf")
        if not np.isin(labels, (-1, 0, 1)).all():
            raise InputError("point_labels are 1 (foreground) and 0 (background)")
        _check_near(points, "point_coords", original_size)
        points, labels = points[None], labels[None]
    return points, labels, None if box is None else _box(box, original_size)


def _box(box, original_size: tuple[int, int]) -> np.ndarray:
    try:
        squeezed = np.squeeze(box)
    except Exception:  # a list of lists of different lengths; the message below says what it should be
        squeezed = None
    corners = _numbers(squeezed, "box", (4,))
    x0, y0, x1, y1 = corners
    if x0 >= x1 or y0 >= y1:
        shown = ", ".join(f"{value:g}" for value in corners)
        raise InputError(f"box [{shown}] is none: x0, y0 is its upper left corner and x1, y1 its lower right one")
    _check_near(corners.reshape(2, 2), "box", original_size)
    return corners[None]


def _check_near(xy: np.ndarray, name: str, original_size: tuple[int, int]) -> None:
    """Raises InputError for points farther from an image than the image is large: they are of another one.

    A detector's boxes may well leave it a little.
    """
    height, width = original_size
    far = (xy < (-width, -height)) | (xy > (2 * width, 2 * height))
    if far.any():
        x, y = xy[far.any(1)][0]
        raise InputError(f"{name}: ({x:g}, {y:g}) lies far outside the image of {width} x {height} pixels")


def _numbers(values, name: str, shape: tuple[int | None, ...], kinds: str = "iuf") -> np.ndarray:
    """Converts values to float64 of a shape, in which None is any length but 0, up to `PROMPT_POINTS`.

    Raises:
      InputError: they are not.
    """
    expected = ", ".join("n" if n is None else str(n) for n in shape)
    array = real_array(values, kinds)
    if array is None or array.ndim != len(shape):
        raise InputError(f"{name} must be finite numbers of shape [{expected}]")
    if any(n not in (None, side) for n, side in zip(shape, array.shape, strict=True)) or not array.size:
        raise InputError(f"{name} must be finite numbers of shape [{expected}], not {list(array.shape)}")
    if len(array) > PROMPT_POINTS:
        raise InputError(f"{name} are {len(array)}, and a prompt can have {PROMPT_POINTS}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"{name} must be finite numbers of shape [{expected}]")
    return array


def real_array(values, kinds: str = "iuf") -> np.ndarray | None:
    """Converts values to an array of real numbers, not copied if they are one; None of text, complex or ragged ones.

    Args:
      kinds: of numpy's dtypes; bfloat16 and the like go for floats.
    """
    try:
        array = np.asarray(values)
        floating = jnp.issubdtype(array.dtype, jnp.floating)
    except Exception:  # whatever an object does that is asked to be an array
        return None
    return array if floating or array.dtype.kind in kinds else None


def kind_of(value: object) -> str:
    return f"a {type(value).__name__}"


def _join(tokens: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts of different lengths to [p, n, 2] and [p, n], with what the decoder passes by."""
    longest = max(len(labels) for _, labels in tokens)
    length = next((n for n in TOKENS if n >= longest), longest)
    points = np.zeros((len(tokens), length, 2), np.float32)
    labels = np.full((len(tokens), length), ABSENT, np.int32)
    for i, (xy, kinds) in enumerate(tokens):
        points[i, : len(xy)], labels[i, : len(kinds)] = xy, kinds
    return points, labels


def _masks(sam: Sam, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Stacks previous logits [p, 4h, 4w, 1], zero where a prompt has none. Returns them, and [p] which have some.

    Raises:
      InputError: a mask of another size, or of no logits.
    """
    previous = [_mask(sam, prompt) for prompt in prompts]
    masks = np.zeros((len(prompts), *_mask_shape(sam), 1), np.float32)
    for i, given in enumerate(previous):
        if given is not None:
            masks[i, ..., 0] = given
    return masks, np.array([given is not None for given in previous])


def _mask_shape(sam: Sam) -> tuple[int, ...]:
    return tuple(4 * side for side in sam.config.grid)


def _mask(sam: Sam, prompt: Prompt) -> np.ndarray | None:
    """Checks the previous logits of a prompt, and returns them, [4h, 4w] float32, or None."""
    if prompt.mask_input is None:
        return None
    shape = _mask_shape(sam)
    given = real_array(prompt.mask_input, kinds="f")
    if given is None:
        raise InputError("mask_input must be float logits, as predict gives them in low_res_masks")
    if given.shape not in (shape, (1, *shape)):
        raise InputError(f"mask_input must be logits of shape [1, {shape[0]}, {shape[1]}], not {list(given.shape)}")
    given = given.astype(np.float64)
    if not (np.abs(given) <= LARGEST_LOGIT).all():  # of NaN, too
        raise InputError(f"mask_input must be finite logits, from {-LARGEST_LOGIT:g} to {LARGEST_LOGIT:g}")
    return given.reshape(shape).astype(np.float32)
