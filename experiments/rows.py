"""Lists the rows of the tables of slimming: each is a `python -m slimsam_jax.compress` command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from experiments.recipes import RECIPES
from slimsam_jax.compression.recipes import RECIPES as SHIPPED
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Recipe

SEEDS = (0, 1, 2)


class Row(NamedTuple):
    """What a row's command says besides `COMMON`, ratio and seed."""

    recipe: str
    set: tuple[str, ...] = ()
    steps: int = 100
    limit: int | None = None
    uniform: bool = False

    def steps_of(self, ratio: float) -> Recipe:
        """Returns the recipe with everything that is set."""
        return change(RECIPES[self.recipe](ratio), [*COMMON["set"], *self.set])

    def arguments(self) -> str:
        """Formats the arguments as typed; a recipe that is not the package's by its name in `experiments.recipes`."""
        recipe = f"--recipe {self.recipe}" if self.recipe in SHIPPED else f"experiments.recipes.{self.recipe}"
        parts = [recipe, f"--steps {self.steps}"]
        parts += [f"--limit {self.limit}"] if self.limit else []
        parts += ["--uniform"] if self.uniform else []
        return " ".join([*parts, "--set", *COMMON["set"], *self.set])


class Table(NamedTuple):
    """Rows by label.

    Attributes:
      title: its heading.
      paper: the paper's number of a (label, ratio), SA-1B single-point mIoU of SAM-B, in %.
      teacher: what is slimmed: "small" is small v1, which most tables are of.
      more: begins with the teacher itself, and has the columns that take longer to measure.
    """

    title: str
    ratios: tuple[float, ...]
    rows: dict[str, Row]
    paper: Mapping[tuple[str, float], float] = MappingProxyType({})
    teacher: str = "small"
    more: bool = False


# As many images for importance as statistics; one validation, at the end, so that all rows keep their last model.
COMMON = {"importance_images": 50, "set": ("distill.validations=1",)}


def taylor(*settings: str, **options) -> Row:
    return Row("taylor", settings, **options)


def default(*settings: str, **options) -> Row:
    return Row("default", settings, **options)


def alternating(*settings: str, **options) -> Row:
    return Row("alternating", settings, **options)


SLIMSAM = Row("slimsam")
RATE = "distill.lr=1e-3"
BUGS = {
    "embedding tied with a period": taylor("quirks.tied_embedding=true"),
    "relative positions zeroed": taylor("quirks.zeroed_rel_pos=true"),
    "logit scale jumps": taylor("quirks.jumping_logit_scale=true"),
    "global q, k, v compared with themselves": taylor("quirks.self_aligned_global=true"),
    "rounded by index": taylor(
        "quirks.rounded_selection=true", "quirks.rounded_by_index=true", "quirks.vanishing_kept=true"
    ),
    "gradients summed": taylor("prune.grad_reduction=sum"),
    "plain MSE": taylor("distill.relative=false"),
}
CRITERIA = {"random": taylor("prune.criterion=random"), "magnitude": taylor("prune.criterion=magnitude")}
TABLES = {
    "compression": Table(
        "Compression",
        (0.5, 0.77, 0.9),
        {
            "default": default(),
            "default, uniform": default(uniform=True),
            "taylor": taylor(),
            "slimsam": SLIMSAM,
        },
        {("slimsam", 0.5): 72.33, ("slimsam", 0.77): 67.40},
        more=True,
    ),
    "narrow": Table(
        "A teacher with less to spare",
        (0.5, 0.77),
        {
            "default": default(),
            "default, alternating": alternating(),
            "taylor": taylor(),
            "slimsam": SLIMSAM,
        },
        teacher="narrow",
        more=True,
    ),
    "criteria": Table(
        "What tells which channels go",
        (0.77, 0.5),
        {
            "scratch": Row("scratch", ("prune.criterion=magnitude",)),
            **CRITERIA,
            "Hessian (Fisher, labels)": taylor("prune.criterion=fisher", "prune.importance_loss=masks"),
            "Taylor, labels": taylor("prune.importance_loss=masks"),
            "Disturbed Taylor": taylor(),
            "ours (projection), their order and learning rate": alternating(RATE),
            "ours (projection)": default(),
        },
        {
            ("scratch", 0.5): 1.63,
            ("random", 0.5): 71.03,
            ("magnitude", 0.5): 69.96,
            ("Hessian (Fisher, labels)", 0.5): 71.01,
            ("Taylor, labels", 0.5): 71.15,
            ("Disturbed Taylor", 0.5): 72.33,
            ("scratch", 0.77): 1.34,
            ("random", 0.77): 62.58,
            ("magnitude", 0.77): 61.60,
            ("Hessian (Fisher, labels)", 0.77): 63.56,
            ("Taylor, labels", 0.77): 64.26,
            ("Disturbed Taylor", 0.77): 67.40,
        },
    ),
    "ablations": Table(
        "The paper's ablations",
        (0.77,),
        {
            "taylor": taylor(),
            "one-shot": Row("one_shot"),
            "one-shot, labels": Row("one_shot", ("prune.importance_loss=masks",)),
            "no intermediate features": taylor("distill.features=0"),
            "normaliser sum": taylor("prune.normalizer=sum"),
            "normaliser mean": taylor("prune.normalizer=mean"),
            "normaliser max": taylor("prune.normalizer=max"),
            "normaliser minmax": taylor("prune.normalizer=minmax"),
            "normaliser gaussian": taylor("prune.normalizer=gaussian"),
            "local": taylor("prune.allocation=local"),
            "100 images": taylor(limit=100),
            "30 images": taylor(limit=30),
            "default": default(),
            "default, alternating": alternating(),
            "default, no intermediate features": default("distill.features=0"),
            "default, 100 images": default(limit=100),
            "default, 30 images": default(limit=30),
        },
        {
            ("one-shot, labels", 0.77): 62.04,
            ("one-shot", 0.77): 62.31,
            ("no intermediate features", 0.77): 63.91,
            ("local", 0.77): 64.38,
            ("normaliser mean", 0.77): 63.64,
            ("normaliser max", 0.77): 64.35,
            ("normaliser sum", 0.77): 63.55,
            ("normaliser gaussian", 0.77): 64.48,
            ("normaliser minmax", 0.77): 64.14,
        },
    ),
    "quirks": Table(
        "The reference's known bugs, one by one",
        (0.77,),
        {
            "taylor": taylor(),
            **BUGS,
            "all of them, and gaussian (slimsam, learning rate and schedule of taylor)": Row(
                "slimsam", (RATE, "distill.schedule=cosine")
            ),
        },
    ),
    "efficiency": Table(
        "Steps and images",
        (0.77,),
        {
            f"{name}, {steps} steps": Row(name, steps=steps)
            for name in ("default", "taylor", "slimsam")
            for steps in (0, 25, 100, 400)
        },
    ),
    "rates": Table(
        "How fast to learn",
        (0.5, 0.77, 0.9),
        {
            "auto_lr 3e-3": default("distill.auto_lr=3e-3"),
            "auto_lr 1e-2 (default)": default(),
            "auto_lr 3e-2": default("distill.auto_lr=3e-2"),
            "taylor, learning rate 3e-4": taylor("distill.lr=3e-4"),
            "taylor, learning rate 1e-3 (its own)": taylor(),
            "taylor, learning rate 3e-3": taylor("distill.lr=3e-3"),
        },
    ),
    "lengths": Table(
        "How fast to learn, for other lengths",
        (0.77,),
        {
            # The default's own is not typed: it is the row of other tables.
            f"{steps} steps, auto_lr {rate}": default(
                *([] if rate == "1e-2" else [f"distill.auto_lr={rate}"]), steps=steps
            )
            for steps in (25, 100, 400)
            for rate in ("3e-3", "1e-2", "3e-2")
        },
    ),
    "order": Table(
        "Alternate, or at once",
        (0.77, 0.5, 0.9),
        {
            "at once (default)": default(),
            "at once, the embedding alone": default("distill.features=0"),
            "alternating": alternating(),
            "alternating, the embedding alone": alternating("distill.features=0"),
        },
    ),
    "search": Table(
        "Looking for a better recipe",
        (0.9,),
        {
            "default": default(),
            "features at half of their weight": default("distill.features=0.5"),
            "plain MSE": default("distill.relative=false"),
            "cosine term 0.5": default("distill.direction=0.5"),
            "constant learning rate": default("distill.schedule=constant"),
            "a last quarter of the steps for the embedding alone": Row("polish"),
            "average of weights 0.95": default("distill.ema=0.95"),
            "AdamW 0.05": default("distill.weight_decay=0.05"),
            "clip 1": default("distill.clip=1"),
            "flip": default("distill.flip=true"),
            "crops and their scale": default("distill.crop=0.5"),
            "learning rate 1e-4": default("distill.lr=1e-4"),
            "learning rate 1e-4, masks 1": default("distill.lr=1e-4", "distill.masks=1"),
            "the decoder tuned by its masks in a last quarter, learning rate 1e-4": Row(
                "decoder", ("distill.lr=1e-4", "distill.masks=1", "distill.keep_checkpoint=last")
            ),
            "alternating": alternating(),
            "alternating, 2 rounds": Row("progressive"),
            "taylor": taylor(),
            "slimsam": SLIMSAM,
        },
    ),
    "choices": Table(
        "Single choices, of small v2",
        (0.77,),
        {"default": default(), "default, alternating": alternating(), "taylor": taylor(), **BUGS, **CRITERIA},
        teacher="sam_small_v2",
    ),
}
FIRST = ("default", "taylor", "slimsam")  # with all seeds before the other rows have their second


def plan() -> Iterator[tuple[Row, float, int]]:
    """Lists every run, what matters most first."""
    runs = [
        (label, row, ratio) for table in TABLES.values() for ratio in table.ratios for label, row in table.rows.items()
    ]
    main = [(row, ratio) for label, row, ratio in runs if label in FIRST]
    rest = [(row, ratio) for _, row, ratio in runs]
    order = [(row, ratio, 0) for row, ratio in main + rest]
    order += [(row, ratio, seed) for seed in SEEDS[1:] for row, ratio in main]
    order += [(row, ratio, seed) for seed in SEEDS[1:] for row, ratio in rest]
    return iter(dict.fromkeys(order))
