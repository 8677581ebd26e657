"""Which axes of SAM's image encoder form one channel, written by hand: what its jaxpr must give.

Kernels vote on importance, biases, norms and position tables follow, as in the reference.
"""

from __future__ import annotations

import dataclasses

from slimsam_jax.models.config import Config
from slimsam_jax.pruning.groups import Group, Member


def embedding_group(config: Config) -> Group:
    """The residual stream: one group through every layer of the encoder. Pruned in stage 1."""
    members = [
        Member("patch_embed_proj/kernel", 3, votes=True),
        Member("patch_embed_proj/bias", 0),
        Member("pos_embed", 3),
        Member("neck_0/kernel", 2, votes=True),
    ]
    for i in range(len(config.blocks)):
        block = f"blocks_{i}"
        members += [Member(f"{block}/{norm}/{leaf}", 0) for norm in ("norm1", "norm2") for leaf in ("scale", "bias")]
        members += [Member(f"{block}/attn/{name}/kernel", 0, votes=True) for name in "qkv"]
        members += [
            Member(f"{block}/attn/proj/kernel", 2, votes=True),
            Member(f"{block}/attn/proj/bias", 0),
            Member(f"{block}/mlp_lin1/kernel", 0, votes=True),
            Member(f"{block}/mlp_lin2/kernel", 1, votes=True),
            Member(f"{block}/mlp_lin2/bias", 0),
        ]
    return Group("embedding", config.embed_dim, tuple(members))


def attention_groups(config: Config) -> list[Group]:
    """Per block the channels within a head, equal for all heads and for q, k and v. Pruned in stage 2.

    The relative position tables are sliced with q's channels. (The reference throws them away.)
    """
    groups = []
    for i, block in enumerate(config.blocks):
        path = f"blocks_{i}/attn"
        members = [Member(f"{path}/{name}/kernel", 2, votes=True) for name in "qkv"]
        members += [Member(f"{path}/{name}/bias", 1) for name in "qkv"]
        members += [Member(f"{path}/rel_pos_{axis}", 1) for axis in "hw"]
        members += [Member(f"{path}/proj/kernel", 1, votes=True)]
        groups.append(Group(path, block.head_dim, tuple(members)))
    return groups


def logit_groups(config: Config) -> list[Group]:
    """Per block the channels of q and k alone, which the heads must share because the tables do."""
    return [
        dataclasses.replace(group, name=f"{group.name}/qk", members=tuple(m for m in group.members if _of_logits(m)))
        for group in attention_groups(config)
    ]


def _of_logits(member: Member) -> bool:
    return not any(f"/{name}/" in member.path for name in ("v", "proj"))


def value_groups(config: Config) -> list[Group]:
    """Per block the channels of v and proj: nothing ties the heads, so each may keep its own."""
    groups = []
    for i, block in enumerate(config.blocks):
        path = f"blocks_{i}/attn"
        members = (
            Member(f"{path}/v/kernel", 2, votes=True, copies=1),
            Member(f"{path}/v/bias", 1, copies=0),
            Member(f"{path}/proj/kernel", 1, votes=True, copies=0),
        )
        groups.append(Group(f"{path}/v", block.head_dim, members, copies=block.heads))
    return groups


def head_groups(config: Config) -> list[Group]:
    """Per block its whole heads."""
    groups = []
    for i, block in enumerate(config.blocks):
        path = f"blocks_{i}/attn"
        members = [Member(f"{path}/{name}/kernel", 1, votes=True) for name in "qkv"]
        members += [Member(f"{path}/{name}/bias", 0) for name in "qkv"]
        members += [Member(f"{path}/proj/kernel", 0, votes=True)]
        groups.append(Group(f"{path}/heads", block.heads, tuple(members)))
    return groups


def mlp_groups(config: Config) -> list[Group]:
    """Per block the hidden channels of the MLP. Pruned in stage 2."""
    return [
        Group(
            f"blocks_{i}/mlp",
            block.mlp_dim,
            (
                Member(f"blocks_{i}/mlp_lin1/kernel", 1, votes=True),
                Member(f"blocks_{i}/mlp_lin1/bias", 0),
                Member(f"blocks_{i}/mlp_lin2/kernel", 0, votes=True),
            ),
        )
        for i, block in enumerate(config.blocks)
    ]
