"""How long the runs of this folder take, from the measured time of one forward pass.

    python -m experiments.bench --what forward --preset vit_b       # on the device: seconds per image, ours
    python -m experiments.sa1b.hours --seconds 6.2

Counts multiply-accumulates, attention included: in the first stage the teacher's forward pass, and the student's with
a backward pass of twice its work and its forward pass once more (blocks are recomputed at 1024 px); in the second
stage the teacher's, the first stage's model's, and the same of the student. The default recipe gives all steps to the
second. `--factor` is what narrow layers lose against the wide teacher's: on 2 CPU cores the stages of vit_p77 took 1.2
and 1.5 times what the count says.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from slimsam_jax import cli, metrics
from slimsam_jax.models.config import Config, preset
from slimsam_jax.recipes import RECIPES
from slimsam_jax.stages import plan
from slimsam_jax.widths import even_cut

IMAGES = 10_000
TEACHERS = ("vit_b", "vit_l", "vit_h")
RATIOS = (0.5, 0.77)


class Work(NamedTuple):
    """Of a stage: multiply-accumulates of an image, and bytes of what stays in memory all the time."""

    macs: int
    state: int


def work_of(teacher: Config, ratio: float) -> dict[str, Work]:
    """By what the stage cuts."""
    slim = even_cut(teacher, ratio)
    narrow = dataclasses.replace(teacher, embed_dim=slim.embed_dim)
    macs = lambda config: metrics.encoder_macs(config).total
    size = metrics.encoder_parameters
    # The student has its gradient and Adam's two moments beside it, float32.
    return {
        "embedding": Work(macs(teacher) + 4 * macs(narrow), 4 * (size(teacher) + 4 * size(narrow))),
        "bottleneck": Work(
            macs(teacher) + macs(narrow) + 4 * macs(slim), 4 * (size(teacher) + size(narrow) + 4 * size(slim))
        ),
    }


def main(seconds: float, factor: float = 1.5, recipe: str = "default") -> None:
    """Print hours and memory of each run of this folder on one device; divide by the number of devices.

    Args:
      seconds: that `experiments.bench --what forward --preset vit_b` gives for one image, ours.
      factor: what narrow layers lose.
      recipe: whose number of passes counts.
    """
    per_mac = seconds / metrics.encoder_macs(preset("vit_b")).total
    passes = {stage.cuts: RECIPES[recipe].passes * stage.share for stage in plan(RECIPES[recipe]) if stage.share}
    table = Table("run", *(f"images/s, {cuts} stage" for cuts in passes), "hours", "parameters and optimiser")
    for name in TEACHERS:
        for ratio in RATIOS:
            work = work_of(preset(name), ratio)
            each = {cuts: factor * per_mac * work[cuts].macs for cuts in passes}
            hours = IMAGES * sum(passes[cuts] * each[cuts] for cuts in passes) / 3600
            state = max(work[cuts].state for cuts in passes) / 1e9
            rates = [f"{1 / seconds:.3g}" for seconds in each.values()]
            table.add_row(f"sam_{name[-1]}_{100 * ratio:.0f}.sh", *rates, f"{hours:.3g}", f"{state:.1f} GB")
    Console().print(table)
    told = " and ".join(f"{number:g} passes in the {cuts} stage" for cuts, number in passes.items())
    print(f"{IMAGES} images, {told}, one device like the one that was timed")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # only counts
    cli.run(main)
