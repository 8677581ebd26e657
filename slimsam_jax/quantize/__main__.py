"""Makes a model of integers. `python -m slimsam_jax.quantize MODEL OUT --images DIR`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from slimsam_jax import cli
from slimsam_jax.cli.checks import check_empty, check_seed
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.compression.set_option import explain
from slimsam_jax.progress import say


def main(
    model: Positional[Path],
    out: Positional[Path],
    images: tuple[str, ...] = (),
    weights: int = 8,
    activations: int = 0,
    set: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Put integers in the place of a model's weights, and perhaps quantise its layers' inputs.

    Weights are rounded by GPTQ: of each layer those that are left make up for the error of those that are rounded,
    where the images need it. What comes out is a model folder like any other, which predict, everything, evaluate and
    inspect take; to-torch writes what its integers stand for, to-onnx --dtype integers the integers themselves.

    Args:
      model: a model folder, a .pth, or a Hugging Face SamModel or Sam2Model folder.
      out: the folder to write; must not exist or be empty.
      images: unlabelled ones to calibrate with, as for compress. Default: the photographs in the package.
      weights: bits: 8, 6, 4 or 3.
      activations: bits of the inputs of the image encoder's layers, 3 to 8; 0 leaves them as they are.
      set: other choices, as NAME=VALUE: group=32, ranges=token, float_weights=10, ... (docs/quantization.md).
      seed: of the order of images, and of prompts.
    """
    check_empty(out)
    check_seed(seed)
    step = choices(Quantize(weights, activations), set)
    import jax

    from converters.from_torch import load_sam
    from slimsam_jax import checkpoint, data
    from slimsam_jax.compression.quantize import quantize

    sam = load_sam(model)
    new = quantize(sam, data.find(images or [data.embedded_images()]), step, seed)
    checkpoint.save(new, out)
    before = sum(4 * leaf.size for leaf in jax.tree.leaves(sam.params))
    after = (out / "model.safetensors").stat().st_size
    say("wrote", f"{out}/: {after / 1e6:.2f} MB, {100 * after / before:.1f} % of its {before / 1e6:.2f} MB in float32")
    say("next", f"slimsam evaluate --model {model} {out} --data DIR --protocol agreement")


def choices(step: Quantize, settings: tuple[str, ...]) -> Quantize:
    """The step with fields set by NAME=VALUE, with or without "quantize." before it."""
    from slimsam_jax.compression.set_option import change

    named = [setting if setting.startswith("quantize.") else f"quantize.{setting}" for setting in settings]
    (changed,) = change((step,), named)
    return changed


if __name__ == "__main__":
    cli.run(main, explain=explain)
