"""Prunes any JAX function: groups from its jaxpr, scores, selection, masks and the cut.

grouping = find_groups(function, params, *inputs)      # shapes will do
scores = score(params, grouping, gradients)
keep = select(scores, ratio=0.5)                       # {group: ascending indices}
slim = shrink(params, grouping, keep)
grouping.run(slim, *inputs)                            # no model class is asked
save(folder, slim, grouping, keep)                     # safetensors and JSON; `load` reads them

Sparse training is in `pruning.sparse`.
"""

from slimsam_jax.pruning.activations import activations
from slimsam_jax.pruning.choosing import select
from slimsam_jax.pruning.cut import mask, score, shrink
from slimsam_jax.pruning.find import find_groups
from slimsam_jax.pruning.grouping import FoundGroup, Grouping, Place
from slimsam_jax.pruning.groups import by_path
from slimsam_jax.pruning.iterating import iterate, within
from slimsam_jax.pruning.projection.freedom import Freedom, freedom
from slimsam_jax.pruning.projection.project import Projected, project
from slimsam_jax.pruning.rename import rename
from slimsam_jax.pruning.saving import Saved, load, save

__all__ = [
    "FoundGroup",
    "Freedom",
    "Grouping",
    "Place",
    "Projected",
    "Saved",
    "activations",
    "by_path",
    "find_groups",
    "freedom",
    "iterate",
    "load",
    "mask",
    "project",
    "rename",
    "save",
    "score",
    "select",
    "shrink",
    "within",
]
