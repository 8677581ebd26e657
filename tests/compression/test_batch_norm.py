"""Batch norm in a run: which steps may recalibrate it, with which images; and encoders of another family."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from helpers.family_models import SLIM_REP_VIT, SLIM_TINY_VIT, edge_sam, random_params, sam2
from helpers.images import samples, save_image
from helpers.models import SQUARE, random_sam
from slimsam_jax.compression import distill, student, trainer
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.plan import check, planned
from slimsam_jax.compression.prepare import check_encoders
from slimsam_jax.compression.steps import Distill, Initialize, Losses, Prune
from slimsam_jax.errors import InputError
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.encoders.tiny_vit_config import uniform
from slimsam_jax.models.sam import Sam, abstract_params, run_encoder

HEAD = {"out_chans": 16, "mask_in_chans": 4, "decoder_mlp_dim": 8, "decoder_depth": 1, "iou_head_dim": 8}
RECALIBRATED = Distill("none", batch_norm="recalibrated")


def tiny_encoder():
    """Of the square test model's frame, grid and embedding."""
    encoder = uniform((4, 6, 8, 8), (1, 1, 1, 1), (1, 1, 2, 2), (2, 2, 3, 2), image_size=64)
    *stages, last = encoder.stages
    stages = (*stages, dataclasses.replace(last, stride=1))
    return dataclasses.replace(encoder, stages=stages, out_chans=SQUARE.out_chans)


def test_another_encoder_is_drawn_for_the_same_head(monkeypatch):
    teacher = random_sam(SQUARE)
    drawn = []
    module = SimpleNamespace(init=lambda key, images: {"params": {"images": images}})
    monkeypatch.setattr(student, "image_encoder", lambda config: drawn.append(config) or module)
    run = SimpleNamespace(options=SimpleNamespace(seed=0), start=None)
    found = student.initialize(run, SimpleNamespace(step=Initialize(tiny_encoder())), teacher, teacher)
    assert [found.config] == drawn == [SamConfig(tiny_encoder(), SQUARE.head)]
    assert found.params["image_encoder"]["images"].shape == (1, 64, 64, 3)
    for part in ("prompt_encoder", "mask_decoder"):
        assert found.params[part] is teacher.params[part]


def test_steps_are_of_the_encoder_that_is_there_then():
    recipe = (Initialize(tiny_encoder()), RECALIBRATED)
    check(recipe)
    assert check_encoders(recipe, SQUARE).encoder == tiny_encoder()
    assert check_encoders((Prune("embedding"),), SQUARE) is SQUARE
    check_encoders((Initialize(tiny_encoder()), Prune("embedding"), Distill()), SQUARE)  # with those before the cut
    with pytest.raises(InputError, match="a hiera gives several"):
        check_encoders((Distill("none", Losses(padding=False)),), sam2().config)
    for steps, message in (
        ((RECALIBRATED,), "this vit has no batch norms to recalibrate"),
        ((Initialize(tiny_encoder()), Distill()), "another encoder has no features like the teacher's"),
        ((Initialize(SLIM_TINY_VIT),), "does not fit the teacher: the encoder has image_size"),
        ((Initialize("vit_t"),), "does not fit the teacher: .* is no family of encoders"),
        ((Initialize(dataclasses.replace(tiny_encoder(), batch_norm=False)), RECALIBRATED), "this tiny_vit has no"),
    ):
        with pytest.raises(InputError, match=message):
            check_encoders(steps, SQUARE)


def test_statistics_are_estimated_from_the_runs_images(tmp_path, monkeypatch):
    """As many batches as `importance_images` make, normalised as the model takes them; without steps, too."""
    head = head_of(SLIM_TINY_VIT.image_size, 8, **HEAD, decoder_heads=1)
    config = SamConfig(SLIM_TINY_VIT, head)
    sam = Sam(config, random_params(abstract_params(config)))
    seen = []
    record = lambda module, params, batches: seen.extend(map(np.asarray, batches)) or {"new": params}
    monkeypatch.setattr(distill, "recalibrate", record)
    images = samples([save_image(tmp_path / f"{i}.png", seed=i) for i in range(7)])
    run = SimpleNamespace(options=Options(importance_images=5), images=images, batch=2, start=None)
    later, frozen = planned((Distill("none"), RECALIBRATED), [4, 4])[1], planned((Distill("none"),), [4])[0]
    assert distill.recalibrated(run, later, sam) is sam is distill.recalibrated(run, frozen, sam) and not seen
    without_steps = planned((Initialize(), RECALIBRATED), [0, 0])[1]  # --steps 0
    found = distill.distill(run, without_steps, sam, sam)
    assert found.params["image_encoder"] == {"new": sam.params["image_encoder"]}
    assert [batch.shape for batch in seen] == [(2, 32, 48, 3)] * 2
    assert distill.distill(run, planned((Distill("none"),), [0])[0], sam, sam) is sam
    auto = planned((Initialize(), Distill("none", batch_norm="auto")), [0, 0])[1]
    assert distill.recalibrated(run, auto, sam).params["image_encoder"] == {"new": sam.params["image_encoder"]}
    run.start = sam  # brought along, as --student PATH does
    assert distill.recalibrated(run, auto, sam) is sam
    assert distill.recalibrated(run, without_steps, sam) is not sam  # where it is asked for
    assert all(2 < np.abs(batch).max() < 3 and np.ptp(batch[..., 0]) > 0 for batch in seen)
    assert jax.tree.leaves(found.params["mask_decoder"])[0] is jax.tree.leaves(sam.params["mask_decoder"])[0]


@pytest.mark.parametrize("encoder", [SLIM_TINY_VIT, SLIM_REP_VIT])
def test_training_multiplies_batch_norms_into_convolutions(encoder):
    """The embedding and the gradients stay, to rounding, and the statistics get none."""
    sam = edge_sam(encoder)
    size = np.int32([encoder.image_size])
    batch = {"image": np.random.default_rng(0).integers(0, 256, (1, *encoder.image_size, 3), np.uint8), "size": size}

    def pulled(change):
        square = lambda params: (run_encoder(*change(sam.config, params), batch)[0] ** 2).mean()
        return jax.tree_util.tree_leaves_with_path(jax.device_get(jax.jit(jax.grad(square))(sam.encoder)))

    assert not trainer.without_norms(sam.config, sam.encoder)[0].encoder.batch_norm
    ours, expected = pulled(trainer.without_norms), pulled(lambda *same: same)
    largest = max(np.abs(gradient).max() for _, gradient in expected)
    for (path, found), (_, wanted) in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6 * largest, err_msg=str(path))
        assert np.any(found) != (path[-1].key in ("mean", "var"))
