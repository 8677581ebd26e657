"""Criteria, reductions and normalisers: numbers by hand, and those of Torch-Pruning."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.graph_models import MODELS
from slimsam_jax import pruning
from slimsam_jax.errors import InputError
from slimsam_jax.pruning import find_groups, gradients, importance
from slimsam_jax.pruning.groups import Group, Member

# Made with torch 2.13 and torch-pruning 1.6.1 from a small net, random numbers of three digits in place of weights and
# of gradients; `layers` are its target types, and the normaliser is None where none is named:
#
#   net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(),
#                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()
#   groups = [graph.get_pruning_group(net[i], tp.prune_conv_out_channels, list(range(n))) for i, n in ((0, 6), (3, 5))]
#   l1, magnitude: GroupMagnitudeImportance(p=1 or 2, group_reduction, normalizer, target_types=[Conv2d, Linear])
#   taylor, fisher: GroupTaylorImportance, GroupHessianImportance of p.grad as it is (the mean of squared gradients)
#   fisher/first: OBDCImportance, with steps = 1 and Fisher = {layer: layer.weight.grad.flatten(1)}
#   fpgm: FPGMImportance(p=1), which takes absolute values; scale: BNScaleImportance
#   activation: ActivationImportance after one net(x)
PATH = Path(__file__).parents[1] / "golden/torch_pruning_criteria.json"
HIDDEN = Group("hidden", 3, (Member("a", 1, True), Member("b", 0, True)))
PARAMS = {"a": np.array([[3.0, 0.0, -1.0], [4.0, 2.0, -1.0]]), "b": np.array([[1.0], [-2.0], [5.0]])}
GRADS = {"a": np.array([[1.0, 1.0, -2.0], [0.5, 2.0, 2.0]]), "b": np.array([[2.0], [-3.0], [0.0]])}


def net(tree, x):
    """The same of Torch-Pruning's arrays, as Flax would name and lay out theirs."""
    conv = lambda x, name: jax.lax.conv_general_dilated(
        x, tree[name]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = conv(x, "first") + tree["first"]["bias"]
    norm = tree["norm"]
    x = (x - norm["mean"]) * jax.lax.rsqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]
    x = jax.nn.relu(conv(jax.nn.relu(x), "second") + tree["second"]["bias"])
    return x.mean((1, 2)) @ tree["last"]["kernel"] + tree["last"]["bias"]


def as_tree(state):
    arrays = {name: np.asarray(value, np.float32) for name, value in state.items()}
    kernel = lambda array: array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    layer = lambda i: {"kernel": kernel(arrays[f"{i}.weight"]), "bias": arrays[f"{i}.bias"]}
    moments = {"mean": np.zeros(6, np.float32), "var": np.ones(6, np.float32)}  # of a BatchNorm that saw nothing
    return {
        "first": layer(0),
        "norm": {"scale": arrays["1.weight"], "bias": arrays["1.bias"], **moments},
        "second": layer(3),
        "last": layer(7),
    }


@pytest.fixture(scope="module")
def other():
    data = json.loads(PATH.read_text())
    x = np.asarray(data["x"], np.float32).transpose(0, 2, 3, 1)
    params = as_tree(data["state"])
    return params, as_tree(data["grads"]), x, find_groups(net, params, x), data["scores"]


def ours(name, params, grads, x, grouping):
    criterion, _, how = name.partition("/")
    reduction, _, normalizer = how.partition("/")
    options = {"reduction": reduction, "normalizer": normalizer or "none"}
    if criterion == "scale":
        return pruning.score(params, grouping, None, "l1", votes="norm/scale", **options)
    if criterion.startswith("fpgm"):
        return pruning.score(jax.tree.map(np.abs, params), grouping, None, "fpgm", **options)
    if criterion == "fisher":
        grads = jax.tree.map(np.sqrt, grads)  # theirs are means of squares
    return pruning.score(params, grouping, grads, criterion, **options)


def test_scores_of_torch_pruning(other):
    """Every row of the table, in the order of channels and in the number itself; a group that is None is left out."""
    *arguments, theirs = other
    names = [group.name for group in arguments[-1].groups]
    assert len(names) == 2 and len(theirs) > 20
    for name in theirs.keys() - {"activation"}:
        scores = ours(name, *arguments)
        assert set(scores) == {group for group, expected in zip(names, theirs[name], strict=True) if expected}, name
        for group, expected in zip(names, theirs[name], strict=True):
            if expected:
                np.testing.assert_allclose(scores[group], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_activations_of_torch_pruning(other):
    params, _, x, grouping, theirs = other
    batches = ((x,), (2 * x,))
    scores = list(pruning.activations(params, grouping, batches[:1]).values())
    np.testing.assert_allclose(scores[0], theirs["activation"][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(len(x) * scores[1], theirs["activation"][1], rtol=1e-4)  # they add up, of a linear layer
    both = [list(pruning.activations(params, grouping, some).values()) for some in (batches, batches[1:])]
    np.testing.assert_allclose(both[0][0], (scores[0] + both[1][0]) / 2, rtol=1e-5)


def test_activations_inside_a_loop():
    """A state is read by each turn, as it was before, and by what follows the loop."""
    function, params, (words,) = MODELS["recurrent"]()
    grouping = find_groups(function, params, words)
    embedded, states = params["table"][words], [np.zeros((2, 7))]
    for t in range(5):
        states.append(np.tanh(embedded[:, t] @ params["in"] + states[-1] @ params["loop"]))
    before, after = (np.abs(part).mean((0, 1)) for part in (np.array(states[:-1]), np.array(states[1:])))
    read = np.abs(embedded).mean((0, 1)), np.abs(np.array(states[1:]) @ params["out"]).mean((0, 1))
    found = pruning.activations(params, grouping, [(words,)], "sum")
    of_embedding, of_state = (found[group.name] for group in grouping.groups)
    np.testing.assert_allclose(of_state, before + after, rtol=1e-5)
    np.testing.assert_allclose(of_embedding, np.add(*read), rtol=1e-5)


@pytest.mark.parametrize(
    ("criterion", "of_a", "of_b"),
    [
        ("l1", [7, 2, 2], [1, 2, 5]),
        ("l2", [5, 2, 2**0.5], [1, 2, 5]),
        ("magnitude", [25, 4, 2], [1, 4, 25]),
        ("obd", [8.5, 4, 1], [1, 0, 0]),
        ("fpgm", [13**0.5 + 41**0.5, 13**0.5 + 10**0.5, 41**0.5 + 10**0.5], [7, 10, 11]),
    ],
)
def test_criteria_by_hand(criterion, of_a, of_b):
    """A curvature below zero counts as none."""
    for reduction, expected in (("sum", np.add(of_a, of_b)), ("first", of_a), ("max", np.maximum(of_a, of_b))):
        scores = importance.channel_scores(PARAMS, GRADS, [HIDDEN], criterion, reduction=reduction)
        np.testing.assert_allclose(scores["hidden"], expected, rtol=1e-6, atol=1e-6)


def test_criteria_of_copies_are_those_of_each():
    random = np.random.default_rng(0)
    array = random.normal(size=(4, 2, 5, 3))
    group = Group("g", 5, (Member("a", 2, True, 1),), copies=2)
    alone = Group("g", 5, (Member("a", 1, True),))
    for criterion in set(importance.CHOICES) - {"random"}:
        both = importance.channel_scores({"a": array}, {"a": array + 1}, [group], criterion)["g"]
        for copy in range(2):
            one = {"a": array[:, copy]}
            score = importance.channel_scores(one, {"a": one["a"] + 1}, [alone], criterion)["g"]
            np.testing.assert_allclose(both[copy], score, rtol=1e-10, err_msg=criterion)


def test_distances_of_a_wide_layer_in_parts():
    weights = np.random.default_rng(0).normal(size=(2, 7, 3))
    between = np.linalg.norm(weights[:, :, None] - weights[:, None], axis=-1).sum(-1)
    np.testing.assert_allclose(importance._distances(weights, at_once=3), between, rtol=1e-6)


def test_lamp_counts_equal_scores_alike():
    lamp = importance.NORMALIZERS["lamp"]
    np.testing.assert_allclose(lamp(np.array([4.0, 1.0, 3.0, 1.0])), [1, 1 / 9, 3 / 7, 1 / 9])
    np.testing.assert_allclose(lamp(np.array([[4.0, 1.0], [3.0, 1.0]])), [[1, 1 / 9], [3 / 7, 1 / 9]])


def test_the_hessian_of_a_quadratic():
    """Exact where the Hessian is diagonal, whatever the signs drawn; right on average elsewhere."""
    curvature = {"a": np.array([2.0, 0.5, -3.0]), "b": np.array([[4.0, 1.0]])}
    halves = lambda params: sum(jnp.sum(c * params[k] ** 2) / 2 for k, c in curvature.items())
    params = jax.tree.map(jnp.ones_like, curvature)
    batches = [1.0, 3.0]
    found = gradients.hessian_diagonal(lambda p, x: x * halves(p), params, batches, jax.random.key(0))
    jax.tree.map(lambda got, c: np.testing.assert_allclose(got, 2 * c, rtol=1e-5), found, curvature)
    mixed = lambda p, x: halves(p) + 3 * p["a"][0] * p["b"][0, 0]
    found = gradients.hessian_diagonal(mixed, params, [0.0], jax.random.key(0), draws=400)
    np.testing.assert_allclose(found["a"], curvature["a"], atol=0.5)
    with pytest.raises(InputError, match="batches and draws: there are none"):
        gradients.hessian_diagonal(mixed, params, [], jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "lamp"}, "criterion 'lamp' is none of taylor, fisher, obd, magnitude, l1, l2, fpgm, random"),
        ({"criterion": "obd"}, "criterion 'obd' needs gradients; without them there are magnitude, l1, l2, fpgm,"),
        ({"criterion": "l1", "reduction": "median"}, "reduction 'median' is none of mean, sum, max, prod, first"),
        ({"criterion": "l1", "normalizer": "softmax"}, "normalizer 'softmax' is none of none, sum, mean"),
        (
            {"criterion": "l1", "votes": ["norm/sclae"]},
            "votes='norm/sclae' matches nothing; the nearest are norm/scale",
        ),
        ({"criterion": "l1", "only": ["first"]}, "there is no group 'first'"),
    ],
)
def test_what_cannot_be_scored(other, options, message):
    params, _, _, grouping, _ = other
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        pruning.score(params, grouping, **options)
    assert "\n" not in str(caught.value)


def test_what_has_no_activations(other):
    params, _, x, grouping, _ = other
    for call, message in (
        (lambda: pruning.activations(params, grouping, []), "there are no batches"),
        (lambda: pruning.activations(params, grouping, [(x[:1],)]), r"an input has shape \(1, 7, 7, 3\), but"),
        (lambda: pruning.activations(params, type(grouping).from_json(grouping.to_json()), [(x,)]), "read from JSON"),
        (lambda: pruning.activations({**params, "first": params["second"]}, grouping, [(x,)]), "has shape"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_what_a_kernel_reads_of_a_concatenation_is_one_array_s_score():
    """As Torch-Pruning counts a layer: not once for each of the concatenated."""
    random = np.random.default_rng(0)
    params = {name: random.standard_normal((4, 4 if name != "k" else 6)).astype(np.float32) for name in "ab"}
    params["k"] = random.standard_normal((8, 6)).astype(np.float32)
    function = lambda p, x: jax.nn.relu(jnp.concatenate([x @ p["a"], x @ p["b"]], 1) @ p["k"]).sum(1, keepdims=True)
    grouping = find_groups(function, params, np.ones((2, 4), np.float32))
    for criterion, wanted in (
        ("l1", np.abs(params["k"]).sum(0)),
        ("l2", np.linalg.norm(params["k"], axis=0)),
    ):
        for reduction in ("first", "mean", "max", "prod"):
            scores = pruning.score(params, grouping, criterion=criterion, reduction=reduction)
            np.testing.assert_allclose(scores["k:1"], wanted, rtol=1e-6, err_msg=f"{criterion} {reduction}")


def test_squares_of_half_precision_do_not_vanish():
    weights = {"a": np.array([[1e-4, 2e-4, 3e-4]], np.float16)}
    group = Group("g", 3, (Member("a", 1, True),))
    for criterion, power in (("magnitude", 2), ("fisher", 4)):
        scores = importance.channel_scores(weights, weights, [group], criterion)["g"]
        np.testing.assert_allclose(scores, np.float64(weights["a"][0]) ** power, rtol=1e-6)
    params = {"a": jnp.asarray([1e-4, 1.0], jnp.float16)}
    total = gradients.reduce_gradients(
        lambda p, image, key: jax.tree.map(lambda a: a[None], p), params, [np.ones((600, 1))], jax.random.key(0), "rms"
    )["a"]
    np.testing.assert_allclose(total, np.sqrt(600) * np.float32(params["a"]), rtol=1e-3)
