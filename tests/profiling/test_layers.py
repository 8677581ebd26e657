"""The table of layers of any function: by hand, against the counts of whole functions, and stage by stage."""

from __future__ import annotations

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.tables.strict import abstract
from helpers import golden_families
from helpers.graph_models import IMAGES, MODELS, halves
from slimsam_jax import pruning
from slimsam_jax.models.encoders import tiny_vit
from slimsam_jax.profiling import layers, macs, sam_costs
from slimsam_jax.profiling.layers import Layer
from slimsam_jax.profiling.macs import Macs
from slimsam_jax.pruning import costs


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


X = struct(2, 3)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv")(x))
        x = x.reshape(x.shape[0], -1, 8)
        x = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(5, name="head")(x.mean(1))


def test_a_network_counted_by_hand():
    images = struct(1, 16, 16, 3)
    params = jax.eval_shape(Net().init, jax.random.key(0), images)["params"]
    rows = layers.arrays(lambda p, x: Net().apply({"params": p}, x), params, images)
    by_name = {row.name: row for row in rows}
    assert by_name["conv/kernel"] == Layer("conv/kernel", 9 * 3 * 8, Macs(64 * 9 * 3 * 8, 0), (1, 8, 8, 8))
    assert by_name["norm/scale"] == Layer("norm/scale", 8, Macs(0, 0), (1, 64, 8))
    assert by_name["attention/(products)"].macs == Macs(0, 2 * 64 * 64 * 8)
    parts = {row.name: row for row in layers.layers(rows, depth=1)}
    assert list(parts) == ["conv", "norm", "attention", "head"]
    assert parts["attention"] == Layer("attention", 4 * 72, Macs(4 * 64 * 64, 2 * 64 * 64 * 8), (1, 64, 8))
    assert parts["head"] == Layer("head", 45, Macs(40, 0), (1, 5))
    deep = [row.name for row in layers.layers(rows)]
    assert deep[2:-1] == [f"attention{name}" for name in ("/query", "/key", "/value", "", "/out")]


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_are_the_whole(name):
    function, params, inputs = MODELS[name]()
    rows = layers.arrays(function, params, *inputs)
    whole = layers.total(rows)
    assert whole.macs == macs.count(function, params, *inputs) and whole.macs.linear > 0
    assert whole.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert layers.total(layers.layers(rows)) == layers.total(layers.layers(rows, 1)) == whole
    assert all(row.output for row in rows)
    kernels = [row for row in rows if row.name.endswith("kernel")]
    assert all(row.macs.linear > 0 for row in kernels)


@pytest.mark.parametrize("name", MODELS)
def test_what_groups_cost_is_what_layers_cost(name):
    """`pruning.costs` counts structures, this room shapes: the same for the whole function and for half of it."""
    function, params, inputs = MODELS[name]()
    grouping = pruning.find_groups(function, params, *inputs)
    for keep in ({}, halves(grouping.groups)):
        slim = pruning.shrink(params, grouping, keep) if keep else params
        at = grouping.widths | {name: len(kept) for name, kept in keep.items()}
        counted = layers.total(layers.arrays(functools.partial(grouping.run, keep=keep), slim, *inputs))
        assert costs.macs(grouping)(at) == sum(counted.macs)
        unread = sum(leaf.size for path, leaf in pruning.by_path(params).items() if path in grouping.unused)
        assert costs.parameters(grouping)(at) == counted.parameters - unread


def test_stages_of_tiny_vit_are_those_of_the_original(monkeypatch):
    """In MACs to the digit; the parameters include batch norm's statistics, which are buffers there."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # depthwise convolutions as such
    counted = json.loads((golden_families.HERE / "families_counts.json").read_text())["vit_t"]
    encoder = tiny_vit.ImageEncoder(tiny_vit.PRESETS["vit_t"])
    embed = lambda params, images: encoder.apply({"params": params}, images)[0]
    rows = layers.arrays(embed, abstract(encoder), struct(1, 1024, 1024, 3))
    linear, attention = {}, {}
    for row in rows:
        stage, part, *_ = row.name.split("/")
        name = stage.rpartition("_")[0] if "layers" not in stage else stage.replace("_", ".")
        name += ".downsample" if part == "downsample" else ""
        linear[name] = linear.get(name, 0) + row.macs.linear
        attention[name] = attention.get(name, 0) + row.macs.attention
    assert linear == counted["macs_linear_conv_by_stage"]
    assert {name: number for name, number in attention.items() if number} == counted["macs_attention_by_stage"]


def test_layers_of_sam_add_up_to_the_papers_columns(tiny_sam):
    """But for biases and activations, which the reference's counter adds to layers; attention is the same."""
    config = tiny_sam.config
    whole = layers.total(sam_costs.encoder_layers(config))
    assert whole.parameters == sam_costs.encoder_parameters(config)
    assert whole.macs.attention == sam_costs.encoder_macs(config).attention
    assert 0.9 < whole.macs.linear / sam_costs.encoder_macs(config).linear < 1


def rows_of(function, params, *inputs):
    return {row.name: row for row in layers.arrays(function, params, *inputs)}


def test_weights_that_are_shared_count_once_and_work_twice():
    params = {"a": struct(3, 6), "loop": struct(6, 6), "spare": struct(7)}
    rows = rows_of(lambda p, x: x @ p["a"] @ p["loop"] @ p["loop"], params, X)
    assert rows["loop"] == Layer("loop", 36, Macs(2 * 2 * 36, 0), (2, 6))
    assert rows["spare"] == Layer("spare", 7, Macs(0, 0), None) and list(rows)[-1] == "spare"


@pytest.mark.parametrize(
    "kernel",
    [
        lambda p: p["a"].T.reshape(6, 3).T,
        lambda p: p["a"].astype(jnp.bfloat16).astype(jnp.float32),
        lambda p: (p["a"] - p["a"].mean(0)) / (jnp.linalg.norm(p["a"], axis=0) + 1e-6),
        lambda p: p["a"] * p["scale"],
        lambda p: jax.checkpoint(jax.jit(jnp.sin))(p["a"]),
    ],
)
def test_a_kernel_may_be_made_of_its_array(kernel):
    rows = rows_of(lambda p, x: x @ kernel(p), {"a": struct(3, 6), "scale": struct(6)}, X)
    assert rows["a"].macs == Macs(2 * 3 * 6, 0) and rows["a"].output == (2, 6)
    assert rows["scale"].macs == Macs(0, 0)


def test_a_fused_kernel_is_shared_out_by_size():
    params = {"q": struct(3, 4), "k": struct(3, 8)}
    rows = rows_of(lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1), params, X)
    assert rows["q"].macs == Macs(24, 0) and rows["k"].macs == Macs(48, 0)


def test_loops_and_branches():
    """A loop of known length counts each turn, another one, and of two branches the dearer one."""
    params = {"scanned": struct(5, 3, 3), "branch": struct(3, 3), "turned": struct(3, 3)}

    def function(p, x):
        x, _ = jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, p["scanned"])
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["branch"], lambda x: x @ p["branch"] @ p["branch"], x)
        return jax.lax.while_loop(lambda x: (x @ x.T)[0, 0] < 3, lambda x: x @ p["turned"], x)

    rows = rows_of(function, params, X)
    assert rows["scanned"] == Layer("scanned", 45, Macs(5 * 18, 0), (2, 3))
    assert rows["branch"].macs == Macs(36, 0)
    whole = layers.total(tuple(rows.values())).macs
    assert whole == macs.count(function, params, X) == Macs(90 + 36 + 18 + 12, 0)


def test_products_without_parameters_stand_under_their_scope():
    def function(p, x):
        with jax.named_scope("mix"):
            x = x.T @ x
        return x @ x @ p["a"]

    rows = rows_of(function, {"a": struct(3, 6)}, X)
    assert {name: row.macs.linear for name, row in rows.items()} == {"mix/(products)": 18, "(products)": 27, "a": 54}
    assert layers.layers(tuple(rows.values()))[0].name == "mix"


def test_the_table_as_text():
    function, params, inputs = MODELS["mlp"]()
    text = layers.table(layers.layers(layers.arrays(function, params, *inputs)))
    assert text.splitlines()[2:] == [
        "params/Dense_0 |        672 | 2 x 32 |      1.28 k |",
        "params/Dense_1 |        792 | 2 x 24 |     1.536 k |",
        "params/Dense_2 |        125 |  2 x 5 |         240 |",
        "---------------+------------+--------+-------------+---------------",
        "total          |    1.589 k |        |     3.056 k |",
    ]
    assert layers.table(()).splitlines()[-1].startswith("total")


def test_a_cut_function_is_counted_without_its_class():
    from helpers.graph_models import halves
    from slimsam_jax import pruning

    function, params, inputs = MODELS["resnet"]()
    grouping = pruning.find_groups(function, params, *inputs)
    slim = pruning.shrink(params, grouping, halves(grouping.groups))
    rows = rows_of(grouping.run, slim, IMAGES)
    assert rows["params/Conv_1/kernel"].macs == Macs(2 * 16 * 16 * 9 * 8 * 8, 0)


def test_a_state_that_begins_as_an_array_is_an_activation():
    """Nor is a learned token the kernel where it meets one; the first output is what an array shows."""
    params = {"start": struct(3, 3), "kernel": struct(3, 3)}

    def function(p, x):
        token = p["start"] @ p["kernel"]
        state, _ = jax.lax.scan(lambda s, _: (s @ s, None), p["start"], length=4)
        turned = jax.lax.while_loop(lambda s: s[0, 0] < 3, lambda s: s @ s, p["start"])
        return x[0] @ p["kernel"] @ (token + state + turned)

    rows = rows_of(function, params, X)
    assert rows["start"].macs == Macs(0, 0)
    assert rows["kernel"] == Layer("kernel", 9, Macs(27 + 9, 0), (3, 3))
    assert rows["(products)"].macs == Macs(4 * 27 + 27 + 9, 0)
    assert [row.name for row in layers.layers(tuple(rows.values()))] == ["start", "kernel", "(products)"]


def test_what_a_while_loop_reads_is_read():
    def function(params, x):
        body = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ params["turn"]))
        return jax.lax.while_loop(lambda carry: carry[0] < params["most"], body, (0, x))[1] @ params["last"]

    params = {"turn": struct(3, 3), "most": jax.ShapeDtypeStruct((), np.int32), "last": struct(3, 5)}
    found = {layer.name: layer for layer in layers.arrays(function, params, X)}
    assert found["most"].output == ()
    assert found["turn"].macs.total == 2 * 3 * 3 and found["turn"].output == (2, 3)
