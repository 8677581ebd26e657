"""How long the runs of this folder take, from the measured time of one forward pass.

    python -m experiments.bench --what forward --preset vit_b       # on the device: seconds per image, ours
    python -m experiments.sa1b.hours --seconds 12
    python -m experiments.tables                                    # those of `DEVICES`, in experiments/tables/sa1b.md

Counts multiply-accumulates, attention included: in the first stage the teacher's forward pass, and the student's with
a backward pass of twice its work and its forward pass once more (blocks are recomputed at 1024 px); in the second
stage the teacher's, the first stage's model's, and the same of the student. The default recipe gives all steps to the
second. `--factor` is what narrow layers lose against the wide teacher's: on 2 CPU cores the stages of vit_p77 took 1.05
and 1.3 times what the count says (speed.md).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from experiments import results
from slimsam_jax import cli
from slimsam_jax.compression.budget import even_cut
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.steps import Distill, Prune
from slimsam_jax.models.config import Config, preset
from slimsam_jax.profiling import sam_costs

IMAGES = 10_000
TEACHERS = ("vit_b", "vit_l", "vit_h")
RATIOS = (0.5, 0.77)
PAPER = {0.5: 72.33, 0.77: 67.40}  # SlimSAM's point mIoU, of SAM-B
DEVICES = {"2 CPU cores (S = 12, measured)": 12.0, "a device with S = 0.05": 0.05, "with S = 0.01": 0.01}


class Work(NamedTuple):
    """Of a stage: multiply-accumulates of an image, and bytes of what stays in memory all the time."""

    macs: int
    state: int


def work_of(teacher: Config, ratio: float) -> dict[str, Work]:
    """By what the stage cuts."""
    slim = even_cut(teacher, ratio)
    narrow = dataclasses.replace(teacher, embed_dim=slim.embed_dim)
    macs = lambda config: sam_costs.encoder_macs(config).total
    size = sam_costs.encoder_parameters
    # The student has its gradient and Adam's two moments beside it, float32.
    return {
        "embedding": Work(macs(teacher) + 4 * macs(narrow), 4 * (size(teacher) + 4 * size(narrow))),
        "bottleneck": Work(
            macs(teacher) + macs(narrow) + 4 * macs(slim), 4 * (size(teacher) + size(narrow) + 4 * size(slim))
        ),
    }


class Cost(NamedTuple):
    """Of a run.

    Attributes:
      rates: images per second, by what the stage cuts.
      hours: of distilling `IMAGES`.
      state: bytes of parameters and optimiser, in the stage that has most.
    """

    rates: dict[str, float]
    hours: float
    state: int


def passes_of(recipe: str) -> dict[str, int]:
    """Counts passes over the images, by the part that was cut before."""
    passes: dict[str, int] = {}
    for step in RECIPES[recipe]:
        if isinstance(step, Prune):
            part = step.part
        elif isinstance(step, Distill):
            passes[part] = step.optimizer.epochs
    return passes


def cost_of(teacher: str, ratio: float, seconds: float, factor: float = 1.3, recipe: str = "default") -> Cost:
    """See `main`."""
    per_mac, passes = seconds / sam_costs.encoder_macs(preset("vit_b")).total, passes_of(recipe)
    work = work_of(preset(teacher), ratio)
    per_image = {cuts: factor * per_mac * work[cuts].macs for cuts in passes}
    hours = IMAGES * sum(passes[cuts] * per_image[cuts] for cuts in passes) / 3600
    return Cost({cuts: 1 / s for cuts, s in per_image.items()}, hours, max(work[cuts].state for cuts in passes))


def script_of(teacher: str, ratio: float) -> str:
    return f"sam_{teacher[-1]}_{100 * ratio:.0f}.sh"


def main(seconds: float, factor: float = 1.3, recipe: str = "default") -> None:
    """Print hours and memory of each run of this folder on one device; divide by the number of devices.

    Args:
      seconds: that `experiments.bench --what forward --preset vit_b` gives for one image, ours.
      factor: what narrow layers lose.
      recipe: whose number of passes counts.
    """
    passes = passes_of(recipe)
    printed = Table("run", *(f"images/s, after the {cuts} cut" for cuts in passes), "hours", "parameters and optimiser")
    for run in itertools.product(TEACHERS, RATIOS):
        cost = cost_of(*run, seconds, factor, recipe)
        rates = [f"{rate:.3g}" for rate in cost.rates.values()]
        printed.add_row(script_of(*run), *rates, f"{cost.hours:.3g}", f"{cost.state / 1e9:.1f} GB")
    Console().print(printed)
    counted = " and ".join(f"{number:g} passes after the {cuts} cut" for cuts, number in passes.items())
    print(f"{IMAGES} images, {counted}, one device like the one that was timed")


def table() -> None:
    """Write experiments/tables/sa1b.md: hours and memory with the default recipe, beside the paper's numbers."""
    head = ["script", "paper, point mIoU", "parameters and optimiser", *(f"hours, {device}" for device in DEVICES)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for teacher, ratio in itertools.product(TEACHERS, RATIOS):
        paper = PAPER[ratio] if teacher == "vit_b" else ""
        costs = [cost_of(teacher, ratio, seconds) for seconds in DEVICES.values()]
        hours = [f"{cost.hours:,.0f}" if cost.hours >= 10 else f"{cost.hours:.1f}" for cost in costs]
        cells = [f"`{script_of(teacher, ratio)}`", f"{paper}", f"{costs[0].state / 1e9:.1f} GB", *hours]
        lines.append("| " + " | ".join(cells) + " |")
    title = "Hours and memory of the runs on SA-1B"
    results.write_table("sa1b", title, lines, "python -m experiments.tables", "../sa1b/README.md")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # only counts
    cli.run(main)
