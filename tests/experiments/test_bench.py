"""PyTorch's side of the benchmark computes the losses that ours does; masks are compared; ways ask what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import tyro

from converters.from_torch import from_state_dict
from experiments import hierarchical
from experiments.bench import everything, original
from experiments.bench.options import STAGES, Options, distillation_of
from experiments.bench.turns import flags
from helpers.models import SQUARE, random_sam, tiny_config
from helpers.peers import state_dict, stock_sam
from slimsam_jax.distillation.losses import mse
from slimsam_jax.models.encoders.vit import ImageEncoder, bottleneck_features, stream_features


@pytest.mark.parametrize("what", STAGES)
def test_features_that_pytorch_compares_are_ours(what):
    """An encoder whose embedding is narrower than its heads, and its teacher."""
    teacher = tiny_config(image_size=(64, 64))
    narrow = dataclasses.replace(teacher, embed_dim=12)
    image = torch.randn(1, 3, 64, 64)
    student, target = (
        _both_sides(config, image, what)
        for config in ((narrow, narrow) if what == "bottleneck-stage" else (narrow, teacher))
    )
    for name in student[0]:
        found = original.mean_square(student[0][name], target[0][name]).item()
        np.testing.assert_allclose(mse(student[1][name], target[1][name]), found, rtol=1e-4)
    assert len(student[0]) == {"bottleneck": 3, "stream+embedding": 1}[distillation_of(what).align]


def _both_sides(config, image: torch.Tensor, what: str):
    """PyTorch's features of a random encoder, and ours of the same weights."""
    module = original.encoder(config, torch.device("cpu"))
    features = original.watch(module, config, what)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        module(image)
    whole = state_dict(stock_sam(tiny_config(image_size=(64, 64))))
    whole = {name: array for name, array in whole.items() if not name.startswith("image_encoder.")}
    model = from_state_dict({**whole, **{f"image_encoder.{n}": a for n, a in state_dict(module).items()}})
    assert model.config == config
    pixels = image.permute(0, 2, 3, 1).numpy()
    _, ours = jax.jit(ImageEncoder(config).apply)({"params": model.params["image_encoder"]}, pixels)
    read = stream_features if what == "bottleneck-stage" else bottleneck_features
    return features, read(config, ours)


def test_turns_are_started_with_the_options_given():
    for options in (Options(), Options("everything", images=3, cached=True, photos=Path("photos"))):
        assert tyro.cli(Options, args=flags(options)) == options


def test_share_of_masks_that_both_sides_find():
    whole, nearly, less = (np.ones((10, 10), bool) for _ in range(3))
    nearly[0, :9], less[0] = False, False  # 0.91 and 0.9 of it
    one, other = everything.encoded([[{"segmentation": whole}], [{"segmentation": nearly}, {"segmentation": less}]])
    assert everything.partners(one, other).tolist() == [True]
    assert everything.partners(other, one).tolist() == [True, False]
    assert everything.share([other, []], [one, one]) == 0.5
    assert everything.share([[]], [one]) == 1 and everything.share([one], [[]]) == 0


def test_points_asked_are_counted():
    way = hierarchical.Way(random_sam(SQUARE), 8, pred_iou_thresh=99.0, hierarchical=True)
    way.generate(np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8))
    assert way.asked == [16]
