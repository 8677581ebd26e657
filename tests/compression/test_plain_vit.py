"""The projection of EfficientSAM's ViT: with nothing cut nothing changes, and what is cut is the least that can be."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.family_models import SLIM_VIT, efficient_sam
from helpers.models import random_images
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.projection import mlp, plain_vit
from slimsam_jax.compression.projection.attention import head_bases, project_heads
from slimsam_jax.compression.projection.embedding import project_embedding
from slimsam_jax.compression.steps import Prune
from slimsam_jax.errors import InputError
from slimsam_jax.models.encoders import counts
from slimsam_jax.models.encoders.architecture import Block
from slimsam_jax.models.sam import Sam, run_encoder
from slimsam_jax.profiling import sam_costs

WEIGHTINGS = ("none", "disturbed")
PARTS = ("stream", "attention", "mlp", "sensitivity")  # all, so that there is one program
DRAWS = 8  # of the noise on each image


@functools.partial(jax.jit, static_argnames="config")
def embed(config, encoder, batch):
    return run_encoder(config, encoder, batch)[0]


def batches():
    return [random_images(SLIM_VIT, seed=seed) for seed in range(8)]


@pytest.fixture(scope="module")
def sam() -> Sam:
    return efficient_sam()


@pytest.fixture(scope="module")
def found(sam):
    """Moments of the model."""
    return plain_vit.moments(sam, batches() * DRAWS, 0, *PARTS)


def error(sam: Sam, encoder, found) -> float:
    """Of the embedding, as a share of its variance."""
    slim, total = plain_vit.with_encoder(sam, encoder), 0.0
    for batch in batches():
        ours, expected = (embed(each.config, each.params["image_encoder"], batch) for each in (slim, sam))
        total += np.square(ours - expected).sum()
    return float(total / found["embedding"] * DRAWS)


def test_nothing_cut_nothing_changed(sam, found):
    """In float64, the two rotations after one another; positions are resized after the first."""
    with jax.enable_x64():
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sam.params["image_encoder"])
        turned = project_embedding(SLIM_VIT, wide, np.float64(found["stream"]), SLIM_VIT.embed_dim)
        params = {**sam.params, "image_encoder": jax.tree.map(jnp.asarray, turned)}
        moments = plain_vit.moments(dataclasses.replace(sam, params=params), batches()[:2], 0, *PARTS)
        for weighting in WEIGHTINGS:
            new = project_heads(turned, head_bases(turned, moments, weighting), [4, 5], [3, 6])
            ours, expected = (embed(sam.config, jax.tree.map(jnp.asarray, e), batches()[0]) for e in (new, wide))
            np.testing.assert_allclose(ours, expected, atol=1e-9)
            assert new["pos_embed"].dtype == np.float64 and np.abs(new["pos_embed"] - wide["pos_embed"]).max() > 0.01


def test_heads_that_use_two_channels_lose_nothing_when_cut_to_two(sam, found):
    """Also the softmax temperature: it must not follow the width."""
    encoder = jax.tree.map(np.array, sam.params["image_encoder"])
    for i in range(2):
        for name in "qkv":
            for array in encoder[f"blocks_{i}"]["attn"][name].values():
                array[..., 2:] = 0
    narrow = dataclasses.replace(sam, params={**sam.params, "image_encoder": jax.tree.map(jnp.asarray, encoder)})
    moments = plain_vit.moments(narrow, batches(), 0, *PARTS)
    for weighting in WEIGHTINGS:
        bases = head_bases(encoder, moments, weighting)
        assert error(narrow, project_heads(encoder, bases, [2, 2], [2, 2]), found) < 1e-6


@pytest.mark.parametrize("kind", ["qk", "v"])
def test_gains_are_shares_of_the_embedding_that_would_be_wrong(sam, found, kind):
    """In the last block; before it, errors of different tokens are not as apart as the gains take them to be."""
    encoder = sam.params["image_encoder"]
    bases, units = head_bases(encoder, found, "disturbed"), mlp.hidden_units(encoder, found, "disturbed")
    gains = plain_vit.gains_of(bases, units)
    widths = {name: len(gain) for name, gain in gains.items()}
    name = f"blocks_1/{kind}"
    widths[name] -= 1
    of_kind = lambda kind: [widths[f"blocks_{i}/{kind}"] for i in range(2)]
    slim = project_heads(encoder, bases, of_kind("qk"), of_kind("v"))
    lost = gains[name][widths[name] :].sum()
    np.testing.assert_allclose(error(sam, slim, found), lost, rtol=0.25)


def test_both_cuts_by_a_ratio(sam):
    """As wide as the multiply-accumulates of an even cut allow."""
    slim = sam
    for part in ("embedding", "bottleneck"):
        slim = plain_vit.project(slim, Prune(part), Target(0.5), lambda name: batches(), seed=0)
    encoder, half = slim.config.encoder, lambda width: (width + 1) // 2
    assert encoder.embed_dim == 5 and np.isfinite(embed(slim.config, slim.params["image_encoder"], batches()[0])).all()
    even = [Block(b.heads, half(b.key_dim), half(b.value_dim), half(b.mlp_dim)) for b in SLIM_VIT.blocks]
    most = counts.macs(dataclasses.replace(SLIM_VIT, embed_dim=5, blocks=tuple(even))).total
    assert 0.9 * most < counts.macs(encoder).total <= most


@pytest.mark.parametrize("allocation", ["global", "local"])
def test_widths_without_costs(allocation):
    gains = {name: np.ones(len(table) - 1) for name, table in plain_vit.group_costs(SLIM_VIT, "macs").items()}
    gains["blocks_1/v"] *= 9
    widths = plain_vit.choose_widths(SLIM_VIT, gains, 0.5, Prune("bottleneck", allocation=allocation))
    assert widths["blocks_1/v"] == (4 if allocation == "global" else 3)
    for kind in plain_vit.FIELDS:
        total = sum(len(gain) for name, gain in gains.items() if name.endswith(kind))
        assert abs(sum(width for name, width in widths.items() if name.endswith(kind)) - total / 2) <= 1


def test_costs_are_what_a_channel_adds(sam):
    for kind in ("params", "macs"):
        costs = plain_vit.group_costs(SLIM_VIT, kind)
        for name, table in costs.items():
            i, field = int(name[7]), plain_vit.FIELDS[name[9:]]
            blocks = list(SLIM_VIT.blocks)
            blocks[i] = dataclasses.replace(blocks[i], **{field: 1})
            slim = sam.config.with_encoder(dataclasses.replace(SLIM_VIT, blocks=tuple(blocks)))
            count = {"params": sam_costs.encoder_parameters, "macs": lambda c: counts.macs(c.encoder).total}[kind]
            assert table[-1] - table[1] == count(sam.config) - count(slim)


def test_what_is_too_narrow_is_one_line(sam, found):
    gains = {name: np.ones(len(table) - 1) for name, table in plain_vit.group_costs(SLIM_VIT, "macs").items()}
    step = Prune("bottleneck", round_to=4)
    with pytest.raises(InputError, match="cut less, or choose a smaller round_to"):
        plain_vit.choose_widths(SLIM_VIT, gains, 0.95, step)
