"""EfficientSAM is slimmed as a SAM is: both halves of alternate slimming, by groups that are found."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from converters import from_torch, to_onnx
from helpers.family_models import SLIM_VIT, efficient_sam, images_of, run
from helpers.runs import compress_options
from slimsam_jax import api, checkpoint, pruning
from slimsam_jax.api import compress_with
from slimsam_jax.compression.found_groups import groups_of
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.encoders import efficient_sam_vit as vit
from slimsam_jax.models.encoders.architecture import Block


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    checkpoint.save(dataclasses.replace(efficient_sam(), thresholds=Thresholds(0.0, 0.0, 0.5)), folder)
    return folder


def test_groups_are_those_of_the_architecture():
    """Of the embedding one; of every block heads, channels of q and k, of v and proj, and the MLP's."""
    sizes = {part: [] for part in vit.STAGES}
    for group in groups_of(efficient_sam().config).groups:
        for part, holds in vit.STAGES.items():
            sizes[part] += [group.size] if holds([member.path for member in group.members]) else []
    assert sizes == {"embedding": [10], "bottleneck": [2, 4, 3, 17, 3, 5, 6, 9]}


def test_masked_is_cut():
    """Half of the channels within heads and of the MLPs'; the softmax keeps its temperature."""
    sam = efficient_sam()
    encoder, grouping = sam.params["image_encoder"], groups_of(sam.config)
    cut = [g for g in grouping.groups if g.name.startswith("blocks") and (g.copies or "mlp" in g.name)]
    keep = {group.name: np.arange(0, group.size, 2) for group in cut}
    slim = vit.keep_logit_scale(pruning.shrink(encoder, grouping, keep), encoder)
    config = vit.config_of(slim, like=SLIM_VIT)
    assert config.blocks == (Block(2, 2, 2, 9), Block(3, 3, 3, 5)) and config.embed_dim == SLIM_VIT.embed_dim
    images = images_of(SLIM_VIT)
    masked, _ = run(vit.ImageEncoder(SLIM_VIT), pruning.mask(encoder, grouping, keep), images)
    shrunk, _ = run(vit.ImageEncoder(config), slim, images)
    np.testing.assert_allclose(shrunk, masked, atol=2e-5)


def test_it_is_slimmed_end_to_end(teacher, material, tmp_path, without_figure):
    choices = ("distill.validations=1",)
    options = compress_options(material, tmp_path / "slim", teacher=teacher, recipe="taylor", set=choices)
    numbers = compress_with(options).report
    slim = from_torch.load(tmp_path / "slim")
    assert slim.config.encoder.embed_dim == 5 and slim.config.head == checkpoint.load(teacher).config.head
    assert numbers["slim"]["encoder_parameters"] < numbers["teacher"]["encoder_parameters"]
    assert numbers["teacher"]["macs_linear"] > numbers["teacher"]["encoder_macs_linear"] and slim.thresholds
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    losses = [entry for entry in log if "loss" in entry]
    assert {"qkv", "mlp"} <= set(losses[0]) and {"stream", "previous"} <= set(losses[-1])
    masks, scores, _ = api.predict(slim, material / "val" / "0.png", [[5, 6]], multimask_output=True)
    assert masks.shape == (3, 20, 30) and np.isfinite(scores).all()
    to_onnx.main(tmp_path / "slim", tmp_path / "onnx", "efficient_sam")  # compares with JAX


def test_the_default_recipe_chooses_bases_first(teacher, material, tmp_path, without_figure):
    """Its streams may be rotated. The decoder's masks in the loss take SAM's kind of prompts within the program."""
    choices = ("distill.validations=1", "distill.masks=1")
    options = compress_options(material, tmp_path / "slim", teacher=teacher, recipe="default", steps=1, set=choices)
    numbers = compress_with(options).report
    slim = from_torch.load(tmp_path / "slim")
    assert slim.config.encoder.embed_dim == 5
    assert numbers["slim"]["encoder_parameters"] < numbers["teacher"]["encoder_parameters"]
    losses = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    assert any("masks" in entry for entry in losses)
    masks, _, _ = api.predict(slim, material / "val" / "0.png", [[5, 6]])
    assert masks.shape == (1, 20, 30)


def test_what_it_cannot_do_is_one_line(teacher, material, tmp_path):
    options = compress_options(material, tmp_path / "slim", teacher=teacher, recipe="slimsam", set=())
    with pytest.raises(InputError, match="known bugs are of SAM's ViT"):
        compress_with(options)
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize("choice", ["features=0.5", "direction=1", "masks=1", "points=4", "relative=false"])
def test_choices_of_losses_that_the_recipe_does_not_have_are_refused(choice):
    """Its trainings share the optimizer of a distillation, and have no terms of its embedding."""
    with pytest.raises(InputError, match=rf"--set distill\.{choice.partition('=')[0]}\.\.\.: no step of the recipe"):
        change(RECIPES["efficient_sam"], [f"distill.{choice}"])
    assert change(RECIPES["mobile_sam"], [f"distill.{choice}"]) != RECIPES["mobile_sam"]
    assert change(RECIPES["efficient_sam"], ["distill.lr=2e-4"])[1].optimizer.lr == 2e-4
