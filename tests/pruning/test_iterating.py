"""Pruning in steps: schedules, choices within choices, masks or cuts in between."""

from __future__ import annotations

import itertools
import re

import jax
import numpy as np
import pytest

from slimsam_jax import pruning
from slimsam_jax.errors import InputError
from slimsam_jax.pruning import find_groups, iterate, within

RANDOM = np.random.default_rng(0)
SHAPES = {"a": (3, 20), "b": (20, 10), "c": (10, 4)}
PARAMS = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
X = RANDOM.normal(size=(2, 3)).astype(np.float32)


def function(params, x):
    return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]


@pytest.fixture(scope="module")
def grouping():
    return find_groups(function, PARAMS, X)


def widths(keeps):
    return [[len(kept) for kept in keep.values()] for keep in keeps]


def random_scores(seed=0):
    random = np.random.default_rng(seed)
    return lambda: {"a:1": random.random(20), "b:1": random.random(10)}


@pytest.mark.parametrize(
    ("ratio", "schedule", "expected"),
    [
        (0.8, "linear", [[16, 8], [12, 6], [8, 4], [4, 2]]),
        (0.8, "cubic", [[11, 5], [6, 3], [4, 2], [4, 2]]),
        ({"a:1": 0.4, "b:1": 0.8}, "linear", [[18, 8], [16, 6], [14, 4], [12, 2]]),
        (lambda step: 0.5 if step > 2 else 0.1, "linear", [[18, 9], [18, 9], [10, 5], [10, 5]]),
    ],
)
def test_schedules(ratio, schedule, expected):
    """Scores change from step to step, and no channel ever comes back."""
    keeps = list(iterate(random_scores(), ratio, 4, schedule))
    assert widths(keeps) == expected
    for before, after in itertools.pairwise(keeps):
        assert all(set(after[name]) <= set(before[name]) for name in after)


@pytest.mark.parametrize("how", [{"allocation": "global"}, {"allocation": "global", "round_to": 4}, {"round_to": 2}])
@pytest.mark.parametrize("shift", [0.0, -0.5])
def test_nothing_comes_back_whoever_competes(how, shift):
    """Also where scores are negative, or zero: what is gone is below all that is left."""
    scores = random_scores(1)
    score = lambda: {name: np.maximum(s, 0.3) - 0.3 + shift for name, s in scores().items()}
    keeps = list(iterate(score, 0.75, 6, **how))
    for before, after in itertools.pairwise(keeps):
        assert all(set(after[name]) <= set(before[name]) for name in after)
    assert sum(map(len, keeps[-1].values())) in (7, 8)


@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_steps_end_where_one_cut_does_if_scores_stay(shift):
    scores = {name: score + shift for name, score in random_scores()().items()}
    *_, last = iterate(lambda: scores, 0.7, 4, allocation="global")
    once = pruning.select(scores, 0.7, "global")
    assert sum(map(len, once.values())) == 9
    for name, kept in once.items():
        np.testing.assert_array_equal(last[name], kept)


def test_what_is_left_of_a_budget_buys_nothing_back():
    """A channel of "a" costs ten of "b", and there is always room for some of those."""
    costs = {"a:1": 10.0 * np.arange(21), "b:1": 1.0 * np.arange(11)}
    random = random_scores()
    score = lambda: {"a:1": 9 + random()["a:1"], "b:1": random()["b:1"] / 1e3}
    keeps = list(iterate(score, lambda step: (0.11, 0.12, 0.49, 0.52)[step - 1], 4, allocation="cost", costs=costs))
    for before, after in itertools.pairwise(keeps):
        assert all(set(after[name]) <= set(before[name]) for name in after)
    assert len(keeps[0]["b:1"]) < 10


def test_masks_between_and_cuts_between_are_the_same(grouping):
    """Without training. The cut model is traced again; its scores are those of the channels that are left."""
    now = {"params": PARAMS, "grouping": grouping}
    score = lambda: pruning.score(now["params"], now["grouping"], criterion="l1")
    by_mask = []
    for keep in iterate(score, 0.7, 3):
        now["params"] = pruning.mask(now["params"], grouping, keep)
        by_mask.append(keep)
    masked, before = now["params"], {}
    now["params"] = PARAMS
    for step, keep in enumerate(iterate(score, 0.7, 3)):
        run = now["grouping"].run
        now["params"] = pruning.shrink(now["params"], now["grouping"], within(keep, before))
        now["grouping"], before = find_groups(run, now["params"], X), keep
        for name, kept in by_mask[step].items():
            np.testing.assert_array_equal(keep[name], kept)
    slim, again = now["params"], now["grouping"]
    assert [array.shape for array in slim.values()] == [(3, 6), (6, 3), (3, 4)]
    np.testing.assert_allclose(again.run(slim, X), function(masked, X), rtol=1e-5, atol=1e-6)


def test_a_group_that_is_gone_stays_as_it_was():
    rounds = iter([{"a:1": np.arange(4.0), "b:1": np.arange(2.0)}, {"a:1": np.arange(3.0)}, {"a:1": np.arange(2.0)}])
    keeps = list(iterate(lambda: next(rounds), lambda step: (0.25, 0.5, 0.75)[step - 1], 3, round_to=1))
    assert [keep["b:1"].tolist() for keep in keeps] == [[0, 1]] * 3
    assert [keep["a:1"].tolist() for keep in keeps] == [[1, 2, 3], [2, 3], [3]]


def test_copies_keep_channels_of_their_own():
    random = np.random.default_rng(0)
    keeps = list(iterate(lambda: {"g": random.random((3, 8))}, 0.75, 3))
    assert [keep["g"].shape for keep in keeps] == [(3, 6), (3, 4), (3, 2)]
    for before, after in itertools.pairwise(keeps):
        assert all(set(own) <= set(former) for own, former in zip(after["g"], before["g"], strict=True))
        places = within(after, before)["g"]
        np.testing.assert_array_equal(np.take_along_axis(before["g"], places, 1), after["g"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iterate(random_scores(), 0.5, 0), "steps 0 is not a number of steps"),
        (lambda: iterate(random_scores(), 0.5, 2, "square"), "schedule 'square' is none of linear, cubic"),
        (lambda: iterate(random_scores(), 1.0, 2), "ratio 1.0 would leave no channel"),
        (
            lambda: iterate(random_scores(), lambda step: 0.5 / step, 2),
            "step 2 asks for 0.25 after 0.5: what is gone does",
        ),
        (lambda: iterate(random_scores(), 0.5, 2, budget=7), "a budget cannot be spread over steps"),
        (lambda: iterate(random_scores(), 0.5, 2, ignore="c"), "ignore='c' matches nothing"),
        (
            lambda: iterate(iter([{"g": np.ones(8)}, {"g": np.ones(7)}]).__next__, 0.5, 2),
            "7 scores of group 'g', which has 6 channels left of 8",
        ),
    ],
)
def test_what_cannot_be_iterated(call, message):
    with pytest.raises(InputError, match=re.escape(message)):
        list(call())
