"""Pictures and their annotations, from wherever they lie: folders, SA-1B, tar shards, COCO, TFDS.

    samples = find(["~/sa1b", "sa_000001.tar", "coco/annotations/instances_val2017.json", "tfds:~/prepared"])

A source is a list of `Sample`s. Nothing of a picture is read before it is asked for, in any order and from any
thread, so shuffling, sharding and resuming are index arithmetic (`batches.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from slimsam_jax.data import coco, folder, shards, tfds
from slimsam_jax.data.sample import Annotation, Sample, check_one_is_readable, decode, read_image
from slimsam_jax.errors import InputError

__all__ = ["Annotation", "Sample", "check_one_is_readable", "decode", "find", "read_image", "without_picture"]


def find(locations: Sequence[str | Path]) -> list[Sample]:
    """All pictures of the locations, each once, in a fixed order.

    Args:
      locations: each a folder (pictures at any depth with SA-1B .json files beside them, and .tar shards; or, with
        an annotations.json in it, COCO), a .tar shard, a COCO .json, or `tfds:DIR`.

    Raises:
      InputError: a location is missing, of another kind, or holds no picture.
    """
    if not locations:
        raise InputError("no folder of images is given, nor anything else that holds some")
    found: list[Sample] = []
    for location in map(str, locations):
        if not location.strip():
            raise InputError("the name of a folder of images is empty")
        samples = _open(location)
        if not samples:
            raise InputError(f"{location} holds no images ({', '.join(sorted(folder.SUFFIXES))})")
        found += samples
    return list(dict.fromkeys(found))


def _open(location: str) -> list[Sample]:
    if location.startswith("tfds:"):
        return tfds.samples(Path(location.removeprefix("tfds:")).expanduser())
    path = Path(location).expanduser()
    if path.is_dir():
        listed = coco.in_folder(path)
        if listed is not None:
            return listed
        return folder.samples(path) + [sample for tar in _tars(path) for sample in shards.samples(tar)]
    if path.is_file() and path.suffix.lower() == ".json":
        return coco.samples(path)
    if path.is_file() and path.suffix.lower() in shards.SUFFIXES:
        return shards.samples(path)
    raise InputError(f"{location} is not a folder of images, a .tar of them, a COCO .json or tfds:DIR")


def _tars(path: Path) -> list[Path]:
    return sorted(tar for tar in path.rglob("*.tar") if not tar.name.startswith("."))


def without_picture(locations: Sequence[str | Path]) -> list[str]:
    """Names of SA-1B annotations in folders and shards whose picture is missing, so that `find` passes them by."""
    found: list[str] = []
    for path in (Path(location).expanduser() for location in map(str, locations)):
        if path.is_dir() and coco.in_folder(path) is None:
            found += folder.without_picture(path)
            found += [name for tar in _tars(path) for name in shards.without_picture(tar)]
        elif path.is_file() and path.suffix.lower() == ".tar":
            found += shards.without_picture(path)
    return found


def embedded_images() -> Path:
    """The photographs that ship with the package; their sources and licences lie beside them."""
    return Path(str(resources.files("slimsam_jax") / "assets" / "photos"))


def embedded_teacher() -> Path:
    """The small SAM (256 px) that ships with the package."""
    return Path(str(resources.files("slimsam_jax") / "assets" / "sam_small_256"))
