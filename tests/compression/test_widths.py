"""Widths from ratios and budgets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import tiny_config
from slimsam_jax.compression import budget, widths
from slimsam_jax.compression.budget import Budget, Target, _ratio_of, group_costs
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Prune
from slimsam_jax.compression.widths import with_widths
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import preset
from slimsam_jax.models.sam import abstract_params
from slimsam_jax.profiling import sam_costs
from slimsam_jax.pruning import allocation
from slimsam_jax.pruning.selection import keep_widths


def test_allocation_by_hand():
    gains = {"a": np.array([9.0, 5.0, 1.0]), "b": np.array([8.0, 7.0, 6.0])}
    even = {name: np.arange(4.0) for name in gains}
    assert allocation.allocate(gains, even, 4) == {"a": 1, "b": 3}
    dear = {"a": np.arange(4.0), "b": 3 * np.arange(4.0)}  # b's 8 for 3 is less than a's 5 for 1, not 1 for 1
    assert allocation.allocate(gains, dear, 5) == {"a": 2, "b": 1}
    assert allocation.allocate(gains, even, 100) == {"a": 3, "b": 3}
    assert allocation.allocate(gains, even, 2) == {"a": 1, "b": 1}
    assert allocation.allocate(gains, even, 4, min_keep=0.7) == {"a": 2, "b": 2}
    with pytest.raises(allocation.TooSmall, match="less than the 2 "):
        allocation.allocate(gains, even, 1.5)


def test_allocation_with_costs_that_jump():
    """A step that costs nothing is taken, one that costs too much is left out."""
    gains = {"a": np.array([4.0, 3.0, 2.0, 1.0])}
    stairs = {"a": np.array([0.0, 5, 5, 10, 10])}
    assert allocation.allocate(gains, stairs, 5) == {"a": 2}
    assert allocation.allocate(gains, stairs, 9.9) == {"a": 2}
    assert allocation.allocate(gains, stairs, 10) == {"a": 4}


def test_what_is_left_goes_where_it_gains_most():
    """A step that is too dear keeps the price above what the others pay; the room left is for one of them."""
    gains = {"dear": np.array([30.0, 30.0]), "a": np.array([3.0, 3.0]), "b": np.array([6.0, 6.0])}
    costs = {"dear": np.array([0.0, 1, 11]), "a": np.array([0.0, 1, 3]), "b": np.array([0.0, 1, 4])}
    assert allocation.allocate(gains, costs, 6) == {"dear": 1, "a": 1, "b": 2}  # 6 for 3, not 3 for 2
    assert allocation.allocate(gains, costs, 5) == {"dear": 1, "a": 2, "b": 1}


def test_a_gain_that_is_negative_has_no_price():
    with pytest.raises(ValueError, match="not negative"):
        allocation.allocate({"a": np.array([1.0, -1.0])}, {"a": np.arange(3.0)}, 2)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    share=st.floats(0.3, 1.0),
    round_to=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 99),
)
def test_allocation_keeps_its_promises(sizes, share, round_to, seed):
    random = np.random.default_rng(seed)
    gains = {str(i): -np.sort(-random.random(size)) for i, size in enumerate(sizes)}
    # Whole numbers, as counted: their sums are exact, and "nothing more fits" is not a matter of rounding.
    costs = {name: random.integers(1000, 5000) * np.arange(len(gain) + 1) for name, gain in gains.items()}
    room = share * sum(cost[-1] for cost in costs.values())
    try:
        found = allocation.allocate(gains, costs, room, round_to)
    except allocation.TooSmall:
        smallest = sum(costs[name][min(round_to, len(gain))] for name, gain in gains.items())
        assert smallest > room
        return
    spent = sum(costs[name][width] for name, width in found.items())
    assert spent <= room
    for name, width in found.items():
        chunk = min(round_to, len(gains[name]))
        assert width >= chunk and width % chunk == 0
        if width + chunk <= len(gains[name]):  # nothing more fits
            assert spent + costs[name][width + chunk] - costs[name][width] > room


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [("params=9.1M", "params", 9.1e6), ("macs=47G", "macs", 47e9), ("latency=120ms", "latency", 0.12)],
)
def test_budgets_are_read(text, kind, amount):
    found = Budget.parse(text)
    assert found.kind == kind and found.amount == pytest.approx(amount)


@pytest.mark.parametrize(
    "text", ["", "params", "params=", "params=-3M", "macs=4X", "latency=120", "size=3M", "params=0"]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(InputError, match="--budget"):
        Budget.parse(text)


def test_closed_form_parameters_count_every_array():
    for config in (tiny_config(), preset("vit_p77"), tiny_config(heads=3, head_dim=5, embed_dim=17)):
        shapes = abstract_params(config)
        assert sam_costs.encoder_parameters(config) == sam_costs.parameters(shapes["image_encoder"])
        assert sam_costs.sam_parameters(config) == sam_costs.parameters(shapes)


def gains_of(config, seed=0):
    random = np.random.default_rng(seed)
    sizes = {f"blocks_{i}/attn": b.head_dim for i, b in enumerate(config.blocks)}
    sizes |= {f"blocks_{i}/mlp": b.mlp_dim for i, b in enumerate(config.blocks)}
    return {name: -np.sort(-random.random(size)) for name, size in sizes.items()}


VIT_B = preset("vit_b")


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("round_to", [1, 8, 16])
@pytest.mark.parametrize("text", ["params=28M", "params=9.7M", "macs=152G", "macs=47G"])
def test_a_budget_is_met_within_a_percent(text, round_to, uniform):
    """ViT-B, about to SlimSAM-50 and -77: both stages, with the widths alone."""
    wanted, step = Budget.parse(text), Prune("bottleneck", round_to=round_to)
    target = Target(budget=wanted)
    config = dataclasses.replace(VIT_B, embed_dim=widths.embedding_width(VIT_B, target, step))
    chosen = widths.bottleneck_widths(config, gains_of(config), target, step, uniform)
    slim = with_widths(config, chosen)
    assert 0.99 * wanted.amount <= wanted.cost(slim) <= wanted.amount
    assert slim.embed_dim % round_to == 0 and (slim.uniform or not uniform)
    assert all(width % round_to == 0 for name, width in chosen.items() if not uniform or name.endswith("mlp"))


def test_an_embedding_rounded_down_is_widened_until_the_budget_can_be_used_up():
    """The nearest multiple of 192 is 576, with which not even uncut bottlenecks cost 72 M."""
    step, target = Prune("embedding", round_to=64), Target(budget=Budget.parse("params=72M"))
    assert target.budget.cost(dataclasses.replace(VIT_B, embed_dim=576)) < 72e6
    assert widths.embedding_width(VIT_B, target, step) == 768
    assert allocation.rounded_width(768, target.channel_ratio(VIT_B), 192) == 576


@pytest.mark.parametrize("text", ["params=100M", "params=4M", "macs=1G"])
def test_a_budget_out_of_reach_is_refused(text):
    with pytest.raises(InputError, match="choose something between"):
        Target(budget=Budget.parse(text)).channel_ratio(VIT_B)


def test_latency_budget_is_measured(monkeypatch):
    """With a clock that charges by the MAC, the result meets the budget as measured, not as the parts promised."""
    seconds = lambda config: 1e-3 + sam_costs.encoder_macs(config).total * 1e-11
    monkeypatch.setattr(budget, "encoder_seconds", lambda configs: [seconds(config) for config in configs])

    def blocks(config, some):  # parts are measured 20 % too slow
        alone = [dataclasses.replace(config, blocks=(block,)) for block in some]
        return [1.2 * seconds(config) for config in alone]

    monkeypatch.setattr(budget, "block_seconds", blocks)
    wanted = Budget.parse("latency=600ms")
    target = Target(budget=wanted)
    _ratio_of.cache_clear()
    config = dataclasses.replace(VIT_B, embed_dim=widths.embedding_width(VIT_B, target, Prune("embedding")))
    slim = with_widths(config, widths.bottleneck_widths(config, gains_of(config), target, Prune("bottleneck"), False))
    _ratio_of.cache_clear()
    assert seconds(slim) == pytest.approx(0.6, rel=0.01)


def test_real_times_rise_with_the_widths():
    config = tiny_config(image_size=(128, 128), embed_dim=96, heads=4, head_dim=8, mlp_dim=1024)
    config = dataclasses.replace(config, blocks=config.blocks[:1])
    tables = group_costs(config, "latency")
    assert set(tables) == set(gains_of(config))
    for name, gains in gains_of(config).items():
        assert tables[name].shape == (len(gains) + 1,) and (np.diff(tables[name]) >= 0).all()
    assert tables["blocks_0/mlp"][-1] > 0


def test_scores_that_may_be_negative_cannot_compete_by_price():
    with pytest.raises(InputError, match="have no price"):
        change(RECIPES["taylor"], ["prune.allocation=macs", "prune.normalizer=gaussian"])


def test_ratios_that_the_reference_cannot_round_are_refused():
    cuts = [step for step in RECIPES["slimsam"] if isinstance(step, Prune)]
    with pytest.raises(InputError, match="leaves nothing of the embedding"):
        widths.check(VIT_B, Target(0.99), cuts, uniform=False)
    widths.check(VIT_B, Target(0.95), cuts, uniform=False)
    narrow, local = (
        tiny_config(embed_dim=48, head_dim=4),
        [dataclasses.replace(cut, allocation="local") for cut in cuts],
    )
    with pytest.raises(InputError, match="leaves nothing of the heads"):
        widths.check(narrow, Target(0.8), local, uniform=False)
    with pytest.raises(InputError, match="that the 2 heads divide"):
        widths.check(tiny_config(embed_dim=25), Target(0.5), cuts, uniform=False)


@pytest.mark.parametrize("allocation", ["macs", "params", "global", "local"])
def test_ratios(allocation):
    config = dataclasses.replace(VIT_B, embed_dim=384)
    step = Prune("bottleneck", allocation=allocation)
    found = widths.bottleneck_widths(config, gains_of(config), Target(0.5), step, uniform=False)
    slim, even = with_widths(config, found), preset("vit_p50")
    if allocation == "global":
        assert sum(b.head_dim for b in slim.blocks) == 12 * 32 and sum(b.mlp_dim for b in slim.blocks) == 12 * 1536
    if allocation == "local":
        assert slim == even
    if allocation in ("macs", "params"):
        cost = Budget(allocation, 1).cost
        assert 0.999 * cost(even) <= cost(slim) <= cost(even)
    assert min(b.mlp_dim for b in slim.blocks) >= 1536 / 4 and min(b.head_dim for b in slim.blocks) >= 32 / 4


def test_values_that_differ_between_heads():
    """Two copies keep their own channels; the widths are shared."""
    keep = keep_widths({"v": np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])}, {"v": 2})
    np.testing.assert_array_equal(keep["v"], [[0, 2], [1, 2]])
    np.testing.assert_array_equal(
        allocation.gains_of({"v": np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])})["v"], [6, 4, 2]
    )
