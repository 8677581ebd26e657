"""Both sides of `experiments.bench --what evaluation`: mIoU by point and by box of an image with annotations.

Ours is what `slimsam_jax.evaluate` does for the single mask, two images at a time; PyTorch's is `SamPredictor`, which
encodes the image once and is then asked for one mask at a time, and IoU by numpy as in SlimSAM's validation
(prune_funcs.py:30-36).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from PIL import Image

from experiments.bench.options import Options, Step
from slimsam_jax.data import Annotation
from slimsam_jax.models.config import Config

TOGETHER = 10  # images of a step of ours
ANNOTATIONS = 19  # as many as BSDS500 has an image; SA-1B has a hundred
SIZE = (1.25, 1.88)  # of the image, over the model's: 321 x 481 for 256 px


def make_step(options: Options, config: Config) -> Step:
    size = tuple(round(ratio * side) for ratio, side in zip(SIZE, config.image_size, strict=True))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    side = ours if options.side == "jax" else original
    run, peak = side(config, image, annotations(size))
    return Step(
        run,
        TOGETHER if options.side == "jax" else 1,
        peak,
        f"{len(os.sched_getaffinity(0))} cores, {ANNOTATIONS} annotations",
    )


def annotations(size: tuple[int, int]) -> list[Annotation]:
    """Draws ellipses of all sizes, anywhere."""
    random, made = np.random.default_rng(0), []
    y, x = np.mgrid[: size[0], : size[1]]
    for number in range(ANNOTATIONS):
        centre, radii = random.uniform(0.2, 0.8, 2) * size, random.uniform(0.02, 0.2, 2) * size
        mask = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1
        box = np.concatenate([(centre - radii)[::-1], (centre + radii)[::-1]])
        made.append(Annotation(number, mask, box, centre[::-1], box))
    return made


def ours(config: Config, image: Image.Image, truth: list[Annotation]) -> tuple[Callable[[], object], Callable[[], int]]:
    from experiments.bench.ours import random_model
    from slimsam_jax.data.reading import map_readable
    from slimsam_jax.evaluation.scores import single_mask_iou
    from slimsam_jax.inference.decode import encode_image
    from slimsam_jax.profiling.memory import peak_memory

    sam = random_model(config, 0)

    def one(_: int) -> list[float]:
        encoded = encode_image(sam, image)
        return [single_mask_iou(sam, encoded, truth, kind) for kind in ("point", "box")]

    return lambda: map_readable(one, range(TOGETHER)), peak_memory


def original(
    config: Config, image: Image.Image, truth: list[Annotation]
) -> tuple[Callable[[], object], Callable[[], int]]:
    import torch

    from experiments.bench.original import peak
    from slimsam_jax.imaging.transforms import resized_shape
    from tests.helpers.peers import segment_anything, stock_sam

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    predictor = segment_anything().SamPredictor(stock_sam(config).to(device))
    size = (image.height, image.width)
    height, width = resized_shape(size, config.image_size)

    def run() -> list[float]:
        pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        predictor.set_torch_image(torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None], size)
        points = [{"point_coords": a.point[None], "point_labels": np.array([1])} for a in truth]
        prompts = zip(points + [{"box": a.box} for a in truth], truth + truth, strict=True)
        return [overlap(predictor.predict(**prompt, multimask_output=False)[0][0], a.mask) for prompt, a in prompts]

    return run, lambda: peak(device)


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    return np.logical_and(mask, truth).sum() / max(1, np.logical_or(mask, truth).sum())
