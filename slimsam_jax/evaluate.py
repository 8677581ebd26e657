"""mIoU of a model on annotated images. `python -m slimsam_jax.evaluate --model M --data D`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from slimsam_jax import cli


def main(
    model: Path, data: tuple[Path, ...], prompt: Literal["point", "box", "both"] = "both", json: Path | None = None
):
    """Measure the mIoU of a SAM by SlimSAM's protocol.

    Each annotation of an image gives one prompt; the single mask (multimask_output=False)
    is compared with it at the original size. Mean over annotations, then over images.

    Args:
      model: a model folder, a .pth, or a Hugging Face SamModel folder.
      data: folders of images with SA-1B .json files of the same names beside them.
      prompt: the annotation's point, its box, or one after the other.
      json: also write the numbers, per image too, to this file.
    """
    from converters.from_torch import load
    from slimsam_jax import checkpoint
    from slimsam_jax.data import find
    from slimsam_jax.errors import InputError
    from slimsam_jax.evaluation import mean_iou
    from slimsam_jax.progress import track

    if not data:
        raise InputError("--data needs at least one folder")
    if json:
        cli.check_file(json)
    sam = load(model)
    prompts = ("point", "box") if prompt == "both" else (prompt,)
    result = mean_iou(sam, track(find(data), "evaluate"), prompts)
    for reason in result["skipped"].values():
        print(f"skipped: {reason}")
    if not result["images"]:
        reason = next(iter(result["skipped"].values()), "none has an SA-1B .json of its name beside it")
        raise InputError(f"no image in {', '.join(map(str, data))} can be measured on: {reason}")
    for kind in prompts:
        print(f"{kind:6s} mIoU {result[kind]:.5f}  ({result['images']} images)")
    if json:
        checkpoint.write_json(json, {"model": str(model), "provenance": sam.provenance, **result})


if __name__ == "__main__":
    cli.run(main)
