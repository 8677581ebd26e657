"""Cuts from the golden vectors of SlimSAM's original code what is small enough for the repository, and reads it.

`python tests/helpers/golden.py PATH/tiny_slimsam.npz` writes `tests/golden/tiny_slimsam_subset.npz` anew.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

FILE = Path(__file__).parents[1] / "golden" / "tiny_slimsam_subset.npz"
PLANES = "#bytes"  # behind the name of a float32 array that is stored byte by byte: [bytes, ...], the highest first
MODEL = "r77fix/step1/sd/"  # the one model whose weights are stored: the narrowest that a second step starts from
OUTPUTS = {"r77fix/step1/out": 2, "r77fix/step2/global/out": 2, "r77fix/step2/local/out": 2}  # for so many images
# Whole arrays, by the beginning of their names. Of the wide models there are scores and what goes, and no weights.
KEPT = (
    *("images", "noise2", "step1/Disturb/", "step1/mag/", "step1/taylor/", "step1/members"),
    *("step2/global/gs", "step2/local/imp", "step2/local/pruned", "quirk_norm_none/r50/gs", "quirk_norm_none/r77/gs"),
    *("r77fix/step2/grad_loss", "r77fix/step2/global/gs", "r77fix/step2/local/imp", "r77fix/step2/local/pruned"),
    *("r77/step1/pruned", "distill2/a_weight_by_epoch"),
)
# Where the weights of the original have the embedding's channels, by the end of their names.
EMBEDDING_AXES = {
    **dict.fromkeys(("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"), 0),
    **dict.fromkeys(("patch_embed.proj.weight", "patch_embed.proj.bias", "attn.proj.weight", "attn.proj.bias"), 0),
    **dict.fromkeys(("mlp.lin2.weight", "mlp.lin2.bias"), 0),
    **dict.fromkeys(("attn.q.weight", "attn.k.weight", "attn.v.weight", "mlp.lin1.weight", "neck.0.weight"), 1),
    "pos_embed": 3,
}


def cut(golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The subset of all arrays, as `read` gives it back, and `MODEL`, which the whole file has no name for."""
    found = {name: golden[name] for name in golden if name.startswith(KEPT)}
    found |= {name: golden[name][:images] for name, images in OUTPUTS.items()}
    return found | {MODEL + name: array for name, array in narrow_model(golden).items()}


def narrow_model(golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model of `r77fix/step1`: the teacher without the channels that went, in ascending order, and without
    relative positions, which the original sets to zero."""
    kept = np.setdiff1d(np.arange(golden["sd/pos_embed"].shape[3]), golden["r77/step1/pruned"])
    found = {}
    for name, array in arrays_under(golden, "sd/").items():
        axis = next((axis for end, axis in EMBEDDING_AXES.items() if name.endswith(end)), None)
        found[name] = array if axis is None else array.take(kept, axis)
        if ".rel_pos_" in name:
            found[name] = np.zeros_like(array)
    return found


def arrays_under(golden: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): golden[name] for name in golden if name.startswith(prefix)}


def write(subset: Mapping[str, np.ndarray], path: Path = FILE) -> None:
    """As an .npz that numpy reads; the model as one array, its bytes apart: that takes two thirds of the room."""
    model = arrays_under(subset, MODEL)
    stored = {name: array for name, array in subset.items() if not name.startswith(MODEL)}
    stored["model"] = np.concatenate([array.ravel() for array in model.values()])
    stored["model/names"] = np.array(list(model))
    stored["model/shapes"] = np.array([str(array.shape).strip("(,)") for array in model.values()])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in stored.items():
            apart = array.dtype == np.float32 and array.size > 1000
            entry = zipfile.ZipInfo(f"{name}{PLANES if apart else ''}.npy", (2026, 1, 1, 0, 0, 0))  # always the same
            entry.compress_type = zipfile.ZIP_LZMA
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, to_planes(array) if apart else array, allow_pickle=False)


def read(path: Path = FILE) -> dict[str, np.ndarray]:
    """{name as in the whole file: array}."""
    with np.load(path, allow_pickle=False) as stored:
        found = {n.removesuffix(PLANES): from_planes(stored[n]) if n.endswith(PLANES) else stored[n] for n in stored}
    names, shapes, model = (found.pop(name) for name in ("model/names", "model/shapes", "model"))
    shapes = [tuple(map(int, shape.split(","))) for shape in shapes]
    parts = np.split(model, np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1])
    return found | {MODEL + n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}


def to_planes(array: np.ndarray) -> np.ndarray:
    """float32 [...] -> uint8 [bytes, ...], the highest first; the lower two are left out where all are zero."""
    planes = np.moveaxis(array.astype(">f4").view(np.uint8).reshape(*array.shape, 4), -1, 0)
    return planes if planes[2:].any() else planes[:2]


def from_planes(planes: np.ndarray) -> np.ndarray:
    """Inverse of `to_planes`."""
    whole = np.zeros((4, *planes.shape[1:]), np.uint8)
    whole[: len(planes)] = planes
    return np.ascontiguousarray(np.moveaxis(whole, 0, -1)).view(">f4")[..., 0].astype(np.float32)


if __name__ == "__main__":
    with np.load(sys.argv[1], allow_pickle=False) as whole:
        write(cut(dict(whole)))
