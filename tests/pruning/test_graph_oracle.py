"""As many groups of the same sizes as Torch-Pruning finds in the same architectures."""

from __future__ import annotations

import json
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from helpers.graph_oracle_models import ORACLE_MODELS
from helpers.shared import shared
from slimsam_jax.pruning import find_groups

# Ours beyond theirs, and theirs beyond ours. A fused qkv is there one group of 3 · heads · channels, and what is left
# of it after a cut cannot be reshaped: their own run of the cut model fails. Here it is the heads, and the channels
# that q, k and v share because one array holds them. In torchvision's ViT they leave attention alone; here its heads,
# the channels of q and k, and those of v are found.
DIFFERENCES = {
    "timm:vit_small_patch16_224": ({6: 12, 64: 12}, {1152: 12}),
    "tv:vit_b_16": ({12: 12, 64: 24}, {}),
}


@pytest.fixture(scope="module")
def oracle():
    return json.loads(shared("golden/groups_oracle.json").read_text())["models"]


def test_every_model_of_the_oracle_is_compared(oracle):
    assert oracle.keys() == ORACLE_MODELS.keys()


@pytest.mark.parametrize("name", ORACLE_MODELS)
def test_the_groups_of_torch_pruning(name, oracle):
    module, side = ORACLE_MODELS[name]
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)
    grouping = find_groups(module.apply, params, images)
    output, *groups = oracle[name]["groups"]  # the output layer is a group there; here outputs are frozen
    assert output["size"] in (1000, 2)
    ours, theirs = Counter(group.size for group in grouping.groups), Counter(group["size"] for group in groups)
    assert (dict(ours - theirs), dict(theirs - ours)) == DIFFERENCES.get(name, ({}, {}))
    assert not grouping.unused
