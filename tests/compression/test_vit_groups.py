"""SAM's ViT under its own names for groups, where a graph lists none: axes of length one."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from helpers.models import random_sam, tiny_config
from slimsam_jax.compression import prune, selection, vit_groups
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.recipes import RECIPES

BOTTLENECK = next(step for step in RECIPES["taylor"] if getattr(step, "part", None) == "bottleneck")


@pytest.fixture(scope="module")
def narrow():
    """Heads of a single channel in one block, a single head in the other."""
    blocks = tiny_config().blocks
    changed = (dataclasses.replace(blocks[0], head_dim=1), dataclasses.replace(blocks[1], heads=1))
    return random_sam(dataclasses.replace(tiny_config(), blocks=changed))


def test_an_axis_of_length_one_is_no_group(narrow):
    shared = ["embedding", "blocks_0/attn/heads", "blocks_0/mlp", "blocks_1/attn", "blocks_1/mlp", "neck"]
    assert [*vit_groups.groups_of(narrow.config).widths] == shared
    apart = vit_groups.groups_of(narrow.config, tied=False)
    assert {"blocks_1/attn/qk", "blocks_1/attn/v"} == {*apart.widths} - {*shared}


@pytest.mark.parametrize(
    ("head_channels", "widths"),
    [
        ("shared", [(2, 1, 20), (1, 6, 20)]),
        ("separate", [(2, 1, 20), (1, 6, 20)]),
        ("whole", [(1, 1, 20), (1, 12, 20)]),
    ],
)
def test_what_cannot_be_cut_stays(narrow, head_channels, widths):
    step = dataclasses.replace(BOTTLENECK, head_channels=head_channels, criterion="magnitude", normalizer="mean")
    encoder = jax.device_get(narrow.params["image_encoder"])
    slim = prune.cut(narrow, selection.choose(narrow.config, encoder, encoder, step, Target(0.5)), step)
    assert [(block.heads, block.head_dim, block.mlp_dim) for block in slim.config.blocks] == widths
