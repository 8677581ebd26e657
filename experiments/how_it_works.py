"""Draws what each step of a recipe does to a model and to its masks: the images of docs/how_it_works.md.

    python -m experiments.how_it_works --recipes taylor --steps 60
    python -m experiments.how_it_works --recipes default --steps 48

The small SAM that ships is slimmed with the photographs that ship, an eighth of which are held out. On those every
model between two steps is measured: squared error of the embedding by its variance, and agreement of masks with the
teacher's. One of them is drawn. Rows go into results/how_it_works.jsonl, images into figures/. Minutes of a core.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from converters.from_torch import load_sam
from experiments import results
from slimsam_jax import cli, data
from slimsam_jax.compression import showcase
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.pipeline import STEP_FUNCTIONS, carry_out
from slimsam_jax.compression.prepare import prepare
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.scores import agreement, relative_error
from slimsam_jax.files import replacing
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.sam import Sam

FILE = results.FOLDER / "how_it_works.jsonl"
STAGES = {  # what the steps of a run are called -> what stands above a column
    "taylor": {
        "prune-embedding": "1  embedding pruned",
        "distill": "2  aligned at the bottleneck",
        "prune-bottleneck": "3  bottleneck pruned",
        "distill-2": "4  aligned at the embedding",
    },
    "default": {
        "prune-embedding": "1  embedding pruned",
        "prune-bottleneck": "2  bottleneck pruned",
        "distill": "3  distilled",
    },
}
SIDE, COLOURS = 260, 96  # pixels of a photograph; colours of an image, which make it small


class Stage(NamedTuple):
    """A model between two steps, and how good it is on what was held out."""

    title: str
    sam: Sam
    error: float
    agreement: float


def main(recipes: tuple[str, ...] = tuple(STAGES), steps: int = 60, ratio: float = 0.5, seed: int = 0) -> None:
    """Slim by recipes, keep a row of each stage, draw. What is there already is not made again.

    Args:
      recipes: of `STAGES`.
      steps: of four images, in all distillations of a recipe together.
      ratio: share of the channels to remove.
      seed: of images and noise.
    """
    results.check_committed()
    if unknown := set(recipes) - set(STAGES):
        raise InputError(f"no figure for {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    teacher = load_sam(data.embedded_teacher())
    for recipe in recipes:
        key = {"recipe": recipe, "ratio": ratio, "seed": seed, "steps": steps}
        if is_there(key):
            continue
        with tempfile.TemporaryDirectory() as folder:  # --steps is of each of the paper's two distillations
            out = Path(folder) / "slim"
            options = Options(recipe=recipe, ratio=ratio, seed=seed, steps=steps // 2, out=out)
            stages, held_out = slimmed(options, teacher)
        for stage in stages:
            numbers = {"error": stage.error, "agreement": stage.agreement, "embed_dim": stage.sam.config.embed_dim}
            if not results.find(FILE, own := {**key, "stage": stage.title}):
                results.append(FILE, {**own, **numbers, "held_out": len(held_out)})
            print(f"{recipe}, {stage.title}: error {stage.error:.2g}, agreement {stage.agreement:.4f}", flush=True)
        (shown,) = showcase.choose(teacher, held_out, 1)
        draw(stages, shown, results.FIGURE_FOLDER / f"steps_{recipe}.png")


def is_there(key: dict[str, Any]) -> bool:
    """Whether a recipe's run has a row of each stage, and its image."""
    kept = {entry["stage"] for entry in results.find(FILE, key)}
    return (
        kept >= {*STAGES[key["recipe"]].values(), "the SAM"}
        and (results.FIGURE_FOLDER / f"steps_{key['recipe']}.png").exists()
    )


def slimmed(options: Options, teacher: Sam) -> tuple[list[Stage], list[data.Sample]]:
    """Carries out a recipe, and measures the teacher and every stage; with the samples held out for that."""
    made: dict[str, Sam] = {}

    def kept(function: Any) -> Any:
        def step(run, planned, student, previous):
            made[planned.name] = function(run, planned, student, previous)
            return made[planned.name]

        return step

    run = prepare(options, teacher)
    with run.folder:
        carry_out(run, {kind: kept(function) for kind, function in STEP_FUNCTIONS.items()})
    titles = STAGES[options.recipe]
    models = {"the SAM": teacher, **{titles[name]: sam for name, sam in made.items()}}
    return [measured(title, sam, teacher, run.val) for title, sam in models.items()], list(run.val)


def measured(title: str, sam: Sam, teacher: Sam, samples: Any) -> Stage:
    """Means over images, of 4 x 4 points each."""
    errors, agree = [], []
    for sample in samples:
        encoded = [encode_image(each, sample.image()) for each in (teacher, sam)]
        errors.append(relative_error(encoded[1].embedding, encoded[0].embedding))
        agree.append(agreement([(teacher, encoded[0]), (sam, encoded[1])], grid=4)[1].mean())
    return Stage(title, sam, float(np.mean(errors)), float(np.mean(agree)))


def draw(stages: list[Stage], shown: showcase.Shown, out: Path) -> None:
    """Writes a PNG: below each stage's masks the channels that its blocks still have."""
    image = shown.image.copy()
    scale = SIDE / max(image.size)
    image = image.resize([round(scale * side) for side in image.size])
    small = shown._replace(image=image, points=shown.points * scale)
    figure = Figure(figsize=(2.6 * len(stages), 4.9), layout="constrained")
    rows = figure.subplots(3, len(stages), squeeze=False, height_ratios=(2.4, 1, 1), sharey="row")
    for (above, heads, mlps), stage in zip(rows.T, stages, strict=True):
        above.imshow(small.drawn(stage.sam))
        above.axis("off")
        quality = "" if stage is stages[0] else f"error {stage.error:.2g}, agreement {100 * stage.agreement:.1f} %"
        above.set_title(f"{stage.title}\n{quality}", fontsize=9)
        for axes, field, most in ((heads, "head_dim", stages[0]), (mlps, "mlp_dim", stages[0])):
            bars(axes, stage.sam, most.sam, field)
        heads.set_title(f"embedding {stage.sam.config.embed_dim}; channels a head", fontsize=8)
        mlps.set_title("hidden channels of MLPs", fontsize=8)
    save(figure, out)


def bars(axes: Any, sam: Sam, teacher: Sam, field: str) -> None:
    """Draws a width of every block, the teacher's in grey behind it."""
    for model, colour in ((teacher, "lightgrey"), (sam, "C0")):
        axes.bar(
            range(len(model.config.blocks)), [getattr(block, field) for block in model.config.blocks], color=colour
        )
    axes.set_xticks([])
    axes.tick_params(labelsize=7)


def save(figure: Figure, out: Path) -> None:
    """Writes it with few colours: half a megabyte otherwise, for photographs of a thumb's size."""
    out.parent.mkdir(exist_ok=True)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
        with Image.open(temporary) as full:
            reduced = full.convert("RGB").quantize(COLOURS)
        reduced.save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    cli.run(main)
