"""Small models with the shapes that pruning trips over; each returns (function, parameters, inputs).

The functions are Flax modules or plain functions of a dict. All parameters are random: biases
and tables that start at zero would hide errors.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

IMAGES = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)


def randomized(params, seed=0):
    """The tree with every array random, variances positive."""
    random = np.random.default_rng(seed)

    def array(keys, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        name = jax.tree_util.keystr(keys)
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 16
        values = random.normal(size=leaf.shape) / np.sqrt(max(fan_in, 1))
        centred = "var" in name or "scale" in name
        return np.asarray(np.abs(1 + values) if centred else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(array, params)


def flax_model(module, *inputs):
    """(function, random parameters, inputs) of a module."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return module.apply, randomized(shapes), inputs


def batch_norm(name=None):
    return nn.BatchNorm(use_running_average=True, name=name)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (32, 24):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(5)(x)


class ResNet(nn.Module):
    """Two residual blocks, the second with a shortcut of its own; flattened at the end."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(batch_norm()(nn.Conv(16, (3, 3))(x)))
        for width, stride in ((16, 1), (32, 2)):
            y = nn.relu(batch_norm()(nn.Conv(width, (3, 3), strides=stride, use_bias=False)(x)))
            y = batch_norm()(nn.Conv(width, (3, 3))(y))
            if x.shape != y.shape:
                x = batch_norm()(nn.Conv(width, (1, 1), strides=stride)(x))
            x = nn.relu(x + y)
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3, 3))(x)
        for _ in range(2):
            for _ in range(3):
                y = nn.Conv(16, (1, 1))(nn.relu(batch_norm()(x)))
                y = nn.Conv(8, (3, 3))(nn.relu(batch_norm()(y)))
                x = jnp.concatenate([x, y], -1)
            x = nn.Conv(x.shape[-1] // 2, (1, 1))(nn.relu(batch_norm()(x)))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


class C2f(nn.Module):
    """YOLOv8's block: split, a chain of bottlenecks, everything concatenated; then a pixel shuffle."""

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Conv(16, (1, 1))(x))
        parts = jnp.split(nn.silu(nn.Conv(24, (1, 1))(x)), 2, -1)
        for _ in range(2):
            y = nn.silu(nn.Conv(12, (3, 3))(parts[-1]))
            parts.append(parts[-1] + nn.silu(nn.Conv(12, (3, 3))(y)))
        x = nn.silu(nn.Conv(32, (1, 1))(jnp.concatenate(parts, -1)))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, 2 * height, 2 * width, channels // 4)
        return nn.Conv(3, (3, 3))(x)


class MobileNet(nn.Module):
    """Inverted bottlenecks: depthwise, squeeze and excitation, group norm, and a grouped convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), strides=2)(x)
        for width in (16, 24):
            y = nn.swish(nn.GroupNorm(4)(nn.Conv(4 * x.shape[-1], (1, 1))(x)))
            y = nn.swish(batch_norm()(nn.Conv(y.shape[-1], (3, 3), feature_group_count=y.shape[-1])(y)))
            gate = nn.swish(nn.Conv(8, (1, 1))(y.mean((1, 2), keepdims=True)))
            y = nn.Conv(width, (1, 1))(y * nn.sigmoid(nn.Conv(y.shape[-1], (1, 1))(gate)))
            x = x + y if x.shape == y.shape else y
        x = nn.Conv(48, (3, 3), feature_group_count=4)(x)
        return nn.Dense(10)(nn.relu(x).mean((1, 2)))


class Vit(nn.Module):
    """Two blocks of 4 heads of 12.

    Attributes:
      qkv: "separate", "thirds", "3hd", "h3d" or "gqa" (two heads of k and v, repeated).
      rope: rotate q and k by halves, with angles of each channel's own.
    """

    qkv: str = "thirds"
    rope: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(48, (4, 4), strides=4)(x)
        x = x.reshape(x.shape[0], -1, 48)
        first = self.param("cls", nn.initializers.normal(), (1, 1, 48))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, 48)), x], 1)
        x = x + self.param("pos", nn.initializers.normal(), (1, x.shape[1], 48))
        for _ in range(2):
            q, k, v = self.heads(nn.LayerNorm()(x))
            if self.rope:
                q, k = rotate(q), rotate(k)
            weights = nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / 12**0.5)
            y = jnp.einsum("bhnm,bmhd->bnhd", weights, v)
            x = x + nn.Dense(48)(y.reshape(x.shape))
            x = x + nn.Dense(48)(nn.gelu(nn.Dense(96)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])

    def heads(self, x):
        batch, tokens, _ = x.shape
        shape = (batch, tokens, 4, 12)
        if self.qkv == "separate":
            return [nn.DenseGeneral((4, 12))(x) for _ in "qkv"]
        if self.qkv == "thirds":
            return [part.reshape(shape) for part in jnp.split(nn.Dense(144)(x), 3, -1)]
        if self.qkv == "3hd":
            return jnp.moveaxis(nn.Dense(144)(x).reshape(batch, tokens, 3, 4, 12), 2, 0)
        if self.qkv == "h3d":
            return jnp.moveaxis(nn.Dense(144)(x).reshape(batch, tokens, 4, 3, 12), 3, 0)
        keys, values = jnp.split(nn.Dense(48)(x).reshape(batch, tokens, 2, 24), 2, -1)
        return nn.Dense(48)(x).reshape(shape), jnp.repeat(keys, 2, 2), jnp.repeat(values, 2, 2)


def rotate(x):
    frequencies = 1 / 100 ** (jnp.arange(6) / 6)
    angles = jnp.arange(x.shape[1])[:, None] * jnp.concatenate([frequencies, frequencies])
    turned = jnp.concatenate([-x[..., 6:], x[..., :6]], -1)
    return x * jnp.cos(angles)[:, None] + turned * jnp.sin(angles)[:, None]


class Layer(nn.Module):
    """An RMSNorm, a gated MLP, a residual."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm()(x)
        return x + nn.Dense(20)(nn.silu(nn.Dense(36)(y)) * nn.Dense(36)(y)), None


class Scanned(nn.Module):
    """Three layers under nn.scan: their arrays are stacked, so all keep the same channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(20)(x)
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(4)(layers()(x, None)[0])


def recurrent():
    """A state read and written by one array, in a scan; the word table is tied to the output."""

    def function(params, words):
        embedded = params["table"][words]

        def step(state, x):
            state = jnp.tanh(x @ params["in"] + state @ params["loop"])
            return state, state

        start = jnp.zeros((words.shape[0], params["loop"].shape[0]))
        _, states = jax.lax.scan(step, start, jnp.moveaxis(embedded, 1, 0))
        return states @ params["out"] @ params["table"].T

    shapes = {"table": (11, 8), "in": (8, 7), "loop": (7, 7), "out": (7, 8)}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    words = np.random.default_rng(0).integers(0, 11, (2, 5))
    return function, randomized(params), (words,)


def mapped_heads():
    """Attention one head at a time (lax.map), with relative positions that the heads share."""

    def function(params, x):
        q, k, v = (jnp.einsum("nc,chd->hnd", x @ params["in"], params[name]) for name in "qkv")
        table = params["table"][np.arange(5)[:, None] - np.arange(5) + 4]

        def head(parts):
            q, k, v = parts
            return nn.softmax(q @ k.T + jnp.einsum("nd,nmd->nm", q, table)) @ v

        return jnp.einsum("hnd,hdc->nc", jax.lax.map(head, (q, k, v)), params["out"])

    shapes = {"in": (6, 12), "table": (9, 8), "out": (3, 10, 4)}
    shapes |= {"q": (12, 3, 8), "k": (12, 3, 8), "v": (12, 3, 10)}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return function, randomized(params), (np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32),)


MODELS = {
    "mlp": lambda: flax_model(Mlp(), IMAGES.reshape(2, -1)[:, :20]),
    "resnet": lambda: flax_model(ResNet(), IMAGES),
    "densenet": lambda: flax_model(DenseNet(), IMAGES),
    "c2f": lambda: flax_model(C2f(), IMAGES),
    "mobilenet": lambda: flax_model(MobileNet(), IMAGES),
    **{f"vit_{qkv}": lambda qkv=qkv: flax_model(Vit(qkv), IMAGES) for qkv in ("thirds", "3hd", "h3d", "gqa")},
    "vit_rope": lambda: flax_model(Vit("separate", rope=True), IMAGES),
    "scanned": lambda: flax_model(Scanned(), IMAGES[:, 0, 0]),
    "recurrent": recurrent,
    "mapped_heads": mapped_heads,
}


# model -> sizes of its groups, in the order of use; a list that lacks one would pass every test of equality
SIZES = {
    "mlp": [32, 24],
    "resnet": [16, 16, 32, 32],
    "densenet": [12, 16, 8, 16, 8, 16, 8, 18, 16, 8, 16, 8, 16, 8, 21],
    "c2f": [16, 12, 12, 12, 12, 8],
    "mobilenet": [16, 4, 16, 8, 4, 16, 8, 4, 6, 12],
    "vit_thirds": [48, *2 * (4, 12, 12, 96)],
    "vit_3hd": [48, *2 * (4, 12, 96)],
    "vit_h3d": [48, *2 * (4, 12, 96)],
    "vit_gqa": [48, *2 * (2, 12, 12, 2, 96)],
    "vit_rope": [48, *2 * (4, 6, 12, 96)],
    "scanned": [20, 36],
    "recurrent": [8, 7],
    "mapped_heads": [12, 3, 8, 10],
}


def halves(groups, seed=0):
    """{group: half of its channels, drawn at random}."""
    random = np.random.default_rng(seed)
    return {group.name: np.sort(random.permutation(group.size)[: max(1, group.size // 2)]) for group in groups}


def doubled(tree):
    """The tree in float64."""
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)


def largest_difference(a, b):
    """The largest relative to the largest value, over two trees of equal shapes."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert all(x.shape == y.shape for x, y in pairs)
    return max(float(np.abs(x - y).max() / np.abs(x).max()) for x, y in pairs)
