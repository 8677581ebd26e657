"""Recipes by name. Each is a file with one list of steps; a paper is one more file, and one more line here."""

from slimsam_jax.compression.recipes import (
    default,
    edge_sam,
    efficient_sam,
    integers,
    mobile_sam,
    slimsam,
    taylor,
    tiny_sam,
)
from slimsam_jax.compression.steps import Recipe

RECIPES: dict[str, Recipe] = {
    "default": default.RECIPE,
    "taylor": taylor.RECIPE,
    "slimsam": slimsam.RECIPE,
    "mobile_sam": mobile_sam.RECIPE,
    "edge_sam": edge_sam.RECIPE,
    "tiny_sam": tiny_sam.RECIPE,
    "efficient_sam": efficient_sam.RECIPE,
    "integers": integers.RECIPE,
}
