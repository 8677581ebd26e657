"""`recipe="slimsam"` against the original code: both cuts at 77 %, losses, and steps of training.

The vectors are those of tests/parity/test_reference.py. Unoptimised programs, which compile in a third of the time,
keep its tolerances here.
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
    EMBEDDING,
    FIRST,
    FULL,
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
    tree,
    wide,
)
from slimsam_jax.compression import prune
from slimsam_jax.compression import trainer as distillations
from slimsam_jax.compression.loss_terms import ALIGN, SAM
from slimsam_jax.compression.loss_terms import terms as terms_of
from slimsam_jax.compression.steps import Quirks
from slimsam_jax.distillation.losses import distillation_loss
from slimsam_jax.models.encoders.vit import bottleneck_features, stream_features
from slimsam_jax.models.sam import Sam


def test_ratio_77(golden):
    """The original shuffles its LayerNorms here (r77); ours keep their order, as r77fix does.

    In float64: a global threshold turns the last bits of float32, which are the processor's, into another channel.
    """
    golden = wide(golden)
    with jax.enable_x64():
        teacher = model(golden, "sd/")
        _, grads = gradients(golden, teacher, golden["noise1"])
        keep = choose(teacher, grads, EMBEDDING, 0.77)
        np.testing.assert_array_equal(removed(keep["embedding"], 96), golden["r77/step1/pruned"])
        slim = prune.cut(teacher, keep, EMBEDDING)
        narrow = {subset.MODEL + name: array for name, array in subset.narrow_model(golden).items()}
        jax.tree.map(np.testing.assert_array_equal, slim.params["image_encoder"], tree(narrow, subset.MODEL))
        np.testing.assert_allclose(embed(golden, slim), golden["r77fix/step1/out"], atol=5e-5)
        losses, grads = gradients(golden, slim, golden["noise2"])
        np.testing.assert_allclose(losses, golden["r77fix/step2/grad_loss"], rtol=1e-5)
        keep = choose(slim, grads, BOTTLENECK, 0.77)
        names = {"attn": "r77fix/step2/global/gs1", "mlp": "r77fix/step2/global/gs2"}
        assert_removed(golden, names, keep, slim.config)
        out = embed(golden, prune.cut(slim, keep, BOTTLENECK))
        np.testing.assert_allclose(out, golden["r77fix/step2/global/out"], atol=5e-5)


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
