"""Chooses thresholds of everything mode for a model. `python -m slimsam_jax.calibrate MODEL --images D`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from slimsam_jax import cli
from slimsam_jax.errors import InputError


def main(model: Positional[Path], images: tuple[str, ...] = (), like: Path | None = None, count: int = 100) -> None:
    """Choose a model's thresholds of everything mode, and write them into its config.json.

    No labels are needed: of all masks at a grid of points as many shall pass as usual, or as another model lets pass.

    Args:
      model: a model folder; its weights stay as they are.
      images: what to look at, as for `compress`. Default: the photographs in the package.
      like: let as many masks pass as this model does: a model folder, a .pth, or a Hugging Face SamModel or
        Sam2Model folder.
      count: images to look at, spread evenly over all.
    """
    if count < 1:
        raise InputError(f"--count {count} must be at least 1")
    if not (model / "model.safetensors").is_file() or not (model / "config.json").is_file():
        raise InputError(f"{model} is no model folder, so it cannot hold thresholds; make one by converters.from_torch")
    import dataclasses

    from converters.from_torch import load_sam as load
    from slimsam_jax import checkpoint, data
    from slimsam_jax.files import write_json
    from slimsam_jax.inference.calibration import calibrate
    from slimsam_jax.models.kinds import check_sam

    sam, teacher = check_sam(checkpoint.load(model)), load(like) if like else None
    thresholds = calibrate(sam, data.find(images or [data.embedded_images()]), teacher, count)
    if thresholds is None:
        raise InputError(
            f"{like} lets no mask pass, so there is nothing to go by; calibrate it first, or give no --like"
        )
    write_json(model / "config.json", checkpoint.describe(dataclasses.replace(sam, thresholds=thresholds)))
    values = ", ".join(f"{name} {value:.3f}" for name, value in thresholds.to_json().items())
    print(f"wrote {model / 'config.json'}: {values}")


if __name__ == "__main__":
    cli.run(main)
