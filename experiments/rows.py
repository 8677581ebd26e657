"""Lists the rows of the tables of slimming: each is a `python -m slimsam_jax.compress` command at 77 %."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from experiments.recipes import RECIPES
from slimsam_jax.compression.recipes import RECIPES as SHIPPED
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Recipe

RATIO = 0.77
SEEDS = (0, 1, 2)


class Row(NamedTuple):
    """What a row's command says besides `COMMON`, ratio and seed."""

    recipe: str
    set: tuple[str, ...] = ()

    def steps_of(self) -> Recipe:
        """Returns the recipe with everything that is set."""
        return change(RECIPES[self.recipe](RATIO), self.settings())

    def settings(self) -> list[str]:
        return [*SET, *self.set]

    def arguments(self) -> str:
        """Formats the arguments as typed; a recipe that is not the package's by its name in `experiments.recipes`."""
        recipe = f"--recipe {self.recipe}" if self.recipe in SHIPPED else f"experiments.recipes.{self.recipe}"
        return " ".join([recipe, "--set", *self.settings()])


class Table(NamedTuple):
    """Rows by label.

    Attributes:
      title: its heading.
      paper: the paper's number of a label, SA-1B single-point mIoU of SAM-B at 77 %, in %.
    """

    title: str
    rows: dict[str, Row]
    paper: Mapping[str, float] = MappingProxyType({})


# As many images for importance as statistics; one validation, at the end, so that all rows keep their last model.
COMMON = {"importance_images": 50, "steps": 100}
SET = ("distill.validations=1",)


# The best of three at this length, by photographs that no table shows (`experiments.fair`): thrice `taylor`'s own.
RATE = "distill.lr=3e-3"


def taylor(*settings: str, recipe: str = "taylor") -> Row:
    return Row(recipe, (RATE, *settings))


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
TABLES = {
    "criteria": Table(
        "What tells which channels go",
        {
            "projection (default)": Row("default"),
            "Disturbed Taylor (taylor)": taylor(),
            "Taylor, labels": taylor("prune.importance_loss=masks"),
            "Hessian (Fisher, labels)": taylor("prune.criterion=fisher", "prune.importance_loss=masks"),
            "random": taylor("prune.criterion=random"),
            "magnitude": taylor("prune.criterion=magnitude"),
            "scratch": taylor("prune.criterion=magnitude", recipe="scratch"),
        },
        {
            "scratch": 1.34,
            "random": 62.58,
            "magnitude": 61.60,
            "Hessian (Fisher, labels)": 63.56,
            "Taylor, labels": 64.26,
            "Disturbed Taylor (taylor)": 67.40,
        },
    ),
    "ablations": Table(
        "The paper's ablations, and the default's",
        {
            "default": Row("default"),
            "default, alternating": Row("alternating"),
            "default, no intermediate features": Row("default", ("distill.features=0",)),
            "taylor": taylor(),
            "one-shot": taylor(recipe="one_shot"),
            "no intermediate features": taylor("distill.features=0"),
            "normaliser gaussian": taylor("prune.normalizer=gaussian"),
            "local": taylor("prune.allocation=local"),
        },
        {
            "one-shot": 62.31,
            "no intermediate features": 63.91,
            "normaliser gaussian": 64.48,
            "local": 64.38,
        },
    ),
    "quirks": Table(
        "The reference's known bugs, one by one",
        {
            "taylor": taylor(),
            **BUGS,
            "all of them, and gaussian (slimsam, learning rate and schedule of taylor)": taylor(
                "distill.schedule=cosine", recipe="slimsam"
            ),
        },
    ),
}


def rows() -> dict[Row, str]:
    """{row: its label, the first of several}: a row that several tables have is one."""
    labelled: dict[Row, str] = {}
    for table in TABLES.values():
        for label, row in table.rows.items():
            labelled.setdefault(row, label)
    return labelled
