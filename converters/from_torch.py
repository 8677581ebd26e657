"""Converts PyTorch and Hugging Face checkpoints to ours. `python -m converters.from_torch SRC DIR`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
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
    from slimsam_jax.models.sam import Sam

# What needs JAX is imported where it is used: --help should not wait for it.


def load(source: Path | str, image_size: int | tuple[int, int] | None = None, single_mask: bool | None = None) -> Sam:
    """Loads any SAM we can read, float32, with its origin and sha256 in `provenance`.

    Args:
      source: a `.pth` in `segment_anything` layout (fused qkv, or q, k, v apart as SlimSAM
        trains it, or a whole pickled module), MobileSAM's or TinySAM's, a Hugging Face `SamModel`
        folder, or a model folder of ours.
      image_size: pixels of the model frame, one side or (height, width), where no array tells it: of a TinyViT,
        whose published models have 1024, the default.
      single_mask: whether the decoder's first mask is for use, which no array tells either. TinySAM returns the other
        three alone; without its own the best of them by predicted IoU is what asks for a single mask get. Default: as
        the file says if `to_torch` wrote it; else not of a TinyViT whose file is called tinysam*.

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
            sam = _load_pth(source, image_size, single_mask)
        elif _is_huggingface(source):
            sam = _load_huggingface(source)
        else:
            sam = checkpoint.load(source)
        _check_given(sam, image_size, single_mask, source)
        if os.path.isdir(source) and not _is_huggingface(source):
            return sam
    return dataclasses.replace(sam, provenance={"source": source.name, "sha256": checkpoint.sha256(source)})


def _check_given(sam: Sam, image_size: int | tuple[int, int] | None, single_mask: bool | None, source: Path) -> None:
    """Raises InputError if another image size was asked for than the arrays have, or another single mask."""
    if single_mask is not None and single_mask is not sam.config.single_mask:
        there = "a" if sam.config.single_mask else "no"
        raise InputError(f"{source} has {there} single mask, and single_mask is {single_mask!r:.40}")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and tuple(size) != sam.config.image_size:
        height, width = sam.config.image_size
        raise InputError(f"{source} takes images of {height} x {width} pixels, and image_size is {image_size!r:.40}")


def from_state_dict(
    state: dict[str, np.ndarray],
    where: str = "the state dict",
    image_size: int | tuple[int, int] | None = None,
    single_mask: bool = True,
    **overrides: Any,
) -> Sam:
    """Converts a `segment_anything` state dict, or one of MobileSAM or TinySAM.

    Args:
      state: {name: array}; `DataParallel`'s "module." is ignored.
      where: what to call it in error messages.
      image_size, single_mask: see `load`.
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
        return _tiny_vit_sam(renamed, where, image_size, single_mask, **overrides)
    if not single_mask:
        raise InputError(f"{where} is SAM's own, whose decoder has a single mask: leave single_mask out")
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
    single_mask: bool = True,
    decoder_heads: int = 8,
    strides: Sequence[int] | None = None,
    **overrides: Any,
) -> Sam:
    """A SAM with a TinyViT; the classifier that the published files bring along is never run, and kept aside."""
    from converters.tables import tiny_vit
    from slimsam_jax.models.composed import SamConfig
    from slimsam_jax.models.sam import Sam

    size = 1024 if image_size is None else image_size
    converted = tiny_vit.from_state_dict(state, where, size, strides, decoder_heads)
    try:
        config = SamConfig(converted.encoder, dataclasses.replace(converted.head, **overrides), single_mask)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    return Sam(config, converted.params, kept={name: np.array(array) for name, array in converted.kept.items()})


def _load_pth(path: Path, image_size: int | tuple[int, int] | None = None, single_mask: bool | None = None) -> Sam:
    """Loads a .pth, with what `to_torch` noted in it, if it did."""
    from converters.tables import tiny_vit

    state, note = torch_file.read_with_note(path)
    thresholds = note.pop("thresholds", None)
    family = {"single_mask", "image_size", "strides"} if tiny_vit.recognises(state) else set()
    if not set(note) <= {"decoder_heads", "pixel_mean", "pixel_std", *family}:
        raise InputError(f"{path} has a note that is none of ours; save its state dict anew, as a plain dict")
    published = not (family and path.name.startswith("tinysam"))  # no array tells it
    given = {"single_mask": published if single_mask is None else single_mask, "image_size": image_size}
    sam = from_state_dict(state, str(path), **{**given, **note})
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


def main(
    source: Positional[Path],
    folder: Positional[Path],
    image_size: int | None = None,
    single_mask: bool | None = None,
) -> None:
    """Convert a PyTorch or Hugging Face SAM into a model folder.

    Args:
      source: a .pth file (SAM, SlimSAM, MobileSAM, TinySAM) or a Hugging Face SamModel folder.
      folder: the model folder to write; must not exist or be empty.
      image_size: side in pixels, where no array tells it: of MobileSAM and TinySAM. Default: 1024.
      single_mask: whether the decoder's first mask is for use, which no array tells either. Default: not of a file
        called tinysam*, as TinySAM returns the other three alone.
    """
    from slimsam_jax import checkpoint
    from slimsam_jax.models.encoders import name_of

    check_empty(folder)
    sam = load(source, image_size, single_mask)
    checkpoint.save(sam, folder)
    print(f"wrote {folder}: {name_of(sam.config.encoder)}, images of {sam.config.image_size} pixels")


if __name__ == "__main__":
    cli.run(main)
