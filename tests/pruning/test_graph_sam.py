"""SAM's groups, found from its jaxpr, are those that were written by hand, and the neck."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import written_groups as written
from helpers.graph_models import doubled, halves, largest_difference
from helpers.models import random_sam, tiny_config
from slimsam_jax import pruning
from slimsam_jax.models.config import preset
from slimsam_jax.models.encoders.vit import ImageEncoder
from slimsam_jax.models.sam import abstract_params
from slimsam_jax.pruning import find_groups

NECK = {("neck_0/kernel", 3), ("neck_1/scale", 0), ("neck_1/bias", 0), ("neck_2/kernel", 2)}


def find(config, attention="plain"):
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    encoder = ImageEncoder(config, attention=attention)
    embed = lambda params, images: encoder.apply({"params": params}, images)[0]
    return find_groups(embed, abstract_params(config)["image_encoder"], images)


def described(members):
    """{(path, axis)} with those that vote, as sets."""
    return frozenset((member.path, member.axis) for member in members)


def check(config, grouping):
    found = {described(group.members): group for group in grouping.groups}
    hand = [written.embedding_group(config), *written.logit_groups(config), *written.value_groups(config)]
    hand += [*written.head_groups(config), *written.mlp_groups(config)]
    assert found.keys() == {*(described(group.members) for group in hand), frozenset(NECK)}
    for group in hand:
        ours = found[described(group.members)]
        assert ours.size == group.size
        assert bool(ours.copies) == bool(group.copies)
        for member in group.members:
            assert member.votes == (member.path in grouping.kernels)


@pytest.mark.parametrize("attention", ["plain", "rows", "folded"])
def test_the_groups_that_were_written_by_hand(attention):
    config = tiny_config()
    check(config, find(config, attention))


@pytest.mark.usefixtures("no_collector")
def test_vit_h_within_15_seconds():
    config = preset("vit_h")
    start = time.process_time()
    grouping = find(config)
    assert time.process_time() - start < 15
    check(config, grouping)
    assert len(grouping.groups) == 2 + 4 * 32


def test_a_sam_that_is_cut_through_its_jaxpr():
    """Every group but the embedding and the neck, masked and cut, in float64; all of them in shape."""
    with jax.enable_x64(True):
        config = tiny_config()
        params = doubled(random_sam(config).params["image_encoder"])
        images = np.random.default_rng(0).normal(size=(1, *config.image_size, 3))
        encoder = ImageEncoder(config, attention="plain", dtype=jnp.float64)
        embed = lambda params, images: encoder.apply({"params": params}, images)[0]
        grouping = find_groups(embed, params, images)
        keep = halves([group for group in grouping.groups if not group.crossed])
        assert len(keep) == len(grouping.groups) - 2
        masked = jax.jit(embed)(pruning.mask(params, grouping, keep), images)
        cut = jax.jit(grouping.run)(pruning.shrink(params, grouping, keep), images)
        assert largest_difference(masked, cut) < 1e-10
        everything = halves(grouping.groups)
        slim = pruning.shrink(params, grouping, everything)
        assert jax.eval_shape(grouping.run, slim, images).shape == masked.shape
