"""Images and their annotations, from wherever they lie: folders, SA-1B, tar shards, COCO, TFDS.

    samples = find(["~/sa1b", "sa_000001.tar", "coco/annotations/instances_val2017.json", "tfds:~/prepared"])

A source is a list of `Sample`s, or one that makes them when they are asked for (`samples.py`). Nothing of an image is
read before it is asked for, in any order and from any thread, so shuffling, sharding and resuming are index arithmetic
(`batches.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from slimsam_jax.data.sample import Annotation, Sample, check_one_is_readable, decode, read_image
from slimsam_jax.data.samples import Lazy, Samples
from slimsam_jax.data.sources import coco, folder, shards, tfds
from slimsam_jax.errors import InputError, printable
from slimsam_jax.files import IMAGE_SUFFIXES

__all__ = [
    "Annotation",
    "Found",
    "Sample",
    "check_one_is_readable",
    "decode",
    "find",
    "look",
    "read_image",
]


Part = Sequence[Sample] | Path  # samples, or a tar that is not opened yet


class Found(NamedTuple):
    """What some locations hold.

    Attributes:
      samples: all images, each once.
      folders: the contents of those locations that are folders, but for COCO's.
      tars: all shards.
    """

    samples: Sequence[Sample]
    folders: list[folder.Contents]
    tars: list[Path]

    def without_image(self) -> list[str]:
        """Reads and lists SA-1B annotations in folders and shards whose image is missing: they are no samples."""
        paths = dict.fromkeys(path for each in self.folders for path in each.alone)
        alone = [str(path) for path in paths if folder.is_annotation_file(path)]
        return [*alone, *shards.without_image(self.tars)]

    def others(self) -> list[str]:
        """Lists files in folders that nothing reads, because of their endings: HEIC of a phone, RAW of a camera."""
        return list(dict.fromkeys(str(path) for each in self.folders for path in each.others))

    def closed(self) -> list[str]:
        """Lists folders in folders that are not looked into: links, and those that this user may not list."""
        return list(dict.fromkeys(name for each in self.folders for name in each.closed))


def find(locations: Sequence[str | Path]) -> Sequence[Sample]:
    """Lists all images of the locations, each once, in a fixed order: a list, or `Samples` if there are shards.

    What cannot be opened in them (a damaged shard, a FIFO called x.jpg) is a sample, too, which fails when it is read.

    Args:
      locations: each a folder (images at any depth with SA-1B .json files beside them, and .tar shards; or, with
        an annotations.json in it, COCO), a .tar shard, a COCO .json, or `tfds:DIR`.

    Raises:
      InputError: a location is missing, of another kind, or holds no image.
    """
    return look(locations).samples


def look(locations: Sequence[str | Path]) -> Found:
    """As `find`, with what lies beside the images. Folders are walked over and COCO files read once.

    Raises:
      InputError: see `find`.
    """
    if not locations:
        raise InputError("no folder of images is given, nor anything else that holds some")
    opened: list[tuple[list[Part], list[folder.Contents]]] = []  # of each location
    for location in map(str, locations):
        if not location.strip():
            raise InputError("the name of a folder of images is empty")
        opened.append(_open(location))
    parts = [part for of_one, _ in opened for part in of_one]
    paths = list(dict.fromkeys(part for part in parts if isinstance(part, Path)))
    tars = shards.samples(paths)
    for location, (of_one, _) in zip(locations, opened, strict=True):
        if not any(map(len, _without_paths(of_one, tars))):
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise InputError(f"{printable(location)} holds no images ({kinds}; convert others, such as .heic, first)")
    return Found(_each_once(parts, tars), [contents for _, folders in opened for contents in folders], paths)


def _open(location: str) -> tuple[list[Part], list[folder.Contents]]:
    """Lists the samples of a location, or the path of a tar, as all are opened together; and what a folder holds."""
    if location.startswith("tfds:"):
        return [tfds.samples(_path(location.removeprefix("tfds:")))], []
    path = _path(location)
    if os.path.isdir(path):
        listed = coco.in_folder(path)
        if listed is not None:
            return [listed], []
        contents = folder.contents(path)
        return [contents.samples, *contents.tars], [contents]
    if os.path.isfile(path) and path.suffix.lower() == ".json":
        return [coco.samples(path)], []
    if os.path.isfile(path) and path.suffix.lower() in shards.SUFFIXES:
        return [path], []
    problem = "is not" if os.path.exists(path) else "does not exist; give"
    raise InputError(f"{printable(location)} {problem} a folder of images, a .tar of them, a COCO .json or tfds:DIR")


def _without_paths(parts: Sequence[Part], tars: Mapping[Path, list[Sequence[Sample]]]) -> list[Sequence[Sample]]:
    return [each for part in parts for each in (tars[part] if isinstance(part, Path) else [part])]


def _each_once(parts: Sequence[Part], tars: Mapping[Path, list[Sequence[Sample]]]) -> Sequence[Sample]:
    """All samples, each once: names in a tar begin with its path, so that no other place has them."""
    first = list({part if isinstance(part, Path) else id(part): part for part in parts}.values())
    known: set[Sample] = set()
    each: list[Sequence[Sample]] = []
    for part in _without_paths(first, tars):
        if isinstance(part, list):
            part = list(dict.fromkeys(sample for sample in part if sample not in known))
            known.update(part)
        each.append(part)
    if not any(isinstance(part, Lazy) and len(part) for part in each) and all(sample.lost for sample in known):
        raise InputError(next(sample.lost for part in each for sample in part))
    return Samples(each) if tars else [sample for part in each for sample in part]


def _path(location: str | Path) -> Path:
    """Expands ~ in a location, which may also name a user whom there is not."""
    return Path(os.path.expanduser(location))


def embedded_images() -> Path:
    """Returns the folder of photographs that ship with the package; their sources and licences lie beside them."""
    return Path(str(resources.files("slimsam_jax") / "assets" / "photos"))


def embedded_teacher() -> Path:
    """Returns the folder of the small SAM (256 px) that ships with the package."""
    return Path(str(resources.files("slimsam_jax") / "assets" / "sam_small_v2"))
