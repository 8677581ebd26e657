"""Models from packages that were not written here: Equinox's own, equimo's, and Haiku's."""

from __future__ import annotations

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equimo.models.convnext import ConvNeXt
from equimo.models.vit import VisionTransformer

from helpers.graph_models import doubled, halves, largest_difference, randomized
from slimsam_jax import pruning
from slimsam_jax.pruning import find_groups

KEY = jax.random.key(0)


def image(side):
    return np.random.default_rng(1).normal(size=(3, side, side)).astype(np.float32)


def of_equinox(model, *inputs, call=lambda model, x: model(x)):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda params, *inputs: call(eqx.combine(params, static), *inputs), randomized(params), inputs


def mlp():
    return of_equinox(eqx.nn.MLP(6, 5, 24, 3, key=KEY), np.ones(6, np.float32))


def attention():
    model = eqx.nn.MultiheadAttention(4, 24, value_size=10, vo_size=5, output_size=7, key=KEY)
    tokens = np.random.default_rng(0).normal(size=(6, 24)).astype(np.float32)
    return of_equinox(model, tokens, call=lambda model, x: model(x, x, x[:, :10]))


def lstm():
    """The four gates are one array of (4 · hidden), split."""
    model = (eqx.nn.LSTMCell(3, 12, key=KEY), eqx.nn.Linear(12, 2, key=KEY))

    def call(model, series):
        cell, last = model
        step = lambda state, x: (cell(x, state), None)
        (hidden, _), _ = jax.lax.scan(step, (jnp.zeros(12), jnp.zeros(12)), series)
        return last(hidden)

    return of_equinox(model, np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), call=call)


def inference(model, x):
    return model(x, key=KEY, inference=True)


def equimo_vit():
    size = {"img_size": 32, "in_channels": 3, "dim": 48, "patch_size": 8, "num_heads": [4], "depths": [2]}
    return of_equinox(VisionTransformer(**size, num_classes=10, key=KEY), image(32), call=inference)


def equimo_convnext():
    model = ConvNeXt(in_channels=3, dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_classes=10, key=KEY)
    return of_equinox(model, image(32), call=inference)


def of_haiku(net):
    """Parameters and the averages of batch norm are two trees; the averages' counters are no weights."""
    model = hk.transform_with_state(lambda images, training: net()(images, is_training=training))
    images = np.moveaxis(image(32), 0, -1)[None]
    trees = jax.eval_shape(lambda images: model.init(KEY, images, True), images)
    whole = jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else np.zeros(leaf.shape, leaf.dtype), trees
    )
    return lambda trees, images: model.apply(*trees, None, images, False)[0], randomized(whole), (images,)


def haiku_resnet():
    """Basic blocks in the first version, whose first group has no shortcut of its own, so the stem's channels stay."""
    groups = {"blocks_per_group": (2, 1, 1, 1), "channels_per_group": (64, 24, 16, 12)}
    projections = (False, True, True, True)
    return of_haiku(lambda: hk.nets.ResNet(num_classes=10, bottleneck=False, use_projection=projections, **groups))


def haiku_mobilenet():
    return of_haiku(lambda: hk.nets.MobileNetV1((1, 2, 2), (8, 12, 16), num_classes=10))


# model -> sizes of the groups in the order of use; of how many a reduction runs over the channels
CASES = [
    pytest.param(mlp, [24, 24, 24], 0, id="equinox-mlp"),
    pytest.param(attention, [4, 6, 5], 0, id="equinox-attention"),
    pytest.param(lstm, [12], 0, id="equinox-lstm"),
    pytest.param(equimo_vit, [48, 4, *2 * (4, 12, 192)], 2, id="equimo-vit"),
    pytest.param(equimo_convnext, [8, 32, 16, 64, 24, 96, 32, 128], 4, id="equimo-convnext"),
    pytest.param(haiku_resnet, [64, 64, 64, 24, 24, 16, 16, 12, 12], 0, id="haiku-resnet"),
    pytest.param(haiku_mobilenet, [32, 8, 12, 16], 0, id="haiku-mobilenet"),
]


@pytest.mark.parametrize(("model", "sizes", "crossed"), CASES)
def test_a_foreign_model_is_cut(model, sizes, crossed):
    """In float64: halves of all groups that nothing crosses at random, exactly; of the others the shapes."""
    with jax.enable_x64(True):
        function, params, inputs = model()
        params, inputs = doubled((params, inputs))
        grouping = find_groups(function, params, *inputs)
        assert [group.size for group in grouping.groups] == sizes
        assert sum(bool(group.crossed) for group in grouping.groups) == crossed
        keep = halves([group for group in grouping.groups if not group.crossed])
        apply = jax.jit(function)
        masked = apply(pruning.mask(params, grouping, keep), *inputs)
        assert largest_difference(apply(params, *inputs), masked) > 1e-3
        slim = pruning.shrink(params, grouping, keep)
        assert largest_difference(masked, jax.jit(grouping.run)(slim, *inputs)) < 1e-10
        slim = pruning.shrink(params, grouping, halves(grouping.groups))
        assert jax.eval_shape(grouping.run, slim, *inputs).shape == masked.shape


def test_a_module_that_reads_its_widths_off_its_arrays_runs_itself():
    """Equinox's layers do, where no number of heads is stored; in float32."""
    function, params, inputs = mlp()
    grouping = find_groups(function, params, *inputs)
    keep = halves(grouping.groups)
    slim = pruning.shrink(params, grouping, keep)
    masked = function(pruning.mask(params, grouping, keep), *inputs)
    assert largest_difference(masked, function(slim, *inputs)) < 1e-5
    assert largest_difference(masked, grouping.run(slim, *inputs)) < 1e-5
