"""Bad input is answered with one line that names the path."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimsam_jax import pruning
from slimsam_jax.errors import InputError
from slimsam_jax.pruning import Grouping, find_groups

PARAMS = {"a": np.ones((3, 8), np.float32), "b": np.ones((8, 5), np.float32)}
X = np.ones((2, 3), np.float32)


def function(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


@pytest.fixture(scope="module")
def grouping():
    return find_groups(function, PARAMS, X)


def heads(params, x):
    q, k = ((x @ params[name]).reshape(2, 2, 4) for name in "qk")
    return jnp.einsum("nhd,mhd->nm", q, k)


def called_back(y):
    return jax.pure_callback(lambda y: np.asarray(y), jax.ShapeDtypeStruct(y.shape, y.dtype), y)


def endless(n):
    return endless(n + 1)


def narrow(params, x):
    """Each number as two of half its size."""
    halves = jax.lax.bitcast_convert_type(x @ params["a"], jnp.bfloat16)
    return halves.sum(-1).astype(np.float32) @ params["b"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: find_groups(lambda p, x: x @ p["a"] if p["a"].sum() > 0 else x, PARAMS, X),
            "cannot be traced: Tracer",
        ),
        (lambda: find_groups(lambda p, x: x @ p["missing"], PARAMS, X), "cannot be traced: KeyError: 'missing'"),
        (lambda: find_groups(lambda p: p, {"layer": {"a": "text"}}), "parameter 'layer/a' is a str, not an array"),
        (lambda: find_groups(lambda p: 1, {}), "there are no parameters"),
        (lambda: find_groups(lambda p, x: x @ p["a"], PARAMS, X), "nothing can be cut .a:0: an axis of an input; a:1"),
        (
            lambda: find_groups(lambda p, x: jnp.fft.fft(x @ p["a"]).real @ p["b"], PARAMS, X),
            "a:1: primitive fft has no",
        ),
        (lambda: find_groups(function, PARAMS, X, keep=["c/*"]), "keep='c/.' matches no parameter; the nearest are"),
        (lambda: find_groups(function, PARAMS, X, keep=[3]), r"takes paths or patterns of paths, not \[3\]"),
        (lambda: find_groups(function, PARAMS, X, keep=None), "takes paths or patterns of paths, not None"),
        (lambda: find_groups(lambda p, x: None, PARAMS, X), "the function returns no array"),
        (lambda: find_groups(lambda p, x: (), PARAMS, X), "the function returns no array"),
        (lambda: find_groups(lambda p, x: 3.0, PARAMS, X), "nothing can be cut .no parameter is read"),
        (lambda: find_groups(lambda p, x: p["s"] * x, {"s": np.float32(3)}, X), "or all axes have length 1"),
        (lambda: find_groups(lambda p, x: "text", PARAMS, X), "cannot be traced: TypeError: .*<class 'str'>"),
        (lambda: find_groups(function, {**PARAMS, "c": 2.0}, X), "parameter 'c' is a float, not an array"),
        (lambda: find_groups(function, {**PARAMS, "c": np.array([object()])}, X), "parameter 'c' holds object"),
        (lambda: find_groups(function, {"c": None}, X), "there are no parameters"),
        (lambda: find_groups(function, {"a/b": X, "a": {"b": X}}, X), "two parameters have the path 'a/b'"),
        (lambda: find_groups(function, PARAMS, X, "train"), "cannot be traced: TypeError"),
        (lambda: find_groups(lambda p, x, t: x if t else 0, PARAMS, X, True), "cannot be traced: TracerBool"),
        (lambda: find_groups(lambda p, x: called_back(x @ p["a"]) @ p["b"], PARAMS, X), "a:1: primitive pure_callback"),
        (lambda: find_groups(lambda p, x: endless(0), PARAMS, X), "cannot be traced: RecursionError"),
        (lambda: find_groups(3, PARAMS, X), "cannot be traced: TypeError"),
        (lambda: find_groups(narrow, PARAMS, X), "a:1: its numbers are read as those of another size"),
    ],
)
def test_what_cannot_be_grouped(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"a:2": [0]}, "there is no group 'a:2'; the nearest are a:1"),
        ({"a:1": []}, "group 'a:1' would keep none of its 8 channels"),
        ({"a:1": [2, 1]}, "ascending and between 0 and 7"),
        ({"a:1": [1, 1]}, "ascending and between 0 and 7"),
        ({"a:1": [1, 8]}, "ascending and between 0 and 7"),
        ({"a:1": [-1, 3]}, "ascending and between 0 and 7"),
        ({"a:1": [[0, 1]]}, r"must be indices of channels, \[width\]; it is int64\(1, 2\)"),
        ({"a:1": [True, False]}, "must be indices of channels"),
    ],
)
@pytest.mark.parametrize("what", [pruning.mask, pruning.shrink])
def test_what_cannot_be_kept(grouping, what, keep, message):
    with pytest.raises(InputError, match=message):
        what(PARAMS, grouping, keep)


def test_another_tree(grouping):
    keep = {"a:1": [0, 1]}
    with pytest.raises(InputError, match=r"there is no array 'b', which was traced; the nearest are a"):
        pruning.shrink({"a": PARAMS["a"]}, grouping, keep)
    with pytest.raises(InputError, match=r"array 'b' has shape \(7, 5\), not \(8, 5\)"):
        pruning.mask({**PARAMS, "b": PARAMS["b"][:7]}, grouping, keep)
    with pytest.raises(InputError, match="array 'c' was not there when the function was traced"):
        pruning.mask({**PARAMS, "c": X}, grouping, keep)
    with pytest.raises(InputError, match="'b' is a str, not an array"):
        pruning.mask({**PARAMS, "b": "text"}, grouping, keep)
    with pytest.raises(InputError, match=r"must be {group: indices of channels}, not of type list"):
        pruning.mask(PARAMS, grouping, [0, 1])


def test_what_cannot_be_selected(grouping):
    with pytest.raises(InputError, match="'taylor' needs gradients"):
        pruning.score(PARAMS, grouping)
    with pytest.raises(InputError, match="group 'a:1' has no copies"):
        pruning.score(PARAMS, grouping, criterion="magnitude", own=["a:1"])
    scores = pruning.score(PARAMS, grouping, criterion="magnitude")
    for ratio in (1, 1.5, -0.1):
        with pytest.raises(InputError, match="would leave no channel of a group"):
            pruning.select(scores, ratio)
    with pytest.raises(InputError, match="there are no groups"):
        pruning.select({}, 0.5)
    with pytest.raises(InputError, match="allocation 'block' is none of local, global, isomorphic, params, macs, cost"):
        pruning.select(scores, 0.5, "block")
    with pytest.raises(InputError, match="costs lack the group 'a:1'"):
        pruning.select(scores, 0.5, "cost", costs={})
    with pytest.raises(InputError, match=r"ratio 0\.99: .* is less than"):
        pruning.select(scores, 0.99, "cost", costs={"a:1": np.arange(9.0)})


def test_what_cannot_be_run(grouping):
    slim = pruning.shrink(PARAMS, grouping, {"a:1": [0, 1, 5]})
    with pytest.raises(InputError, match=r"an input has shape \(4, 3\), but \(2, 3\) was traced"):
        grouping.run(slim, np.ones((4, 3), np.float32))
    with pytest.raises(InputError, match="the arguments are"):
        grouping.run(slim)
    with pytest.raises(InputError, match=r"array 'b' has shape \(8, 5\), not \(3, 5\)"):
        grouping.run({**slim, "b": PARAMS["b"]}, X)
    with pytest.raises(InputError, match="'a' is a str, not an array"):
        grouping.run({**slim, "a": "text"}, X)
    with pytest.raises(InputError, match="is wider than group 'a:1', which has 8"):
        grouping.run({"a": np.ones((3, 9), np.float32), "b": np.ones((9, 5), np.float32)}, X)


def test_arguments_of_other_types():
    """Where lax would not take them; what it takes is run."""
    function = lambda p, x: (x @ p["a"] + p["c"]) @ p["b"]
    params = {**PARAMS, "c": np.ones(8, np.float32)}
    grouping = find_groups(function, params, X)
    slim = pruning.shrink(params, grouping, {"a:1": [0, 1, 5]})
    with pytest.raises(InputError, match="array 'c' is int8, but the function was traced with float32"):
        grouping.run({**slim, "c": slim["c"].astype(np.int8)}, X)
    added = find_groups(lambda p, x, y: (x @ p["a"]).sum(1) + y, {"a": np.ones((3, 8), np.float32)}, X, X[:, 0])
    with pytest.raises(InputError, match="input 2 is int8, but the function was traced with float32"):
        added.run({"a": PARAMS["a"]}, X, X[:, 0].astype(np.int8))


def test_an_axis_that_no_cut_leaves():
    """Pairs of channels stay pairs."""
    pairs = find_groups(lambda p, x: (x @ p["a"])[:, ::2] @ p["b"], {"a": PARAMS["a"], "b": PARAMS["b"][:4]}, X)
    with pytest.raises(InputError, match="a: an axis of length 7 is none that a cut of group 'b:0' leaves"):
        pairs.run({"a": PARAMS["a"][:, :7], "b": PARAMS["b"][:3]}, X)


def test_an_axis_that_has_one_group_twice():
    """All pairs of channels: 9 are of 3, and 10 of no number of them."""
    params = {"a": np.ones((3, 8), np.float32), "c": np.ones((64, 5), np.float32)}
    function = lambda p, x: jnp.einsum("ni,nj->nij", x @ p["a"], x @ p["a"]).reshape(2, 64) @ p["c"]
    x = np.ones((2, 3), np.float32)
    keep = {"a:1": np.array([1, 3, 6])}
    slim = pruning.shrink(params, find_groups(function, params, x), keep)
    anew = find_groups(function, params, x)
    np.testing.assert_allclose(anew.run(slim, x), 9 * 3**2)
    with pytest.raises(InputError, match="c: an axis of length 10 is none that a cut of group 'a:1' leaves"):
        anew.run(slim | {"a": np.ones((3, 8), np.float32), "c": np.ones((10, 5), np.float32)}, x)


def test_shapes_that_leave_a_width_open():
    """2 heads of 2 channels and 1 of 4 have the same shapes; arrays that nobody cut here do not say which they are."""
    params = {"q": np.ones((3, 8), np.float32), "k": np.ones((3, 8), np.float32)}
    grouping = find_groups(heads, params, X)
    keep = {"q:1.1": [0, 2]}
    slim = pruning.shrink(params, grouping, keep)
    strange = {name: array + 1 for name, array in slim.items()}
    other = pruning.shrink(params, grouping, {"q:1.0": [1]})
    assert grouping.run(slim, X).shape == grouping.run(other, X).shape == (2, 2)
    with pytest.raises(InputError, match=r"do not tell how many channels of group 'q:1.0' stay \(q\): pass keep="):
        grouping.run(strange, X)
    np.testing.assert_allclose(grouping.run(strange, X, keep=keep), 2 * 2 * 36)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format=9),
        lambda data: data.update(axes={"a": [{"quotient": [1, 2]}]}),
        lambda data: data.update(axes={"a": [3, "gone"]}),
        lambda data: data["groups"][0].update(size=-1),
        lambda data: data["groups"][0].update(copies="gone"),
        lambda data: data.pop("frozen"),
        lambda data: data.update(groups=[1]),
    ],
)
def test_json_that_is_no_grouping(grouping, change):
    data = json.loads(grouping.to_json())
    change(data)
    with pytest.raises(InputError):
        Grouping.from_json(json.dumps(data))


def test_text_that_is_no_json():
    for text in ("", "[]", "{", "[" * 5000):
        with pytest.raises(InputError, match="not the JSON of a grouping"):
            Grouping.from_json(text)
