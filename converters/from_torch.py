"""Converts PyTorch and Hugging Face checkpoints to ours. `python -m converters.from_torch SRC DIR`."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from converters import huggingface, torch_file
from converters.tables import vit
from converters.tables.rows import Row
from converters.tables.sam import rows
from converters.tables.vit import split_qkv
from slimsam_jax import cli, safetensors_file
from slimsam_jax.cli.checks import check_empty
from slimsam_jax.errors import InputError, reading
from slimsam_jax.files import read_json
from slimsam_jax.models import config as architecture

if TYPE_CHECKING:
    from slimsam_jax.models.fast_sam import FastSam
    from slimsam_jax.models.sam import Sam

# What needs JAX is imported where it is used: --help should not wait for it.


def load(source: Path | str, image_size: int | tuple[int, int] | None = None) -> Sam | FastSam:
    """Loads any SAM we can read, float32, with its origin and sha256 in `provenance`.

    Args:
      source: a `.pth` in `segment_anything` layout (fused qkv, or q, k, v apart as SlimSAM
        trains it, or a whole pickled module), MobileSAM's or TinySAM's, FastSAM's `.pt`, a Hugging Face
        `SamModel` folder, or a model folder of ours.
      image_size: pixels of the model frame, one side or (height, width), where no array tells it: of a TinyViT
        or a FastSAM, whose published models have 1024, the default; of a FastSAM the longer side.

    Raises:
      InputError: missing, unreadable, or not a SAM; names what is missing and surplus.
    """
    from slimsam_jax import checkpoint

    if not isinstance(source, str | os.PathLike) or not str(source):
        what = "an empty name" if source == "" else f"an object of type {type(source).__name__}"
        raise InputError(f"load takes the path of a checkpoint or a model folder, not {what}")
    with reading(source):
        source = Path(source).expanduser()
        if not os.path.isdir(source):
            sam = _load_pth(source, image_size)
        elif _is_huggingface(source):
            sam = _load_huggingface(source)
        else:
            sam = checkpoint.load(source)
        _check_image_size(sam, image_size, source)
        if os.path.isdir(source) and not _is_huggingface(source):
            return sam
    return dataclasses.replace(sam, provenance={"source": source.name, "sha256": checkpoint.sha256(source)})


def _check_image_size(sam: Sam, image_size: int | tuple[int, int] | None, source: Path) -> None:
    """Raises InputError if another image size was asked for than the arrays have."""
    size, own = ((side, side) if isinstance(side, int) else side for side in (image_size, sam.config.image_size))
    if size is not None and tuple(size) != own:
        height, width = own
        raise InputError(f"{source} takes images of {height} x {width} pixels, and image_size is {image_size!r:.40}")


def from_state_dict(
    state: dict[str, np.ndarray],
    where: str = "the state dict",
    image_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Sam:
    """Converts a `segment_anything` state dict, or one of MobileSAM or TinySAM.

    Args:
      state: {name: array}; `DataParallel`'s "module." is ignored.
      where: what to call it in error messages.
      image_size: see `load`.
      overrides: fields of `Config` that shapes do not tell.

    Raises:
      InputError: a name missing or surplus, or a shape that fits no SAM.
    """
    from converters.tables import tiny_vit
    from slimsam_jax import checkpoint
    from slimsam_jax.models.sam import Sam

    renamed = {re.sub(r"(^|\.)module\.", r"\1", name): array for name, array in state.items()}
    if len(renamed) < len(state):
        raise InputError(f"{where} holds arrays that differ in name by 'module.' alone")
    for key in ("pixel_mean", "pixel_std"):  # buffers, present in whole modules only
        if key in renamed:
            overrides[key] = _pixel_statistics(renamed.pop(key), f"{where}: {key}")
    if tiny_vit.recognises(renamed):
        return _tiny_vit_sam(renamed, where, image_size, **overrides)
    state = split_qkv(renamed)
    try:
        config = dataclasses.replace(vit.from_state_dict(state), **overrides)
        table = rows(config)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    checkpoint.check_names(set(state), {row.name for row in table}, where)
    return Sam(config, _params(config, state, table, where))


def _tiny_vit_sam(
    state: dict[str, np.ndarray],
    where: str,
    image_size: int | tuple[int, int] | None,
    decoder_heads: int = 8,
    **overrides: Any,
) -> Sam:
    """A SAM with a TinyViT. (The classifier that the published files bring along is never run, and left behind.)"""
    from converters.tables import tiny_vit
    from slimsam_jax.models.composed import SamConfig
    from slimsam_jax.models.sam import Sam

    size = 1024 if image_size is None else image_size
    converted = tiny_vit.from_state_dict(state, where, size, decoder_heads=decoder_heads)
    try:
        config = SamConfig(converted.encoder, dataclasses.replace(converted.head, **overrides))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    return Sam(config, converted.params)


def load_sam(source: Path | str) -> Sam:
    """As `load`, for what needs SAM's prompt encoder and decoder.

    Raises:
      InputError: as `load`, or it is a FastSAM.
    """
    from slimsam_jax.inference.predictor import check_model

    return check_model(load(source))


def _fast_sam(path: Path, state: dict[str, np.ndarray], note: dict[str, Any], image_size: Any) -> FastSam:
    """A FastSAM, whose image size `to_torch` may have noted."""
    from converters.tables import fast_sam
    from slimsam_jax.models.fast_sam import FastSam

    size = note.get("image_size", 1024) if image_size is None else image_size
    size = size[0] if isinstance(size, tuple) and len(set(size)) == 1 else size  # of a square one side
    model = FastSam(*fast_sam.from_state_dict(state, str(path), size))
    torch_file.check_sums(path)
    return model


def _load_pth(path: Path, image_size: int | tuple[int, int] | None = None) -> Sam | FastSam:
    """Loads a .pth, with what `to_torch` noted in it, if it did."""
    from converters.tables import fast_sam

    state, note = torch_file.read_with_note(path)
    if fast_sam.recognises(state):
        return _fast_sam(path, state, note, image_size)
    thresholds = note.pop("thresholds", None)
    if not set(note) <= {"decoder_heads", "pixel_mean", "pixel_std"}:
        raise InputError(f"{path} has a note that is none of ours; save its state dict anew, as a plain dict")
    sam = from_state_dict(state, str(path), image_size, **note)
    torch_file.check_sums(path)
    thresholds = None if thresholds is None else architecture.Thresholds.from_json(thresholds)
    return dataclasses.replace(sam, thresholds=thresholds)


def _pixel_statistics(array: np.ndarray, where: str) -> tuple[float, ...]:
    if array.size != 3 or np.iscomplexobj(array):  # integers and bfloat16 are fine
        raise InputError(f"{where} must be three real numbers, and it has shape {array.shape} of {array.dtype}")
    return tuple(round(float(value), 4) for value in array.reshape(-1))  # 123.675, not its float32


def _params(config: architecture.Config, state: dict[str, np.ndarray], table: list[Row], where: str) -> dict[str, Any]:
    """Converts a state dict to parameters; no array is read before the shapes of all are right."""
    import flax.traverse_util

    from slimsam_jax import checkpoint
    from slimsam_jax.models.sam import abstract_params

    with reading(where):
        expected = flax.traverse_util.flatten_dict(abstract_params(config), sep="/")
    shapes = {}
    for row in table:
        shape = state[row.name].shape
        try:
            shapes[row.path] = row.shape(shape), expected[row.path].shape
        except Exception:  # einops has its own error class; the shape is what the user needs
            raise InputError(f"{where}: {row.name} has shape {shape}, which does not fit its place") from None
    checkpoint.check_shapes(shapes, where)
    return checkpoint.to_device({row.path: row.to_ours(state[row.name]) for row in table}, where)


def _is_huggingface(folder: Path) -> bool:
    try:
        return "model_type" in read_json(folder / "config.json")
    except InputError:  # which the loader of our folders will say again
        return False


def _load_huggingface(folder: Path) -> Sam:
    state, description = huggingface.read(folder)
    overrides = huggingface.pixel_statistics(folder)
    overrides["decoder_heads"] = description.get("mask_decoder_config", {}).get("num_attention_heads", 8)
    state = {huggingface.to_segment_anything(name): array for name, array in state.items()}
    sam = from_state_dict(state, str(folder), **overrides)
    for path in safetensors_file.files_of(folder):
        if path.suffix == ".bin":
            torch_file.check_sums(path)
    return sam


def main(source: Positional[Path], folder: Positional[Path], image_size: int | None = None) -> None:
    """Convert a PyTorch or Hugging Face SAM into a model folder.

    Args:
      source: a .pth file (SAM, SlimSAM, MobileSAM, TinySAM, FastSAM) or a Hugging Face SamModel folder.
      folder: the model folder to write; must not exist or be empty.
      image_size: side in pixels, where no array tells it: of MobileSAM, TinySAM and FastSAM. Default: 1024.
    """
    from slimsam_jax import checkpoint

    check_empty(folder)
    sam = load(source, image_size)
    checkpoint.save(sam, folder)
    print(f"wrote {folder}: {checkpoint.describe(sam)['family']}, images of {sam.config.image_size} pixels")


if __name__ == "__main__":
    cli.run(main)
