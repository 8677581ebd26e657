"""Finds all masks of an image: `segment_anything`'s `SamAutomaticMaskGenerator`, and ways to ask fewer points.

A grid of points is decoded in batches; what the model thinks poor is dropped before anything is enlarged, the rest is
enlarged, measured and packed to bits on the device, and only what survives suppression is unpacked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.imaging import rle
from slimsam_jax.imaging.prompts import clicks_at
from slimsam_jax.inference import amg, hierarchical
from slimsam_jax.inference.candidates import Candidates, concatenate, enlarge, unpack
from slimsam_jax.inference.decode import Encoded, decode_prompts
from slimsam_jax.inference.hierarchical import Decoded
from slimsam_jax.inference.mixed_prompts import real_array
from slimsam_jax.inference.predictor import AnyImage, as_image, check_list, encode_images
from slimsam_jax.inference.ranking import by_stability, stability_scores
from slimsam_jax.limits import SEARCH, quoted
from slimsam_jax.limits import check as check_number
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.kinds import check_sam
from slimsam_jax.models.sam import Sam


@dataclasses.dataclass(frozen=True)
class SamAutomaticMaskGenerator:
    """Finds the masks of whole images. Fields as the original's, with its defaults but for the model's thresholds.

    Attributes:
      sam: the model. Thresholds that are None become its own, or those of Segment Anything if it has none.
      points_per_side: of the grid; or None and `point_grids`.
      points_per_batch: decoded together.
      pred_iou_thresh: the model's own estimate that a mask must exceed.
      stability_score_thresh: the least IoU of a mask cut at logits above and below 0 by `stability_score_offset`.
      box_nms_thresh: box IoU from which the worse of two masks is a duplicate.
      crop_n_layers: 1: also in 4 crops, 2: and in 16, ...
      crop_nms_thresh: as box_nms_thresh, between crops, the smaller crop being the better.
      crop_overlap_ratio: of the shorter side, by which the first crops overlap.
      crop_n_points_downscale_factor: by which points_per_side falls from layer to layer.
      point_grids: [n, 2] (x, y) in 0..1 for each layer.
      min_mask_region_area: holes and islands of fewer pixels are filled and dropped; 0 for none.
      output_mode: "binary_mask" [h0, w0] bool, "uncompressed_rle" or "coco_rle".
      hierarchical: asks fewer points: a few first, then where they gave a mask, see `inference.hierarchical`.
      use_stability_score: filter and rank by the stability of the decoder's logits in place of predicted IoU, in
        `pred_iou_thresh` and in the results' predicted_iou, too; None: of models that have no estimate, EdgeSAM's.
      covered_thresh: with `hierarchical`, TinySAM's strategy instead of ours: the logit over which a mask covers other
        points. Theirs is 8.5, tuned on SAM-H and its like.
    """

    model: Sam
    points_per_side: int | None = 32
    points_per_batch: int = 64
    pred_iou_thresh: float | None = None
    stability_score_thresh: float | None = None
    stability_score_offset: float | None = None
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: Sequence[np.ndarray] | None = None
    min_mask_region_area: int = 0
    output_mode: Literal["binary_mask", "uncompressed_rle", "coco_rle"] = "binary_mask"
    hierarchical: bool = False
    covered_thresh: float | None = None
    use_stability_score: bool | None = None

    def __post_init__(self):
        check_sam(self.model)
        for name, value in (self.model.thresholds or Thresholds()).to_json().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the class is frozen
        if self.use_stability_score is None:
            object.__setattr__(self, "use_stability_score", by_stability(self.model))
        self._check_numbers()
        if (self.points_per_side is None) == (self.point_grids is None):
            raise InputError("give either points_per_side or point_grids")
        if self.hierarchical and self.point_grids is not None:
            raise InputError("hierarchical refines a regular grid: give points_per_side, not point_grids")
        if self.covered_thresh is not None and not self.hierarchical:
            raise InputError("covered_thresh is of the hierarchical search: add hierarchical, or leave it out")
        if self.point_grids is not None:
            _check_grids(self.point_grids, self.crop_n_layers + 1)
        if not isinstance(self.output_mode, str) or self.output_mode not in ENCODE:
            raise InputError(f"output_mode {quoted(self.output_mode)} is none of {', '.join(ENCODE)}")

    def _check_numbers(self) -> None:
        """Raises InputError for what is no number, or out of all bounds; for None where a number must be."""
        for name, allowed in SEARCH.items():
            value = getattr(self, name)
            if value is not None or name not in ("points_per_side", "covered_thresh"):
                check_number(name, value, allowed)
        for name in ("hierarchical", "use_stability_score"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise InputError(f"{name} {quoted(getattr(self, name))} is neither True nor False")

    def generate(self, image: AnyImage) -> list[dict[str, Any]]:
        """Finds the masks of an image, best first; [] if there are none.

        Returns:
          A dict of each mask: segmentation (see `output_mode`), area in pixels, bbox (x, y, width, height of the box
          between the outermost pixels), predicted_iou, point_coords [[x, y]], stability_score, crop_box (x, y,
          width, height).

        Raises:
          InputError: not an image.
        """
        pixels = np.asarray(as_image(image))
        size = pixels.shape[:2]
        crops = amg.generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        crops = [(box, layer) for box, layer in crops if (box[2:] > box[:2]).all()]  # of a tiny image some are empty
        kept = concatenate([self._of_crop(pixels, crop_box, layer) for crop_box, layer in crops])
        if len(crops) > 1:
            kept = kept.take(amg.nms(kept.boxes, 1 / amg.box_area(kept.crop_boxes), self.crop_nms_thresh))
        masks: Iterable[np.ndarray] = (unpack(kept, i, size) for i in range(len(kept.bits)))  # one at a time
        if self.min_mask_region_area and len(kept.bits):
            kept, masks = self._without_small_regions(kept, list(masks))
        return [_record(kept, i, mask, self.output_mode) for i, mask in enumerate(masks)]

    def _of_crop(self, pixels: np.ndarray, crop_box: np.ndarray, layer: int) -> Candidates:
        x0, y0, x1, y1 = crop_box
        (encoded,) = encode_images(self.model, [pixels[y0:y1, x0:x1]])
        return self.candidates(encoded, crop_box, layer, pixels.shape[:2])

    def candidates(
        self, encoded: Encoded, crop_box: np.ndarray | None = None, layer: int = 0, size: tuple[int, int] | None = None
    ) -> Candidates:
        """Finds the masks of an encoded image, best first; or of a crop of one of `size`."""
        height, width = encoded.original_size
        crop_box = np.array([0, 0, width, height]) if crop_box is None else crop_box
        decode = functools.partial(self._decode, encoded)
        judge = functools.partial(self._passing, encoded, crop_box, size or encoded.original_size)
        grid = self._grid(layer) * (width, height)
        if not self.hierarchical:
            candidates = concatenate([judge(decoded)[0] for decoded in decode(grid.reshape(-1, 2))])
        elif self.covered_thresh is not None:
            candidates = hierarchical.where_not_covered(decode, judge, grid, self.model, encoded, self.covered_thresh)
        else:
            thresholds = self.pred_iou_thresh, self.stability_score_thresh, self.stability_score_offset
            cells = tuple(-(-4 * side // self.model.config.patch_size) for side in encoded.size)
            duplicate = max(hierarchical.DUPLICATE, self.box_nms_thresh)  # whoever wants near duplicates gets them
            candidates = hierarchical.refine_near_best(decode, judge, grid, cells, *thresholds, duplicate)
        return candidates.take(amg.nms(candidates.boxes, candidates.predicted_iou, self.box_nms_thresh))

    def _grid(self, layer: int) -> np.ndarray:
        """Returns the points of a layer, (x, y) in 0..1: [rows, columns, 2], or [n, 2] of `point_grids`."""
        if self.point_grids is not None:
            return np.asarray(self.point_grids[layer], float)
        side = max(1, int(self.points_per_side / self.crop_n_points_downscale_factor**layer))
        return amg.build_point_grid(side).reshape(side, side, 2)

    def _decode(self, encoded: Encoded, points: np.ndarray) -> Iterator[Decoded]:
        """Decodes all masks at [n, 2] points of a crop, a batch at a time; the single mask of each is left out."""
        for start in range(0, len(points), self.points_per_batch):
            some = points[start : start + self.points_per_batch]
            low, scores = decode_prompts(self.model, encoded, clicks_at(some))
            low, scores = low[:, 1:].reshape(-1, *low.shape[2:]), scores[:, 1:].ravel()
            scores = stability_scores(low) if self.use_stability_score else scores
            yield Decoded(np.repeat(some, len(scores) // len(some), axis=0), scores, low)

    def _passing(
        self, encoded: Encoded, crop_box: np.ndarray, size: tuple[int, int], decoded: Decoded
    ) -> tuple[Candidates, np.ndarray]:
        """Returns the masks that pass the filters, and their indices among `decoded`."""
        good = np.flatnonzero((decoded.scores > self.pred_iou_thresh) | (self.pred_iou_thresh <= 0))
        points, scores, low = decoded.take(good)
        bits, boxes, areas, stability = enlarge(self.model, encoded, low, self.stability_score_offset)
        boxes = boxes + np.tile(crop_box[:2], 2)
        crops = np.tile(crop_box, (len(good), 1))
        candidates = Candidates(list(bits), boxes, areas, scores, stability, points + crop_box[:2], crops)
        near_edge = amg.is_box_near_crop_edge(boxes, crop_box, size)
        keep = np.flatnonzero((stability >= self.stability_score_thresh) & ~near_edge)
        kept = candidates.take(keep)  # copied, as views would keep the masks of all candidates of the batch
        return kept._replace(bits=[mask.copy() for mask in kept.bits]), good[keep]

    def _without_small_regions(self, candidates: Candidates, masks: list[np.ndarray]):
        """Removes small regions; of duplicates those masks go that had some. They stand last, as the original's."""
        cleaned = [amg.remove_small_regions(mask, self.min_mask_region_area) for mask in masks]
        masks, changed = [mask for mask, _ in cleaned], np.array([changed for _, changed in cleaned])
        boxes = np.stack([amg.mask_to_box(mask) for mask in masks])
        keep = amg.nms(boxes, 1.0 - changed, max(self.box_nms_thresh, self.crop_nms_thresh))
        candidates = candidates._replace(boxes=boxes, areas=np.array([mask.sum() for mask in masks]))
        return candidates.take(keep), [masks[i] for i in keep]


def _check_grids(grids: Any, layers: int) -> None:
    """Raises InputError unless there are points [n, 2] in 0..1 for each layer of crops."""
    check_list(grids, "point_grids", axes=3)
    if len(grids) < layers:
        raise InputError(f"{len(grids)} point_grids for {layers} layers of crops")
    for i, grid in enumerate(grids):
        array, most = real_array(grid), SEARCH["points_per_side"].most ** 2
        if array is None or array.ndim != 2 or array.shape[1] != 2 or not 0 < len(array) <= most:
            raise InputError(f"point_grids[{i}] must be numbers of shape [n, 2], n from 1 to {most}")
        if not ((array >= 0) & (array <= 1)).all():  # NaN is neither
            raise InputError(f"point_grids[{i}] must be shares of the image's width and height, from 0 to 1")


ENCODE = {"binary_mask": np.asarray, "uncompressed_rle": rle.encode_uncompressed, "coco_rle": rle.encode}


def _record(kept: Candidates, index: int, mask: np.ndarray, mode: str) -> dict[str, Any]:
    (x0, y0, x1, y1), (left, top, right, bottom) = (
        kept.boxes[index].tolist(),
        kept.crop_boxes[index].tolist(),
    )
    return {
        "segmentation": ENCODE[mode](mask),
        "area": int(kept.areas[index]),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "predicted_iou": float(kept.predicted_iou[index]),
        "point_coords": [kept.points[index].tolist()],
        "stability_score": float(kept.stability[index]),
        "crop_box": [left, top, right - left, bottom - top],
    }
