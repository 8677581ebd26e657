"""Cut parameters as a folder that anybody can read: arrays as safetensors, what was cut as JSON. No code, no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from slimsam_jax import safetensors_file
from slimsam_jax.errors import InputError, printable, writing
from slimsam_jax.files import new_folder, read_bytes, read_json
from slimsam_jax.pruning.grouping import Grouping
from slimsam_jax.pruning.groups import Keep, Tree, by_path, path_of
from slimsam_jax.pruning.unfolding import check_shapes
from slimsam_jax.pruning.widths import check_keep, widths_of

ARRAYS, GROUPING, KEEP = "model.safetensors", "grouping.json", "keep.json"
MOST_JSON = 8 << 20  # bytes; ViT-H's grouping has 0.2 MB, its lists to keep 0.5 MB


class Saved(NamedTuple):
    """What `load` reads: a slim model and how it came about.

    Attributes:
      params: the cut parameters, numpy: a tree like the one that was given, else {path: array}.
      grouping: without the function, so it is not to be run; equal to what `find_groups` finds in the function again.
      keep: {group: ascending indices into the channels of the full model}.
    """

    params: Tree
    grouping: Grouping
    keep: dict[str, np.ndarray]


def save(folder: Path | str, params: Tree, grouping: Grouping, keep: Keep) -> None:
    """Writes a new folder, whole or not at all: `model.safetensors`, `grouping.json` and `keep.json`.

    Args:
      folder: must not exist, or be empty.
      params: as `pruning.shrink` returned them, trained since or not.
      grouping: of the full model.
      keep: what `shrink` kept.

    Raises:
      InputError: the folder is there, or the parameters are not of the shapes that `keep` leaves.
      RunError: it cannot be written.
    """
    folder = Path(folder)
    keep = check_keep(grouping, keep)
    arrays = by_path(params)
    check_shapes(arrays, grouping, widths_of(grouping, keep))
    arrays = {path: _array(path, leaf) for path, leaf in arrays.items()}
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{printable(folder)} is there already; name a new folder")
    texts = {GROUPING: grouping.to_json(), KEEP: json.dumps({name: kept.tolist() for name, kept in keep.items()})}
    for name, text in texts.items():
        if len(text) >= MOST_JSON:
            raise InputError(f"{name} would have {len(text)} bytes, and at most {MOST_JSON} are read again")
    with writing(folder), new_folder(folder) as temporary:
        save_file(arrays, temporary / ARRAYS)
        for name, text in texts.items():
            (temporary / name).write_text(text + "\n")


def load(folder: Path | str, like: Tree | None = None) -> Saved:
    """Reads what `save` wrote. The folder may come from anybody: all sizes are checked before an array is read.

    Args:
      like: a tree of the structure that the parameters shall have, such as those of the full model, or their shapes;
        only its paths are looked at. Without it they come as {path: array}.

    Raises:
      InputError: files are missing, damaged or too large, or do not belong to each other or to `like`.
    """
    folder = Path(folder)
    grouping = _grouping(folder / GROUPING)
    keep = _keep(folder / KEEP, grouping)
    path = folder / ARRAYS
    arrays = safetensors_file.read(path)
    try:
        check_shapes(arrays, grouping, widths_of(grouping, keep))
        if like is not None:
            _check_same(arrays, by_path(like))
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None
    copied = {name: np.array(array) for name, array in arrays.items()}  # a map of a file that changes is no safe place
    if like is None:
        return Saved(copied, grouping, keep)
    params = jax.tree_util.tree_map_with_path(lambda keys, _: copied[path_of(keys)], like)
    return Saved(params, grouping, keep)


def _array(path: str, leaf: Any) -> np.ndarray:
    known = {np.dtype(dtype) for dtype in safetensors_file.DTYPES.values()}
    if leaf.dtype not in known:
        raise InputError(f"array {path!r} holds {leaf.dtype}, which a safetensors file cannot")
    return np.ascontiguousarray(leaf).reshape(leaf.shape)  # which makes a scalar an array of one


def _grouping(path: Path) -> Grouping:
    text = read_bytes(path, MOST_JSON).decode(errors="replace")
    try:
        return Grouping.from_json(text)
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None


def _keep(path: Path, grouping: Grouping) -> dict[str, np.ndarray]:
    try:
        return check_keep(grouping, read_json(path, MOST_JSON))
    except InputError as error:
        if str(error).startswith(printable(path)):
            raise
        raise InputError(f"{printable(path)}: {error}") from None


def _check_same(arrays: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    differing = sorted(arrays.keys() ^ like.keys())
    if differing:
        where = "in the file alone" if differing[0] in arrays else "in the tree alone"
        raise InputError(f"array {differing[0]!r} is {where}; `like` must have the paths of the file")
