"""`pruning/` on models that are no SAM: trees, axes and functions are all it knows."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam_jax import pruning
from slimsam_jax.pruning import allocation, gradients, importance
from slimsam_jax.pruning.groups import Group, Member, check_groups
from slimsam_jax.pruning.selection import keep_global, keep_widths
from slimsam_jax.pruning.shrink import apply_masks, mask_tree, shrink

RANDOM = np.random.default_rng(0)


class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(self.width, name="first")(x))
        return nn.Dense(3, name="last")(x)


def mlp(params, x):
    return Mlp(len(params["first"]["bias"])).apply({"params": params}, x)


MLP_GROUPS = [
    Group("hidden", 8, (Member("first/kernel", 1, True), Member("first/bias", 0), Member("last/kernel", 0, True)))
]


class ConvNet(nn.Module):
    """A stem, two residual blocks, and a head: the stream's channels are one group through all of them."""

    width: int
    inner: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        conv = lambda features, name: nn.Conv(features, (3, 3), name=name)
        x = conv(self.width, "stem")(x)
        for i, inner in enumerate(self.inner):
            x = x + conv(self.width, f"down_{i}")(nn.gelu(conv(inner, f"up_{i}")(x)))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


def conv_net(params, x):
    inner = tuple(len(params[f"up_{i}"]["bias"]) for i in range(2))
    return ConvNet(len(params["stem"]["bias"]), inner).apply({"params": params}, x)


def conv_groups(net: ConvNet) -> list[Group]:
    stream = [Member("stem/kernel", 3, True), Member("stem/bias", 0), Member("head/kernel", 0, True)]
    groups = []
    for i, inner in enumerate(net.inner):
        stream += [Member(f"up_{i}/kernel", 2, True), Member(f"down_{i}/kernel", 3, True), Member(f"down_{i}/bias", 0)]
        own = (Member(f"up_{i}/kernel", 3, True), Member(f"up_{i}/bias", 0), Member(f"down_{i}/kernel", 2, True))
        groups.append(Group(f"inner_{i}", inner, own))
    return [Group("stream", net.width, tuple(stream)), *groups]


def recurrent(params, x):
    """A plain dict of arrays: a recurrent net whose state is read and written by the same array."""
    state = jnp.zeros((len(x), params["loop"].shape[0]))
    for t in range(x.shape[1]):
        state = jnp.tanh(x[:, t] @ params["in"] + state @ params["loop"])
    return state @ params["out"]


RECURRENT_GROUPS = [
    Group("state", 7, (Member("in", 1, True), Member("loop", 0, True), Member("loop", 1, True), Member("out", 0, True)))
]


def array(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def init(module, x):
    return module.init(jax.random.key(0), x)["params"]


def flax_mlp():
    x = array(5, 4)
    return mlp, init(Mlp(8), x), x, MLP_GROUPS


def conv_residual():
    net, x = ConvNet(6, (8, 10)), array(5, 6, 4, 3)
    return conv_net, init(net, x), x, conv_groups(net)


def plain_dict():
    params = {"in": array(3, 7), "loop": 0.3 * array(7, 7), "out": array(7, 2)}
    return recurrent, params, array(5, 4, 3), RECURRENT_GROUPS


@pytest.fixture(scope="module", params=[flax_mlp, conv_residual, plain_dict], ids=lambda make: make.__name__)
def case(request):
    """(function, parameters, input, groups); made here, as each worker collects."""
    return request.param()


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "magnitude", "random"])
def test_prune_anything(case, criterion):
    apply, params, x, groups = case
    check_groups(params, groups)
    grads = gradients.disturbed_gradients(apply, params, [x, x], jax.random.key(0))
    scores = importance.channel_scores(params, grads, groups, criterion)
    keep = keep_global(scores, 0.5)
    assert sum(map(len, keep.values())) == allocation.rounded_width(sum(g.size for g in groups), 0.5)
    masked = apply(apply_masks(params, mask_tree(params, groups, keep)), x)
    shrunk = shrink(params, groups, keep)
    np.testing.assert_allclose(apply(shrunk, x), masked, atol=1e-5)


def test_channels_that_do_nothing_go_first(case):
    """A channel whose weights out of it are zero has no gradient into it, and none out of it matters."""
    apply, params, x, groups = case
    group = groups[-1]
    useful = np.sort(RANDOM.permutation(group.size)[: group.size // 2])
    dead = mask_tree(params, [group], {group.name: useful})
    params = apply_masks(params, dead)
    grads = gradients.disturbed_gradients(apply, params, [x], jax.random.key(1))
    scores = importance.channel_scores(params, grads, [group])
    keep = keep_widths(scores, {group.name: len(useful)})
    np.testing.assert_array_equal(keep[group.name], useful)


def test_the_folder_imports_no_framework_and_no_sam():
    allowed = {"jax", "numpy", "optax", "slimsam_jax.pruning", "slimsam_jax.tracing", "slimsam_jax.errors"}
    files = {"safetensors", "slimsam_jax", "slimsam_jax.files"}  # of the one module that writes and reads
    for path in Path(pruning.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in (name for name in names if name.split(".")[0] not in sys.stdlib_module_names):
                also = files if path.name == "saving.py" else set()
                assert any(name == a or name.startswith(f"{a}.") for a in allowed | also), f"{path.name} imports {name}"
