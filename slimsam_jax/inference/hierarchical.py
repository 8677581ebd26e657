"""Asks fewer points of a grid than all: a few first, whose masks decide on the others.

`grid` is [rows, columns, 2] (x, y) points of a crop in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from slimsam_jax.imaging.geometry import bounding_window
from slimsam_jax.inference import amg
from slimsam_jax.inference.candidates import Candidates, concatenate, enlarge
from slimsam_jax.inference.decode import Encoded
from slimsam_jax.models.sam import Sam

SLACK = 0.03  # by which masks may miss the thresholds and still have the points beside theirs asked
DUPLICATE = 0.8  # box IoU from which a mask is taken for another point's


class Decoded(NamedTuple):
    """Masks as they leave the decoder: the points asked [n, 2], predicted IoUs [n], and logits [n, 4h, 4w]."""

    points: np.ndarray
    scores: np.ndarray
    low: np.ndarray

    def take(self, index: np.ndarray) -> Decoded:
        return Decoded(*(array[index] for array in self))


Decode = Callable[[np.ndarray], Iterator[Decoded]]  # [n, 2] points -> their masks, some at a time
Judge = Callable[[Decoded], tuple[Candidates, np.ndarray]]  # -> those that pass the filters, and their indices


def refine_near_best(
    decode: Decode,
    judge: Judge,
    grid: np.ndarray,
    cells: tuple[int, int],
    iou: float,
    stability: float,
    offset: float,
    duplicate: float = DUPLICATE,
) -> Candidates:
    """Asks every second point of every second row; then, while there are any, those beside points of the best masks.

    The best survive a suppression of its own. A worse duplicate lies beside its better, and a point that gives nothing
    lies beside others that give nothing. Both are judged by the logits as the decoder gives them; only what is
    promising is enlarged. What this keeps and saves: experiments/README.md.

    Args:
      cells: rows and columns of the logits that the crop fills; the others are padding, and hold anything.
      iou, stability, offset: thresholds of predicted IoU and stability, as the generator's.
      duplicate: box IoU of that suppression.
    """
    asked, new = np.zeros((2, *grid.shape[:2]), bool)
    new[::2, ::2] = True
    masks, near = [], []
    while new.any():
        for decoded in decode(grid[new]):
            low = decoded.low[:, : cells[0], : cells[1]]
            index = _promising(decoded.scores, low, iou, stability, offset)
            masks.append(judge(decoded.take(index))[0])
            near.append((_boxes(low[index]), decoded.scores[index], decoded.points[index]))
        asked |= new
        boxes, scores, points = (np.concatenate(parts) for parts in zip(*near, strict=True))
        best = points[amg.nms(boxes, scores, duplicate)]
        gave = (grid[:, :, None] == best).all(-1).any(-1)
        new = ndimage.binary_dilation(gave, np.ones((3, 3))) & ~asked
    return concatenate(masks)


def _promising(scores: np.ndarray, low: np.ndarray, iou: float, stability: float, offset: float) -> np.ndarray:
    """Returns indices of the masks that pass, or nearly so, by their logits as they are."""
    some = np.flatnonzero((scores > iou - SLACK) | (iou <= 0))  # 0 lets everything pass, as in the generator
    inner, outer = ((low[some] > sign * offset).sum((1, 2)) for sign in (1, -1))
    return some[inner >= (stability - SLACK) * np.maximum(outer, 1)]


def _boxes(low: np.ndarray) -> np.ndarray:
    """Returns boxes [n, 4]: x0, y0, and x1, y1 just outside, in cells. A mask one cell wide has an area, too."""
    spans = [bounding_window(mask) for mask in low > 0]
    return np.array([[x.start, y.start, x.stop, y.stop] for y, x in spans]).reshape(-1, 4)


def where_not_covered(
    decode: Decode, judge: Judge, grid: np.ndarray, sam: Sam, encoded: Encoded, threshold: float
) -> Candidates:
    """Asks a sixteenth of the points; then those at which no logit of a mask so far exceeds `threshold`.

    TinySAM (Shu et al., AAAI 2025, section 3.4; 8.5, tuned on SAM-H and its like). There the first points lie beside
    the grid, here they are of it, so that no point is asked that the flat strategy would not ask.
    """
    first = np.zeros(grid.shape[:2], bool)
    first[min(1, len(grid) - 1) :: 4, min(1, len(grid) - 1) :: 4] = True
    parts, known = [], np.zeros(encoded.original_size, bool)
    for decoded in decode(grid[first]):
        candidates, passing = judge(decoded)
        parts.append(candidates)
        known |= covered(sam, encoded, decoded.low[passing], threshold)
    x, y = np.moveaxis(grid.astype(int), -1, 0)
    rest = decode(grid[~first & ~known[y, x]])
    return concatenate(parts + [judge(decoded)[0] for decoded in rest])


def covered(sam: Sam, encoded: Encoded, low: np.ndarray, threshold: float) -> np.ndarray:
    """Tells where any of the [m, 4h, 4w] logits exceeds the threshold: [h0, w0] bool."""
    bits = enlarge(sam, encoded, low, threshold=threshold)[0]
    together = np.bitwise_or.reduce(bits, axis=0) if len(bits) else np.zeros(bits.shape[1:], np.uint8)
    return np.unpackbits(together, axis=-1, count=encoded.original_size[1]).astype(bool)
