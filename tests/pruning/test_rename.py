"""Groups under names of one's own, and tied ones."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam_jax import pruning
from slimsam_jax.errors import InputError
from slimsam_jax.pruning import Grouping, find_groups, rename


def two_layers(params, x):
    """[3] -> hidden [4] twice -> [2]."""
    return sum(jnp.tanh(x @ params[name]["in"]) @ params[name]["out"] for name in "ab")


@pytest.fixture(scope="module")
def traced():
    random = np.random.default_rng(0)
    params = {name: {"in": random.normal(size=(3, 4)), "out": random.normal(size=(4, 2))} for name in "ab"}
    return params, find_groups(two_layers, params, np.zeros(3))


def test_a_new_name_changes_nothing_else(traced):
    params, grouping = traced
    named = rename(grouping, {"a/in:1": "hidden"})
    assert [(group.name, group.size) for group in named.groups] == [("hidden", 4), ("b/in:1", 4)]
    assert [(place.path, place.axis) for place in named.groups[0].members] == [("a/in", 1), ("a/out", 0)]
    old, new = (pruning.score(params, each, criterion="magnitude") for each in (grouping, named))
    np.testing.assert_array_equal(new["hidden"], old["a/in:1"])
    slim = pruning.shrink(params, named, {"hidden": np.array([0, 3])})
    chex.assert_trees_all_equal(slim, pruning.shrink(params, grouping, {"a/in:1": np.array([0, 3])}))
    assert Grouping.from_json(named.to_json()) == named
    with pytest.raises(InputError, match="without the function"):
        named.run(slim, np.zeros(3))


def test_groups_of_one_name_stay_or_go_together(traced):
    params, grouping = traced
    tied = rename(grouping, {"a/in:1": "both", "b/in:1": "both"})
    assert tied.widths == {"both": 4} and len(tied.groups[0].members) == 4
    apart = pruning.score(params, grouping, criterion="magnitude")
    together = pruning.score(params, tied, criterion="magnitude")["both"]
    np.testing.assert_allclose(together, (apart["a/in:1"] + apart["b/in:1"]) / 2)
    keep = np.array([1, 2])
    slim = pruning.shrink(params, tied, {"both": keep})
    chex.assert_trees_all_equal(slim, pruning.shrink(params, grouping, {"a/in:1": keep, "b/in:1": keep}))


def test_what_does_not_fit_is_refused(traced):
    _, grouping = traced
    with pytest.raises(InputError, match="no group 'c' to rename"):
        rename(grouping, {"c": "hidden"})
    params = {
        "a": {"in": np.ones((3, 4)), "out": np.ones((4, 2))},
        "b": {"in": np.ones((3, 5)), "out": np.ones((5, 2))},
    }
    with pytest.raises(InputError, match="of 4 and 5 channels cannot both be 'both'"):
        rename(find_groups(two_layers, params, np.zeros(3)), {"a/in:1": "both", "b/in:1": "both"})
    with pytest.raises(InputError, match="no group 'c' to score"):
        pruning.score(params, grouping, criterion="magnitude", only=["c"])
