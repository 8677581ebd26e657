"""The projection of Hiera: with nothing cut nothing changes; what is cut loses less than channels that are dropped."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.family_models import SLIM_HIERA, sam2
from helpers.models import random_images
from slimsam_jax.compression import found_groups, prune
from slimsam_jax.compression.budget import Budget, Target
from slimsam_jax.compression.projection import hiera, plain_vit, streams
from slimsam_jax.compression.projection.attention import head_bases, project_heads
from slimsam_jax.compression.projection.hiera_statistics import moments_of
from slimsam_jax.compression.steps import Prune
from slimsam_jax.errors import InputError
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.encoders import counts
from slimsam_jax.models.encoders.hiera import PRESETS
from slimsam_jax.models.sam import Sam, run_encoder
from slimsam_jax.profiling import sam_costs
from slimsam_jax.pruning import allocation

PARTS = ("stream", "attention", "mlp", "sensitivity")  # all, so that there is one program
DIMS = [stage.dim for stage in SLIM_HIERA.stages]


@functools.partial(jax.jit, static_argnames="config")
def embed(config, encoder, batch):
    return run_encoder(config, encoder, batch)[0]


def batches():
    return [random_images(SLIM_HIERA, seed=seed) for seed in range(6)]


@pytest.fixture(scope="module")
def wide():
    """A model and its moments in float64."""
    with jax.enable_x64():
        sam = sam2()
        sam = dataclasses.replace(sam, params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sam.params))
        yield sam, plain_vit.moments(sam, batches(), 0, *PARTS, moments_of=moments_of)


def all_left(moments):
    """Of the streams as they are, as if all of them were left: rotations read no more than sums."""
    of = lambda own: {**own, "cross": own["second"], "wide_sum": own["sum"]}
    blocks = [{name: of(own) for name, own in block.items()} for block in moments["blocks"]]
    return {"blocks": blocks, "ends": list(map(of, moments["ends"]))}


def error(sam: Sam, slim: Sam) -> float:
    """Of the maps, as a share of their variance."""
    shares = []
    for batch in batches()[:2]:
        ours, expected = (embed(each.config, each.params["image_encoder"], batch) for each in (slim, sam))
        shares += [np.square(ours[n] - expected[n]).mean() / np.var(expected[n]) for n in expected]
    return float(np.mean(shares))


def test_nothing_cut_nothing_changed(wide):
    """The first stream rotated, and all heads; positions are resized after the first."""
    sam, found = wide
    with jax.enable_x64():
        encoder = sam.params["image_encoder"]
        changes = hiera.changes_of(SLIM_HIERA, found["stream"], [np.arange(dim) for dim in DIMS])
        turned = hiera.project_streams(SLIM_HIERA, encoder, all_left(found["stream"]), changes)
        assert np.abs(turned["pos_embed"] - encoder["pos_embed"]).max() > 0.01
        blocks = [place.block for place in hiera.places(SLIM_HIERA)]
        whole = [block.key_dim for block in blocks], [block.value_dim for block in blocks]
        for new in (turned, *(_heads(encoder, found, weighting, whole) for weighting in ("none", "disturbed"))):
            ours, expected = (embed(sam.config, jax.tree.map(jnp.asarray, e), batches()[0]) for e in (new, encoder))
            jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-9), ours, expected)


def _heads(encoder, found, weighting, widths):
    bases = head_bases(encoder, found, weighting, SLIM_HIERA.firsts[1:])
    return project_heads(encoder, bases, *widths)


def test_queries_that_are_pooled_keep_their_channels(wide):
    sam, found = wide
    for weighting in ("none", "disturbed"):
        bases = head_bases(sam.params["image_encoder"], found, weighting, SLIM_HIERA.firsts[1:])
        for i, basis in enumerate(bases):
            permutation = ((basis.query == 0) | (basis.query == 1)).all() and np.allclose(basis.query, basis.key)
            assert permutation == (i in SLIM_HIERA.firsts[1:]) or basis.query.size == 1
            assert (np.diff(basis.logit_gains) <= 1e-12).all() and (basis.logit_gains >= 0).all()


@pytest.mark.parametrize(("compete", "alike"), [("macs", True), ("params", True), ("local", True), ("global", False)])
def test_streams_compete_only_if_asked_for(wide, monkeypatch, compete, alike):
    """Scores that say nothing for the first stage's stream would let it vanish."""
    sam, _ = wide
    loud = lambda sam, *_: jax.tree.map(lambda leaf: 1e-6 * np.ones_like(leaf), sam.params["image_encoder"])
    monkeypatch.setattr(streams, "gradients", lambda *inputs: with_loud_ends(loud(*inputs)))
    norms = ["blocks_0/norm1/bias", *(f"blocks_{i}/norm2/bias" for i in (1, 2, 4))]
    kept = streams.kept_channels(sam, Prune("embedding", allocation=compete), 0.5, None, 0, norms)
    assert (list(map(len, kept)) == [4, 5, 6, 7]) == alike


def with_loud_ends(grads):
    """Gradients of which those of the last block are large."""
    return {**grads, "blocks_4": jax.tree.map(lambda leaf: 1e3 * leaf, grads["blocks_4"])}


def test_what_is_cut_loses_less_than_channels_dropped(wide, monkeypatch):
    """The same channels, without what is refitted."""
    sam, found = wide
    with jax.enable_x64():
        changes = hiera.changes_of(SLIM_HIERA, found["stream"], [np.arange(0, dim, 2) for dim in DIMS])
        across = streams.moments(sam, batches(), 0, moments_of, changes)
        cut = lambda: hiera.project_streams(SLIM_HIERA, sam.params["image_encoder"], across, changes)
        slim = plain_vit.with_encoder(sam, cut())
        assert [stage.dim for stage in slim.config.encoder.stages] == [4, 5, 6, 7]
        unfitted = lambda change, moment, normal: (change.writes, 0 * moment["wide_sum"])
        monkeypatch.setattr(streams, "reading_of", unfitted)
        assert error(sam, slim) < min(1, 0.7 * error(sam, plain_vit.with_encoder(sam, cut())))


def test_a_budget_is_used_up(wide):
    """Of the whole SAM's parameters, of the encoder's multiply-accumulates."""
    sam, _ = wide
    gains = {name: np.ones(len(table) - 1) for name, table in hiera.group_costs(SLIM_HIERA, "macs").items()}
    for kind in ("params", "macs"):
        costs = hiera.group_costs(SLIM_HIERA, kind)
        budget = Budget(kind, Budget(kind, 1).cost(sam.config) - 0.4 * sum(table[-1] for table in costs.values()))
        assert 0 < Target(budget=budget).channel_ratio(sam.config) < 0.5
        widths = plain_vit.within_budget(sam.config, gains, budget, Prune("bottleneck"), hiera.group_costs)
        blocks = [
            dict(zip(("qk", "v", "mlp"), dataclasses.astuple(p.block)[1:], strict=True))
            for p in hiera.places(SLIM_HIERA)
        ]
        assert all(widths[f"blocks_{i}/{name}"] <= size for i, own in enumerate(blocks) for name, size in own.items())
        saved = sum(costs[name][-1] - costs[name][width] for name, width in widths.items())
        assert 0.97 * budget.amount < budget.cost(sam.config) - saved <= budget.amount


@pytest.mark.parametrize(
    ("budget", "criterion", "message"),
    [
        (Budget("latency", 1.0), "projection", "are not timed one by one"),
        (Budget("params", 1e3), "taylor", "by projection alone: take --recipe default"),
        (Budget("params", 1.0), "projection", "can be cut to"),
    ],
)
def test_budgets_that_cannot_be_met_are_one_line(budget, criterion, message):
    steps = [Prune(part, criterion=criterion, allocation="global") for part in ("embedding", "bottleneck")]
    found_groups.check(sam2().config, Target(0.5), steps, uniform=False)
    with pytest.raises(InputError, match=message):
        found_groups.check(sam2().config, Target(budget=budget), steps, uniform=False)


def test_a_budget_that_the_streams_meet_alone_leaves_the_rest(monkeypatch):
    """Rounding may cut them further than was asked for: then the bottlenecks keep all that is a multiple, unrefused."""
    tiny = PRESETS["sam2_tiny"]
    head = dataclasses.replace(sam2().config.head, image_size=tiny.image_size, out_chans=tiny.out_chans)
    config, step = SamConfig(tiny, head), Prune("bottleneck", round_to=64)
    target = Target(budget=Budget("macs", 143.27e9))
    ratio = target.channel_ratio(config)
    stages = [dataclasses.replace(s, dim=allocation.rounded_width(s.dim, ratio, 64)) for s in tiny.stages]
    slim = config.with_encoder(dataclasses.replace(tiny, stages=tuple(stages)))
    assert target.budget.cost(slim) < 143.27e9 < target.budget.cost(config)
    monkeypatch.setattr(hiera, "project", lambda sam, step, target, calibration, seed: sam)
    assert prune.prune(Sam(slim, {}), step, target, None, 0).config == slim
    costs = hiera.group_costs(slim.encoder, "macs")
    gains = {name: np.linspace(1, 0, len(table) - 1) for name, table in costs.items()}
    widths = plain_vit.within_budget(slim, gains, target.budget, step, hiera.group_costs)
    assert widths == {name: len(gain) // 64 * 64 for name, gain in gains.items()}


def test_costs_are_what_a_channel_adds():
    sam = sam2()
    for kind in ("params", "macs"):
        for name, table in hiera.group_costs(SLIM_HIERA, kind).items():
            i, field = int(name[7]), plain_vit.FIELDS[name[9:]]
            wider = sam.config.with_encoder(hiera._wider(SLIM_HIERA, i, field))
            count = {"params": sam_costs.encoder_parameters, "macs": lambda c: counts.macs(c.encoder).total}[kind]
            assert table[1] == count(wider) - count(sam.config)


def test_what_reads_a_selection_gives_what_it_gave(monkeypatch):
    """Channels that others explain, norm and all, may go at no loss; and the constants of the others stay."""
    monkeypatch.setattr(streams, "RIDGE", 1e-8)
    random = np.random.default_rng(0)
    half = random.standard_normal((500, 3))
    x = np.concatenate([half, -half], axis=1) + 0.0  # centred by itself, as behind a norm's centring
    x = x / x.std(1, keepdims=True)
    change, left = streams.Change(np.eye(6)[[0, 1, 5]], rotated=False), x[:, [0, 1, 5]]
    moment = {"second": left.T @ left, "cross": left.T @ x, "sum": left.sum(0), "wide_sum": x.sum(0), "tokens": len(x)}
    turned, constant = streams.reading_of(change, moment, normal=False)
    np.testing.assert_allclose(x[:, [0, 1, 5]] @ turned + constant, x, atol=1e-4)
