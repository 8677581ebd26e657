"""Masked and cut are the same function, in float64, through the traced equations and through the rebuilt class."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from helpers.graph_models import IMAGES, MODELS, SIZES, doubled, halves, largest_difference, randomized
from slimsam_jax import pruning
from slimsam_jax.errors import InputError
from slimsam_jax.pruning import find_groups, gradients

# Every mean and variance in these models is Flax's: E[x²] - E[x]² counts a masked zero as nothing.
CROSSED = {
    "mobilenet": {16},
    "scanned": {20},
    **{f"vit_{kind}": {48} for kind in ("thirds", "3hd", "h3d", "gqa", "rope")},
}


@pytest.mark.parametrize("name", MODELS)
def test_masked_and_cut_are_the_same_function(name):
    """All groups halved at random, every parameter random; then the shapes of groups that are cut alone."""
    with jax.enable_x64(True):
        function, *arrays = MODELS[name]()
        params, inputs = doubled(arrays)
        grouping = find_groups(function, params, *inputs)
        assert [group.size for group in grouping.groups] == SIZES[name]
        assert {group.size for group in grouping.groups if group.crossed} == CROSSED.get(name, set())
        keep = halves(grouping.groups)
        slim = pruning.shrink(params, grouping, keep)
        apply = jax.jit(function)
        masked = apply(pruning.mask(params, grouping, keep), *inputs)
        assert largest_difference(apply(params, *inputs), masked) > 1e-2
        assert largest_difference(masked, jax.jit(grouping.run)(slim, *inputs)) < 1e-10
        for group in grouping.groups:
            alone = halves([group], seed=1)
            small = jax.eval_shape(lambda p, keep=alone: pruning.shrink(p, grouping, keep), params)
            result = jax.eval_shape(lambda p, *x, keep=alone: grouping.run(p, *x, keep=keep), small, *inputs)
            assert result.shape == masked.shape


def test_a_norm_that_centres_first_counts_what_is_masked():
    """(x - mean)² is not zero where x is: the group says so, and only the shapes are the same."""

    def function(params, x):
        y = x @ params["a"]
        y = y - y.mean(-1, keepdims=True)
        return y / jnp.sqrt((y**2).mean(-1, keepdims=True)) @ params["b"]

    params = randomized({"a": jax.ShapeDtypeStruct((3, 8), np.float32), "b": jax.ShapeDtypeStruct((8, 5), np.float32)})
    x = IMAGES[0, 0]
    grouping = find_groups(function, params, x)
    keep = halves(grouping.groups)
    masked, cut = (
        function(pruning.mask(params, grouping, keep), x),
        grouping.run(pruning.shrink(params, grouping, keep), x),
    )
    assert grouping.groups[0].crossed == ("reduce_sum",)
    assert largest_difference(masked, cut) > 1e-2


def test_the_rebuilt_class_agrees_too():
    """An MLP whose class takes widths; a mean over channels would differ, its literal 1/D does not shrink."""
    import flax.linen as nn

    class Mlp(nn.Module):
        widths: tuple[int, int]

        @nn.compact
        def __call__(self, x):
            for width in self.widths:
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(5)(x)

    function, params, inputs = MODELS["mlp"]()
    grouping = find_groups(function, params, *inputs)
    keep = halves(grouping.groups)
    slim = pruning.shrink(params, grouping, keep)
    result = Mlp(tuple(map(len, keep.values()))).apply(slim, *inputs)
    assert largest_difference(grouping.run(slim, *inputs), result) < 1e-5


def test_copies_may_keep_channels_of_their_own():
    """v and proj of each head by themselves, and half of the heads gone besides."""
    with jax.enable_x64(True):
        function, *arrays = MODELS["vit_thirds"]()
        params, inputs = doubled(arrays)
        grouping = find_groups(function, params, *inputs)
        random, keep = np.random.default_rng(0), {}
        for group in grouping.groups:
            if group.copies:
                keep[group.name] = np.sort([random.permutation(12)[:5] for _ in range(4)])
            elif group.size == 4:
                keep[group.name] = np.array([1, 3])
        assert len(keep) == 6
        masked = jax.jit(function)(pruning.mask(params, grouping, keep), *inputs)
        slim = pruning.shrink(params, grouping, keep)
        assert slim["params"]["Dense_1"]["kernel"].shape == (2 * 5, 48)
        assert largest_difference(masked, jax.jit(grouping.run)(slim, *inputs)) < 1e-10


def test_a_cut_constant_needs_the_indices_only_where_it_varies():
    angles = np.arange(8, dtype=np.float32)
    params = {"a": np.ones((3, 8), np.float32), "b": np.ones((8, 5), np.float32)}
    grouping = find_groups(lambda p, x: (x @ p["a"] * angles) @ p["b"], params, IMAGES[0, 0])
    keep = {"a:1": np.array([2, 7])}
    slim = pruning.shrink(params, grouping, keep)
    expected = np.repeat(9 * IMAGES[0, 0].sum(1, keepdims=True), 5, 1)
    np.testing.assert_allclose(grouping.run(slim, IMAGES[0, 0]), expected, rtol=1e-5)
    loaded = jax.tree.map(lambda x: x.copy(), slim)
    pruning.shrink(params, grouping, {"a:1": np.array([0, 1])})  # the same shapes: only `keep` can tell
    np.testing.assert_allclose(grouping.run(loaded, IMAGES[0, 0], keep=keep), expected, rtol=1e-5)
    with pytest.raises(InputError, match="group 'a:1' also cuts a constant of the function: pass keep="):
        grouping.run(loaded, IMAGES[0, 0])


def test_an_array_that_two_cuts_left_alone_is_of_neither():
    """One cut's tree whose other arrays were trained since has the shapes alone, which are also the other's."""
    params = {name: jnp.ones(shape) for name, shape in {"a": (3, 8), "b": (8, 5), "c": (5, 2)}.items()}
    grouping = find_groups(lambda p, x: (x @ p["a"] * np.arange(8.0)) @ p["b"] @ p["c"], params, IMAGES[0, 0])
    slim, _ = (pruning.shrink(params, grouping, {"a:1": kept}) for kept in ([2, 7], [0, 1]))
    with pytest.raises(InputError, match="group 'a:1' also cuts a constant of the function: pass keep="):
        grouping.run(slim | {"a": 2 * slim["a"], "b": 2 * slim["b"]}, IMAGES[0, 0])


def test_a_cut_function_is_traced_and_cut_again():
    function, params, inputs = MODELS["resnet"]()
    grouping = find_groups(function, params, *inputs)
    slim = pruning.shrink(params, grouping, halves(grouping.groups))
    again = find_groups(grouping.run, slim, *inputs)
    assert [group.size for group in again.groups] == [size // 2 for size in SIZES["resnet"]]
    assert [group.name for group in again.groups] == [group.name for group in grouping.groups]
    keep = halves(again.groups, seed=1)
    masked = grouping.run(pruning.mask(slim, again, keep), *inputs)
    assert largest_difference(masked, again.run(pruning.shrink(slim, again, keep), *inputs)) < 1e-5


def test_a_cut_function_is_exported_and_differentiated():
    function, params, inputs = MODELS["recurrent"]()
    grouping = find_groups(function, params, *inputs)
    slim = pruning.shrink(params, grouping, halves(grouping.groups))
    exported = export.export(jax.jit(grouping.run))(slim, *inputs)
    restored = export.deserialize(exported.serialize())
    np.testing.assert_allclose(restored.call(slim, *inputs), grouping.run(slim, *inputs), rtol=1e-5, atol=1e-6)
    slopes = jax.grad(lambda p: grouping.run(p, *inputs).sum())(slim)
    assert jax.tree.map(jnp.shape, slopes) == jax.tree.map(jnp.shape, slim)
    assert all(jnp.abs(slope).max() > 0 for slope in jax.tree.leaves(slopes))


@pytest.fixture(scope="module")
def scored():
    """A model half of whose channels are masked: its grouping, which ones are not, and the scores."""
    function, params, inputs = MODELS["c2f"]()
    grouping = find_groups(function, params, *inputs)
    useful = halves(grouping.groups)
    params = pruning.mask(params, grouping, useful)
    grads = gradients.loss_gradients(lambda p, x: (function(p, x) ** 2).sum(), params, [inputs[0]])
    return grouping, useful, pruning.score(params, grouping, grads)


@pytest.mark.parametrize("allocation", ["local", "global", "cost"])
def test_from_gradients_to_a_cut(allocation, scored):
    """What does nothing goes first, by any allocation."""
    grouping, useful, scores = scored
    assert {name: score.shape for name, score in scores.items()} == {g.name: (g.size,) for g in grouping.groups}
    costs = {group.name: np.arange(group.size + 1.0) for group in grouping.groups}
    keep = pruning.select(scores, 0.5, allocation, costs=costs)
    assert {name: kept.tolist() for name, kept in keep.items()} == {
        name: kept.tolist() for name, kept in useful.items()
    }


def test_scores_of_copies_average_to_those_of_the_group():
    function, params, inputs = MODELS["vit_3hd"]()
    grouping = find_groups(function, params, *inputs)
    own = [group.name for group in grouping.groups if group.copies]
    apart = pruning.score(params, grouping, criterion="magnitude", own=own)
    together = pruning.score(params, grouping, criterion="magnitude")
    for name in own:
        assert apart[name].shape == (4, 12)
        np.testing.assert_allclose(apart[name].sum(0), together[name], rtol=1e-6)


def test_an_array_is_unfolded_and_folded_back():
    function, params, inputs = MODELS["vit_gqa"]()
    grouping = find_groups(function, params, *inputs)
    keep = {group.name: np.arange(group.size) for group in grouping.groups}
    for tree in (pruning.mask(params, grouping, keep), pruning.shrink(params, grouping, keep)):
        jax.tree.map(np.testing.assert_array_equal, tree, params)


def linear_attention(feature):
    """Features of q and k contracted over their channels; (function, parameters)."""

    def function(params, x):
        q, k = (feature(x @ params[name]) for name in "qk")
        return q @ k.T

    shapes = {name: jax.ShapeDtypeStruct((3, 8), np.float32) for name in "qk"}
    return function, randomized(shapes)


@pytest.mark.parametrize(("feature", "crossed"), [(jax.nn.relu, ()), (lambda x: jax.nn.elu(x) + 1, ("dot_general",))])
def test_a_contraction_that_counts_masked_channels_is_listed(feature, crossed):
    """relu(0) relu(0) adds nothing, 1 · 1 does."""
    function, params = linear_attention(feature)
    grouping = find_groups(function, params, IMAGES[0, 0])
    (group,) = grouping.groups
    assert group.crossed == crossed
    keep = halves(grouping.groups)
    cut = grouping.run(pruning.shrink(params, grouping, keep), IMAGES[0, 0])
    difference = largest_difference(function(pruning.mask(params, grouping, keep), IMAGES[0, 0]), cut)
    assert difference > 1e-2 if crossed else difference < 1e-5


def test_a_loop_is_followed_until_what_it_carries_is_known():
    """What is masked is zero in the first state and one in the second, and the length of a state counts it."""

    def function(params, x):
        start = x[0] @ params["a"]
        turn = lambda state, row: (jnp.exp(row @ params["a"] + state), state @ state)
        return jax.lax.scan(turn, start, x)[1]

    params = {"a": jax.ShapeDtypeStruct((3, 8), np.float32)}
    assert find_groups(function, params, IMAGES[0, 0]).groups[0].crossed == ("dot_general",)


def test_a_kernel_that_is_divided_by_its_norm_says_so():
    """0 / 0 where it is masked; the cut function has no such channel."""
    params = {"a": jax.ShapeDtypeStruct((3, 8), np.float32), "b": jax.ShapeDtypeStruct((8, 5), np.float32)}
    function = lambda p, x: x @ (p["a"] / jnp.linalg.norm(p["a"], axis=0)) @ p["b"]
    grouping = find_groups(function, params, IMAGES[0, 0])
    assert grouping.groups[0].crossed == ("div",)


@pytest.mark.parametrize(("power", "name"), [(-1, "integer_pow"), (-0.5, "pow"), (2, None)])
def test_a_kernel_that_is_multiplied_by_a_power_of_its_norm_says_so_where_that_has_a_pole(power, name):
    params = {"a": jax.ShapeDtypeStruct((3, 8), np.float32), "b": jax.ShapeDtypeStruct((8, 5), np.float32)}
    function = lambda p, x: x @ (p["a"] * jnp.abs(p["a"]).sum(0) ** power) @ p["b"]
    assert find_groups(function, params, IMAGES[0, 0]).groups[0].crossed == ((name,) if name else ())


def test_a_loop_may_be_given_what_no_turn_reads():
    """It is of full length, and is not cut."""
    shapes = {"a": (4, 3), "b": (4,), "last": (4, 5), "unread": (4, 7)}
    params = randomized({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()})

    def function(p, x):
        turn = lambda rows: jnp.tanh(x[0] @ rows[0]) * rows[1]
        return jax.lax.map(turn, (p["a"], p["b"], p["unread"])) @ p["last"]

    grouping = find_groups(function, params, IMAGES[0, 0])
    (group,) = [each for each in grouping.groups if each.size == 4]
    keep = {group.name: np.array([0, 2])}
    cut = grouping.run(pruning.shrink(params, grouping, keep), IMAGES[0, 0])
    assert largest_difference(function(pruning.mask(params, grouping, keep), IMAGES[0, 0]), cut) < 1e-5


def test_a_slice_of_merged_axes_starts_where_the_cut_has_moved_it():
    """The middle two of four heads of three channels, from the axis of twelve."""
    params = {"a": jax.ShapeDtypeStruct((3, 4, 3), np.float32), "b": jax.ShapeDtypeStruct((6, 5), np.float32)}
    params = randomized(params)
    function = lambda p, x: jnp.einsum("nc,chd->nhd", x, p["a"]).reshape(-1, 12)[:, 3:9] @ p["b"]
    grouping = find_groups(function, params, IMAGES[0, 0])
    assert [(group.name, group.size) for group in grouping.groups] == [("a:1.0", 2), ("a:2", 3)]
    keep = {"a:2": [0, 2], "a:1.0": [1]}
    masked = function(pruning.mask(params, grouping, keep), IMAGES[0, 0])
    cut = grouping.run(pruning.shrink(params, grouping, keep), IMAGES[0, 0])
    np.testing.assert_allclose(cut, masked, rtol=1e-5, atol=1e-6)


def test_kernels_vote_and_where_there_are_none_all_do():
    params = randomized({name: jax.ShapeDtypeStruct((8,), np.float32) for name in "ab"})
    grouping = find_groups(lambda p, x: (x[:, :1] * p["a"] + p["b"]).sum(1), params, IMAGES[0, 0])
    (scores,) = pruning.score(params, grouping, criterion="magnitude").values()
    np.testing.assert_allclose(scores, (params["a"] ** 2 + params["b"] ** 2) / 2, rtol=1e-6)
    kernel = np.ones((3, 8), np.float32)
    grouping = find_groups(lambda p, x: (x @ p["k"] + p["b"]).sum(1), {"k": kernel, "b": params["b"]}, IMAGES[0, 0])
    (scores,) = pruning.score({"k": kernel, "b": params["b"]}, grouping, criterion="magnitude").values()
    np.testing.assert_array_equal(scores, 3)
