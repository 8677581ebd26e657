"""The loss of annotated masks, for Taylor importance with labels."""

from __future__ import annotations

import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from helpers.images import samples, write_annotation
from helpers.models import random_sam, tiny_config
from slimsam_jax.compression import gradients
from slimsam_jax.compression.gradients import mask_loss
from slimsam_jax.compression.steps import Prune
from slimsam_jax.data import prompted
from slimsam_jax.errors import InputError
from slimsam_jax.pruning import importance

CONFIG = tiny_config(image_size=(64, 48))


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        write_annotation(tmp_path / f"{i}.png")
    return samples(sorted(tmp_path.glob("*.png")))


def test_batches_carry_clicks_and_masks_in_the_model_frame(folder):
    batch = next(prompted.AnnotatedBatches(folder, CONFIG, 2, seed=0))
    assert batch["image"].shape == (2, 64, 48, 3) and batch["masks"].shape == (2, prompted.PROMPTS, 16, 12)
    assert batch["points"].shape == (2, prompted.PROMPTS, 2, 2) and (batch["labels"] == [1, -1]).all()
    mask = folder[0].annotations()[0].mask  # all are alike: rows 5 to 9 of 20, columns 4 to 19 of 30
    np.testing.assert_allclose(batch["points"][:, :, 0], np.broadcast_to([6.5 * 48 / 30, 7.5 * 32 / 20], (2, 4, 2)))
    # The image fills 32 of 64 rows: 8 of the 16 of a mask, which keeps the share of the image covered.
    np.testing.assert_allclose(batch["masks"][:, :, :8].mean((2, 3)), mask.mean(), atol=0.01)
    assert not batch["masks"][:, :, 8:].any()
    assert batch["masks"][0, 0, 3, 4] == 1 and batch["masks"][0, 0, 0, 0] == 0


@pytest.mark.slow
def test_loss_falls_on_the_way_down_its_gradient(folder):
    sam = random_sam(CONFIG)
    batch = jax.tree.map(lambda x: x[:1], next(prompted.AnnotatedBatches(folder, CONFIG, 2, seed=0)))
    loss = jax.jit(lambda encoder: mask_loss(sam, encoder, batch))
    encoder = sam.params["image_encoder"]
    grads = jax.grad(loss)(encoder)
    size = sum(float((g**2).sum()) for g in jax.tree.leaves(grads))
    step = 1e-3 / size
    lower = jax.tree.map(lambda p, g: p - step * g, encoder, grads)
    assert float(loss(encoder)) - float(loss(lower)) == pytest.approx(1e-3, rel=0.2)


def test_a_perfect_mask_costs_nothing_and_an_inverted_one_much(monkeypatch, folder):
    sam = random_sam(CONFIG)
    batch = jax.tree.map(lambda x: x[:1], next(prompted.AnnotatedBatches(folder, CONFIG, 2, seed=0)))
    batch["masks"] = (batch["masks"] > 0.5).astype(np.float32)
    for sign, low, high in ((1, 0, 0.01), (-1, 5, np.inf)):
        logits = sign * 40 * (2 * batch["masks"][0] - 1)[:, None]
        monkeypatch.setattr(gradients, "decode", lambda *_, logits=logits: (logits, None))
        assert low <= float(mask_loss(sam, sam.params["image_encoder"], batch)) <= high


def test_without_annotations_it_is_refused(tmp_path, folder):
    for sample in folder:
        Path(sample.name).with_suffix(".json").write_text('{"annotations": []}')
    with pytest.raises(InputError, match=r"needs annotated images: .*1\.png has none"):
        prompted.annotated(folder)
    with pytest.raises(InputError, match="there is none"):
        prompted.annotated(samples([tmp_path / "a.png"]))


def test_only_criteria_that_read_gradients_need_them_or_labels():
    """The options and the core agree on which they are, also on one that somebody adds."""
    for criterion in sorted({*importance.CHOICES} - {"obd"}):
        step = Prune("bottleneck", criterion=criterion, importance_loss="masks")
        assert step.reads_gradients == step.needs_labels == (criterion not in importance.WITHOUT_GRADIENT)
        if step.reads_gradients:
            with pytest.raises(InputError, match=f"criterion {criterion} needs a gradient"):
                Prune("bottleneck", criterion=criterion, importance_loss="none")
    with pytest.raises(InputError, match="criterion 'obd' is none of"):  # no Hessian is estimated here: fisher is
        Prune("bottleneck", criterion="obd")
    hints = typing.get_type_hints(Prune)
    assert {*typing.get_args(hints["criterion"])} - {"projection"} == {*typing.get_args(importance.Criterion)} - {"obd"}
    assert set(typing.get_args(importance.Criterion)) == {*importance.CHOICES}
    assert set(typing.get_args(hints["normalizer"])) == {*typing.get_args(importance.Normalizer)}
    assert set(typing.get_args(importance.Normalizer)) == {*importance.NORMALIZERS}
    assert set(typing.get_args(importance.Reduction)) == {*importance.REDUCTIONS}
