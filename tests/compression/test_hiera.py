"""SAM 2 is slimmed as a SAM is: both halves of alternate slimming, and all maps that the decoder reads in the loss."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import from_torch
from converters.tables import hiera as table
from helpers.family_models import SMALL_HIERA, sam2
from helpers.images import samples
from helpers.runs import compress_options
from slimsam_jax import api, checkpoint
from slimsam_jax.api import compress_with
from slimsam_jax.compression.steps import Distill, Optimizer, Prune, Validation
from slimsam_jax.compression.teacher_cache import TeacherCache
from slimsam_jax.distillation.losses import distillation_loss
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.encoders import hiera
from slimsam_jax.pruning.gradients import disturbed, disturbed_loss

# A block a stage: what a run compiles goes with them.
TEACHER = dataclasses.replace(
    SMALL_HIERA,
    stages=tuple(dataclasses.replace(stage, blocks=stage.blocks[:1]) for stage in SMALL_HIERA.stages),
    global_blocks=(),
)
VIDEO = {"no_obj_ptr": np.ones((1, 16), np.float32)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    checkpoint.save(dataclasses.replace(sam2(TEACHER), thresholds=Thresholds(0.0, 0.0, 0.5), kept=VIDEO), folder)
    return folder


# One distillation, and gradients for one of the cuts: the recipe `taylor` compiles twice as many programs.
RECIPE = (
    Prune("bottleneck", criterion="taylor", allocation="local"),
    Distill("stream+embedding", optimizer=Optimizer(lr=1e-3), validation=Validation(validations=1)),
    Prune("embedding", criterion="magnitude", allocation="local"),
)


def test_it_is_slimmed_end_to_end(teacher, material, tmp_path, without_figure):
    """By halves, locally: what sam2's own classes hold. The memory of videos goes along."""
    changes = {"teacher": teacher, "steps": 2, "cache": tmp_path / "cache"}
    numbers = compress_with(compress_options(material, tmp_path / "slim", **changes, set=()), RECIPE).report
    slim = from_torch.load(tmp_path / "slim")
    encoder = slim.config.encoder
    assert [stage.dim for stage in encoder.stages] == [4, 8, 16, 32] and set(slim.kept) == set(VIDEO)
    assert table.obstacle(slim.config) == "it has another decoder"  # a small one: widths are a uniform model's
    assert encoder == hiera.config_of(slim.params["image_encoder"], like=TEACHER)
    assert numbers["slim"]["encoder_parameters"] < 0.4 * numbers["teacher"]["encoder_parameters"]
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    losses = [entry for entry in log if "loss" in entry]
    assert losses and {"embedding", "stream", "previous"} <= set(losses[-1])
    masks, scores, _ = api.predict(slim, material / "val" / "0.png", [[5, 6]], multimask_output=True)
    assert masks.shape == (3, 20, 30) and np.isfinite(scores).all()
    # What the run has cached are all three maps.
    (sample,) = samples([material / "images" / "0.png"])
    (folder,) = (tmp_path / "cache").iterdir()
    whole = checkpoint.load(teacher)
    cache = TeacherCache(tmp_path / "cache", whole, folder.name.partition("-")[0])
    expected = encode_image(whole, sample.image()).embedding
    assert list(np.load(cache.file(sample)).shape) == [sum(x.size for x in expected.values())]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), cache.read(sample), expected)


def test_maps_count_alike_whatever_their_sizes():
    one = {"a": jnp.zeros((2, 2)), "b": jnp.zeros((4, 4))}
    other = {"a": jnp.ones((2, 2)), "b": jnp.zeros((4, 4)).at[0, 0].set(4)}
    loss, terms = distillation_loss({"embedding": other}, {"embedding": one}, {"embedding": 0.5})
    assert terms["embedding"] == pytest.approx((1 + 16 / 16) / 2) == 2 * float(loss)
    values = {name: np.arange(x.size, dtype=float) for name, x in one.items()}
    off = {name: x + 1 for name, x in values.items()}
    assert relative_error(off, values) == pytest.approx(np.mean([1 / values["a"].var(), 1 / values["b"].var()]))


def test_disturbed_gradients_of_several_maps_are_those_of_the_sum_of_their_losses():
    """The noise of each map is its own, and each is weighed by its own size."""
    params, key, std = {"w": jnp.array([0.5, -2.0, 3.0])}, jax.random.key(0), 0.1
    embed = lambda p, x: {"a": p["w"] * x, "b": jnp.outer(p["w"] ** 2, x)}
    x = jnp.array([1.0, 2.0, 3.0])
    found = disturbed(embed, std)(params, x, key)
    target = embed(params, x)
    noise = {
        n: std * jax.random.normal(k, (1, *v.shape))[0]
        for (n, v), k in zip(target.items(), jax.random.split(key), strict=True)
    }
    wanted = jax.grad(lambda p: disturbed_loss(embed, p, x, target, noise))(params)
    np.testing.assert_allclose(found["w"][0], wanted["w"], rtol=1e-5)
