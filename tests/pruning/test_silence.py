"""A group that lies on two axes of a value, and primitives that are not zero where a mask is: `crossed` names them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.graph_models import IMAGES, halves, largest_difference, randomized
from slimsam_jax import pruning
from slimsam_jax.pruning import find_groups


def _states(q, k, v):
    return jnp.einsum("nd,de->ne", q, jnp.einsum("nd,ne->de", k, v))


def _scanned(q, k, v):
    """The same, whose products of k and v are outer ones that a loop adds up."""
    turn = lambda state, row: (state + row[0][:, None] * row[1], state)
    return q @ jax.lax.scan(turn, jnp.zeros((8, 8)), (k, v))[0]


ELU = lambda x: jax.nn.elu(x) + 1
SHARED = {
    "plain": (lambda h: _states(*h) @ h[0].T, ()),
    "kernels": (lambda h: _states(ELU(h[0]), ELU(h[1]), h[2]), ("dot_general",)),
    "scanned": (lambda h: _scanned(*h), ()),
    "scanned kernels": (lambda h: _scanned(ELU(h[0]), ELU(h[1]), h[2]), ("dot_general",)),
    "read by what is not silent": (lambda h: h[0] @ ELU(h[1].T @ h[2]) @ ELU(h[0]).T, ("dot_general",)),
    "a sum of outer ones": (lambda h: ELU(h[0]) @ (h[1][0][:, None] + h[2][0]), ("dot_general",)),
    "ratios": (lambda h: h[0] @ (h[1][0][:, None] / jnp.broadcast_to(h[2][0], (8, 8))), ("div",)),
    "ranks": (lambda h: jax.lax.sort((h[0], h[0] + 1), dimension=0)[1] @ ELU(h[1]).T, ("dot_general",)),
    "filled": (lambda h: jnp.take(h[0], np.array([0, 99]), 0, fill_value=1) @ ELU(h[1]).T, ("dot_general",)),
    "to the power of nothing": (lambda h: jax.lax.integer_pow(h[0], 0) @ ELU(h[1]).T, ("dot_general",)),
    "remainders": (lambda h: jnp.fmod(h[0], h[1]) @ h[2].T, ("rem",)),
    "a gamma function": (lambda h: jax.lax.lgamma(h[0] ** 2) @ h[1].T, ("lgamma",)),
}


@pytest.mark.parametrize("name", SHARED)
def test_three_values_that_share_their_channels(name):
    """One array makes them, so a product of two has the group on both axes; `crossed` says where a mask differs."""
    between, crossed = SHARED[name]
    shapes = {"a": (3, 3, 8), "b": (8, 5)}
    params = randomized({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()})

    def function(p, x):
        h = between(jnp.einsum("nc,ctd->tnd", x, p["a"]))
        return h @ p["b"] if h.shape[-1] == 8 else h

    grouping = find_groups(function, params, IMAGES[0, 0])
    (group,) = [group for group in grouping.groups if group.size == 8]
    assert group.crossed == crossed
    keep = halves([group])
    masked = function(pruning.mask(params, grouping, keep), IMAGES[0, 0])
    cut = grouping.run(pruning.shrink(params, grouping, keep), IMAGES[0, 0])
    difference = largest_difference(masked, cut)
    assert not difference < 1e-2 if crossed else difference < 1e-5
