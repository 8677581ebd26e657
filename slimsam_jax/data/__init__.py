"""Images and their annotations, from wherever they lie: folders, SA-1B, tar shards, COCO, TFDS.

    samples = find(["~/sa1b", "sa_000001.tar", "coco/annotations/instances_val2017.json", "tfds:~/prepared"])

A source is a list of `Sample`s. Nothing of an image is read before it is asked for, in any order and from any
thread, so shuffling, sharding and resuming are index arithmetic (`batches.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from slimsam_jax.data.sample import Annotation, Sample, check_one_is_readable, decode, read_image
from slimsam_jax.data.sources import coco, folder, shards, tfds
from slimsam_jax.errors import InputError, printable

__all__ = ["Annotation", "Sample", "check_one_is_readable", "decode", "find", "read_image", "without_image"]


def find(locations: Sequence[str | Path]) -> list[Sample]:
    """Lists all images of the locations, each once, in a fixed order.

    What cannot be opened in them (a damaged shard, a FIFO called x.jpg) is a sample, too, which fails when it is read.

    Args:
      locations: each a folder (images at any depth with SA-1B .json files beside them, and .tar shards; or, with
        an annotations.json in it, COCO), a .tar shard, a COCO .json, or `tfds:DIR`.

    Raises:
      InputError: a location is missing, of another kind, or holds no image.
    """
    if not locations:
        raise InputError("no folder of images is given, nor anything else that holds some")
    samples: list[Sample] = []
    for location in map(str, locations):
        if not location.strip():
            raise InputError("the name of a folder of images is empty")
        here = _open(location)
        if not here:
            raise InputError(f"{printable(location)} holds no images ({', '.join(sorted(folder.SUFFIXES))})")
        samples += here
    if all(sample.lost for sample in samples):
        raise InputError(samples[0].lost)
    return list(dict.fromkeys(samples))


def _open(location: str) -> list[Sample]:
    if location.startswith("tfds:"):
        return tfds.samples(_path(location.removeprefix("tfds:")))
    path = _path(location)
    if os.path.isdir(path):
        listed = coco.in_folder(path)
        if listed is not None:
            return listed
        return folder.samples(path) + [sample for tar in folder.tars(path) for sample in shards.samples(tar)]
    if os.path.isfile(path) and path.suffix.lower() == ".json":
        return coco.samples(path)
    if os.path.isfile(path) and path.suffix.lower() in shards.SUFFIXES:
        return shards.samples(path)
    raise InputError(f"{printable(location)} is not a folder of images, a .tar of them, a COCO .json or tfds:DIR")


def _path(location: str | Path) -> Path:
    """Expands ~ in a location, which may also name a user whom there is not."""
    return Path(os.path.expanduser(location))


def without_image(locations: Sequence[str | Path]) -> list[str]:
    """Lists SA-1B annotations in folders and shards whose image is missing, so that `find` passes them by."""
    names: list[str] = []
    for path in map(_path, locations):
        if os.path.isdir(path) and coco.in_folder(path) is None:
            names += folder.without_image(path)
            names += [name for tar in folder.tars(path) for name in shards.without_image(tar)]
        elif os.path.isfile(path) and path.suffix.lower() == ".tar":
            names += shards.without_image(path)
    return names


def embedded_images() -> Path:
    """Returns the folder of photographs that ship with the package; their sources and licences lie beside them."""
    return Path(str(resources.files("slimsam_jax") / "assets" / "photos"))


def embedded_teacher() -> Path:
    """Returns the folder of the small SAM (256 px) that ships with the package."""
    return Path(str(resources.files("slimsam_jax") / "assets" / "sam_small_256"))
