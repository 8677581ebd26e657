"""Checks a command's numbers, paths and outputs, before anything slow is imported: each raises InputError."""

from __future__ import annotations

import numbers
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimsam_jax.errors import InputError, printable
from slimsam_jax.files import IMAGE_SUFFIXES
from slimsam_jax.limits import quoted


def check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**31:
        raise InputError(f"--seed {quoted(seed)} must be between 0 and {2**31 - 1}")


def check_share(max_broken: float) -> None:
    if not isinstance(max_broken, numbers.Real) or not 0 <= max_broken <= 1:
        raise InputError(f"--max-broken {quoted(max_broken)} is not a share of the images: between 0 and 1")


def check_empty(folder: Path) -> None:
    """Raises InputError unless `folder` can become an output folder: absent, or an empty folder."""
    if os.path.exists(folder) and not folder.is_dir():
        raise InputError(f"{folder} is a file, and an output folder is needed")
    if os.path.exists(folder) and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose another folder, or remove it first")
    _check_writable(folder)


def check_file(path: Path) -> None:
    """Raises InputError unless `path` can become an output file; an existing file will be replaced."""
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder, and an output file is needed")
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is no regular file, and an output file would replace it")
    _check_writable(path.parent)
    _check_name(path)


def check_files(paths: Sequence[Path]) -> None:
    """Raises InputError unless `paths` can all become output files, no two the same."""
    for path in paths:
        check_file(path)
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise InputError(f"{' and '.join(map(str, paths))} are one file; each output needs its own")


def check_spared(outputs: Mapping[str, Path | None], inputs: Mapping[str, Iterable[str | Path | None]]) -> None:
    """Raises InputError for an output that would replace an input, or a file of a folder that is read with it.

    Args:
      outputs: {option: path}.
      inputs: {option: files and folders}; those of --model and --clip are models, all others images.
    """
    places = [(option, os.path.expanduser(place)) for option, given in inputs.items() for place in given if place]
    for output, path in outputs.items():
        if not path or not os.path.exists(path):
            continue
        folder = Path(os.path.realpath(path.parent))
        for option, place in places:
            if os.path.exists(place) and os.path.samefile(path, place):
                raise InputError(f"{output} {path} would replace {option}; choose another name")
            is_read = _is_weights if option in ("--model", "--clip") else _is_data
            if folder.is_relative_to(os.path.realpath(place)) and is_read(path):
                raise InputError(f"{output} {path} would replace a file of {option} {place}; choose another name")


def _is_data(path: Path) -> bool:
    """Whether a file in a folder of images is read with it: an image, a shard, COCO's, or what is beside an image."""
    if path.suffix.lower() != ".json":
        return path.suffix.lower() in {*IMAGE_SUFFIXES, ".tar"}
    beside = (path.with_suffix(each) for suffix in IMAGE_SUFFIXES for each in (suffix, suffix.upper()))
    return path.name == "annotations.json" or any(map(os.path.exists, beside))


def _is_weights(path: Path) -> bool:
    """Whether a file in a model folder is read with it."""
    return path.suffix in (".safetensors", ".bin") or path.name.endswith(("config.json", ".index.json"))


def _check_name(path: Path) -> None:
    """Raises InputError if a file of this name, or the temporary one beside it, has no room in a folder's entry."""
    if len(os.fsencode(path.name)) > 240:
        raise InputError(f"{printable(path)} is too long a name for a file")


def _check_writable(folder: Path) -> None:
    try:
        nearest = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
        for part in folder.absolute().parts:
            _check_name(Path(part))
        if len(os.fsencode(folder.absolute())) > 3000:  # Linux opens 4095, with the names of files in it
            raise InputError(f"{printable(folder)} is too long a name for a folder")
        with tempfile.TemporaryFile(dir=nearest):  # permissions are not the truth for root, nor on a read-only disk
            pass
    except OSError:
        raise InputError(
            f"{printable(folder)} cannot be written: {printable(nearest)} is no folder, or takes no file"
        ) from None


def several(values: Any) -> list[Any]:
    """One value, or those of a list."""
    return list(values) if isinstance(values, Iterable) and not is_path(values) else [values]


def is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def as_path(value: Any, name: str) -> Path:
    """Raises InputError for what is no path."""
    if not is_path(value) or not str(value):
        hint = "; slimsam_jax.save(sam, folder) writes a model to one" if hasattr(value, "params") else ""
        raise InputError(f"{name} is a path, not {quoted(value)}{hint}")
    return Path(value)
