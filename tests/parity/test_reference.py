"""`recipe="slimsam"` against the original code: gradients, importances, indices, weights, outputs, losses.

All of the golden vectors, which lie outside the repository; tests/parity/test_golden.py compares with a part of them
anywhere.
"""

from __future__ import annotations

import dataclasses

import flax.traverse_util
import jax
import numpy as np
import pytest

from helpers import golden as subset
from helpers.reference import (
    BOTTLENECK,
    DEPTH,
    EMBEDDING,
    FIRST,
    FULL,
    HEADS,
    SECOND,
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
from helpers.shared import shared
from slimsam_jax.compression import prune, reference
from slimsam_jax.compression import trainer as distillations
from slimsam_jax.compression.loss_terms import ALIGN, SAM
from slimsam_jax.compression.loss_terms import terms as terms_of
from slimsam_jax.compression.steps import Quirks
from slimsam_jax.distillation.losses import distillation_loss
from slimsam_jax.models.encoders.vit import bottleneck_features, stream_features
from slimsam_jax.models.sam import Sam
from slimsam_jax.pruning import importance


@pytest.fixture(scope="module")
def golden():
    return np.load(shared("golden/tiny_slimsam.npz"))


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


def test_ratio_77(golden, step1):
    """The original shuffles its LayerNorms here (r77); ours keep their order, as r77fix does."""
    teacher, _, grads = step1
    keep = choose(teacher, grads, EMBEDDING, 0.77)
    np.testing.assert_array_equal(removed(keep["embedding"], 96), golden["r77/step1/pruned"])
    slim = prune.cut(teacher, keep, EMBEDDING)
    narrow = {subset.MODEL + name: array for name, array in subset.narrow_model(golden).items()}
    jax.tree.map(np.testing.assert_array_equal, slim.params["image_encoder"], tree(narrow, subset.MODEL))
    np.testing.assert_allclose(embed(golden, slim), golden["r77fix/step1/out"], atol=5e-5)
    losses, grads = gradients(golden, slim, golden["noise2"])
    np.testing.assert_allclose(losses, golden["r77fix/step2/grad_loss"], rtol=1e-5)
    keep = choose(slim, grads, BOTTLENECK, 0.77)
    assert_removed(golden, {k: f"r77fix/{v}" for k, v in GLOBAL_RUN.items()}, keep, slim.config)
    np.testing.assert_allclose(
        embed(golden, prune.cut(slim, keep, BOTTLENECK)), golden["r77fix/step2/global/out"], atol=5e-5
    )


@pytest.mark.parametrize("percent", [50, 77])
def test_groups_that_would_vanish_are_skipped(golden, step2, percent):
    student, _, grads = step2
    step = dataclasses.replace(BOTTLENECK, normalizer="none")
    keep = choose(student, grads, step, percent / 100)
    prefix = f"quirk_norm_none/r{percent}"
    assert_removed(golden, {"attn": f"{prefix}/gs1", "mlp": f"{prefix}/gs2"}, keep, student.config)
    out = embed(golden, prune.cut(student, keep, step))
    np.testing.assert_allclose(out, golden[f"{prefix}/out"], atol=5e-5)


def losses_of(golden, student: Sam, target, step, progress: float):
    outputs = run(student.config, student.params["image_encoder"], images(golden)[:1])
    found = {"embedding": outputs[0]}
    if step.align == "bottleneck":
        found |= bottleneck_features(student.config, outputs[1])
    else:
        found |= {"previous": outputs[0], **stream_features(student.config, outputs[1])}
    loss, terms = distillation_loss(found, target, ALIGN[step.align](progress, step, SAM))
    return float(loss), {name: float(term) for name, term in terms.items()}


def test_stage1_loss(golden):
    student, teacher = model(golden, "step1/sd/"), model(golden, "sd/")
    embedding, features = run(teacher.config, teacher.params["image_encoder"], images(golden)[:1])
    target = {"embedding": embedding, **bottleneck_features(FULL, features)}
    loss, terms = losses_of(golden, student, target, FIRST, 0.0)
    expected = {"embedding": "emb", "qkv_window": "qkv_window", "qkv_global": "qkv_global_intended", "mlp": "mid"}
    for name, theirs in expected.items():
        np.testing.assert_allclose(terms[name], golden[f"distill1/term_{theirs}"], rtol=1e-5)
    np.testing.assert_allclose(loss, golden["distill1/loss_epoch_lt10_as_written"], rtol=1e-5)
    intended = dataclasses.replace(FIRST, quirks=Quirks())
    loss, _ = losses_of(golden, student, target, intended, 0.49)
    np.testing.assert_allclose(loss, golden["distill1/loss_epoch_lt10_intended"], rtol=1e-5)
    loss, _ = losses_of(golden, student, target, FIRST, 0.5)
    np.testing.assert_allclose(loss, golden["distill1/loss_epoch_ge10"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["global", "local"])
def test_stage2_loss(golden, kind):
    student, previous, teacher = (model(golden, p) for p in (f"step2/{kind}/sd/", "step1/sd/", "sd/"))
    embedding = run(teacher.config, teacher.params["image_encoder"], images(golden)[:1])[0]
    before, features = run(previous.config, previous.params["image_encoder"], images(golden)[:1])
    target = {"embedding": embedding, "previous": before, **stream_features(previous.config, features)}
    for epoch in (0, 5, 10, 11):
        loss, terms = losses_of(golden, student, target, SECOND, (epoch + 0.5) / 20)
        np.testing.assert_allclose(loss, golden[f"distill2/{kind}/loss_epoch{epoch}"], rtol=1e-5)
    for name, theirs in {"embedding": "emb_teacher", "stream": "block_pruned", "previous": "emb_pruned"}.items():
        np.testing.assert_allclose(terms[name], golden[f"distill2/{kind}/term_{theirs}"], rtol=1e-5)
    weights = [float(ALIGN[SECOND.align]((epoch + 0.5) / 20, SECOND, SAM)["stream"]) for epoch in range(20)]
    np.testing.assert_allclose(weights, golden["distill2/a_weight_by_epoch"], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_two_steps_of_training(golden, monkeypatch, number):
    """Eight images in order, summed by fours: losses, parameters and outputs of the original loop."""
    step = (FIRST, SECOND)[number - 1]
    teacher, previous, student = (model(golden, p) for p in ("sd/", "step1/sd/", "step2/global/sd/"))
    previous, student = (previous, student) if number == 2 else (teacher, previous)
    encode = lambda config, encoder, batch, **_: run(config, encoder, batch["image"])
    monkeypatch.setattr(distillations, "run_encoder", encode)
    trainer = distillations.make_trainer(student, previous, teacher, step)
    terms = terms_of(step, 0, 10_000)
    batches = [{"image": images(golden)[i : i + 4]} for i in (0, 4)]
    state, losses = trainer.state, []
    for batch in batches:
        state, found = trainer.step(state, trainer.frozen, batch, terms, step.optimizer.lr)
        losses.append(float(found["loss"]))
    np.testing.assert_allclose(losses, golden[f"train{number}/losses"].reshape(2, 4).mean(1), rtol=1e-5)
    flat = flax.traverse_util.flatten_dict(state.params["image_encoder"], sep="/")
    compared = [row for row in encoder_rows() if f"train{number}/param_after_2_steps/{row.name}" in golden]
    assert len(compared) == 10
    for row in compared:
        expected = row.to_ours(golden[f"train{number}/param_after_2_steps/{row.name}"])
        np.testing.assert_allclose(flat[row.path], expected, atol=3e-6, err_msg=row.name)
    out = embed(golden, Sam(student.config, state.params))
    np.testing.assert_allclose(out[:2], golden[f"train{number}/out_after_2_steps"], atol=1e-4)
