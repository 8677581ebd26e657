"""Saves and loads models: a folder with `model.safetensors` and `config.json`. Nothing is ever half-written.

Of a published model that brings along arrays which are never run, `kept.safetensors` has those. A quantised model has
integers in the place of kernels, and scales beside them (`quantization.saving`).
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from slimsam_jax import safetensors_file
from slimsam_jax.errors import InputError, printable, reading, writing
from slimsam_jax.files import open_regular, read_json, replacing, write_json
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.kinds import Model, families
from slimsam_jax.quantization import saving

FORMAT, FIRST = "slimsam_jax/2", "slimsam_jax/1"  # the first had no family: SAM's ViT
KEPT, MOST_KEPT = "kept.safetensors", 1 << 28  # file, and bytes: MobileSAM's classifier has 1.3 MB
MOST_LEVELS = 100  # of provenance; a teacher's teacher's are four deeper each


def save(sam: Model, folder: Path | str) -> None:
    """Writes a model folder; existing files of these names are replaced atomically.

    Raises:
      OSError, RunError: the folder cannot be written; no partial file is left behind.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(sam.params, sep="/")
    with writing(folder / "model.safetensors"), replacing(folder / "model.safetensors") as temporary:
        save_file(saving.to_arrays(flat), temporary)
    if sam.kept:
        with writing(folder / KEPT), replacing(folder / KEPT) as temporary:
            save_file(sam.kept, temporary)
    else:
        (folder / KEPT).unlink(missing_ok=True)  # of a model that was here before
    write_json(folder / "config.json", describe(sam))


def describe(sam: Model) -> dict[str, Any]:
    """Returns the content of `config.json`; thresholds only of a model that has some."""
    thresholds = {"thresholds": sam.thresholds.to_json()} if sam.thresholds else {}
    described = {"format": FORMAT, "family": sam.family, "architecture": sam.config.to_json()}
    integers = saving.describe(flax.traverse_util.flatten_dict(sam.params, sep="/"))
    quantized = {"quantization": integers} if integers else {}
    return {**described, **quantized, **thresholds, "provenance": sam.provenance}


def load(folder: Path | str) -> Model:
    """Reads a model folder back, strictly: every array of the architecture and no other, float32 or integers.

    Raises:
      InputError: not such a folder, arrays missing, surplus or of the wrong shape, or thresholds that are none.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not os.path.lexists(folder / name):
            raise InputError(f"{folder} is not a model folder: it has no {name}")
    description = read_json(folder / "config.json")
    with reading(folder):
        family = _family(description, str(folder))
        kind = families()[family]
        config = kind.architecture(family, description["architecture"])
        provenance = _provenance(description.get("provenance", {}))
        flat = safetensors_file.read(folder / "model.safetensors")
        lasts = kind.last_arrays(config)  # costs next to nothing
        check_names(lasts & set(flat), lasts, str(folder))
        thresholds = description.get("thresholds")
        thresholds = None if thresholds is None else Thresholds.from_json(thresholds)
        shapes = flax.traverse_util.flatten_dict(kind.abstract_params(config), sep="/")
        integers = saving.Described(description.get("quantization", []), str(folder))
        if integers.paths and not kind.QUANTIZES:
            raise InputError(f"{folder} is a {family} in integers, which nothing here computes with")
    check_names(set(flat), set(shapes) | integers.extra, str(folder))
    check_names(integers.paths & set(shapes), integers.paths, str(folder))
    plain = {path: flat[path] for path in shapes if path not in integers.paths}
    check_shapes({k: (v.shape, shapes[k].shape) for k, v in plain.items()}, str(folder))
    with reading(folder):
        quantized = integers.restore(flat, {path: shape.shape for path, shape in shapes.items()})
    kept = _kept(folder / KEPT)
    params = to_device(plain, str(folder), quantized)
    return kind.make(config, params, provenance, thresholds, kept)


def _kept(path: Path) -> dict[str, np.ndarray]:
    """What is kept aside for the way back, which checks it; {} if nothing is."""
    if not os.path.lexists(path):
        return {}
    arrays = safetensors_file.read(path)
    if (size := sum(array.nbytes for array in arrays.values())) > MOST_KEPT:
        raise InputError(f"{path} has {size} bytes of arrays that nothing reads, and at most {MOST_KEPT} are kept")
    return {name: np.array(array) for name, array in arrays.items()}


def _family(description: dict[str, Any], where: str) -> str:
    """The name of a family; in the first format SAM's ViT was the only one."""
    if description.get("format") not in (FORMAT, FIRST):
        theirs = printable(repr(description.get("format")), 40)
        raise InputError(f"{where} has format {theirs}, and {FORMAT!r} is what we read")
    name = description["family"] if description["format"] == FORMAT else "vit"
    if name not in families():
        raise InputError(f"{where} is of the family {printable(repr(name), 40)}, and there are {', '.join(families())}")
    return name


def _provenance(provenance: Any) -> dict[str, Any]:
    """Checks that a provenance can be written again: JSON's writer takes a frame of the stack for each level."""
    level, depth = [provenance], 0
    while level and depth <= MOST_LEVELS:
        nodes = (node for node in level if type(node) in (dict, list))
        children = (node.values() if isinstance(node, dict) else node for node in nodes)
        level, depth = list(itertools.chain.from_iterable(children)), depth + 1
    if level or not isinstance(provenance, dict):
        raise ValueError(f"its provenance must be an object of at most {MOST_LEVELS} levels")
    return provenance


def to_device(flat: dict[str, np.ndarray], where: str, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Puts {path: array} onto the default device as a tree of float32, so that no later call copies them there.

    Args:
      others: {path: what else goes into the tree}, as it is.

    Raises:
      InputError: an array is not of real floating-point numbers, or has values that are not finite in float32.
    """
    tree = dict(others or {})
    for path, array in flat.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{where}: {path} holds {array.dtype}, and weights are real numbers with a fraction")
        with np.errstate(over="ignore"):
            values = array.astype(np.float32, order="C")
        if not np.isfinite(values).all():
            raise InputError(f"{where}: {path} holds values that are not finite in float32")
        tree[path] = values
    return jax.device_put(flax.traverse_util.unflatten_dict(tree, sep="/"))  # at once: no program for each shape


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """Raises InputError listing missing (-) and surplus (+) names, if there are any."""
    names = [f"- {n}" for n in sorted(expected - found)] + [f"+ {n}" for n in sorted(found - expected)]
    if names:
        more = f" … and {len(names) - 8} more" if len(names) > 8 else ""
        listed = ", ".join(printable(name, 100) for name in names[:8])
        raise InputError(f"{where} does not hold a SAM (- missing, + surplus): {listed}{more}")


def check_shapes(pairs: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], where: str) -> None:
    """Raises InputError naming the arrays whose (actual, expected) shapes differ, if any do."""
    wrong = [f"{name} is {actual}, expected {shape}" for name, (actual, shape) in pairs.items() if actual != shape]
    if wrong:
        more = f" … and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise InputError(f"{where} has arrays of the wrong shape: {'; '.join(wrong[:4])}{more}")


def sha256(path: Path | str) -> str:
    """Hashes a file, or those of a model folder that hold the weights.

    Raises:
      InputError: one is no regular file, or cannot be read.
    """
    path, digest = Path(path).expanduser(), hashlib.sha256()
    for part in safetensors_file.files_of(path) if path.is_dir() else [path]:
        with open_regular(part) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
