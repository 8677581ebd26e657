"""Prunes any JAX function: groups from its jaxpr, scores, selection, masks and the cut.

grouping = find_groups(function, params, *inputs)      # shapes will do
scores = score(params, grouping, gradients)
keep = select(scores, ratio=0.5)                       # {group: ascending indices}
slim = shrink(params, grouping, keep)
grouping.run(slim, *inputs)                            # no model class is asked
save(folder, slim, grouping, keep)                     # safetensors and JSON; `load` reads them
"""

from slimsam_jax.pruning.cut import mask, score, select, shrink
from slimsam_jax.pruning.find import find_groups
from slimsam_jax.pruning.grouping import FoundGroup, Grouping, Place
from slimsam_jax.pruning.groups import by_path
from slimsam_jax.pruning.saving import Saved, load, save

__all__ = [
    "FoundGroup",
    "Grouping",
    "Place",
    "Saved",
    "by_path",
    "find_groups",
    "load",
    "mask",
    "save",
    "score",
    "select",
    "shrink",
]
