"""Which groups are cut, who competes with whom, and what budgets buy."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.graph_models import MODELS
from slimsam_jax import pruning
from slimsam_jax.errors import InputError
from slimsam_jax.pruning import costs, find_groups, select
from slimsam_jax.pruning.allocation import narrowest
from slimsam_jax.pruning.choosing import structure_of

SHAPES = {"stem": (3, 8), "up_0": (8, 12), "down_0": (12, 8), "up_1": (8, 16), "down_1": (16, 8), "head": (8, 5)}
X = np.ones((2, 3), np.float32)
STREAM, FIRST, SECOND = "stem/kernel:1", "up_0/kernel:1", "up_1/kernel:1"


def residual(params, x):
    """A stream of 8, two branches of 12 and 16."""
    kernel = lambda name: params[name]["kernel"]
    x = x @ kernel("stem")
    for i in range(2):
        x = x + jax.nn.relu(x @ kernel(f"up_{i}")) @ kernel(f"down_{i}")
    return x @ kernel("head")


@pytest.fixture(scope="module")
def grouping():
    params = {name: {"kernel": jax.ShapeDtypeStruct(shape, np.float32)} for name, shape in SHAPES.items()}
    grouping = find_groups(residual, params, X)
    assert grouping.widths == {STREAM: 8, FIRST: 12, SECOND: 16}
    return grouping


@pytest.fixture(scope="module")
def scores():
    """The second branch is the better one."""
    random = np.random.default_rng(0)
    return {STREAM: random.random(8), FIRST: random.random(12), SECOND: 0.4 + random.random(16)}


def widths(keep):
    return {name: len(kept) for name, kept in keep.items()}


@pytest.mark.parametrize(
    ("ignore", "cut"),
    [
        (["head"], {FIRST, SECOND}),  # the stream goes through it
        (["up_0/kernel:1"], {STREAM, SECOND}),
        (["*_1/*"], {FIRST}),
        ("up_?", set()),
        ([SECOND, FIRST], {STREAM}),
    ],
)
def test_ignored(grouping, scores, ignore, cut):
    if not cut:
        with pytest.raises(InputError, match="all of them are ignored"):
            select(scores, 0.5, grouping=grouping, ignore=ignore)
        return
    keep = select(scores, 0.5, grouping=grouping, ignore=ignore)
    whole = select(scores, 0.5)
    assert set(keep) == cut
    for name in cut:
        np.testing.assert_array_equal(keep[name], whole[name])


def test_ratios_by_pattern(grouping, scores):
    """The last that fits counts; 0 leaves a group alone, and so does no pattern."""
    ratio = {"*": 0.5, "up_*": 0.25, "up_1/kernel:1": 0.75}
    by_place = select(scores, {**ratio, STREAM: 0}, grouping=grouping)
    assert widths(by_place) == {FIRST: 9, SECOND: 4}
    assert widths(select(scores, {FIRST: 0.25, SECOND: 0.75})) == {FIRST: 9, SECOND: 4}
    # Those of one pattern compete among themselves: 14 of 28 channels.
    competing = widths(select(scores, {"*": 0.5, "stem": 0.25}, "global", grouping=grouping))
    assert competing[STREAM] == 6 and competing[FIRST] + competing[SECOND] == 14 and competing[SECOND] > 9


def test_isomorphic_groups_compete_among_themselves(grouping, scores):
    keep = widths(select(scores, 0.5, "isomorphic", grouping=grouping))
    assert keep[STREAM] == 4 and keep[FIRST] + keep[SECOND] == 14 and keep[SECOND] > 9
    everybody = widths(select(scores, 0.5, "global"))
    assert sum(everybody.values()) == 18 and everybody[STREAM] != 4


def test_structures_of_a_vit():
    """Heads with heads, logits with logits, values with values, MLPs with MLPs; their sizes do not matter."""
    function, params, inputs = MODELS["vit_thirds"]()
    grouping = find_groups(function, params, *inputs)
    kinds = {}
    for group in grouping.groups:
        kinds.setdefault(structure_of(group, grouping), []).append(group.size)
    assert sorted(kinds.values()) == [[4, 4], [12, 12], [12, 12], [48], [96, 96]]


@pytest.mark.parametrize("allocation", ["local", "global", "isomorphic", "params"])
@pytest.mark.parametrize("round_to", [1, 2])
def test_no_group_loses_more_than_the_most(grouping, scores, allocation, round_to):
    low = {**scores, FIRST: scores[FIRST] / 1e3}
    ratio = 0.35 if allocation == "params" else 0.6  # 0.3 of each would leave 0.61 of the parameters
    free = widths(select(low, ratio, allocation, round_to, grouping=grouping))
    kept = widths(select(low, ratio, allocation, round_to, grouping=grouping, max_ratio=0.3))
    assert min(free[name] / grouping.widths[name] for name in free) < 0.7
    assert all(width >= 0.7 * grouping.widths[name] and width % round_to == 0 for name, width in kept.items())
    assert [narrowest(10, 1, 0.25), narrowest(10, 1, 0, 0.75), narrowest(10, 4, 0, 0.1), narrowest(3, 8)] == [
        2,
        3,
        8,
        3,
    ]


def test_parameters_and_macs_by_hand(grouping):
    for at in (grouping.widths, {STREAM: 3, FIRST: 5, SECOND: 7}):
        stream, first, second = (at[name] for name in (STREAM, FIRST, SECOND))
        expected = 3 * stream + 2 * stream * first + 2 * stream * second + 5 * stream
        assert costs.parameters(grouping)(at) == expected
        assert costs.macs(grouping)(at) == 2 * expected  # two rows of x


def test_macs_of_convolutions_and_loops():
    def function(params, x):
        conv = lambda x, name, groups: jax.lax.conv_general_dilated(
            x, params[name], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )
        x = conv(conv(x, "a", 1), "b", 8).reshape(2, 4, 8)
        state = jnp.zeros((4, 7))
        for _ in range(2):
            turn = lambda state, x: (jnp.tanh(x @ params["in"] + state @ params["loop"]), None)
            state, _ = jax.lax.scan(turn, state, x)
        return state @ params["out"]

    shapes = {"a": (3, 3, 3, 8), "b": (3, 3, 1, 8), "in": (8, 7), "loop": (7, 7), "out": (7, 2)}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    grouping = find_groups(function, params, jax.ShapeDtypeStruct((2, 8, 8, 3), np.float32))
    count = costs.macs(grouping)
    for at in (grouping.widths, {name: size - 2 for name, size in grouping.widths.items()}):
        c, s = at["a:3"], at["in:1"]
        products = 2 * 2 * 4 * (c * s + s * s) + 4 * s * 2
        assert count(at) == 2 * 16 * 27 * c + 2 * 4 * 9 * c + products
    assert costs.table(count, grouping.widths, ["in:1"])["in:1"][-1] == 2 * 2 * 4 * (8 * 7 + 49) + 56


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_budget_is_kept_and_used_up(grouping, scores, kind):
    """Against every choice of widths there is: no other keeps the budget and has much more of the scores."""
    count, full = costs.COSTS[kind](grouping), grouping.widths
    value = lambda at: sum(np.sort(scores[name])[::-1][:width].sum() for name, width in at.items())
    budget = 0.4 * count(full)
    keep = select(scores, allocation=kind, grouping=grouping, budget=budget)
    same = select(scores, 0.6, kind, grouping=grouping)
    assert widths(keep) == widths(same)
    assert 0.9 * budget < count(widths(keep)) <= budget
    every = (dict(zip(full, at, strict=True)) for at in itertools.product(*(range(1, n + 1) for n in full.values())))
    best = max(value(at) for at in every if count(at) <= budget)
    assert value(widths(keep)) > 0.93 * best
    assert widths(select(scores, allocation=kind, grouping=grouping, budget=2 * count(full))) == full


def test_a_table_of_measured_costs(scores):
    """A staircase: what a wider group does not cost is taken along."""
    table = {name: 5.0 * np.ceil(np.arange(len(score) + 1) / 4) for name, score in scores.items()}
    keep = widths(select(scores, allocation="cost", costs=table, budget=30.0))
    assert all(width % 4 == 0 for width in keep.values()) and sum(keep.values()) == 24


BAD_COSTS = np.arange(9.0)
FALLING = {STREAM: BAD_COSTS[::-1], FIRST: np.arange(13.0), SECOND: np.arange(17.0)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": {"*": 1.0}}, "ratio 1.0 of '*' would leave no channel of a group"),
        ({"ratio": float("nan")}, "ratio nan would leave no channel"),
        ({"ratio": {"stm": 0.5}}, "ratio of 'stm' matches nothing; the nearest are stem/kernel:1"),
        ({"ignore": ["haed"]}, "ignore='haed' matches nothing; the nearest are head/kernel:0"),
        ({"max_ratio": 1.5}, "max_ratio 1.5 is not a share"),
        ({"min_keep": -1}, "min_keep -1 is not a share"),
        ({"round_to": 0}, "round_to 0 is not a number of channels"),
        ({"budget": 100}, "a budget needs something that is counted: allocation params, macs, cost"),
        ({"allocation": "macs", "budget": 0}, "budget 0 leaves nothing"),
        ({"allocation": "params", "budget": 11}, "budget 11: 11 params are less than the 12 that the narrowest have"),
        ({"allocation": "macs", "ratio": {"*": 0.5}}, "ratios by pattern do not share what 'macs' counts"),
        ({"allocation": "macs", "grouping": None}, "allocation 'macs' needs grouping="),
        ({"allocation": "cost"}, "allocation 'cost' needs costs="),
        ({"allocation": "cost", "costs": {STREAM: BAD_COSTS}}, f"costs lack the group '{FIRST}'"),
        ({"allocation": "cost", "costs": dict.fromkeys((STREAM, FIRST, SECOND), BAD_COSTS)}, "shape (9,), not (13,)"),
        ({"allocation": "cost", "costs": FALLING}, f"costs of group '{STREAM}' must be finite, not negative, and"),
    ],
)
def test_what_cannot_be_chosen(grouping, scores, options, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        select(scores, **{"grouping": grouping, **options})
    assert "\n" not in str(caught.value)


def test_scores_that_say_nothing(grouping, scores):
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match=f"the scores of group '{FIRST}' are not all finite numbers"):
            select({**scores, FIRST: np.full(12, bad)})
    with pytest.raises(InputError, match=f"scores of group '{STREAM}' are negative and have no price"):
        select({**scores, STREAM: -scores[STREAM]}, allocation="params", grouping=grouping)
    with pytest.raises(InputError, match="there is no group 'gone' in the grouping"):
        select({"gone": scores[STREAM]}, allocation="isomorphic", grouping=grouping)
    renamed = pruning.rename(grouping, {STREAM: "stream"})
    with pytest.raises(InputError, match="MACs are counted in the function"):
        select({"stream": scores[STREAM]}, allocation="macs", grouping=renamed)
    assert len(select({"stream": scores[STREAM]}, 0.5, "params", grouping=renamed)["stream"]) == 4
