"""Importance, selection, masks and shrinking: four numbers in, four out; then the invariances."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import written_groups
from helpers.models import random_images, random_sam, tiny_config
from slimsam_jax.compression import reference
from slimsam_jax.models.encoders.vit import config_of, keep_logit_scale
from slimsam_jax.models.sam import run_encoder
from slimsam_jax.pruning import allocation, gradients, importance
from slimsam_jax.pruning.groups import Group, Member, check_groups
from slimsam_jax.pruning.selection import keep_global, keep_local
from slimsam_jax.pruning.shrink import apply_masks, mask_tree, shrink

PARAMS = {
    "first": jnp.array([[1.0, -2.0], [3.0, 4.0]]),
    "bias": jnp.array([5.0, 6.0]),
    "last": jnp.array([[1.0], [-1.0]]),
}
GRADS = {
    "first": jnp.array([[0.5, 1.0], [1.0, -0.5]]),
    "bias": jnp.array([9.0, 9.0]),
    "last": jnp.array([[2.0], [8.0]]),
}
HIDDEN = Group("hidden", 2, (Member("first", 1, True), Member("bias", 0), Member("last", 0, True)))


def test_taylor_scores_by_hand():
    scores = importance.channel_scores(PARAMS, GRADS, [HIDDEN])
    # Column sums of |w g|: [.5 + 3, 2 + 2]; rows of the last: [2, 8]; the bias has no vote.
    np.testing.assert_allclose(scores["hidden"], [(3.5 + 2) / 2, (4 + 8) / 2])


def test_magnitude_scores_by_hand():
    scores = importance.channel_scores(PARAMS, GRADS, [HIDDEN], "magnitude")
    np.testing.assert_allclose(scores["hidden"], [(10 + 1) / 2, (20 + 1) / 2])


def test_fisher_scores_by_hand():
    scores = importance.channel_scores(PARAMS, GRADS, [HIDDEN], "fisher")
    np.testing.assert_allclose(scores["hidden"], [(0.25 + 9 + 4) / 2, (4 + 4 + 64) / 2])


def test_keep_masks_and_shrink_by_hand():
    keep = {"hidden": np.array([1])}
    shrunk = shrink(PARAMS, [HIDDEN], keep)
    chex.assert_trees_all_equal(
        shrunk, {"first": jnp.array([[-2.0], [4.0]]), "bias": jnp.array([6.0]), "last": jnp.array([[-1.0]])}
    )
    mask = mask_tree(PARAMS, [HIDDEN], keep)
    chex.assert_trees_all_equal(
        mask, {"first": jnp.array([[0.0, 1.0]]), "bias": jnp.array([0.0, 1.0]), "last": jnp.array([[0.0], [1.0]])}
    )
    masked = apply_masks(PARAMS, mask)
    chex.assert_trees_all_equal(masked["first"], jnp.array([[0.0, -2.0], [0.0, 4.0]]))


def test_ties_are_settled_and_the_exact_number_goes():
    keep = keep_local({"g": np.array([1.0, 1.0, 1.0, 1.0])}, 0.5)
    np.testing.assert_array_equal(keep["g"], [0, 1])
    keep = keep_global({"a": np.ones(4), "b": np.ones(4)}, 0.5)
    assert sum(map(len, keep.values())) == 4


def test_global_selection_by_hand():
    scores = {"a": np.array([9.0, 8.0, 7.0, 6.0]), "b": np.array([1.0, 2.0, 3.0, 10.0])}
    keep = keep_global(scores, 0.5)
    np.testing.assert_array_equal(keep["a"], [0, 1, 2])
    np.testing.assert_array_equal(keep["b"], [3])
    keep = keep_global(scores, 0.5, round_to=2)  # pairs: a (9, 8) and (7, 6), b (10, 3) and (2, 1)
    np.testing.assert_array_equal(keep["a"], [0, 1])  # every group keeps one pair
    np.testing.assert_array_equal(keep["b"], [2, 3])
    keep = keep_global({"a": np.array([9.0, 8.0, 7.0, 6.0]), "b": np.array([0.1, 0.4, 0.2, 0.3])}, 0.5, min_keep=0.5)
    np.testing.assert_array_equal(keep["b"], [1, 3])


def test_every_group_keeps_its_least_whatever_is_left():
    scores = {name: np.array([4.0, 3.0, 2.0, 1.0]) for name in "abc"}
    assert allocation.global_widths(scores, 0.95) == {"a": 1, "b": 1, "c": 1}  # 0.6 of 12 channels, that is 1
    assert allocation.global_widths(scores, 0.95, round_to=2) == {"a": 2, "b": 2, "c": 2}
    # Half of each is one chunk of two, not two chunks.
    assert allocation.global_widths(scores, 0.95, round_to=2, min_keep=0.5) == {"a": 2, "b": 2, "c": 2}
    assert allocation.global_widths({"a": 9 * np.ones(4), "b": np.ones(4)}, 0.25, 2, min_keep=0.5) == {"a": 4, "b": 2}


def test_reference_rounds_down_and_spares_the_highest_numbers():
    np.testing.assert_array_equal(reference.keep_local({"g": np.arange(8.0)}, 0.4, 4)["g"], [4, 5, 6, 7])
    # 5 of 8 lie below the pooled threshold, 4 can go: the fifth, number 4, is spared though 2 is as good.
    keep = reference.keep_global({"g": np.array([0, 1, 2, 3, 4, 9, 8, 7.0])}, 5 / 8, 4)
    np.testing.assert_array_equal(keep["g"], [4, 5, 6, 7])
    # A group wholly below the threshold is not pruned at all.
    keep = reference.keep_global({"low": np.zeros(4), "high": np.ones(4)}, 0.5, 1)
    assert len(keep["low"]) == len(keep["high"]) == 4


def test_reference_ties_channels_over_heads():
    keep = reference.keep_local_tied({"g": np.array([9.0, 1.0, 0.0, 1.0])}, 0.5, 2, ties=2)
    np.testing.assert_array_equal(keep["g"], [0, 2])  # 9 + 0 against 1 + 1


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(4, 40), min_size=1, max_size=4),
    ratio=st.floats(0.01, 0.95),
    round_to=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_global_selection_keeps_its_promises(sizes, ratio, round_to, seed):
    random = np.random.default_rng(seed)
    scores = {str(i): random.random(size // round_to * round_to) for i, size in enumerate(sizes)}
    keep = keep_global(scores, ratio, round_to)
    total = sum(map(len, scores.values()))
    wanted = max(allocation.rounded_width(total, ratio, round_to), round_to * len(scores))
    assert sum(map(len, keep.values())) == wanted
    for name, kept in keep.items():
        assert len(kept) >= round_to and len(kept) % round_to == 0
        assert (np.diff(kept) > 0).all()
        gone = np.setdiff1d(np.arange(len(scores[name])), kept)
        assert not len(gone) or scores[name][kept].min() >= scores[name][gone].max()


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="share of channels"):
        allocation.rounded_width(8, ratio)


def test_unknown_paths_name_their_neighbours():
    with pytest.raises(ValueError, match="the nearest are first"):
        check_groups(PARAMS, [Group("g", 2, (Member("fist", 0),))])
    with pytest.raises(ValueError, match="should have 3 channels"):
        check_groups(PARAMS, [Group("g", 3, (Member("first", 0),))])


@pytest.fixture(scope="module")
def model():
    return random_sam(tiny_config())


@functools.partial(jax.jit, static_argnames="config")
def run(config, encoder, batch):
    return run_encoder(config, encoder, batch)


def embed(config, encoder, seed=0):
    return run(config, encoder, random_images(config, seed=seed))[0]


def test_groups_cover_the_encoder(model):
    groups = [
        written_groups.embedding_group(model.config),
        *written_groups.attention_groups(model.config),
        *written_groups.mlp_groups(model.config),
    ]
    encoder = model.params["image_encoder"]
    check_groups(encoder, groups)
    members = {member.path for group in groups for member in group.members}
    leaves = {"/".join(k.key for k in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(encoder)}
    assert {leaf.split("/")[0] for leaf in leaves - members} == {"neck_1", "neck_2", "neck_3"}


def test_masked_equals_shrunk_in_the_bottlenecks(model):
    """Attention needs its old temperature (keep_logit_scale); then both agree to rounding."""
    config, encoder = model.config, model.params["image_encoder"]
    groups = written_groups.attention_groups(config) + written_groups.mlp_groups(config)
    random = np.random.default_rng(0)
    keep = {g.name: np.sort(random.choice(g.size, size, False)) for g, size in zip(groups, (5, 7, 11, 13), strict=True)}
    masked = apply_masks(encoder, mask_tree(encoder, groups, keep))
    shrunk = shrink(encoder, groups, keep)
    after = config_of(shrunk, like=config)
    assert [(b.head_dim, b.mlp_dim) for b in after.blocks] == [(5, 11), (7, 13)]
    rescaled = keep_logit_scale(shrunk, encoder)
    np.testing.assert_allclose(embed(after, rescaled), embed(config, masked), atol=2e-5)
    assert np.abs(embed(after, shrunk) - embed(config, masked)).max() > 1e-3  # the jump of the temperature is real


def test_masked_equals_shrunk_when_heads_keep_their_own_values(model):
    config, encoder = model.config, model.params["image_encoder"]
    groups = written_groups.value_groups(config) + written_groups.logit_groups(config)
    random = np.random.default_rng(0)
    some = lambda size: np.sort(random.choice(12, size, False))
    keep = {f"blocks_{i}/attn/v": np.stack([some(width), some(width)]) for i, width in enumerate((5, 7))}
    keep |= {f"blocks_{i}/attn/qk": some(width) for i, width in enumerate((5, 7))}
    check_groups(encoder, groups)
    masked = apply_masks(encoder, mask_tree(encoder, groups, keep))
    shrunk = shrink(encoder, groups, keep)
    after = config_of(shrunk, like=config)
    assert [b.head_dim for b in after.blocks] == [5, 7]
    rescaled = keep_logit_scale(shrunk, encoder)
    np.testing.assert_allclose(embed(after, rescaled), embed(config, masked), atol=2e-5)


def test_masked_equals_shrunk_for_whole_heads(model):
    config, encoder = model.config, model.params["image_encoder"]
    groups, keep = written_groups.head_groups(config), {"blocks_0/attn/heads": np.array([1])}
    masked = apply_masks(encoder, mask_tree(encoder, groups, keep))
    shrunk = shrink(encoder, groups, keep)
    after = config_of(shrunk, like=config)
    assert [b.heads for b in after.blocks] == [1, 2]
    np.testing.assert_allclose(embed(after, shrunk), embed(config, masked), atol=2e-5)


def test_scores_of_copies_add_up_to_those_of_the_shared_group(model):
    """v and proj alone: what all heads together say is the sum of what each says."""
    config, encoder = model.config, model.params["image_encoder"]
    grads = random_sam(config, seed=1).params["image_encoder"]
    apart = importance.channel_scores(encoder, grads, written_groups.value_groups(config))
    members = lambda group: tuple(m._replace(copies=None) for m in group.members)
    shared = [dataclasses.replace(g, copies=0, members=members(g)) for g in written_groups.value_groups(config)]
    for name, score in importance.channel_scores(encoder, grads, shared).items():
        assert apart[name].shape == (2, 12)
        np.testing.assert_allclose(apart[name].sum(0), score, rtol=1e-5)


def test_masked_differs_from_shrunk_in_the_embedding_only_by_the_layer_norms(model):
    """LayerNorm averages over zeroed channels. Undone by hand, one linear layer agrees; the encoder does not."""
    config, encoder = model.config, model.params["image_encoder"]
    group = written_groups.embedding_group(config)
    keep = {"embedding": np.arange(0, 24, 2)}
    masked = apply_masks(encoder, mask_tree(encoder, [group], keep))
    shrunk = shrink(encoder, [group], keep)
    after = config_of(shrunk, like=config)
    assert after.embed_dim == 12
    batch = random_images(config)
    _, wide = run(config, masked, batch)
    _, slim = run(after, shrunk, batch)
    np.testing.assert_allclose(slim["patch"]["out"], wide["patch"]["out"][..., keep["embedding"]], atol=1e-5)
    assert np.abs(slim["blocks_1"]["out"] - wide["blocks_1"]["out"][..., keep["embedding"]]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("noise_samples", [1, 2])
def test_disturbed_gradient_is_that_of_the_loss(model, noise_samples):
    """Of every image and probe by itself: summed as they are, or by their squares."""
    config, encoder = model.config, jax.tree.map(jnp.asarray, model.params["image_encoder"])
    batch, key = random_images(config), jax.random.key(3)
    function = lambda params, batch: run_encoder(config, params, batch)[0]

    @jax.jit
    def expected(image, noise):
        target = function(encoder, image)
        return jax.grad(lambda p: gradients.disturbed_loss(function, p, image, target, noise))(encoder)

    singles = []
    for i, image_key in enumerate(gradients.image_keys(key, np.arange(2))):
        image = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        noise = 0.01 * jax.random.normal(image_key, (noise_samples, 1, *config.grid, config.out_chans))
        singles += [expected(image, eps) for eps in noise]
    found = gradients.disturbed_gradients(function, encoder, [batch], key, reduce="sum", noise_samples=noise_samples)
    chex.assert_trees_all_close(found, jax.tree.map(lambda *g: sum(g), *singles), atol=1e-6)
    found = gradients.disturbed_gradients(function, encoder, [batch], key, reduce="rms", noise_samples=noise_samples)
    squares = jax.tree.map(lambda *g: jnp.sqrt(sum(x**2 for x in g)), *singles)
    chex.assert_trees_all_close(found, squares, atol=1e-6)


def test_rms_gradients_estimate_the_jacobian():
    """For a linear model the diagonal of JᵀJ is known; the estimate approaches it, one draw does not."""
    random = np.random.default_rng(0)
    params = {"w": jnp.asarray(random.standard_normal((6, 4)), jnp.float32)}
    batches = [jnp.asarray(random.standard_normal((2, 6)), jnp.float32) for _ in range(400)]
    embed_linear = lambda p, x: x @ p["w"]
    exact = np.sqrt(sum((np.asarray(b) ** 2).sum(0) for b in batches))  # the same for every output
    error = {}
    for reduce in ("rms", "sum"):
        grads = gradients.disturbed_gradients(embed_linear, params, batches, jax.random.key(0), reduce=reduce)
        ratio = np.abs(np.asarray(grads["w"])) / exact[:, None]
        error[reduce] = ratio.std() / ratio.mean()
    assert error["rms"] < 0.1 < 0.5 < error["sum"]


def test_importance_compiles_once(model):
    config = model.config
    chex.clear_trace_counter()
    function = chex.assert_max_traces(lambda params, batch: run_encoder(config, params, batch)[0], n=1)
    batches = [random_images(config, seed=seed) for seed in range(3)]
    gradients.disturbed_gradients(function, model.params["image_encoder"], batches, jax.random.key(0))


def test_random_scores_follow_the_seed():
    one, same, other = (
        importance.channel_scores(PARAMS, GRADS, [HIDDEN], "random", seed)["hidden"] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


SHARDED = """
import jax, json, re, sys
import numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from helpers.models import random_images, random_sam, tiny_config
from slimsam_jax import sharding
from slimsam_jax.models.sam import run_encoder
from slimsam_jax.pruning import gradients

config = tiny_config()
encoder = jax.tree.map(jax.numpy.asarray, random_sam(config).params["image_encoder"])
embed = lambda params, batch: run_encoder(config, params, batch)[0]
batches = [random_images(config, 4, seed) for seed in range(2)]
found = {}
for name, devices in (("one", jax.devices()[:1]), ("four", jax.devices())):
    mesh = sharding.make_mesh(devices=devices)
    params, sharded = sharding.replicate(encoder, mesh), [sharding.shard_batch(batch, mesh) for batch in batches]
    found[name] = gradients.disturbed_gradients(embed, params, sharded, jax.random.key(0), mesh=mesh)
for i in range(2):  # the true gradient of k's bias is zero, and what is found is rounding
    for grads in found.values():
        grads[f"blocks_{i}"]["attn"]["k"].pop("bias")
same = jax.tree.map(lambda a, b: float(abs(np.asarray(a) - np.asarray(b)).max() / np.asarray(a).max()), *found.values())
accumulate = gradients.accumulator(gradients.disturbed(embed), "rms", mesh)
program = accumulate.lower(params, params, sharded[0], jax.random.key(0), 0).compile().as_text()
gathered = [line for line in program.splitlines() if re.search(r" all-(gather|to-all)", line)]
print(json.dumps({"worst": max(jax.tree.leaves(same)), "reduces": "all-reduce" in program, "gathered": gathered}))
"""


DEVICES = """
import jax, sys
import numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from helpers.models import random_images, random_sam, tiny_config
from slimsam_jax import sharding
from slimsam_jax.compression import gradients, prune
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.budget import Target

images, make_mesh = random_images(tiny_config(), 4), sharding.make_mesh
images["seed"] = np.arange(7, 11, dtype=np.uint32)


def look(what, step, devices, order):
    mesh = make_mesh(devices=jax.devices()[:devices])
    sharding.make_mesh = lambda: mesh
    batches = [{k: v[order[i : i + devices]] for k, v in images.items()} for i in range(0, 4, devices)]
    return what(step, lambda name: (sharding.shard_batch(batch, mesh) for batch in batches))


def cut(step, calibration):
    slim = prune.prune(random_sam(tiny_config()), step, Target(0.5), calibration, 0)
    print(slim.config.embed_dim, slim.config.blocks[0].mlp_dim)
    return slim.params


def importance(step, calibration):
    found = jax.device_get(gradients.gradients(random_sam(tiny_config()), step, calibration, 0))
    for i in range(2):  # the true gradient of k's bias is zero, and what is found is rounding
        found[f"blocks_{i}"]["attn"]["k"].pop("bias")
    return found


# The recipe's gradients, and the default's cut by statistics with noise.
for what, step in ((importance, RECIPES["taylor"][0]), (cut, RECIPES["default"][1])):
    one, four = (look(what, step, n, np.array(order)) for n, order in ((1, [0, 1, 2, 3]), (4, [2, 0, 3, 1])))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(a).max())
"""


@pytest.mark.slow
def test_any_number_of_devices_cuts_the_same_channels(tmp_path):
    """Whatever order their images come in, too, as that of several hosts is another."""
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.slow
def test_sharded_importance_equals_one_device_and_gathers_nothing(tmp_path):
    """Each device squares the gradients of its own images; only their sum travels."""
    program = SHARDED
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["worst"] < 1e-4 and found["reduces"] and found["gathered"] == []
