"""Image encoders, a family a module. Each has six names, by which the package knows it:

- `Config`: the architecture, frozen, with `image_size`, `grid`, `out_chans`, `to_json` and `from_json`;
- `ImageEncoder`: Flax; config, dtype, remat; normalised images -> (embedding, features), the embedding an array or a
  dict of maps;
- `config_of(params, image_size)`: the architecture with the widths that the arrays have;
- `features(config, features)`: what stays at full width when the embedding or the bottlenecks are cut;
- `FEATURES`: the names of those, {"embedding": ..., "bottleneck": ...};
- `STAGES`: which groups of channels are cut with either, a predicate on the paths of their members.

A family may bring along what else it knows: `keep_logit_scale`, `abstract_params`, `kept_elements`,
`last_arrays`, `RANKED_BY_STABILITY`, `LEAVES_OUT`, `for_inference`, `keeps_unread`, `embedding_shapes` (of several
maps).
`ROTATES` says where bases may be chosen, and how channels are chosen elsewhere; such a family has an entry in
`compression.prune.PROJECTIONS`. Budgets ask for
`narrowed(config, narrow)`: the architecture with every width of streams and bottlenecks by `narrow`, an int -> int.
What is for SAM's ViT alone (uniform cuts) asks for "vit" by name and refuses others.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from slimsam_jax.models.encoders import efficient_sam_vit, hiera, rep_vit, tiny_vit, vit

FAMILIES: dict[str, ModuleType] = {
    "vit": vit,
    "tiny_vit": tiny_vit,
    "efficient_sam": efficient_sam_vit,
    "rep_vit": rep_vit,
    "hiera": hiera,
}


def name_of(encoder: Any) -> str:
    """The family of an encoder's `Config`.

    Raises:
      ValueError: it is of none.
    """
    for name, family in FAMILIES.items():
        if type(encoder) is family.Config:
            return name
    raise ValueError(f"{type(encoder).__module__} is no family of encoders; there are {', '.join(FAMILIES)}")


def family_of(encoder: Any) -> ModuleType:
    """Its module; see `name_of`."""
    return FAMILIES[name_of(encoder)]
