"""PyTorch's side of the benchmark computes the losses that ours does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_config
from peers import state_dict, stock_sam

from converters.from_torch import from_state_dict
from experiments import bench, bench_torch
from slimsam_jax import distill
from slimsam_jax.models.features import bottleneck_features, stream_features
from slimsam_jax.models.image_encoder import ImageEncoder
from slimsam_jax.stages import STAGES


@pytest.mark.parametrize("what", bench.STAGES)
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
        found = bench_torch.mean_square(student[0][name], target[0][name]).item()
        np.testing.assert_allclose(distill.mse(student[1][name], target[1][name]), found, rtol=1e-4)
    stage = next(stage for stage in STAGES if what.startswith(stage.name))
    assert len(student[0]) == {"bottleneck": 3, "stream": 1}[stage.features]


def _both_sides(config, image: torch.Tensor, what: str):
    """PyTorch's features of a random encoder, and ours of the same weights."""
    module = bench_torch.encoder(config, torch.device("cpu"))
    features = bench_torch.watch(module, config, what)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        module(image)
    whole = state_dict(stock_sam(tiny_config(image_size=(64, 64))))
    whole = {name: array for name, array in whole.items() if not name.startswith("image_encoder.")}
    model = from_state_dict({**whole, **{f"image_encoder.{n}": a for n, a in state_dict(module).items()}})
    assert model.config == config
    pixels = image.permute(0, 2, 3, 1).numpy()
    _, ours = ImageEncoder(config).apply({"params": model.params["image_encoder"]}, pixels)
    read = stream_features if what == "bottleneck-stage" else bottleneck_features
    return features, read(config, ours)
