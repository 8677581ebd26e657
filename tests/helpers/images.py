"""Image files, sound and broken, with and without annotations."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from slimsam_jax.data import Sample
from slimsam_jax.data.sources import folder


def random_image(seed: int = 0, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save_image(path, height=20, width=30, seed=0, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **kw)
    return path


def truncated(path):
    save_image(path, 200, 300)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def write_annotation(path, **changes):
    mask = np.zeros((20, 30), np.uint8)
    mask[5:10, 4:20] = 1
    encoded = coco.encode(np.asfortranarray(mask))
    fields = {
        "bbox": [4, 5, 16, 5],
        "point_coords": [[6.5, 7.5]],
        "segmentation": {"size": [20, 30], "counts": encoded["counts"].decode()},
    }
    path.with_suffix(".json").write_text(json.dumps({"annotations": [{**fields, **changes}]}))
    return mask.astype(bool)


def samples(paths) -> list[Sample]:
    """Of image files, with the SA-1B .json beside those that have one."""
    return [folder.sample(path, beside if (beside := path.with_suffix(".json")).exists() else None) for path in paths]
