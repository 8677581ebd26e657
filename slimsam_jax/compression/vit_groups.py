"""The groups of SAM's ViT, under the names that widths and budgets go by."""

from __future__ import annotations

import functools

from slimsam_jax.compression import found_groups
from slimsam_jax.models.config import Config
from slimsam_jax.pruning import FoundGroup, Grouping, rename

# A group is known by a place in which no other lies: {(end of the path, axis): name within its block}.
KNOWN_BY = {
    ("pos_embed", 3): "embedding",
    ("neck_0/kernel", 3): "neck",
    ("attn/q/kernel", 2): "attn/qk",
    ("attn/v/kernel", 2): "attn/v",
    ("attn/v/kernel", 1): "attn/heads",
    ("mlp_lin1/kernel", 1): "mlp",
}


@functools.lru_cache(maxsize=8)
def groups_of(config: Config, tied: bool = True) -> Grouping:
    """The groups of its image encoder, by name:

    - "embedding": the residual stream through every layer; SlimSAM's first stage prunes it;
    - "blocks_i/mlp": the hidden channels of an MLP, and "blocks_i/attn" the channels within a head, equal for all
      heads and for q, k and v, which its second stage prunes;
    - if not `tied`, in place of that "blocks_i/attn/qk", which heads must share because the relative positions do, and
      "blocks_i/attn/v", of which each head may keep its own;
    - "blocks_i/attn/heads": whole heads; and "neck".

    An axis of length one is no group: nothing of it can go.
    """
    found = found_groups.groups_of(config)
    names = {group.name: _name(group) for group in found.groups}
    if tied:
        names = {group: name.removesuffix("/qk").removesuffix("/v") for group, name in names.items()}
    return rename(found, names)


def of_kind(grouping: Grouping, kind: str) -> list[str]:
    """Names of the groups of all blocks, "attn", "attn/qk", "attn/v", "attn/heads" or "mlp"; or of "embedding"."""
    return [group.name for group in grouping.groups if kind in (group.name, group.name.partition("/")[2])]


def _name(group: FoundGroup) -> str:
    """Its name, with its block's before it."""
    for place in group.members:
        block, _, end = place.path.partition("/")
        if name := KNOWN_BY.get((end, place.axis)):
            return f"{block}/{name}"
        if name := KNOWN_BY.get((place.path, place.axis)):
            return name
    raise ValueError(f"{group.name} is no group of SAM's ViT")
