"""Predicts a mask for an image. `python -m slimsam_jax.predict --model M --image I --point X,Y --out P.png`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from slimsam_jax import api, cli, limits
from slimsam_jax.cli.checks import check_file, check_spared
from slimsam_jax.errors import InputError, printable

if TYPE_CHECKING:
    from slimsam_jax.models.kinds import Model

# Python takes 1_0 for a number, too, and digits of any script.
NUMBER = r" *[+-]?(?:[0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,3})? *"


def parse_numbers(text: str, names: str) -> tuple[float, ...]:
    """Parses "1,2" as (1.0, 2.0), if there are as many numbers as `names` ("X,Y") has."""
    numbers = tuple(float(part) for part in text.split(",")) if re.fullmatch(rf"{NUMBER}(,{NUMBER})*", text) else ()
    if len(numbers) != names.count(",") + 1 or not all(map(math.isfinite, numbers)):
        raise InputError(f"{printable(text, 60)!r} is not {names}: numbers in pixels of the image, separated by commas")
    return numbers


def main(
    model: Path,
    image: Path,
    out: Path,
    point: tuple[str, ...] = (),
    background: tuple[str, ...] = (),
    box: str | None = None,
    text: str | None = None,
    clip: Path | None = None,
) -> None:
    """Segment one object of an image and draw its mask over it.

    All points and the box together are one prompt. Coordinates are pixels of the image
    as displayed (after its EXIF rotation), x to the right and y down.

    Args:
      model: a model folder, a .pth, or a Hugging Face SamModel or Sam2Model folder.
      image: the image.
      out: the PNG or JPEG to write, the image with the mask drawn over it. A file of this name is replaced.
      point: points X,Y on the object.
      background: points X,Y that are not on it.
      box: a box X0,Y0,X1,Y1 around it.
      text: instead of points and a box, words for what to segment, with a FastSAM and a CLIP alone.
      clip: a folder in which transformers has saved a CLIP; nothing is downloaded.
    """
    points = [parse_numbers(text, "X,Y") for text in (*point, *background)]
    boxes = [parse_numbers(box, "X0,Y0,X1,Y1")] if box else []
    if not points and not boxes and text is None:
        raise InputError("give at least one --point X,Y or a --box X0,Y0,X1,Y1")
    if (text is None) != (clip is None) or (text is not None and (points or boxes)):
        raise InputError("--text and --clip FOLDER are one prompt: give both, and neither a point nor a box")
    if len(points) > limits.PROMPT_POINTS:
        raise InputError(f"{len(points)} points are more than a prompt can have, {limits.PROMPT_POINTS}")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"{out} should end in .png or .jpg")
    if boxes and (boxes[0][0] >= boxes[0][2] or boxes[0][1] >= boxes[0][3]):
        raise InputError(
            f"{printable(box, 60)} is not a box: X0,Y0 is its upper left corner and X1,Y1 its lower right one"
        )
    check_file(out)
    check_spared({"--out": out}, {"--image": [image], "--model": [model], "--clip": [clip]})

    from converters.clip import load_clip
    from slimsam_jax.data import read_image
    from slimsam_jax.files import replacing
    from slimsam_jax.imaging.draw import draw_masks, draw_prompts

    photo = read_image(image)
    compares = load_clip(clip) if clip else None
    for x, y in [*points, *(corner for b in boxes for corner in (b[:2], b[2:]))]:
        if not (0 <= x <= photo.width and 0 <= y <= photo.height):
            raise InputError(f"({x:g}, {y:g}) lies outside the image of {photo.width} x {photo.height} pixels")
    labels = [1] * len(point) + [0] * len(background)
    prompt = {"points": points or None, "labels": labels or None, "box": boxes[0] if boxes else None}
    sam = api.load(model)
    masks, scores, _ = api.predict(sam, photo, **prompt, text=text, clip=compares)
    drawn = draw_prompts(draw_masks(photo, masks), points, boxes, labels)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        drawn.save(temporary, format="PNG" if out.suffix.lower() == ".png" else "JPEG")
    nothing = "" if masks[0].any() else "; the model has no mask at this prompt"
    score = scored_by(sam) if text is None else "similarity with the text"
    print(f"wrote {out}: mask of {int(masks[0].sum())} pixels, {score} {scores[0]:.3f}{nothing}")


def scored_by(model: Model) -> str:
    """What the score of a model's mask is."""
    from slimsam_jax.inference.ranking import by_stability
    from slimsam_jax.models.fast_sam import FastSam

    if isinstance(model, FastSam):
        return "confidence"
    return "stability" if by_stability(model) else "predicted IoU"


if __name__ == "__main__":
    cli.run(main)
