"""Makes a model of integers. `python -m slimsam_jax.quantize MODEL OUT --images DIR`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from slimsam_jax import cli, limits
from slimsam_jax.api import compress_with
from slimsam_jax.cli.checks import check_empty, check_seed
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.recipes.integers import MEND
from slimsam_jax.compression.set_option import change, explain
from slimsam_jax.compression.steps import Recipe
from slimsam_jax.errors import InputError
from slimsam_jax.progress import say


def main(
    model: Positional[Path],
    out: Positional[Path],
    images: tuple[str, ...] = (),
    weights: int = 8,
    activations: int = 0,
    set: tuple[str, ...] = (),
    steps: int = 0,
    resume: bool = False,
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
      set: other choices, as NAME=VALUE: share=0.2, group=32, ranges=token, ... (docs/quantization.md); with
        --steps also distill.lr=1e-4 and others of its distillation.
      steps: optimizer steps afterwards, in which scales, norms and biases learn to give the float model's embedding, by
        a run as compress does it, with its report. The integers stay.
      resume: continue a run with --steps that was interrupted.
      seed: of the order of images, and of prompts.
    """
    check_seed(seed)
    recipe = choices(Quantize(weights, activations), set, steps)
    if steps:
        compress_with(Options(teacher=model, out=out, images=images, seed=seed, resume=resume), recipe)
        return
    if resume:
        raise InputError("--resume continues a run with --steps: give as many as before")
    check_empty(out)
    quantize_alone(model, out, images, *recipe, seed)


def quantize_alone(model: Path, out: Path, images: tuple[str, ...], step: Quantize, seed: int) -> None:
    """Without a distillation: calibrates, writes the folder, says how large it is."""
    import jax

    from converters.from_torch import load_sam
    from slimsam_jax import checkpoint, data
    from slimsam_jax.compression.quantize import quantize
    from slimsam_jax.models.sam import folded

    sam = load_sam(model)
    new = quantize(sam, data.find(images or [data.embedded_images()]), step, seed)
    checkpoint.save(new, out)
    before = sum(4 * leaf.size for leaf in jax.tree.leaves(folded(sam).params))  # what a share is of
    after = (out / "model.safetensors").stat().st_size
    say("wrote", f"{out}/: {after / 1e6:.2f} MB, {100 * after / before:.1f} % of its {before / 1e6:.2f} MB in float32")
    say("next", f"slimsam evaluate --model {model} {out} --data DIR --protocol agreement")


def choices(step: Quantize, settings: tuple[str, ...], steps: int = 0) -> Recipe:
    """The step, and a distillation if it has steps, with fields set by NAME=VALUE, with or without "quantize." before.

    Raises:
      InputError: there is no such field or value, or no such number of steps.
    """
    limits.check("steps", steps, limits.Range(0, limits.STEPS, True))
    mend = dataclasses.replace(MEND, optimizer=dataclasses.replace(MEND.optimizer, steps=steps))
    named = [setting if "." in setting.partition("=")[0] else f"quantize.{setting}" for setting in settings]
    return change((step, mend) if steps else (step,), named)


if __name__ == "__main__":
    cli.run(main, explain=explain)
