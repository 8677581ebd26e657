"""What each kind of primitive ties together, freezes or leaves free; traced on shapes, nothing is compiled."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.graph_models import MODELS
from slimsam_jax.errors import InputError
from slimsam_jax.pruning import Grouping, find_groups
from slimsam_jax.pruning.structure import Product, Sum


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


X = struct(2, 3)


def two_layers(between, width=8, after=8):
    """x @ a, something, @ b."""
    params = {"a": struct(3, width), "b": struct(after, 5)}
    return find_groups(lambda p, x: between(x @ p["a"]) @ p["b"], params, X)


def places(group):
    return [(member.path, member.axis) for member in group.members]


def test_a_layer_between_two_is_one_group():
    (group,) = two_layers(jax.nn.relu).groups
    assert (group.name, group.size, group.crossed) == ("a:1", 8, ())
    assert places(group) == [("a", 1), ("b", 0)]


def test_inputs_and_outputs_are_frozen_with_the_reason():
    grouping = two_layers(jax.nn.gelu)
    assert grouping.frozen == {"a:0": "an axis of an input", "b:1": "an axis of an output"}


@pytest.mark.parametrize(
    ("between", "crossed"),
    [
        (jax.nn.softmax, ("reduce_max", "reduce_sum")),
        (lambda y: jnp.cumsum(y, 1), ("cumsum",)),
        (lambda y: y / jnp.linalg.norm(y, axis=1, keepdims=True), ("reduce_sum",)),
        (lambda y: y * y.mean(0), ()),
    ],
)
def test_reductions_over_a_group_are_listed(between, crossed):
    (group,) = two_layers(between).groups
    assert group.crossed == crossed


@pytest.mark.parametrize(
    ("between", "name"),
    [
        (lambda y: jnp.fft.fft(y).real, "fft"),
        (lambda y: jnp.sort(y, 1), "sort"),
        (lambda y: y[:, ::-1], "rev"),
        (lambda y: jax.lax.top_k(y, 8)[0], "top_k"),
        (lambda y: jnp.linalg.qr(jnp.tile(y, (4, 1)))[0], "qr"),
    ],
)
def test_a_primitive_in_the_middle_freezes_what_it_touches_and_is_named(between, name):
    params = {"a": struct(3, 6), "b": struct(6, 8), "c": struct(8, 7), "d": struct(7, 5)}

    def function(p, x):
        return between(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"] @ p["d"]

    grouping = find_groups(function, params, X)
    assert [(group.name, group.size) for group in grouping.groups] == [("a:1", 6), ("c:1", 7)]
    assert name in grouping.frozen["b:1"]
    assert name in grouping.frozen["c:0"]


def test_the_structure_of_a_fused_axis_is_data():
    params = {"qkv": struct(3, 24), "out": struct(8, 5)}

    def function(p, x):
        q, k, v = (part.reshape(2, 2, 4) for part in jnp.split(x @ p["qkv"], 3, 1))
        return jnp.einsum("nhm,mhd->nhd", jnp.einsum("nhd,mhd->nhm", q, k), v).reshape(2, 8) @ p["out"]

    grouping = find_groups(function, params, X)
    heads, keys, values = (group.name for group in grouping.groups)
    assert (heads, keys, values) == ("qkv:1.0", "qkv:1.1", "qkv:1.2")
    assert [group.size for group in grouping.groups] == [2, 4, 4]
    assert [group.copies for group in grouping.groups] == [None, heads, heads]
    assert grouping.axes["qkv"][1] == Sum((Product((heads, keys)), Product((heads, keys)), Product((heads, values))))
    assert grouping.axes["out"] == (Product((heads, values)), 5)


def test_heads_that_share_a_table_share_their_channels():
    """As q and k of SAM do; the same without the table may keep channels of their own."""
    params = {"q": struct(3, 2, 4), "k": struct(3, 2, 4), "table": struct(9, 4), "v": struct(3, 2, 4)}

    def attention(p, x, table=True):
        q, k, v = (jnp.einsum("nc,chd->nhd", x, p[name]) for name in "qkv")
        logits = jnp.einsum("nhd,mhd->hnm", q, k)
        if table:
            logits += jnp.einsum("nhd,nmd->hnm", q, p["table"][jnp.array([[0, 1], [2, 3]])])
        return jnp.einsum("hnm,mhd->n", logits, v)

    copies = lambda grouping: {group.name: group.copies for group in grouping.groups}
    assert copies(find_groups(attention, params, X)) == {"q:1": None, "q:2": None, "v:2": "q:1"}
    free = find_groups(lambda p, x: attention(p, x, False), params, X)
    assert copies(free) == {"q:1": None, "q:2": "q:1", "v:2": "q:1"}
    assert free.unused == ("table",)


def test_a_sum_over_heads_ties_their_channels_but_not_the_heads_of_a_channel():
    params = {"a": struct(3, 2, 4), "b": struct(4, 5)}
    grouping = find_groups(lambda p, x: jnp.einsum("nc,chd->nhd", x, p["a"]).sum(1) @ p["b"], params, X)
    assert {group.name: group.copies for group in grouping.groups} == {"a:1": "a:2", "a:2": None}


def test_attention_between_heads_ties_their_channels():
    """Each head's channels meet those of the others."""
    params = {"q": struct(3, 2, 4), "k": struct(3, 2, 4), "mix": struct(2, 2)}

    def function(p, x):
        q, k = (jnp.einsum("nc,chd->nhd", x, p[name]) for name in "qk")
        return jnp.einsum("nhd,ngd,hg->n", q + jnp.einsum("ngd,gh->nhd", k, p["mix"]), k, p["mix"])

    groups = find_groups(function, params, X).groups
    assert {group.name: (group.size, group.copies) for group in groups} == {"q:1": (2, None), "q:2": (4, None)}


def test_constants_neither_tie_nor_freeze():
    """A table of angles made by iota is cut with the channels; two uses of one constant are two uses."""
    params = {"a": struct(3, 8), "b": struct(8, 8), "c": struct(8, 5)}

    def function(p, x):
        table = jnp.cos(jnp.arange(8.0))[None]
        y = x @ p["a"] * table
        return (y @ p["b"] * table) @ p["c"]

    assert [group.name for group in find_groups(function, params, X).groups] == ["a:1", "b:1"]


def test_heads_that_a_loop_takes_one_by_one_are_still_heads():
    """The relative positions tie the channels of q, which the loop does not see as heads."""
    function, params, inputs = MODELS["mapped_heads"]()
    groups = find_groups(function, params, *inputs).groups
    assert {group.name: group.copies for group in groups} == {"in:1": None, "q:1": None, "q:2": None, "v:2": "q:1"}


def test_a_stride_is_never_cut():
    """Even channels times odd ones: what is left must still alternate."""
    params = {"a": struct(3, 12), "b": struct(6, 5)}
    (group,) = find_groups(lambda p, x: ((y := x @ p["a"])[:, ::2] * y[:, 1::2]) @ p["b"], params, X).groups
    assert (group.name, group.size) == ("b:0", 6)
    assert find_groups(lambda p, x: (x @ p["a"])[:, ::2] @ p["b"], params, X).axes["a"][1] == Product(("b:0", 2))


def test_arrays_that_are_never_read_are_unused_and_dead_code_ties_nothing():
    params = {"a": struct(3, 8), "b": struct(8, 5), "spare": struct(7), "dead": struct(8, 8)}

    def function(p, x):
        y = x @ p["a"]
        jnp.sort(y @ p["dead"], 1)
        return y @ p["b"]

    grouping = find_groups(function, params, X)
    assert grouping.unused == ("dead", "spare")
    assert [group.name for group in grouping.groups] == ["a:1"]


def test_weights_that_are_shared_are_one_group():
    params = {"a": struct(3, 6), "loop": struct(6, 6), "b": struct(6, 5)}
    (group,) = find_groups(lambda p, x: x @ p["a"] @ p["loop"] @ p["loop"] @ p["b"], params, X).groups
    assert places(group) == [("a", 1), ("loop", 0), ("loop", 1), ("b", 0)]


def test_an_uneven_reshape_freezes_what_it_cuts_across():
    params = {"a": struct(3, 12), "b": struct(8, 5)}
    with pytest.raises(InputError, match=r"nothing can be cut .*a:1: a reshape of 2 by 12 to 3 by 8 cuts across it"):
        find_groups(lambda p, x: jax.nn.relu(x @ p["a"]).reshape(3, 8) @ p["b"], params, X)


def test_interleaved_pairs_are_cut_as_pairs():
    """RoPE of neighbouring channels: the pair stays whole, its number of pairs is free."""
    params = {"a": struct(3, 12), "b": struct(12, 5)}

    def function(p, x):
        y = (x @ p["a"]).reshape(2, 6, 2)
        return jnp.stack([-y[..., 1], y[..., 0]], -1).reshape(2, 12) @ p["b"]

    (group,) = find_groups(function, params, X).groups
    assert group.size == 6


def test_a_loop_keeps_the_state_and_a_branch_both_sides():
    params = {"a": struct(3, 6), "loop": struct(6, 6), "b": struct(6, 5)}

    def function(p, x):
        y = jax.lax.while_loop(lambda y: (y < 3).all(), lambda y: y @ p["loop"] + 1, x @ p["a"])
        y = jax.lax.cond(x[0, 0] > 0, lambda y: y @ p["loop"], jnp.sin, y)
        return jax.lax.fori_loop(0, 3, lambda _, y: y @ p["loop"], y) @ p["b"]

    (group,) = find_groups(function, params, X).groups
    assert places(group) == [("a", 1), ("loop", 0), ("loop", 1), ("b", 0)]


def test_kept_arrays_are_frozen_by_request():
    params = {"in": {"a": struct(3, 8)}, "out": {"b": struct(8, 6), "c": struct(6, 5)}}
    function = lambda p, x: x @ p["in"]["a"] @ p["out"]["b"] @ p["out"]["c"]
    assert [group.name for group in find_groups(function, params, X).groups] == ["in/a:1", "out/b:1"]
    for keep in ("in", "in/a", "i*/a", ["out/b:0"]):
        grouping = find_groups(function, params, X, keep=keep)
        assert [group.name for group in grouping.groups] == ["out/b:1"]
        assert grouping.frozen["out/b:0"] == "kept by request"


def test_the_json_is_the_grouping_without_the_function():
    grouping = two_layers(jax.nn.softmax)
    read = Grouping.from_json(grouping.to_json())
    assert read == grouping
    with pytest.raises(InputError, match="trace it again with find_groups"):
        read.run({}, None)


@pytest.mark.usefixtures("no_collector")
def test_a_long_function_takes_time_in_proportion():
    def seconds(layers):
        params = {"a": struct(3, 8), "b": struct(8, 8), "c": struct(8, 5)}

        def function(p, x):
            y = x @ p["a"]
            for _ in range(layers):
                y = jax.nn.gelu(y @ p["b"]) + y
            return y @ p["c"]

        start = time.process_time()
        find_groups(function, params, X)
        return time.process_time() - start

    seconds(10)
    assert seconds(400) < 40 * seconds(40)
