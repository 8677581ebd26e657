"""Converts ours to PyTorch and Hugging Face. `python -m converters.to_torch DIR DST --format sam|hf`."""

from __future__ import annotations

import collections
import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from safetensors.numpy import save_file
from tyro.conf import Positional

from converters import huggingface, huggingface_sam2, model_card, torch_file
from converters.from_torch import load
from converters.tables.sam import rows
from converters.tables.vit import fuse_qkv
from slimsam_jax import cli
from slimsam_jax.errors import InputError, writing
from slimsam_jax.models.config import GLOBAL, Config

if TYPE_CHECKING:
    from slimsam_jax.models.fast_sam import FastSam
    from slimsam_jax.models.sam import Sam

# What needs JAX is imported where it is used: --help should not wait for it.

# What goes beside each .pth, by the encoder's family: a file that loads it, whatever its widths.
LOADERS = {
    "vit": Path(__file__).with_name("slim_sam_torch.py"),
    "tiny_vit": Path(__file__).with_name("tiny_vit_sam_torch.py"),
    "efficient_sam": Path(__file__).with_name("efficient_sam_torch.py"),
    "rep_vit": Path(__file__).with_name("rep_vit_sam_torch.py"),
    "hiera": Path(__file__).with_name("sam2_torch.py"),
}
UNDER_MODEL = ("efficient_sam", "hiera")  # families whose published files hold the state dict under "model"


def to_state_dict(sam: Sam | FastSam) -> dict[str, np.ndarray]:
    """Converts our parameters to a `segment_anything` state dict (fused qkv), or to that of its family, exact.

    Of integers what they stand for, to the bit.

    Some have arrays that are never run, too: those that the model came with (`Sam.kept`), or zeros.

    Raises:
      InputError: an array is missing or surplus.
    """
    import flax.traverse_util

    from converters.families import FAMILIES
    from converters.tables import fast_sam
    from converters.tables.strict import Converted
    from slimsam_jax import checkpoint
    from slimsam_jax.models.sam import dequantized

    if sam.family == "fast_sam":
        return fast_sam.to_state_dict(sam.config, sam.params)
    sam = dequantized(sam)
    if sam.family in FAMILIES:
        return FAMILIES[sam.family].to_state_dict(Converted(sam.config.encoder, sam.config.head, sam.params, sam.kept))
    flat = flax.traverse_util.flatten_dict(sam.params, sep="/")
    table = rows(sam.config)
    checkpoint.check_names(set(flat), {row.path for row in table}, "the parameter tree")
    return fuse_qkv({row.name: row.to_theirs(np.asarray(flat[row.path])) for row in table})


def save_sam(sam: Sam, path: Path) -> list[Path]:
    """Writes a state dict in the names of the original, and one of `LOADERS` beside it; needs torch installed.

    Stock code loads it strictly if the model is uniform; the loader loads it whatever its widths.

    Returns:
      the files that were written, `path` first.

    Raises:
      InputError: there is no torch, or another file of the loader's name.
    """
    try:
        import torch
    except ImportError:
        raise InputError("writing a .pth needs PyTorch: pip install torch") from None
    from slimsam_jax import checkpoint
    from slimsam_jax.files import replacing

    files, family = {path: None}, checkpoint.describe(sam)["family"]
    if family in LOADERS:
        loader = path.with_name(LOADERS[family].name)
        content = files[loader] = LOADERS[family].read_bytes()
        if loader.exists() and not (loader.is_file() and loader.read_bytes() == content):
            raise InputError(f"{loader} is there already and is not this version's; remove it or write elsewhere")
    tensors = collections.OrderedDict((k, torch.from_numpy(v.copy())) for k, v in to_state_dict(sam).items())
    tensors._metadata = {torch_file.NOTE: noted(sam)}  # no tensor, which a strict load would refuse
    content_of_file = {"model": tensors} if family in UNDER_MODEL else tensors  # as it is published
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack, writing(path):
        for name, content in files.items():
            temporary = stack.enter_context(replacing(name))
            torch.save(content_of_file, temporary) if content is None else temporary.write_bytes(content)
    return list(files)


def noted(sam: Sam | FastSam) -> dict[str, Any]:
    """What no shape tells, for a note beside the arrays."""
    from converters.families import FAMILIES

    if sam.family == "fast_sam":
        return {"image_size": sam.config.image_size}
    note = {name: getattr(sam.config, name) for name in ("decoder_heads", "pixel_mean", "pixel_std")}
    if sam.family in FAMILIES:
        note |= FAMILIES[sam.family].given_by(sam.config)
    return {**note, "thresholds": sam.thresholds.to_json() if sam.thresholds else None}


def save_huggingface(sam: Sam, folder: Path, card: str | None = None) -> None:
    """Writes a folder for `from_pretrained` of `SamModel` or `Sam2Model`; needs neither torch nor transformers.

    Args:
      card: the text of its README.md; None writes none.
    """
    from slimsam_jax import checkpoint
    from slimsam_jax.files import new_folder, replacing, write_json

    state, kind = to_state_dict(sam), huggingface
    if checkpoint.describe(sam)["family"] == "hiera":
        state, kind = huggingface_sam2.to_huggingface(state), huggingface_sam2
    else:
        state = {huggingface.to_huggingface(name): array for name, array in state.items()}
    with new_folder(folder) as temporary:
        weights = temporary / "model.safetensors"
        # Replaced for its permissions: safetensors lets nobody else read what it writes.
        with writing(folder), replacing(weights) as file:
            save_file(state, file, metadata={"format": "pt"})
        write_json(temporary / "config.json", kind.description(sam.config))
        write_json(temporary / "preprocessor_config.json", kind.preprocessor(sam.config))
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def encoder_arguments(config: Config) -> dict[str, Any]:
    """Returns the arguments of a stock `ImageEncoderViT` of a uniform model, besides norm_layer."""
    block, windows = config.blocks[0], {b.window for b in config.blocks} - {GLOBAL}
    ratio = block.mlp_dim / config.embed_dim
    if int(config.embed_dim * ratio) < block.mlp_dim:  # stock code multiplies and rounds down
        ratio = math.nextafter(ratio, math.inf)
    return {
        "img_size": config.image_size[0],
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": len(config.blocks),
        "num_heads": block.heads,
        "mlp_ratio": ratio,
        "out_chans": config.out_chans,
        "use_rel_pos": True,
        "window_size": next(iter(windows), 0),
        "global_attn_indexes": tuple(i for i, b in enumerate(config.blocks) if b.window == GLOBAL),
    }


def fit_to_stock(sam: Sam, source: Path, format: str, pad: bool) -> Sam:
    """Returns `sam`, if its format can hold it, else its padded twin, which is always made if `pad`.

    Raises:
      InputError: it can hold neither, or padding would be needed and `pad` is False.
    """
    from converters.pad_to_uniform import pad_to_uniform
    from slimsam_jax import checkpoint

    if (family := checkpoint.describe(sam)["family"]) != "vit":
        if family == "hiera" and format == "hf" and not pad:
            if reason := huggingface_sam2.obstacle(sam.config):
                raise InputError(f"{source} cannot be held by transformers' Sam2Model: {reason}")
            return sam
        if format != "sam" or pad:
            lacks = "transformers has no SAM with such an encoder" if format == "hf" else "it has no padded twin"
            raise InputError(f"{source} is a {family}, and {lacks}: it goes to --format sam alone, without padding")
        return sam
    if len(set(sam.config.image_size)) > 1:
        height, width = sam.config.image_size
        raise InputError(
            f"stock {format} models take square images, and those of {source} have {height} x {width} pixels"
        )
    if sam.config.uniform or (format == "sam" and not pad):
        return sam
    if not pad:
        raise InputError(
            f"hf models have equal blocks and heads * head_dim == embed_dim, and {source} has not; --pad-to-uniform "
            "writes an exact but larger twin, compress --uniform makes a model that needs none, and --format sam "
            "writes this one as it is"
        )
    return pad_to_uniform(sam)


def describe_padding(before: Config, after: Config) -> str:
    """Says what padding costs, in a line."""
    from slimsam_jax.profiling import sam_costs

    block = after.blocks[0]
    parameters = [sam_costs.sam_parameters(config) / 1e6 for config in (before, after)]
    macs = [sam_costs.encoder_macs(config).total / 1e9 for config in (before, after)]
    return (
        f"padded with zeros: embedding {before.embed_dim} -> {after.embed_dim}, all blocks {block.heads} heads of "
        f"{block.head_dim} and {block.mlp_dim} MLP channels; parameters {parameters[0]:.2f} -> {parameters[1]:.2f} M, "
        f"encoder MACs {macs[0]:.2f} -> {macs[1]:.2f} G"
    )


def how_to_load(sam: Sam | FastSam, path: Path) -> str:
    """Says how to load a .pth, in two or three lines: for scripts, for tools, and for stock code where that can."""
    from converters.families import FAMILIES

    if sam.family == "fast_sam":
        return f"torch.load({str(path)!r}) gives the state dict of a YOLOv8-seg module, names beginning with model."
    if sam.family in FAMILIES:
        return FAMILIES[sam.family].how_to_load(sam, path)
    lines = [
        f'in Python: import slim_sam_torch; slim_sam_torch.register("slim", {str(path)!r}) puts it into '
        "segment_anything's sam_model_registry",
        f"in a shell: python {path.with_name(LOADERS['vit'].name)} TOOL.py --model-type slim --checkpoint {path}",
    ]
    if sam.config.uniform:
        arguments = ", ".join(f"{name}={value!r}" for name, value in encoder_arguments(sam.config).items())
        lines.append(f"without it: ImageEncoderViT({arguments}, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))")
    return "\n".join(lines)


def main(
    source: Positional[Path],
    destination: Positional[Path],
    format: Literal["sam", "hf"] = "sam",
    pad_to_uniform: bool = False,
) -> None:
    """Convert a model folder into a PyTorch checkpoint or a Hugging Face folder.

    Beside a checkpoint goes slim_sam_torch.py, by which every tool that takes its models from segment_anything's
    sam_model_registry loads it: docs/third_party.md.

    Args:
      source: a model folder of ours (or anything else that loads).
      destination: the .pth file (sam) or folder (hf) to write; must not exist.
      format: sam for segment_anything or the original of its family, hf for transformers' SamModel or Sam2Model.
      pad_to_uniform: give a model whose blocks differ an exact twin with equal ones, larger by zeros: hf needs it,
        and sam where slim_sam_torch.py shall not be needed.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise InputError(f"{destination} exists already; choose another name or remove it")
    original = load(source)
    sam = fit_to_stock(original, source, format, pad_to_uniform)
    written = [destination]
    if format == "sam":
        written = save_sam(sam, destination)
    else:
        card = model_card.text(sam, original, destination.name, source)
        save_huggingface(sam, destination, card)
    if sam.config != original.config:
        print(describe_padding(original.config, sam.config))
    print(f"wrote {' and '.join(map(str, written))}")
    if format == "sam":
        print(how_to_load(sam, destination))


if __name__ == "__main__":
    cli.run(main)
