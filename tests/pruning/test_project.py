"""Bases are changed before the cut: exact at full width, and better than the given basis on correlated data."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.graph_models import MODELS, Vit, doubled, flax_model, largest_difference, randomized
from helpers.models import random_images, random_sam, tiny_config
from slimsam_jax import pruning
from slimsam_jax.compression.projection import attention, embedding, mlp, statistics
from slimsam_jax.errors import InputError
from slimsam_jax.models.encoders.vit import ImageEncoder, config_of
from slimsam_jax.models.sam import preprocess


def correlated(shape, rank=6, seed=0):
    """Vectors [..., c] that lie near a space of `rank` dimensions, float32."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(*shape[:-1], rank)) @ random.normal(size=(rank, shape[-1]))
    return (mixed + 0.1 * random.normal(size=shape)).astype(np.float32)


def layer_norm(x, p):
    y = x - x.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt((y**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["shift"]


def rms_norm(x, p):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + p["scale"])


def lengths(x, p):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def residual(norm, behind=lambda y: y, biases=True):
    """(function, parameters, inputs): a stream of 24 that two MLPs write and their norms read, and a head without."""

    def function(params, x):
        x = x @ params["in"]
        for block in params["blocks"]:
            y = behind(norm(x, block))
            y = jax.nn.gelu(y @ block["up"] + block.get("up_bias", 0))[:, : x.shape[1]]
            x = x + y @ block["down"] + block["down_bias"]
        return x @ params["out"]

    block = {"scale": (24,), "shift": (24,), "up": (24, 40), "down": (40, 24), "down_bias": (24,)}
    block |= {"up_bias": (40,)} if biases else {}
    shapes = {"in": (12, 24), "blocks": [block, block], "out": (24, 5)}
    struct = lambda shape: jax.ShapeDtypeStruct(shape, np.float32)
    params = jax.tree.map(struct, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return function, randomized(params), (correlated((3, 16, 12)),)


def both_sides():
    """An array that reads a norm and makes the stream, whose bias is the stream's."""

    def function(params, x):
        x = x @ params["in"]
        return (x + (layer_norm(x, params) @ params["loop"] + params["bias"])) @ params["out"]

    shapes = {"in": (12, 24), "scale": (24,), "shift": (24,), "loop": (24, 24), "bias": (24,), "out": (24, 5)}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return function, randomized(params), (correlated((3, 16, 12)),)


def no_bias(kind):
    """Behind a norm, what is added along tokens, as many as the kernel makes channels; and what two kernels share."""

    def function(params, x):
        y = layer_norm(x @ params["in"], params) @ params["a"]
        return y + params["b"][:, None] if kind == "tokens" else (y + params["b"], x @ params["c"] + params["b"])

    shapes = {"in": (12, 24), "scale": (24,), "shift": (24,), "a": (24, 16), "b": (16,), "c": (12, 16)}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return function, randomized(params), (correlated((16, 12)),)


def free_widths(grouping, share=1.0):
    """{group: channels that stay} of all groups whose basis is free."""
    free = pruning.freedom(grouping)
    return {g.name: max(1, int(share * g.size)) for g in grouping.groups if free[g.name].kind != "none"}


FULL = {
    "LayerNorm": lambda: residual(layer_norm),
    "LayerNorm, padded behind it": lambda: residual(layer_norm, lambda y: jnp.pad(y, ((0, 0), (0, 2), (0, 0)))),
    "LayerNorm, weighted behind it": lambda: residual(layer_norm, lambda y: y * np.linspace(0, 1, 16)[:, None]),
    "a scale and a shift alone": lambda: residual(lambda x, p: x * p["scale"] + p["shift"]),
    "LayerNorm, no bias behind it": lambda: residual(layer_norm, biases=False),
    "RMSNorm": lambda: residual(rms_norm),
    "length one": lambda: residual(lengths),
    "an array on both sides": both_sides,
    "numbers along tokens": lambda: no_bias("tokens"),
    "a bias that two kernels share": lambda: no_bias("shared"),
    "Flax ViT, q, k and v in one array": lambda: MODELS["vit_thirds"](),
    "Flax ViT, grouped queries": lambda: MODELS["vit_gqa"](),
}


@pytest.mark.parametrize("name", FULL)
def test_at_full_width_the_function_stays_the_same(name):
    """In float64, though every free group has another basis."""
    with jax.enable_x64(True):
        function, *arrays = FULL[name]()
        params, inputs = doubled(arrays)
        grouping = pruning.find_groups(function, params, *inputs)
        widths = free_widths(grouping)
        result, keep, how = pruning.project(params, grouping, [inputs], 0, widths)
        before = {path: np.asarray(leaf) for path, leaf in pruning.by_path(params).items()}
        for path, leaf in pruning.by_path(result).items():
            if any(place.path == path for g in grouping.groups if g.name in widths for place in g.members):
                assert np.abs(leaf - before[path]).max() > 1e-2, f"{path} is as it was"
        after = jax.jit(functools.partial(grouping.run, keep=keep, recount=True))(result, *inputs)
        assert largest_difference(jax.jit(function)(params, *inputs), after) < 1e-10
        assert keep.keys() == widths.keys() and how.keys() == grouping.widths.keys()


def error_of(run, params, inputs, wanted):
    return float(((jax.jit(run)(params, *inputs) - wanted) ** 2).mean() / np.var(wanted))


def vit():
    function, params, (images,) = flax_model(Vit("separate"), correlated((6, 16, 16, 3), rank=2))
    return function, params, (images,)


CUT = {
    "MLP with LayerNorm": (lambda: residual(layer_norm), 0.3),
    "Flax ViT": (vit, 0.5),
}


@pytest.mark.parametrize("name", CUT)
def test_at_half_the_width_less_is_lost_than_by_magnitude(name):
    """At the same widths of the same groups, on inputs that were not seen."""
    model, share = CUT[name]
    function, params, (seen,) = model()
    unseen = seen[::-1] * 0.9
    wanted = jax.jit(function)(params, unseen)
    grouping = pruning.find_groups(function, params, seen)
    slim, keep, how = pruning.project(params, grouping, [(seen,)], 0.5)
    lost = error_of(functools.partial(grouping.run, keep=keep, recount=True), slim, (unseen,), wanted)
    scores = pruning.score(params, grouping, criterion="magnitude")
    chosen = {name: np.sort(np.argsort(-scores[name])[: len(kept)]) for name, kept in keep.items()}
    cut = pruning.shrink(params, grouping, chosen)
    runs = [functools.partial(grouping.run, keep=chosen, recount=recount) for recount in (False, True)]
    by_magnitude = min(error_of(run, cut, (unseen,), wanted) for run in runs)
    assert lost < share * by_magnitude, (lost, by_magnitude)
    assert any("rotated" in words for words in how.values()) and any("refitted" in words for words in how.values())


@pytest.fixture(scope="module")
def sam():
    """A small SAM's encoder, images as it takes them, its grouping, and the moments of `compression`."""
    config = tiny_config()
    encoder, batch = random_sam(config).params["image_encoder"], random_images(config, 4)
    pixels = np.asarray(preprocess(config, batch["image"], batch["size"]))
    function = lambda params, x: ImageEncoder(config, attention="plain").apply({"params": params}, x)[0]
    grouping = pruning.find_groups(function, encoder, pixels)
    statistic = statistics.moments_of(random_sam(config).config, ("stream", "attention", "mlp"))
    return config, encoder, pixels, grouping, statistics.accumulate(statistic, jax.device_put(encoder), [batch])


def run_class(config, params, pixels):
    """The stock class at the widths of the parameters."""
    module = ImageEncoder(config_of(params, like=config), attention="plain")
    return jax.jit(lambda params: module.apply({"params": params}, pixels)[0])(params)


def test_sams_stream_is_rotated_as_by_hand(sam):
    """The same arrays as `compression.projection`, and the class at the new width is what `run` runs."""
    config, encoder, pixels, grouping, moments = sam
    stream = "patch_embed_proj/kernel:3"
    slim, keep, _ = pruning.project(encoder, grouping, [(pixels,)], 0, {stream: 16})
    by_hand = embedding.project_embedding(config, encoder, moments["stream"], 16)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-4), slim, by_hand)
    ran = jax.jit(functools.partial(grouping.run, keep=keep, recount=True))(slim, pixels)
    np.testing.assert_allclose(ran, run_class(config, slim, pixels), atol=1e-4)
    given = pruning.project(encoder, grouping, [(pixels,)], 0, {stream: 16}, {stream: moments["stream"]})
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-4), given.params, by_hand)


def test_sam_at_full_width(sam):
    """In float32, in which the class computes: stream, neck, and the heads of both blocks."""
    config, encoder, pixels, grouping, _ = sam
    widths = free_widths(grouping)
    slim, keep, _ = pruning.project(encoder, grouping, [(pixels,)], 0, widths)
    assert len(widths) == 6
    after = jax.jit(functools.partial(grouping.run, keep=keep, recount=True))(slim, pixels)
    assert largest_difference(run_class(config, encoder, pixels), after) < 1e-5


def test_sams_heads_and_mlps_lose_no_more_than_by_hand(sam):
    """Within a few percent: padding of windows counts here, and the means of values stay in v's bias there."""
    config, encoder, pixels, grouping, moments = sam
    wanted = run_class(config, encoder, pixels)
    heads = {name: 6 for name in grouping.widths if "q/kernel:2" in name or "v/kernel:2" in name}
    units = {name: 20 for name in grouping.widths if "mlp" in name}
    slim, keep, _ = pruning.project(encoder, grouping, [(pixels,)], 0, heads | units)
    by_hand = attention.project_heads(encoder, attention.head_bases(encoder, moments), [6, 6], [6, 6])
    by_hand = mlp.project_mlp(by_hand, mlp.hidden_units(by_hand, moments), [20, 20])
    ours = error_of(functools.partial(grouping.run, keep=keep, recount=True), slim, (pixels,), wanted)
    theirs = float(((run_class(config, by_hand, pixels) - wanted) ** 2).mean() / np.var(wanted))
    assert 0 < ours < 1.05 * theirs, (ours, theirs)


def test_a_convolutional_net_is_refused_in_one_line():
    function, params, inputs = MODELS["resnet"]()
    grouping = pruning.find_groups(function, params, *inputs)
    with pytest.raises(InputError, match=r"^no group can be projected; params/Conv_0/kernel:3 is left whole: .*rsqrt"):
        pruning.project(params, grouping, [inputs])


@pytest.fixture(scope="module")
def small():
    function, params, inputs = residual(layer_norm)
    return params, pruning.find_groups(function, params, *inputs), inputs


BAD = {
    "no batches": ({"batches": []}, "there are no batches to take moments of"),
    "other inputs": ({"batches": [(np.zeros((3, 7, 12), np.float32),)]}, "an input has shape"),
    "an unknown group": ({"widths": {"up": 3}}, "there is no group 'up' to project"),
    "a width above the group's": ({"widths": {"in:1": 25}}, "group 'in:1' has 24 channels; 25 of them cannot stay"),
    "no width": ({"widths": {"in:1": 0}}, "group 'in:1' has 24 channels; 0 of them cannot stay"),
    "a ratio of one": ({"ratio": 1.0}, "ratio is the share of channels that goes, from 0 to below 1; it is 1.0"),
    "moments of another shape": ({"moments": {"in:1": np.eye(23)}}, r"must be \[24, 24\]; it is \[23, 23\]"),
    "moments that are not finite": ({"moments": {"in:1": np.full((24, 24), np.nan)}}, "'in:1' is not finite"),
    "moments of units": ({"moments": {"blocks/0/up:1": np.eye(40)}}, "'blocks/0/up:1' is none"),
    "inputs that are not finite": (
        {"batches": [(np.full((3, 16, 12), np.inf, np.float32),)]},
        "group 'in:1': its moments on these inputs are not finite",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, small):
    params, grouping, inputs = small
    given, message = BAD[name]
    with pytest.raises(InputError, match=message) as error:
        pruning.project(params, grouping, given.pop("batches", [inputs]), **given)
    assert "\n" not in str(error.value)


def test_a_group_that_cannot_be_projected_is_not_asked_for():
    function, params, inputs = MODELS["vit_rope"]()
    grouping = pruning.find_groups(function, params, *inputs)
    name = "params/DenseGeneral_0/kernel:2.0"
    with pytest.raises(InputError, match=f"group '{name}' cannot be projected: a constant of the function lies along"):
        pruning.project(params, grouping, [inputs], 0, {name: 3})


def test_a_dead_scale_with_a_live_shift_needs_a_bias():
    function, params, inputs = residual(layer_norm, biases=False)
    params["blocks"][0]["scale"][3] = 0
    grouping = pruning.find_groups(function, params, *inputs)
    with pytest.raises(InputError, match="blocks/0/scale is zero where blocks/0/shift is not"):
        pruning.project(params, grouping, [inputs], 0, {"in:1": 12})


def test_means_over_cut_channels_count_what_is_left_if_asked_to():
    function = lambda p, x: (x @ p["a"]).mean(-1)
    params = {"a": np.ones((12, 8), np.float32)}
    x = correlated((4, 12))
    grouping = pruning.find_groups(function, params, x)
    cut = pruning.shrink(params, grouping, {"a:1": np.arange(2)})
    whole = function(params, x)
    np.testing.assert_allclose(grouping.run(cut, x), whole / 4, rtol=1e-5)
    np.testing.assert_allclose(grouping.run(cut, x, recount=True), whole, rtol=1e-5)
