"""Which groups' basis is free, how far, and what forbids it, from the jaxpr alone. Nothing is compiled here."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.graph_models import IMAGES, MODELS
from helpers.models import tiny_config
from slimsam_jax import pruning
from slimsam_jax.errors import InputError
from slimsam_jax.models.encoders.vit import ImageEncoder
from slimsam_jax.models.sam import abstract_params

X = IMAGES[0, 0]  # [16, 3]
SHAPES = {"a": (3, 8), "b": (8, 5), "loop": (8, 8), "scale": (8,), "shift": (8,), "wide": (16 * 8, 5)}


def free(function, x=X):
    """Of the group of eight channels that `a` makes."""
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in SHAPES.items()}
    grouping = pruning.find_groups(function, params, x)
    (name,) = [group.name for group in grouping.groups if any(place.path == "a" for place in group.members)]
    return pruning.freedom(grouping)[name]


def layer_norm(x, p, epsilon=1e-6):
    y = x - x.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt((y**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["shift"]


def rms_norm(x, p):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True)) * (1 + p["scale"])


FREE = {
    "two linear maps": (lambda p, x: x @ p["a"] @ p["b"], "linear"),
    "with a bias between": (lambda p, x: (2 * (x @ p["a"]) + p["shift"]) @ p["b"], "linear"),
    "rounded to what it is": (lambda p, x: jax.lax.reduce_precision(x @ p["a"], 8, 23) @ p["b"], "linear"),
    "in half precision": (lambda p, x: (x @ p["a"]).astype(jnp.bfloat16).astype(jnp.float32) @ p["b"], "linear"),
    "rows by an integer mask": (
        lambda p, x: (x @ p["a"] * jnp.broadcast_to(x[:, :1] > 0, (16, 8)).astype(jnp.int32)) @ p["b"],
        "linear",
    ),
    "masked rows": (lambda p, x: jnp.where(x[:, :1] > 0, x @ p["a"], 0) @ p["b"], "linear"),
    "a mean over tokens": (lambda p, x: (x @ p["a"]).mean(0) @ p["b"], "linear"),
    "tokens and channels flattened": (lambda p, x: (x @ p["a"]).reshape(-1) @ p["wide"], "linear"),
    "an array that makes what it reads": (lambda p, x: (x @ p["a"] + x @ p["a"] @ p["loop"]) @ p["b"], "orthogonal"),
    "its own lengths": (lambda p, x: (x @ p["a"]) @ (x @ p["a"]).T, "orthogonal"),
    "LayerNorm": (lambda p, x: layer_norm(x @ p["a"], p) @ p["b"], "orthogonal"),
    "RMSNorm, 1 + scale": (lambda p, x: rms_norm(x @ p["a"], p) @ p["b"], "orthogonal"),
    "a scale alone": (lambda p, x: (x @ p["a"] * p["scale"]) @ p["b"], "orthogonal"),
    "a vector of length one": (
        lambda p, x: (x @ p["a"]) / jnp.linalg.norm(x @ p["a"], axis=-1, keepdims=True) @ p["b"],
        "orthogonal",
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_what_commutes(name):
    function, kind = FREE[name]
    assert free(function).kind == kind


FORBIDDEN = {
    "relu": (lambda p, x: jnp.maximum(x @ p["a"], 0) @ p["b"], "primitive max .*acts on each channel by itself"),
    "softmax": (lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"], "primitive reduce_max .*no rule"),
    "max over tokens": (lambda p, x: (x @ p["a"]).max(0) @ p["b"], "primitive reduce_max .*no rule"),
    "a gate": (lambda p, x: ((x @ p["a"]) * (x @ p["a"] + 1)) @ p["b"], "adds a number to every channel"),
    "channel by channel": (lambda p, x: (x @ p["a"] * p["scale"] + x @ p["a"]) @ p["b"], "what scale scales is not"),
    "a constant along it": (lambda p, x: (x @ p["a"] + np.arange(8.0)) @ p["b"], "a constant of the function lies"),
    "a norm without a count": (
        lambda p, x: (x @ p["a"] - (x @ p["a"]).sum(-1, keepdims=True) / 7) @ p["b"],
        "adds a number to every channel",
    ),
    "a norm read by a nonlinearity": (lambda p, x: jnp.tanh(layer_norm(x @ p["a"], p)) @ p["b"], "primitive tanh"),
    "a norm behind the sum": (
        lambda p, x: layer_norm(layer_norm(x @ p["a"], p) + x @ p["a"], p) @ p["b"],
        "what scale scales is not read by linear maps alone",
    ),
    "a scale that is a bias, too": (
        lambda p, x: rms_norm(x @ p["a"] + p["scale"], p) @ p["b"],
        "scale is used in two ways",
    ),
    "one kernel behind a norm and without": (
        lambda p, x: layer_norm(x @ p["a"], p) @ p["b"] + x @ p["a"] @ p["b"],
        "b is used in two ways",
    ),
    "a norm's scale read by activations": (
        lambda p, x: layer_norm(x @ p["a"], p) @ (x @ p["a"]).T,
        "what scale scales is read by something else than a parameter",
    ),
    "the variance itself": (
        lambda p, x: (x @ p["a"]) @ p["b"] + (x @ p["a"]).mean(-1, keepdims=True),
        "takes a sum over it",
    ),
    "a sort of tokens": (lambda p, x: jnp.sort(x @ p["a"], 0) @ p["b"], "primitive sort .*no rule"),
    "integers": (
        lambda p, x: (x @ p["a"]).astype(jnp.int32).astype(jnp.float32) @ p["b"],
        "convert.* rounds each channel",
    ),
    "fewer bits": (
        lambda p, x: jax.lax.reduce_precision(x @ p["a"], 4, 2) @ p["b"],
        "primitive reduce_precision.* rounds",
    ),
    "a loop": (
        lambda p, x: jax.lax.scan(lambda s, row: (s + row @ p["a"], None), jnp.zeros(8), x)[0] @ p["b"],
        "goes through primitive scan",
    ),
    "an outer product": (lambda p, x: jnp.einsum("nc,nd->cd", x @ p["a"], x @ p["a"]).sum(0) @ p["b"], "meets itself"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_does_not(name):
    function, why = FORBIDDEN[name]
    found = free(function)
    assert found.kind == "none"
    assert re.search(why, found.why), found.why


# model -> kinds of its groups in the order of use, by their first letters
KINDS = {
    "mlp": "nn",
    "resnet": "nnnn",
    "mobilenet": "lnnnnnnnnn",
    "vit_thirds": "onoln" + "noln",
    "vit_gqa": "onllnn" + "nllnn",
    "vit_rope": "onnlnnnln",
    "scanned": "nn",
    "recurrent": "nn",
}


@pytest.mark.parametrize("model", KINDS)
def test_the_groups_of_a_model(model):
    function, params, inputs = MODELS[model]()
    found = pruning.freedom(pruning.find_groups(function, params, *inputs))
    assert "".join(each.kind[0] for each in found.values()) == KINDS[model]
    assert all(bool(each.why) == (each.kind != "linear") and "\n" not in each.why for each in found.values())


def test_each_group_of_a_resnet_says_where_its_batch_norm_is():
    function, params, inputs = MODELS["resnet"]()
    found = pruning.freedom(pruning.find_groups(function, params, *inputs))
    for each, number in zip(found.values(), (0, 1, 3, 4), strict=True):
        assert each.why == f"primitive rsqrt in ResNet/BatchNorm_{number} acts on each channel by itself"


def test_sam():
    """The stream and the neck are rotated, heads are linear; but for the heads as wholes and the MLPs."""
    config = dataclasses.replace(tiny_config(), blocks=tiny_config().blocks[:1])
    function = lambda params, x: ImageEncoder(config, attention="plain").apply({"params": params}, x)[0]
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    grouping = pruning.find_groups(function, abstract_params(config)["image_encoder"], images)
    assert "".join(each.kind[0] for each in pruning.freedom(grouping).values()) == "onllno"


def test_without_the_function_nothing_is_known():
    function, params, inputs = MODELS["mlp"]()
    grouping = pruning.find_groups(function, params, *inputs)
    with pytest.raises(InputError, match="read from JSON or renamed, without the function"):
        pruning.freedom(pruning.Grouping.from_json(grouping.to_json()))
