"""Masked pre-training: patches that are not seen really are not, and its predictions are in the image's order."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.models import SQUARE, random_images, random_sam
from helpers.runs import compress_options
from slimsam_jax import checkpoint
from slimsam_jax.api import compress_with
from slimsam_jax.compression.prepare import check_encoders
from slimsam_jax.compression.pretrain import predicted, seen_of
from slimsam_jax.compression.steps import Initialize, Optimizer, Pretrain, Validation
from slimsam_jax.compression.student import initialize
from slimsam_jax.errors import InputError
from slimsam_jax.models.composed import with_encoder
from slimsam_jax.models.encoders.efficient_sam_vit import uniform
from slimsam_jax.models.masked_decoder import MaskedDecoder

STUDENT = dataclasses.replace(uniform(12, 1, 2, image_size=64), out_chans=SQUARE.out_chans, pretrain_grid=4)
SMALL = Pretrain(depth=1, width=16, heads=2, optimizer=Optimizer(epochs=1, lr=1e-3), validation=Validation(1))


def test_patches_that_are_not_seen_change_nothing():
    config = with_encoder(SQUARE, STUDENT)
    batch = {**random_images(config, 1), "seed": np.array([3], np.uint32)}
    batch["size"][:] = 64
    order = jax.random.permutation(jax.random.key(3), 16)
    count = seen_of(SMALL, 16)
    assert count == 4
    decoder = MaskedDecoder(16, config.out_chans, 16, 1, 2).init(
        jax.random.key(1), jnp.zeros((1, count, 12)), order[None]
    )
    params = {"image_encoder": random_sam(config).params["image_encoder"], "decoder": decoder["params"]}
    program = jax.jit(lambda images: predicted(SMALL, config, jnp.float32, None, params, {**batch, "image": images}))
    before = program(batch["image"])["embedding"]
    assert before.shape == (1, 16, config.out_chans)
    for patch, seen in ((order[0], True), (order[count - 1], True), (order[count], False), (order[-1], False)):
        row, column = divmod(int(patch), 4)
        changed = batch["image"].copy()
        changed[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] ^= 255
        difference = np.abs(program(changed)["embedding"] - before).max()
        assert difference > 1e-3 if seen else difference == 0


def test_what_was_seen_comes_out_at_its_own_place():
    """A token seen reaches its own place alone directly, and those that were not seen by attention."""
    decoder, order = MaskedDecoder(6, 3, 8, 1, 2), jnp.array([[4, 0, 1, 2, 3, 5]])
    tokens = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 5)), jnp.float32)
    params = decoder.init(jax.random.key(0), tokens, order)
    run = jax.jit(decoder.apply)
    before, after = run(params, tokens, order), run(params, tokens.at[0, 0].add(1.0), order)
    moved = np.abs(after - before).max(-1)[0] > 1e-6
    np.testing.assert_array_equal(moved, [False, True, True, True, True, True])  # patch 0 was seen, and is the other


def test_it_runs_as_a_step_and_leaves_an_encoder(material, tmp_path, unmeasured):
    options = compress_options(material, tmp_path / "slim", steps=1, set=())
    slim = compress_with(options, (Initialize(STUDENT), SMALL)).sam
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in log} == {"pretrain"} and sum("loss" in entry for entry in log) == 2
    (score,) = [entry["score"] for entry in log if "score" in entry]
    assert -10 < score < 0
    teacher = checkpoint.load(material / "teacher")
    assert slim.config.encoder == STUDENT and set(slim.params) == set(teacher.params)


def test_the_neck_which_no_patch_goes_through_stays_as_it_is(material, tmp_path, unmeasured):
    """To the bit, whatever the weight decay; and nothing but kernels decays where gradients are nothing."""
    options = compress_options(material, tmp_path / "slim", steps=1, set=())
    step = dataclasses.replace(SMALL, optimizer=Optimizer(epochs=1, lr=1e-3, weight_decay=100.0))
    slim, teacher = compress_with(options, (Initialize(STUDENT), step)).sam, checkpoint.load(material / "teacher")
    begun = initialize(
        SimpleNamespace(options=options, start=None), SimpleNamespace(step=Initialize(STUDENT)), teacher, teacher
    )
    for name, part in begun.encoder.items():
        same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), part, slim.encoder[name]))
        assert same == name.startswith("neck"), name


def test_an_encoder_that_cannot_leave_patches_out_is_refused():
    with pytest.raises(InputError, match="a vit cannot leave patches out; pre-training is for efficient_sam"):
        check_encoders((Pretrain(),), SQUARE)
    check_encoders((Initialize(STUDENT), Pretrain()), SQUARE)
    with pytest.raises(InputError, match="width 10 of the decoder must be a multiple of its 4 heads"):
        Pretrain(width=10, heads=4)
