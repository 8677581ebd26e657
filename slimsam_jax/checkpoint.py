"""Models on disk: a folder with `model.safetensors` and `config.json`. Nothing is ever half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from slimsam_jax.errors import InputError, blaming, writing
from slimsam_jax.models.config import Config
from slimsam_jax.models.sam import Params, Sam, abstract_params

FORMAT = "slimsam_jax/1"


def save(sam: Sam, folder: Path | str) -> None:
    """Writes a model folder; existing files of these names are replaced atomically.

    Raises:
      OSError, RunError: the folder cannot be written; no partial file is left behind.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(sam.params, sep="/")
    with writing(folder / "model.safetensors"), replacing(folder / "model.safetensors") as temporary:
        save_file({path: np.asarray(array) for path, array in flat.items()}, temporary)
    description = {"format": FORMAT, "architecture": sam.config.to_json(), "provenance": sam.provenance}
    write_json(folder / "config.json", description)


def load(folder: Path | str) -> Sam:
    """Reads a model folder back, float32, strictly: every array of the architecture and no other.

    Raises:
      InputError: not such a folder, or arrays missing, surplus or of the wrong shape.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            raise InputError(f"{folder} is not a model folder: it has no {name}")
    with blaming(folder):
        description = json.loads((folder / "config.json").read_text())
        if description.get("format") != FORMAT:
            raise InputError(f"{folder} has format {description.get('format')!r}, and {FORMAT!r} is what we read")
        config = Config.from_json(description["architecture"])
        flat = load_file(folder / "model.safetensors")
        shapes = flax.traverse_util.flatten_dict(abstract_params(config), sep="/")
    check_names(set(flat), set(shapes), str(folder))
    check_shapes({k: (v.shape, shapes[k].shape) for k, v in flat.items()}, str(folder))
    params = to_device(flat, str(folder))
    return Sam(config, params, description.get("provenance", {}))


def to_device(flat: dict[str, np.ndarray], where: str) -> Params:
    """{path: array} -> tree of float32 arrays on the default device, so that no later call copies them there.

    Raises:
      InputError: an array is of integers, or has values that are not finite in float32.
    """
    with np.errstate(over="ignore"):
        arrays = {path: array.astype(np.float32) for path, array in flat.items()}
    for path, array in arrays.items():
        if flat[path].dtype.kind in "iub" or not np.isfinite(array).all():
            raise InputError(f"{where}: {path} holds integers, or values that are not finite")
    return jax.device_put(flax.traverse_util.unflatten_dict(arrays, sep="/"))


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """Raises InputError listing missing (-) and surplus (+) names, if there are any."""
    names = [f"- {n}" for n in sorted(expected - found)] + [f"+ {n}" for n in sorted(found - expected)]
    if names:
        more = f" … and {len(names) - 8} more" if len(names) > 8 else ""
        raise InputError(f"{where} does not hold a SAM (- missing, + surplus): {', '.join(names[:8])}{more}")


def check_shapes(pairs: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], where: str) -> None:
    """Raises InputError naming the arrays whose (found, expected) shapes differ, if any do."""
    wrong = [f"{name} is {found}, expected {wanted}" for name, (found, wanted) in pairs.items() if found != wanted]
    if wrong:
        more = f" … and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise InputError(f"{where} has arrays of the wrong shape: {'; '.join(wrong[:4])}{more}")


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` on success, removes it on failure."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` on success, and is removed on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(path: Path | str) -> str:
    """Of a file, or of a model folder's weights."""
    path, digest = Path(path).expanduser(), hashlib.sha256()
    weights = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".bin")] if path.is_dir() else [path]
    for part in weights:
        with part.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
