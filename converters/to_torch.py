"""Ours -> PyTorch and Hugging Face. `python -m converters.to_torch DIR DST --format sam|hf`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from safetensors.numpy import save_file
from tyro.conf import Positional

from converters import huggingface
from converters.from_torch import load
from converters.mapping import fuse_qkv, rows
from slimsam_jax import cli
from slimsam_jax.errors import InputError, writing

if TYPE_CHECKING:
    from slimsam_jax.models.sam import Sam

# What needs JAX is imported where it is used: --help should not wait for it.


def to_state_dict(sam: Sam) -> dict[str, np.ndarray]:
    """Our parameters as a `segment_anything` state dict (fused qkv), exact.

    Raises:
      InputError: an array is missing or surplus.
    """
    import flax.traverse_util

    from slimsam_jax import checkpoint

    flat = flax.traverse_util.flatten_dict(sam.params, sep="/")
    table = rows(sam.config)
    checkpoint.check_names(set(flat), {row.path for row in table}, "the parameter tree")
    return fuse_qkv({row.name: row.to_theirs(np.asarray(flat[row.path])) for row in table})


def save_sam(sam: Sam, path: Path) -> None:
    """Writes a `.pth` that stock `segment_anything` loads strictly; needs torch installed."""
    try:
        import torch
    except ImportError:
        raise InputError("writing a .pth needs PyTorch: pip install torch") from None
    from slimsam_jax import checkpoint

    tensors = {name: torch.from_numpy(array.copy()) for name, array in to_state_dict(sam).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), checkpoint.replacing(path) as temporary:
        torch.save(tensors, temporary)


def save_huggingface(sam: Sam, folder: Path) -> None:
    """Writes a folder for `SamModel.from_pretrained`; needs neither torch nor transformers."""
    from slimsam_jax import checkpoint

    folder.parent.mkdir(parents=True, exist_ok=True)
    state = {huggingface.to_huggingface(name): array for name, array in to_state_dict(sam).items()}
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with writing(folder):
            save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        checkpoint.write_json(temporary / "config.json", huggingface.description(sam.config))
        checkpoint.write_json(temporary / "preprocessor_config.json", huggingface.preprocessor(sam.config))
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(source: Positional[Path], destination: Positional[Path], format: Literal["sam", "hf"] = "sam") -> None:
    """Convert a model folder into a PyTorch checkpoint or a Hugging Face folder.

    Args:
      source: a model folder of ours (or anything else that loads).
      destination: the .pth file (sam) or folder (hf) to write; must not exist.
      format: sam for stock segment_anything, hf for transformers' SamModel.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise InputError(f"{destination} exists already; choose another name or remove it")
    sam = load(source)
    if not sam.config.uniform or len(set(sam.config.image_size)) > 1:
        raise InputError(
            f"stock {format} models have equal blocks, heads * head_dim == embed_dim and square images, and {source} "
            "has not; compress with --uniform to get such a model"
        )
    {"sam": save_sam, "hf": save_huggingface}[format](sam, destination)
    print(f"wrote {destination}")


if __name__ == "__main__":
    cli.run(main)
