"""Reads COCO's format: one .json with `images` and `annotations`, the images in a folder near it."""

from __future__ import annotations

import collections
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimsam_jax.data.sample import MOST_BYTES, Sample
from slimsam_jax.data.sources import polygons
from slimsam_jax.errors import InputError, printable, reading
from slimsam_jax.files import read_bytes
from slimsam_jax.imaging import rle

MOST_OF_JSON = 2**32  # bytes; LVIS has a billion


def file_of(location: str | Path) -> Path:
    """Returns the .json of a location that holds COCO: annotations.json in a folder, or itself."""
    path = Path(os.path.expanduser(location))
    return path / "annotations.json" if os.path.isdir(path) else path


def read(path: Path) -> Any:
    """Reads the .json of a whole data set.

    Raises:
      InputError: not a file, or of more than 4 GiB.
      ValueError, RecursionError: not JSON.
    """
    return json.loads(read_bytes(path, MOST_OF_JSON))


def in_folder(folder: Path) -> list[Sample] | None:
    """Lists the images of a folder's annotations.json; None if there is no such file, or one without `images`.

    (SA-1B's have `image`; beside an image of that name it may be one.)
    """
    path = file_of(folder)
    if not os.path.isfile(path):
        return None
    with reading(path):
        content = read(path)
        return _samples(path, content) if "images" in content else None


def samples(path: Path) -> list[Sample]:
    """Lists the images of a COCO file, in its order. Crowds (`iscrowd`), which are no single object, are left out.

    Raises:
      InputError: not such a file, or its images are nowhere near it.
    """
    with reading(f"the COCO file {path}"):
        return _samples(path, read(path))


def _samples(path: Path, content: dict[str, Any]) -> list[Sample]:
    images = [(int(image["id"]), str(image["file_name"]), image) for image in content["images"]]
    annotations: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for fields in content.get("annotations", ()):
        if not fields.get("iscrowd"):
            annotations[int(fields["image_id"])].append(fields)
    if not images:
        raise InputError(f"{path} lists no images")
    root = _root(path, [name for _, name, _ in images])
    listed = []
    for number, name, image in images:
        load = functools.partial(_with_masks, annotations[number], image) if annotations[number] else None
        read_image = functools.partial(read_bytes, root / name, MOST_BYTES)
        listed.append(Sample(str(root / name), read_image, load, number))
    return listed


def _root(path: Path, names: list[str]) -> Path:
    """Finds the folder of the images: the file's own, `images` in it, or, as COCO lays them out, ../val2017."""
    split = path.stem.rpartition("_")[2]
    near = [path.parent, path.parent / "images", path.parent / split, path.parent.parent / split, path.parent.parent]
    near += [path.parent.parent / "images", path.parent.parent / "images" / split]
    for root in near:
        if any(os.path.exists(root / name) for name in names[:100]):
            return root
    raise InputError(
        f"{printable(names[0])}, listed by {path}, is in none of {', '.join(map(str, dict.fromkeys(near)))}"
    )


def _with_masks(annotations: list[dict[str, Any]], image: dict[str, Any]) -> list[dict[str, Any]]:
    size = size_of(image)
    segmentations = [fields["segmentation"] for fields in annotations]
    polygons.check_together([given for given in segmentations if not isinstance(given, dict)], size)
    masks = [as_rle(given, size) for given in segmentations]
    return [fields | {"segmentation": mask} for fields, mask in zip(annotations, masks, strict=True)]


def size_of(image: dict[str, Any]) -> tuple[int, int]:
    """Returns the (height, width) of one of COCO's `images`."""
    return int(image["height"]), int(image["width"])


def as_rle(segmentation: Any, size: Sequence[int]) -> dict[str, Any]:
    """Converts a segmentation of COCO's, of an image of (height, width), to what `rle.decode` and pycocotools take.

    Raises:
      ValueError, KeyError, TypeError: it is none, or of another image.
      InputError: it is polygons, and pycocotools is not installed.
    """
    if not isinstance(segmentation, dict):
        return polygons.to_rle(segmentation, size)
    rle.run_lengths(segmentation, size)
    return segmentation
