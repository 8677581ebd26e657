"""Models from packages that were not written here. Equinox is a test dependency; the others are used if installed.

pip install --no-deps equimo==1.1.0 loguru lz4 semver flaxmodels==0.1.3 h5py
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.graph_models import halves, largest_difference, randomized
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
    vit = pytest.importorskip("equimo.models.vit")
    size = {"img_size": 32, "in_channels": 3, "dim": 48, "patch_size": 8, "num_heads": [4], "depths": [2]}
    return of_equinox(vit.VisionTransformer(**size, num_classes=10, key=KEY), image(32), call=inference)


def equimo_convnext():
    convnext = pytest.importorskip("equimo.models.convnext")
    model = convnext.ConvNeXt(in_channels=3, dims=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_classes=10, key=KEY)
    return of_equinox(model, image(32), call=inference)


def flaxmodels_resnet18():
    flaxmodels = pytest.importorskip("flaxmodels")
    model = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=10, normalize=False)
    images = np.moveaxis(image(32), 0, -1)[None]
    apply = lambda params, images: model.apply(params, images, train=False)
    return apply, randomized(jax.eval_shape(model.init, KEY, images)), (images,)


# model -> sizes of the groups in the order of use; of how many a reduction runs over the channels
CASES = [
    pytest.param(mlp, [24, 24, 24], 0, id="equinox-mlp"),
    pytest.param(attention, [4, 6, 5], 0, id="equinox-attention"),
    pytest.param(lstm, [12], 0, id="equinox-lstm"),
    pytest.param(equimo_vit, [48, 4, *2 * (4, 12, 192)], 2, id="equimo-vit"),
    pytest.param(equimo_convnext, [8, 32, 16, 64, 24, 96, 96, 32, 128], 4, id="equimo-convnext"),
    pytest.param(
        flaxmodels_resnet18,
        [64, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512],
        0,
        id="flaxmodels-resnet18",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("model", "sizes", "crossed"), CASES)
def test_a_foreign_model_is_cut(model, sizes, crossed):
    function, params, inputs = model()
    grouping = find_groups(function, params, *inputs)
    assert [group.size for group in grouping.groups] == sizes
    assert sum(bool(group.crossed) for group in grouping.groups) == crossed
    keep = halves([group for group in grouping.groups if not group.crossed])
    apply = jax.jit(function)
    masked = apply(pruning.mask(params, grouping, keep), *inputs)
    assert largest_difference(apply(params, *inputs), masked) > 1e-3
    assert largest_difference(masked, jax.jit(grouping.run)(pruning.shrink(params, grouping, keep), *inputs)) < 1e-5
    slim = pruning.shrink(params, grouping, halves(grouping.groups))
    assert jax.eval_shape(grouping.run, slim, *inputs).shape == masked.shape
