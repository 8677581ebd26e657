"""`recipe="slimsam"` against the original code: gradients, importances, indices, weights, outputs.

All of the golden vectors, which lie outside the repository; tests/parity/test_golden.py compares with a part of them
anywhere, and tests/parity/test_reference_steps.py with losses and steps of training.
"""

from __future__ import annotations

import dataclasses

import flax.traverse_util
import jax
import numpy as np
import pytest

from helpers.reference import (
    BOTTLENECK,
    DEPTH,
    EMBEDDING,
    FULL,
    HEADS,
    assert_removed,
    choose,
    embed,
    encoder_rows,
    gradients,
    images,
    model,
    removed,
    run,
    scores_of,
    tree,
)
from slimsam_jax.compression import prune, reference
from slimsam_jax.models.encoders.vit import bottleneck_features, stream_features
from slimsam_jax.pruning import importance


@pytest.fixture(scope="module")
def step1(golden):
    teacher = model(golden, "sd/")
    losses, grads = gradients(golden, teacher, golden["noise1"])
    return teacher, losses, grads


@pytest.fixture(scope="module")
def step2(golden):
    student = model(golden, "step1/sd/")
    losses, grads = gradients(golden, student, golden["noise2"])
    return student, losses, grads


def test_encoder(golden, step1):
    np.testing.assert_allclose(embed(golden, step1[0]), golden["full/out"], atol=5e-5)


def test_features(golden, step1):
    teacher = step1[0]
    _, features = run(teacher.config, teacher.params["image_encoder"], images(golden)[:1])
    bottleneck, stream = bottleneck_features(FULL, features), stream_features(FULL, features)["stream"]
    joined = lambda arrays: np.concatenate([a.reshape(*a.shape[:3], -1) for a in arrays])
    for found, name in (("qkv_window", "qkv_emb1"), ("qkv_global", "qkv_emb2"), ("mlp", "mid_emb")):
        np.testing.assert_allclose(joined(bottleneck[found]), golden[f"full/img0/{name}"], atol=5e-5)
    # The reference concatenates the block's output before its post-attention stream.
    ordered = [stream[0], *(stream[i] for b in range(DEPTH) for i in (2 * b + 2, 2 * b + 1))]
    # Values up to 8 after twelve blocks: float32 itself is off by 1e-5 of that.
    np.testing.assert_allclose(joined(ordered), golden["full/img0/block_emb"], atol=1e-4)


@pytest.mark.parametrize("step", ["step1", "step2"])
def test_disturbed_gradients(golden, step, request):
    _, losses, grads = request.getfixturevalue(step)
    np.testing.assert_allclose(losses, golden[f"{step}/grad_loss"], rtol=1e-5)
    found = flax.traverse_util.flatten_dict(grads, sep="/")
    for row in encoder_rows():
        if "attn.k.bias" in row.name:  # true gradient zero, rounding noise stored
            continue
        expected = golden[f"{step}/grad/{row.name}"]
        np.testing.assert_allclose(
            row.to_theirs(np.asarray(found[row.path])), expected, atol=5e-5 * np.abs(expected).max()
        )


@pytest.mark.parametrize(("name", "criterion"), [("Disturb", "taylor"), ("mag", "magnitude")])
def test_step1_importance(golden, step1, name, criterion):
    teacher, _, grads = step1
    score = scores_of(teacher, grads, "embedding", criterion)["embedding"]
    tied = np.tile(score.reshape(HEADS, -1).sum(0), HEADS)
    np.testing.assert_allclose(tied, golden[f"step1/{name}/imp_raw"], rtol=2e-6)
    np.testing.assert_allclose(importance.NORMALIZERS["mean"](tied), golden[f"step1/{name}/imp"], rtol=2e-6)
    keep = reference.keep_local_tied({"g": score}, 0.5, HEADS, HEADS)["g"]
    np.testing.assert_array_equal(removed(keep, 96), golden[f"step1/{name}/pruned"])


def test_step1_taylor_lets_the_first_head_decide(golden, step1):
    """The original's "taylor" is Disturbed Taylor without the sum over what it takes for heads."""
    teacher, _, grads = step1
    scores = scores_of(teacher, grads, "embedding")
    np.testing.assert_allclose(scores["embedding"], golden["step1/taylor/imp_raw"], rtol=2e-6)
    normal = reference.normalize(scores, "mean")["embedding"]
    np.testing.assert_allclose(normal, golden["step1/taylor/imp"], rtol=2e-6)
    keep = reference.keep_local_tied(scores, 0.5, HEADS, HEADS, decided_by="first")["embedding"]
    np.testing.assert_array_equal(removed(keep, 96), golden["step1/taylor/pruned"])


def test_step1_pruned_weights_and_output(golden, step1):
    teacher, _, grads = step1
    slim = prune.cut(teacher, choose(teacher, grads, EMBEDDING, 0.5), EMBEDDING)
    expected = model(golden, "step1/sd/")
    assert slim.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, slim.params["image_encoder"], expected.params["image_encoder"])
    np.testing.assert_allclose(embed(golden, slim), golden["step1/out"], atol=5e-5)


def test_step2_importance(golden, step2):
    student, _, grads = step2
    for kind, copies in (("attn", HEADS), ("mlp", 1)):
        scores = scores_of(student, grads, kind)
        run_name = "gs1" if kind == "attn" else "gs2"
        normal = reference.normalize(scores, "gaussian", copies)
        assert len(scores) == len(student.config.blocks)
        for block in range(len(scores)):
            raw = np.tile(scores[f"blocks_{block}/{kind}"], copies)
            np.testing.assert_allclose(raw, golden[f"step2/global/{run_name}/imp_raw/{kind}{block}"], rtol=5e-5)
            found = np.tile(normal[f"blocks_{block}/{kind}"], copies)
            np.testing.assert_allclose(found, golden[f"step2/global/{run_name}/imp/{kind}{block}"], atol=5e-5)


GLOBAL_RUN = {"attn": "step2/global/gs1", "mlp": "step2/global/gs2"}


def test_step2_global(golden, step2):
    student, _, grads = step2
    keep = choose(student, grads, BOTTLENECK, 0.5)
    assert_removed(golden, GLOBAL_RUN, keep, student.config)
    slim = prune.cut(student, keep, BOTTLENECK)
    jax.tree.map(np.testing.assert_array_equal, slim.params["image_encoder"], tree(golden, "step2/global/sd/"))
    np.testing.assert_allclose(embed(golden, slim), golden["step2/global/out"], atol=5e-5)


def test_step2_local(golden, step2):
    student, _, grads = step2
    for kind, copies in (("mlp", 1), ("attn", HEADS)):
        normals = reference.normalize(scores_of(student, grads, kind), "mean", copies)
        assert len(normals) == len(student.config.blocks)
        for block in range(len(normals)):
            normal = normals[f"blocks_{block}/{kind}"]
            np.testing.assert_allclose(np.tile(normal, copies), golden[f"step2/local/imp/{kind}{block}"], rtol=5e-5)
    keep = choose(student, grads, dataclasses.replace(BOTTLENECK, allocation="local"), 0.5)
    assert_removed(golden, {"attn": "step2/local", "mlp": "step2/local"}, keep, student.config)
    slim = prune.cut(student, keep, BOTTLENECK)
    np.testing.assert_allclose(embed(golden, slim), golden["step2/local/out"], atol=5e-5)


@pytest.mark.parametrize("percent", [50, 77])
def test_groups_that_would_vanish_are_skipped(golden, step2, percent):
    student, _, grads = step2
    step = dataclasses.replace(BOTTLENECK, normalizer="none")
    keep = choose(student, grads, step, percent / 100)
    prefix = f"quirk_norm_none/r{percent}"
    assert_removed(golden, {"attn": f"{prefix}/gs1", "mlp": f"{prefix}/gs2"}, keep, student.config)
    out = embed(golden, prune.cut(student, keep, step))
    np.testing.assert_allclose(out, golden[f"{prefix}/out"], atol=5e-5)
