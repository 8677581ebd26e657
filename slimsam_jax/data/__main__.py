"""`python -m slimsam_jax.data check DIR` and `prepare DIR --out DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from slimsam_jax import cli
from slimsam_jax.cli.checks import check_empty, check_file
from slimsam_jax.errors import printable

if TYPE_CHECKING:
    from slimsam_jax.data import Sample

Locations = Annotated[tuple[str, ...], tyro.conf.Positional]


def check(locations: Locations, sheet: Path | None = None, distributed: str | None = None) -> None:
    """Say what a data set holds and what is wrong with it. Exit code 1 if anything is.

    Every image is decoded and every mask compared with its image and its box.

    Args:
      locations: folders of images or of SA-1B, .tar shards, COCO .json files, tfds:DIR.
      sheet: also draw some of the images with their masks, points and boxes into this PNG.
      distributed: for several processes, each with the same arguments, which share the images: "auto" on TPU pods and
        under SLURM or MPI; or HOST:PORT,PROCESSES,INDEX, where HOST:PORT is a free port of process 0, which prints.
    """
    from slimsam_jax.data import check as checks
    from slimsam_jax.data import look

    if sheet:
        check_file(sheet)
    if distributed:
        from slimsam_jax import sharding

        sharding.join_processes(distributed, preemption=False)
    found = look(locations)
    samples, alone = found.samples, found.without_image()
    findings = checks.check_together(samples) if distributed else checks.check(samples)
    if not distributed or sharding.is_main():
        print("\n".join(checks.describe(samples, findings, found.others(), found.closed())))
        print("".join(f"{printable(name)} annotates no image: there is none of its name\n" for name in alone), end="")
        if sheet:
            draw(samples, sheet)
    if distributed:
        sharding.barrier("checked")
    if alone or any(f.problems for f in findings):
        sys.exit(1)


def draw(samples: Sequence[Sample], sheet: Path) -> None:
    """Draws some of the samples into a PNG."""
    from slimsam_jax.data.check import draw_sheet
    from slimsam_jax.files import replacing

    sheet.parent.mkdir(parents=True, exist_ok=True)
    with replacing(sheet) as temporary:
        draw_sheet(samples).save(temporary, format="PNG")
    print(f"drawn in {sheet}")


def prepare(locations: Locations, out: Path, distributed: str | None = None) -> None:
    """Write a TFDS data set (ArrayRecord) in the features of tfds' `segment_anything`. Needs no TensorFlow.

    Args:
      locations: as for check.
      out: a new folder; `--images tfds:OUT` reads it.
      distributed: as for check; the processes see one file system.
    """
    check_empty(out)
    from slimsam_jax.data import find, tfds_writer

    if not distributed:
        samples = find(locations)
        return say_prepared(samples, tfds_writer.prepare(samples, out), out)
    from slimsam_jax import sharding
    from slimsam_jax.data.tfds_parts import prepare_together

    sharding.join_processes(distributed, preemption=False)
    samples = find(locations)
    skipped = prepare_together(samples, out)
    if sharding.is_main():
        say_prepared(samples, skipped, out)


def say_prepared(samples: Sequence[Sample], skipped: dict[str, str], out: Path) -> None:
    """Prints what has been written, and what not, {name: reason}."""
    for reason in skipped.values():
        print(f"skipped: {reason}")
    print(f"wrote {len(samples) - len(skipped)} images; read them with tfds:{out}")


if __name__ == "__main__":
    cli.run({"check": check, "prepare": prepare})
