"""What a FastSAM learns of drawn shapes: cells, distances and masks are those of the shapes."""

from __future__ import annotations

import numpy as np

from experiments.fast_sam_shapes import CELLS, SIDE, batch_of, draw
from slimsam_jax.imaging.geometry import bounding_window
from slimsam_jax.models.fast_sam_config import STRIDES


def middle(cell: int) -> tuple[np.ndarray, int]:
    """(x, y) of a cell's middle in pixels, levels one after the other, and its stride."""
    for stride in STRIDES:
        side = SIDE // stride
        if cell < side * side:
            return (np.array(np.divmod(cell, side)[::-1]) + 0.5) * stride, stride
        cell -= side * side
    raise AssertionError("no level has it")


def test_cells_give_the_boxes_back():
    scenes = [draw(np.random.default_rng([5, i])) for i in range(8)]
    batch = batch_of(scenes)
    assert batch.images.shape == (8, SIDE, SIDE, 3) and batch.cells.shape == (8, CELLS)
    met, strides = set(), set()
    for i, j in np.argwhere(batch.real):
        rows, columns = bounding_window(scenes[i].masks[batch.objects[i, j]])
        place, stride = middle(int(batch.cells[i, j]))
        left, top, right, bottom = batch.distances[i, j] * stride
        box = [place[0] - left, place[1] - top, place[0] + right, place[1] + bottom]
        sides = batch.distances[i, j] > 0  # a cell beside a thin shape has a side at its own middle
        assert sides.sum() >= 3
        wanted = np.array([columns.start, rows.start, columns.stop, rows.stop])
        np.testing.assert_allclose(np.array(box)[sides], wanted[sides], atol=1e-4)
        met.add((i, batch.objects[i, j]))
        strides.add(stride)
    shapes = {(i, k) for i, scene in enumerate(scenes) for k in range(len(scene.masks))}
    assert met == shapes and strides == set(STRIDES)


def test_masks_are_quarters_within_their_boxes():
    scene = draw(np.random.default_rng(3))
    batch = batch_of([scene])
    for k, mask in enumerate(scene.masks):
        small = batch.masks[0, k]
        assert abs(16 * small.sum() - mask.sum()) < 0.2 * mask.sum()
        assert (batch.windows[0, k] >= small).mean() > 0.99
    assert not batch.masks[0, len(scene.masks) :].any() and not batch.real[0, -1]
