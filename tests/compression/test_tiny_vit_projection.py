"""The projection of TinyViT: with nothing cut nothing changes; what is cut loses less than dropped channels."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.family_models import SLIM_TINY_VIT, tiny_vit_sam
from helpers.models import random_images
from slimsam_jax.compression import found_groups, prune
from slimsam_jax.compression.budget import Budget, Target
from slimsam_jax.compression.projection import mlp, plain_vit, streams, tiny_vit
from slimsam_jax.compression.projection.attention import head_bases, project_heads
from slimsam_jax.compression.projection.tiny_vit_statistics import blocks_of, convolutions_of, moments_of
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.steps import Prune
from slimsam_jax.models.encoders import counts
from slimsam_jax.models.encoders.tiny_vit import Block, Stage, fold_batch_norm
from slimsam_jax.models.sam import Sam, run_encoder
from slimsam_jax.profiling import sam_costs

PARTS = ("stream", "attention", "mlp", "sensitivity")  # all, so that there is one program
DIMS = (SLIM_TINY_VIT.conv_dim, *(stage.dim for stage in SLIM_TINY_VIT.stages))
BLOCKS = [block for *_, block in blocks_of(SLIM_TINY_VIT)]
WHOLE = [block.key_dim for block in BLOCKS], [block.value_dim for block in BLOCKS]


@functools.partial(jax.jit, static_argnames="config")
def embed(config, encoder, batch):
    return run_encoder(config, encoder, batch)[0]


def batches(config=SLIM_TINY_VIT):
    return [random_images(config, seed=seed) for seed in range(6)]


def found_of(sam: Sam, keep):
    changes = tiny_vit.changes_of(SLIM_TINY_VIT, keep)
    encoder = {**sam.params["image_encoder"], "changes": [change.writes for change in changes]}
    asked = dataclasses.replace(sam, params={**sam.params, "image_encoder": encoder})
    return plain_vit.moments(asked, batches(), 0, *PARTS, moments_of=moments_of)


@pytest.fixture(scope="module")
def wide():
    """A model and its moments in float64, of all channels."""
    with jax.enable_x64():
        sam = tiny_vit_sam()
        sam = dataclasses.replace(sam, params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sam.params))
        yield sam, found_of(sam, list(map(np.arange, DIMS)))


def error(sam: Sam, slim: Sam) -> float:
    """Of the embedding, as a share of its variance."""
    shares = []
    for batch in batches(sam.config.encoder)[:2]:
        ours, expected = (embed(each.config, each.params["image_encoder"], batch) for each in (slim, sam))
        shares.append(np.square(ours - expected).mean() / np.var(expected))
    return float(np.mean(shares))


def test_nothing_cut_nothing_changed(wide):
    """Heads turned, and norms moved into what reads them; with batch norms and without."""
    sam, found = wide
    with jax.enable_x64():
        encoder = sam.params["image_encoder"]
        blocks = tiny_vit.plain_blocks(encoder)
        news = [tiny_vit.project_streams(sam.config, encoder, found["stream"], list(map(np.arange, DIMS)))]
        assert (news[0]["layers_1"]["blocks_0"]["attn"]["norm"]["scale"] == 1).all()
        for weighting in ("none", "disturbed"):
            heads = project_heads(blocks, head_bases(blocks, found, weighting), *WHOLE)
            news.append(tiny_vit.with_blocks(encoder, heads))
            turned = news[-1]["layers_1"]["blocks_1"]["attn"]["q"]["kernel"]
            assert np.abs(turned - encoder["layers_1"]["blocks_1"]["attn"]["q"]["kernel"]).max() > 0.01
        expected = embed(sam.config, jax.tree.map(jnp.asarray, encoder), batches()[0])
        for new in news:
            ours = embed(sam.config, jax.tree.map(jnp.asarray, new), batches()[0])
            np.testing.assert_allclose(ours, expected, atol=1e-9)
        folded = fold_batch_norm(encoder)
        again = tiny_vit.with_blocks(folded, tiny_vit.plain_blocks(folded))
        jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(folded))


def test_units_that_nobody_reads_go_at_no_loss(wide):
    """Of every hidden layer, batch norms behind it or not."""
    sam, found = wide
    with jax.enable_x64():
        encoder = jax.tree.map(np.array, jax.device_get(sam.params["image_encoder"]))
        blocks = tiny_vit.plain_blocks(encoder)
        for block in blocks.values():
            block["mlp_lin2"]["kernel"][1] = 0
        for i, path in enumerate(convolutions_of(SLIM_TINY_VIT), len(BLOCKS)):
            module = tiny_vit._at(encoder, "" if path == "patch_embed" else path)
            last = tiny_vit._names(path)[-1]
            module[last] = tiny_vit.with_linear(module[last], blocks[f"blocks_{i}"]["mlp_lin2"])
        for path, *_ in blocks_of(SLIM_TINY_VIT):
            tiny_vit._at(encoder, path)["mlp"]["fc2"]["kernel"][1] = 0
        units = mlp.hidden_units(blocks, found, "disturbed")
        for unit in units:  # it may explain others, and need not be the last
            assert (np.diff(unit.gains) <= 0).all() and unit.gains[0] > 0
            unit.order = np.r_[np.delete(np.arange(len(unit.order)), 1), 1]
        cut = mlp.project_mlp(blocks, units, [len(unit.order) - 1 for unit in units])
        unread = dataclasses.replace(sam, params={**sam.params, "image_encoder": encoder})
        slim = plain_vit.with_encoder(sam, tiny_vit.with_blocks(encoder, cut))
        assert slim.config.encoder.stem_dim == 4 and slim.config.encoder.conv_blocks == (11, 6)
        assert error(unread, slim) < 1e-6


def test_what_is_cut_loses_less_than_channels_dropped(wide, monkeypatch):
    """The same channels of the streams, without what is refitted."""
    sam, _ = wide
    with jax.enable_x64():
        keep = [np.arange(0, dim, 2) for dim in DIMS]
        across = streams.moments(sam, batches(), 0, moments_of, tiny_vit.changes_of(SLIM_TINY_VIT, keep))
        cut = lambda: tiny_vit.project_streams(sam.config, sam.params["image_encoder"], across, keep)
        slim = plain_vit.with_encoder(sam, cut())
        assert slim.config.encoder.conv_dim == 4 and [stage.dim for stage in slim.config.encoder.stages] == [5, 6]
        unfitted = lambda change, moment, normal: (change.writes, 0 * moment["wide_sum"])
        monkeypatch.setattr(streams, "reading_of", unfitted)
        assert error(sam, slim) < min(1, 0.7 * error(sam, plain_vit.with_encoder(sam, cut())))


def test_the_default_loses_less_than_importance_alone():
    """Both cuts by half, by the steps of the two recipes, of a block of either kind."""
    stage = Stage(8, 4, (Block(2, 4, 4, 12),), 8, 2)
    small = dataclasses.replace(SLIM_TINY_VIT, image_size=(32, 32), conv_blocks=(9,), stages=(stage,))
    sam, errors = tiny_vit_sam(small), []
    for name in ("default", "taylor"):
        slim = sam
        for step in RECIPES[name]:
            if isinstance(step, Prune):
                slim = prune.prune(slim, step, Target(0.5), lambda name: batches(small), 0)
        errors.append(error(sam, slim))
        assert counts.macs(slim.config.encoder).total < 0.8 * counts.macs(small).total  # much is the neck's
    assert errors[0] < min(1, 0.8 * errors[1]), errors


def test_a_budget_is_used_up():
    """Of the whole SAM's parameters, of the encoder's multiply-accumulates."""
    sam = tiny_vit_sam()
    for kind in ("params", "macs"):
        costs = tiny_vit.group_costs(SLIM_TINY_VIT, kind)
        gains = {name: np.ones(len(table) - 1) for name, table in costs.items()}
        budget = Budget(kind, Budget(kind, 1).cost(sam.config) - 0.4 * sum(table[-1] for table in costs.values()))
        steps = [Prune("embedding"), Prune("bottleneck")]
        found_groups.check(sam.config, Target(budget=budget), steps, uniform=False)
        assert 0 < Target(budget=budget).channel_ratio(sam.config) < 0.5
        widths = plain_vit.within_budget(sam.config, gains, budget, steps[1], tiny_vit.group_costs)
        saved = sum(costs[name][-1] - costs[name][width] for name, width in widths.items())
        assert 0.97 * budget.amount < budget.cost(sam.config) - saved <= budget.amount


@pytest.mark.parametrize("batch_norm", [True, False])
def test_costs_are_what_a_channel_adds(batch_norm):
    own = dataclasses.replace(SLIM_TINY_VIT, batch_norm=batch_norm)
    sam = tiny_vit_sam()
    config = sam.config.with_encoder(own)
    count = {"params": sam_costs.encoder_parameters, "macs": lambda config: counts.macs(config.encoder).total}
    for kind, of in count.items():
        tables = tiny_vit.group_costs(own, kind)
        assert len(tables) == 3 * len(BLOCKS) + len(convolutions_of(own))
        for name, table in tables.items():
            assert table[1] == of(config.with_encoder(tiny_vit.widened(own, name))) - of(config), (kind, name)
