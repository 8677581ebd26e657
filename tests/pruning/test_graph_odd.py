"""Functions with something odd in the middle that can be cut nevertheless: masked and cut agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.graph_models import IMAGES, halves, largest_difference, randomized
from slimsam_jax import pruning
from slimsam_jax.errors import InputError
from slimsam_jax.pruning import find_groups


def test_dropout_with_a_key_of_its_own_call():
    """Numbers are drawn at full size and cut, so the same ones drop out; `keep` says which, shapes do not."""
    shapes = {"a": jax.ShapeDtypeStruct((3, 8), np.float32), "b": jax.ShapeDtypeStruct((8, 5), np.float32)}
    params, x, key = randomized(shapes), IMAGES[0, 0], jax.random.key(3)

    def function(p, x, key):
        y = x @ p["a"]
        y = jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y, 0) + 0.1 * jax.random.normal(key, y.shape)
        return y @ p["b"]

    grouping = find_groups(function, params, x, key)
    assert [(group.size, group.crossed) for group in grouping.groups] == [(8, ())]
    keep = halves(grouping.groups)
    slim = pruning.shrink(params, grouping, keep)
    masked = function(pruning.mask(params, grouping, keep), x, key)
    assert largest_difference(masked, jax.jit(grouping.run)(slim, x, key)) < 1e-5
    np.testing.assert_allclose(grouping.run(params, x, key), function(params, x, key), rtol=1e-5, atol=1e-6)
    loaded = jax.tree.map(lambda array: array.copy(), slim)
    pruning.shrink(params, grouping, halves(grouping.groups, seed=1))  # the same shapes
    with pytest.raises(InputError, match=r"through random numbers of shape .*: pass keep="):
        grouping.run(loaded, x, key)


@pytest.mark.parametrize(
    "between",
    [
        lambda y, m: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jax.nn.relu(s[1] @ m)), (0, y))[1],
        lambda y, m: doubled_by_hand(y),
        lambda y, m: jax.jit(lambda y, n: y**n, static_argnums=1)(y, 2),
        lambda y, m: jnp.abs(y * (1 + 1j)),
        lambda y, m: jax.device_put(y),
    ],
    ids=["while", "custom-vjp", "static", "complex", "device-put"],
)
def test_what_is_odd_but_sound_is_cut(between):
    shapes = {"a": (3, 8), "m": (8, 8), "b": (8, 5)}
    params = randomized({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()})
    params |= {"step": np.int32(3), "none": None}
    function = lambda p, x: between(x @ p["a"], p["m"]) @ p["b"]
    grouping = find_groups(function, params, IMAGES[0, 0])
    assert [(group.name, group.size, group.crossed) for group in grouping.groups] == [("a:1", 8, ())]
    keep = halves(grouping.groups)
    masked = function(pruning.mask(params, grouping, keep), IMAGES[0, 0])
    assert largest_difference(masked, grouping.run(pruning.shrink(params, grouping, keep), IMAGES[0, 0])) < 1e-5


@jax.custom_vjp
def doubled_by_hand(x):
    return 2 * x


doubled_by_hand.defvjp(lambda x: (2 * x, None), lambda _, slope: (2 * slope,))


def test_integers_are_cut_as_well():
    random = np.random.default_rng(0)
    params = {name: random.integers(-9, 9, shape, np.int32) for name, shape in (("a", (3, 8)), ("b", (8, 5)))}
    x = random.integers(-9, 9, (2, 3), np.int32)
    function = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    grouping = find_groups(function, params, x)
    keep = halves(grouping.groups)
    cut = grouping.run(pruning.shrink(params, grouping, keep), x)
    np.testing.assert_array_equal(cut, function(pruning.mask(params, grouping, keep), x))
