"""Prompts as arrays: points and boxes with the labels that SAM's prompt encoder knows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NOT_A_POINT, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 2, 3  # besides 0, background, and 1, foreground
IGNORED = -3  # a token of zeros, which is attended to: EdgeSAM's label -2
ABSENT = -2  # fills prompts up to one length; `sam.decode` passes it by, where "not a point" is a token to the original


def prompt_points(points=None, labels=None, boxes=None) -> tuple[np.ndarray, np.ndarray]:
    """Joins points and boxes the way the original does, into what `PromptEncoder` takes. On the host.

    Without a box the original appends a "not a point" at (0, 0); with one it appends the corners.

    Args:
      points: [p, n, 2] (x, y) in pixels of the model frame, or None.
      labels: [p, n] 1 foreground, 0 background, -1 ignore; needed with points.
      boxes: [p, 4] x0, y0, x1, y1 in the same frame, or None.

    Returns:
      ([p, m, 2] float32, [p, m] int32), m = n + 1, n + 2, 2 or (mask prompt alone, p = 1) 0.
    """
    if points is None and boxes is None:
        return np.zeros((1, 0, 2), np.float32), np.zeros((1, 0), np.int32)
    count = len(points) if points is not None else len(boxes)
    parts = []
    if points is not None:
        parts.append((np.asarray(points, np.float32), np.asarray(labels, np.int32)))
    if boxes is not None:
        corners = np.asarray(boxes, np.float32).reshape(count, 2, 2)
        parts.append((corners, np.tile(np.array([[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]]), (count, 1))))
    else:
        parts.append((np.zeros((count, 1, 2), np.float32), np.full((count, 1), NOT_A_POINT)))
    coordinates, kinds = zip(*parts, strict=True)
    return np.concatenate(coordinates, axis=1), np.concatenate(kinds, axis=1).astype(np.int32)


class Prompts(NamedTuple):
    """p prompts of n tokens each, as `prompt_points` gives them, but in pixels of the original frame.

    Attributes:
      points: [p, n, 2] (x, y); box corners are points too.
      labels: [p, n]; see `PromptEncoder`.
    """

    points: np.ndarray
    labels: np.ndarray


def clicks_at(points: np.ndarray) -> Prompts:
    """Makes one foreground click per prompt of points [p, 2] (x, y) in original pixels."""
    return Prompts(*prompt_points(points[:, None], np.ones((len(points), 1), np.int32)))


def point_grid(original_size: tuple[int, int], side: int) -> np.ndarray:
    """Makes a regular grid of points inside an image: [side * side, 1, 2] (x, y) in its pixels."""
    height, width = original_size
    steps = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(steps * width, steps * height), axis=-1).reshape(-1, 1, 2)


NOISE, MOST_NOISE = 0.1, 20.0  # of a box's side, and pixels: Segment Anything (Kirillov et al. 2023), appendix A


def noisy(box: np.ndarray, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Adds a normal error to each coordinate of a box x0, y0, x1, y1, and clips it to its (height, width) image."""
    noise = random.normal(0, NOISE * np.tile(box[2:] - box[:2], 2)).clip(-MOST_NOISE, MOST_NOISE)
    height, width = shape
    return (box + noise).clip(0, [width, height, width, height])
