"""`python -m slimsam_jax.data check DIR` and `prepare DIR --out DIR`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from slimsam_jax import cli
from slimsam_jax.cli.checks import check_empty, check_file
from slimsam_jax.errors import printable

Locations = Annotated[tuple[str, ...], tyro.conf.Positional]


def check(locations: Locations, sheet: Path | None = None) -> None:
    """Say what a data set holds and what is wrong with it. Exit code 1 if anything is.

    Every image is decoded and every mask compared with its image and its box.

    Args:
      locations: folders of images or of SA-1B, .tar shards, COCO .json files, tfds:DIR.
      sheet: also draw some of the images with their masks, points and boxes into this PNG.
    """
    from slimsam_jax.data import check as checks
    from slimsam_jax.data import find, without_image
    from slimsam_jax.files import replacing

    if sheet:
        check_file(sheet)
    samples, alone = find(locations), without_image(locations)
    findings = checks.check(samples)
    print("\n".join(checks.describe(samples, findings)))
    print("".join(f"{printable(name)} annotates no image: there is none of its name\n" for name in alone), end="")
    if sheet:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        with replacing(sheet) as temporary:
            checks.draw_sheet(samples).save(temporary, format="PNG")
        print(f"drawn in {sheet}")
    if alone or any(f.problems for f in findings):
        sys.exit(1)


def prepare(locations: Locations, out: Path) -> None:
    """Write a TFDS data set (ArrayRecord) in the features of tfds' `segment_anything`. Needs no TensorFlow.

    Args:
      locations: as for check.
      out: a new folder; `--images tfds:OUT` reads it.
    """
    check_empty(out)
    from slimsam_jax.data import find, tfds_writer

    samples = find(locations)
    skipped = tfds_writer.prepare(samples, out)
    for reason in skipped.values():
        print(f"skipped: {reason}")
    print(f"wrote {len(samples) - len(skipped)} images; read them with tfds:{out}")


if __name__ == "__main__":
    cli.run({"check": check, "prepare": prepare})
