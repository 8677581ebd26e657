"""Converts PyTorch and Hugging Face checkpoints to ours. `python -m converters.from_torch SRC DIR`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from converters import huggingface, huggingface_sam2, torch_file
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


def load(
    source: Path | str,
    image_size: int | tuple[int, int] | None = None,
    heads: int | Sequence[int] | None = None,
    single_mask: bool | None = None,
) -> Sam | FastSam:
    """Loads any SAM we can read, float32, with its origin and sha256 in `provenance`.

    Args:
      source: a `.pth` in `segment_anything` layout (fused qkv, or q, k, v apart as SlimSAM trains it, or a whole
        pickled module), MobileSAM's, TinySAM's, EfficientSAM's, EdgeSAM's, SAM 2's or FastSAM's, a Hugging Face
        `SamModel` or `Sam2Model` folder, or a model folder of ours.
      image_size: pixels of the model frame, one side or (height, width), where no array tells it: of all families but
        SAM's own ViT. Their published models have 1024, the default; a FastSAM's is the longer side.
      heads: of the image encoder's attention, one number or one a block, where no array tells it: of EfficientSAM and
        SAM 2, whose published models are known by their width.
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
    given = {"image_size": image_size, "heads": heads, "single_mask": single_mask}
    given = {name: value for name, value in given.items() if value is not None}
    with reading(source):
        source = Path(source).expanduser()
        if not os.path.isdir(source):
            sam = _load_pth(source, given)
        elif _is_huggingface(source):
            sam = _load_huggingface(source)
        else:
            sam = checkpoint.load(source)
        _check_given(sam, str(source), **given)
        if os.path.isdir(source) and not _is_huggingface(source):
            return sam
    return dataclasses.replace(sam, provenance={"source": source.name, "sha256": checkpoint.sha256(source)})


def _check_given(
    sam: Sam | FastSam,
    where: str,
    image_size: int | tuple[int, int] | None = None,
    heads: int | Sequence[int] | None = None,
    single_mask: bool | None = None,
) -> None:
    """Raises InputError if a model is not what it was said to be."""
    size, own = ((side, side) if isinstance(side, int) else side for side in (image_size, sam.config.image_size))
    if size is not None and tuple(size) != own:
        height, width = own
        raise InputError(f"{where} takes images of {height} x {width} pixels, and image_size is {image_size!r:.40}")
    if single_mask is not None and single_mask is not (there := getattr(sam.config, "single_mask", False)):
        there = "a" if there else "no"
        raise InputError(f"{where} has {there} single mask, and single_mask is {single_mask!r:.40}")
    if heads is None:
        return
    encoder = getattr(sam.config, "encoder", sam.config)
    parts = encoder.stages if hasattr(encoder, "stages") else [encoder]
    own = tuple(block.heads for part in parts for block in getattr(part, "blocks", ()) if hasattr(block, "heads"))
    if own != ((heads,) * len(own) if isinstance(heads, int) else tuple(heads)):
        raise InputError(f"{where} has blocks of {_short(own)} heads, and heads is {heads!r:.40}")


def _short(numbers: Sequence[int]) -> str:
    """ "3" of equal ones, else all."""
    return ", ".join(map(str, numbers[:1] if len(set(numbers)) == 1 else numbers))


def from_state_dict(state: dict[str, np.ndarray], where: str = "the state dict", **given: Any) -> Sam:
    """Converts a `segment_anything` state dict, or one of another family (`converters.families`).

    Args:
      state: {name: array}; `DataParallel`'s "module." is ignored.
      where: what to call it in error messages.
      given: what shapes do not tell: a family's `GIVEN`, see `load`, and fields of the head's `Config`. What a family's
        shapes do tell is passed over.

    Raises:
      InputError: a name missing or surplus, or a shape that fits no SAM.
    """
    from converters.families import family_of

    renamed = torch_file.unwrapped(state, where)
    for key in ("pixel_mean", "pixel_std"):  # buffers, present in whole modules only
        if key in renamed:
            given[key] = _pixel_statistics(renamed.pop(key), f"{where}: {key}")
    family = family_of(renamed)
    return _vision_transformer(renamed, where, given) if family is None else _composed(family, renamed, where, given)


def _vision_transformer(state: dict[str, np.ndarray], where: str, given: dict[str, Any]) -> Sam:
    """A SAM with its own ViT."""
    from slimsam_jax import checkpoint
    from slimsam_jax.models.sam import Sam

    given = {name: value for name, value in given.items() if name not in ("image_size", "heads", "single_mask")}
    state = split_qkv(state)
    try:
        config = dataclasses.replace(vit.from_state_dict(state), **given)
        table = rows(config)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    checkpoint.check_names(set(state), {row.name for row in table}, where)
    return Sam(config, _params(config, state, table, where))


def _composed(family: ModuleType, state: dict[str, np.ndarray], where: str, given: dict[str, Any]) -> Sam:
    """A SAM with an encoder of another family."""
    from slimsam_jax.models.composed import SamConfig
    from slimsam_jax.models.sam import Sam

    statistics = {name: given[name] for name in ("pixel_mean", "pixel_std") if name in given}
    for name, values in statistics.items():
        if hasattr(family, "UNIT_IMAGES") and max(values) <= 1:  # of a whole module
            statistics[name] = tuple(round(255 * value, 4) for value in values)
    own = {name: value for name, value in given.items() if name in family.GIVEN and name != "single_mask"}
    converted = family.from_state_dict(state, where, **own)
    single = {"single_mask": given["single_mask"]} if "single_mask" in family.GIVEN and "single_mask" in given else {}
    try:
        config = SamConfig(converted.encoder, dataclasses.replace(converted.head, **statistics), **single)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    thresholds = getattr(family, "THRESHOLDS", None)
    return Sam(config, converted.params, thresholds=thresholds, kept=_copied(converted.kept, where))


def _copied(kept: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Copies what nothing here reads, for the way back; raises InputError for more than a folder of ours may keep."""
    from slimsam_jax.checkpoint import MOST_KEPT

    if (size := sum(array.nbytes for array in kept.values())) > MOST_KEPT:
        raise InputError(f"{where} has {size} bytes of arrays that nothing reads, and at most {MOST_KEPT} are kept")
    return {name: np.array(array) for name, array in kept.items()}


def load_sam(source: Path | str) -> Sam:
    """As `load`, for what needs SAM's prompt encoder and decoder.

    Raises:
      InputError: as `load`, or it is a FastSAM.
    """
    from slimsam_jax.models.kinds import check_sam

    return check_sam(load(source))


def _fast_sam(path: Path, state: dict[str, np.ndarray], image_size: Any = 1024) -> FastSam:
    """A FastSAM, whose image size `to_torch` may have noted."""
    from converters.tables import fast_sam
    from slimsam_jax.models.fast_sam import FastSam

    square = isinstance(image_size, tuple) and len(set(image_size)) == 1
    model = FastSam(*fast_sam.from_state_dict(state, str(path), image_size[0] if square else image_size))
    torch_file.check_sums(path)
    return model


def _load_pth(path: Path, given: dict[str, Any]) -> Sam | FastSam:
    """Loads a .pth, with what `to_torch` noted in it, if it did."""
    from converters.families import family_of
    from converters.tables import fast_sam

    state, note = torch_file.read_with_note(path)
    state = torch_file.unwrapped(state, str(path))
    if fast_sam.recognises(state):
        sizes = {name: each["image_size"] for name, each in (("note", note), ("given", given)) if "image_size" in each}
        return _fast_sam(path, state, *list(sizes.values())[:1])
    family = family_of(state)
    known = ("decoder_heads", *getattr(family, "GIVEN", ()))
    if not set(note) <= {*known, "pixel_mean", "pixel_std", "thresholds"}:
        raise InputError(f"{path} has a note that is none of ours; save its state dict anew, as a plain dict")
    if "single_mask" in known and path.name.startswith("tinysam"):
        given = {"single_mask": False, **given}  # no array tells it
    noted, thresholds = "thresholds" in note, note.pop("thresholds", None)
    sam = from_state_dict(state, str(path), **{**given, **note})
    torch_file.check_sums(path)
    if not noted:
        return sam
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
    description = read_json(folder / "config.json")
    if description["model_type"] in huggingface_sam2.TYPES:
        state, overrides = huggingface_sam2.read(folder, description)
    else:
        state, description = huggingface.read(folder)
        overrides = {"decoder_heads": description.get("mask_decoder_config", {}).get("num_attention_heads", 8)}
        state = {huggingface.to_segment_anything(name): array for name, array in state.items()}
    sam = from_state_dict(state, str(folder), **overrides, **huggingface.pixel_statistics(folder))
    for path in safetensors_file.files_of(folder):
        if path.suffix == ".bin":
            torch_file.check_sums(path)
    return sam


def main(
    source: Positional[Path],
    folder: Positional[Path],
    image_size: int | None = None,
    heads: int | None = None,
    single_mask: bool | None = None,
) -> None:
    """Convert a PyTorch or Hugging Face SAM into a model folder.

    Args:
      source: a .pth file (SAM, SlimSAM, MobileSAM, TinySAM, EfficientSAM, EdgeSAM, SAM 2, FastSAM) or a Hugging Face
        SamModel or Sam2Model folder.
      folder: the model folder to write; must not exist or be empty.
      image_size: side in pixels, where no array tells it: of all but SAM and SlimSAM. Default: 1024.
      heads: of each block's attention, where no array tells it: of EfficientSAM and SAM 2. Default: the published
        model's of its width.
      single_mask: whether the decoder's first mask is for use, which no array tells either. Default: not of a file
        called tinysam*, as TinySAM returns the other three alone.
    """
    from slimsam_jax import checkpoint

    check_empty(folder)
    sam = load(source, image_size, heads, single_mask)
    checkpoint.save(sam, folder)
    print(f"wrote {folder}: {checkpoint.describe(sam)['family']}, images of {sam.config.image_size} pixels")


if __name__ == "__main__":
    cli.run(main)
