"""How long the recipes that distil into another encoder take on 1 % of SA-1B, from one measured forward pass.

    python -m experiments.bench --what forward --preset vit_b              # on the device: seconds per image, ours
    python -m experiments.sa1b.distillers_hours --seconds 12
    python -m experiments.tables                                           # those of `hours.DEVICES`

Multiply-accumulates are counted in the very training steps that run, backward passes and what is computed twice
included, for SAM-H as the teacher. Its own forward pass is counted once an image (`--cache`). `--factor` is what
narrow layers lose, as in `hours.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from experiments.sa1b.hours import DEVICES
from slimsam_jax import cli
from slimsam_jax.compression import mask_distill, pretrain, trainer
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.steps import Distill, DistillMasks, Initialize, Pretrain
from slimsam_jax.models.composed import with_encoder
from slimsam_jax.models.config import preset
from slimsam_jax.models.encoders import presets
from slimsam_jax.models.sam import Sam, abstract_params
from slimsam_jax.profiling import sam_costs
from slimsam_jax.profiling.macs import count

IMAGES = 110_000
RECIPE_NAMES = ("mobile_sam", "edge_sam", "tiny_sam", "efficient_sam")
SCORES = {"mobile_sam": "41.0", "edge_sam": "42.2", "tiny_sam": "42.3", "efficient_sam": "42.3"}  # COCO AP, papers'


class Training(NamedTuple):
    """A training of a recipe: its kind, passes over the images, and multiply-accumulates of an image in a pass."""

    kind: str
    epochs: int
    macs: int


def trainings_of(recipe: str, teacher: str = "vit_h") -> list[Training]:
    """Counts the trainings of a recipe for its own student. Nothing is computed."""
    config, found = preset(teacher), []
    zeros = lambda config: jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(config))
    for step in RECIPES[recipe]:
        if isinstance(step, Initialize):
            student = Sam(with_encoder(config, presets.encoder(step.encoder, config)), {})
            student = Sam(student.config, zeros(student.config))
            head = {part: student.params[part] for part in mask_distill.HEAD}
        else:
            macs = step_macs(step, student, Sam(config, head))
            found.append(Training(type(step).__name__, step.optimizer.epochs, macs))
    return found


def step_macs(step: Distill | DistillMasks | Pretrain, student: Sam, teacher: Sam) -> int:
    """Of one image; its embedding by the teacher is there. Of prompts in the loop all rounds count."""
    module = {Distill: trainer, DistillMasks: mask_distill, Pretrain: pretrain}[type(step)]
    models = (student, teacher, teacher) if module is trainer else (student, teacher)
    weights = step.losses.weights() if module is mask_distill else {"embedding": 1.0}
    steps = []

    def state_and_frozen() -> Any:
        built = module.make_trainer(*models, step, known=True)
        steps.append(built.step)
        return built.state, built.frozen

    shapes = jax.eval_shape(state_and_frozen)  # so that nothing is compiled
    return count(*steps, *shapes, batch_of(step, teacher.config), weights, 1e-4).total


def batch_of(step: Any, config: Any) -> dict[str, Any]:
    """Shapes of a batch of one image."""
    shape = lambda *sides, dtype=jnp.float32: jax.ShapeDtypeStruct((1, *sides), dtype)
    batch = {"image": shape(*config.image_size, 3, dtype=jnp.uint8), "size": shape(2, dtype=jnp.int32)}
    embedding = *config.grid, config.out_chans
    if isinstance(step, Distill):
        return batch | {"targets": {"embedding": shape(1, *embedding)}}
    batch |= {"embedding": shape(*embedding), "seed": shape(dtype=jnp.uint32)}
    if isinstance(step, DistillMasks):
        count, cells = step.prompting.prompts, tuple(4 * side for side in config.grid)
        batch |= {"points": shape(count, 2, 2), "labels": shape(count, 2, dtype=jnp.int32)}
        batch |= {"masks": shape(count, *cells)}
    return batch


def hours_of(trainings: list[Training], seconds: float, factor: float) -> float:
    """Of `IMAGES` on a device that takes so many seconds for an image of SAM-B's encoder."""
    per_mac = seconds / sam_costs.encoder_macs(preset("vit_b")).total
    teacher = sam_costs.encoder_macs(preset("vit_h")).total
    return IMAGES * per_mac * (teacher + factor * sum(each.epochs * each.macs for each in trainings)) / 3600


def lines_of(devices: dict[str, float], factor: float = 1.3) -> list[str]:
    """The Markdown table."""
    head = ["recipe", "paper, COCO AP", "passes x MACs of an image", *(f"hours, {device}" for device in devices)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for recipe in RECIPE_NAMES:
        trainings = trainings_of(recipe)
        work = ", ".join(f"{each.kind} {each.epochs} x {each.macs / 1e9:,.0f} G" for each in trainings)
        hours = [f"{hours_of(trainings, seconds, factor):,.0f}" for seconds in devices.values()]
        lines.append("| " + " | ".join([f"`{recipe}`", SCORES[recipe], work, *hours]) + " |")
    return lines


def main(seconds: float, factor: float = 1.3) -> None:
    """Print hours of each recipe on one device; divide by the number of devices.

    Args:
      seconds: that `experiments.bench --what forward --preset vit_b` gives for one image, ours.
      factor: what narrow layers lose.
    """
    print("\n".join(lines_of({f"S = {seconds:g}": seconds}, factor)))


def table() -> None:
    """Write experiments/tables/distillers_hours.md."""
    title, page = "Hours of the recipes that distil into another encoder", "../../docs/distillers.md"
    results.write_table("distillers_hours", title, lines_of(DEVICES), "python -m experiments.tables", page)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # only counts
    cli.run(main)
