"""Prunes any JAX function: groups from its jaxpr, scores, selection, masks and the cut.

grouping = find_groups(function, params, *inputs)      # shapes will do
scores = score(params, grouping, gradients)
keep = select(scores, ratio=0.5)                       # {group: ascending indices}
slim = shrink(params, grouping, keep)
grouping.run(slim, *inputs)                            # no model class is asked
"""

from slimsam_jax.pruning.cut import mask, score, select, shrink
from slimsam_jax.pruning.find import find_groups
from slimsam_jax.pruning.grouping import FoundGroup, Grouping, Place
from slimsam_jax.pruning.groups import by_path
from slimsam_jax.pruning.rename import rename

__all__ = ["FoundGroup", "Grouping", "Place", "by_path", "find_groups", "mask", "rename", "score", "select", "shrink"]
