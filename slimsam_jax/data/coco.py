"""COCO's format: one .json with `images` and `annotations`, the pictures in a folder near it."""

from __future__ import annotations

import collections
import functools
import json
from pathlib import Path
from typing import Any

from slimsam_jax.data.sample import Sample
from slimsam_jax.errors import InputError, blaming


def file_of(location: str | Path) -> Path:
    """The .json of a location that holds COCO: annotations.json in a folder, or itself."""
    path = Path(location).expanduser()
    return path / "annotations.json" if path.is_dir() else path


def in_folder(folder: Path) -> list[Sample] | None:
    """The pictures that a folder's annotations.json lists, or None: there is no such file, or without `images`.

    (SA-1B's have `image`; beside a picture of that name it may be one.)
    """
    path = file_of(folder)
    if not path.is_file():
        return None
    with blaming(path):
        content = json.loads(path.read_bytes())
        return _samples(path, content) if "images" in content else None


def samples(path: Path) -> list[Sample]:
    """The pictures that a COCO file lists, in its order. Crowds (`iscrowd`), which are no single object, are left out.

    Raises:
      InputError: not such a file, or its pictures are nowhere near it.
    """
    with blaming(f"the COCO file {path}"):
        return _samples(path, json.loads(path.read_bytes()))


def _samples(path: Path, content: dict[str, Any]) -> list[Sample]:
    images = [(int(image["id"]), str(image["file_name"]), image) for image in content["images"]]
    annotations: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for fields in content.get("annotations", ()):
        if not fields.get("iscrowd"):
            annotations[int(fields["image_id"])].append(fields)
    if not images:
        raise InputError(f"{path} lists no images")
    root = _root(path, [name for _, name, _ in images])
    made = []
    for number, name, image in images:
        load = functools.partial(_with_masks, annotations[number], image) if annotations[number] else None
        made.append(Sample(str(root / name), (root / name).read_bytes, load, number))
    return made


def _root(path: Path, names: list[str]) -> Path:
    """The folder of the pictures: the file's own, `images` in it, or, as COCO lays them out, ../val2017."""
    split = path.stem.rpartition("_")[2]
    near = [path.parent, path.parent / "images", path.parent / split, path.parent.parent / split, path.parent.parent]
    near += [path.parent.parent / "images", path.parent.parent / "images" / split]
    for root in near:
        if any((root / name).exists() for name in names[:100]):
            return root
    raise InputError(f"{names[0]}, listed by {path}, is in none of {', '.join(map(str, dict.fromkeys(near)))}")


def _with_masks(annotations: list[dict[str, Any]], image: dict[str, Any]) -> list[dict[str, Any]]:
    size = int(image["height"]), int(image["width"])
    return [fields | {"segmentation": _as_rle(fields["segmentation"], size)} for fields in annotations]


def _as_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Polygons become masks by COCO's own rule, which no other rasteriser follows to the pixel."""
    if isinstance(segmentation, dict):
        return segmentation
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError("polygons need pycocotools: pip install 'slimsam_jax[coco]'") from None
    return mask.merge(mask.frPyObjects(segmentation, *size))
