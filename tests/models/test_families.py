"""An encoder family is one module: a toy one loads, predicts, is measured, pruned and distilled as a ViT is."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from converters import from_torch
from helpers import toy_encoder
from helpers.models import SQUARE, random_images, random_sam
from helpers.runs import compress_options
from slimsam_jax import checkpoint, data
from slimsam_jax.api import compress_with
from slimsam_jax.compression import report
from slimsam_jax.compression.found_groups import groups_of
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.compare import compare_models
from slimsam_jax.inference.predictor import SamPredictor
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.encoders import FAMILIES, name_of, tiny_vit
from slimsam_jax.models.encoders.tiny_vit_config import uniform
from slimsam_jax.models.sam import Sam, abstract_params, init, run_encoder
from slimsam_jax.profiling import sam_costs
from slimsam_jax.pruning import mask, shrink

HEAD = {name: getattr(SQUARE, name) for name in ("out_chans", "mask_in_chans", "decoder_heads", "decoder_mlp_dim")}
HEAD |= {name: getattr(SQUARE, name) for name in ("decoder_depth", "multimask_outputs", "iou_head_dim")}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", toy_encoder)


def toy_sam(seed: int = 0) -> Sam:
    config = SamConfig(toy_encoder.Config(out_chans=SQUARE.out_chans), head_of((64, 64), **HEAD))
    return Sam(config, jax.jit(lambda key: init(config, key))(jax.random.key(seed)))


def test_a_folder_says_its_family(tmp_path):
    sam = toy_sam()
    checkpoint.save(sam, tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    assert (description["format"], description["family"]) == ("slimsam_jax/2", "toy")
    again = from_torch.load(tmp_path)
    assert again.config == sam.config and name_of(again.config.encoder) == "toy"
    jax.tree.map(np.testing.assert_array_equal, again.params, sam.params)


def test_the_first_format_is_a_vit_forever(tmp_path):
    sam = random_sam(SQUARE)
    checkpoint.save(sam, tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description.pop("family") == "vit"
    (tmp_path / "config.json").write_text(json.dumps({**description, "format": "slimsam_jax/1"}))
    assert checkpoint.load(tmp_path).config == SQUARE
    for wrong in ({"format": "slimsam_jax/3"}, {"format": "slimsam_jax/2", "family": "resnet"}):
        (tmp_path / "config.json").write_text(json.dumps({**description, **wrong}))
        with pytest.raises(InputError, match=r"has format|of the family .resnet., and there are vit"):
            checkpoint.load(tmp_path)


def test_it_predicts_and_is_compared(material):
    sam, other = toy_sam(), toy_sam(1)
    predictor = SamPredictor(sam)
    predictor.set_image(np.asarray(Image.open(material / "images" / "0.png")))
    masks, scores, _ = predictor.predict(np.array([[9.0, 5.0]]), np.array([1]))
    assert masks.shape == (sam.config.multimask_outputs, 20, 30) and np.isfinite(scores).all()
    found = compare_models(sam, other, data.find([material / "val"]))
    assert found["annotated_images"] == 2 and 0 <= found["agreement"] <= 1 and found["teacher"]["point"] >= 0


def test_its_groups_are_found_and_masked_is_cut():
    sam = toy_sam()
    encoder, grouping = sam.params["image_encoder"], groups_of(sam.config)
    sizes = sorted(group.size for group in grouping.groups)
    assert sizes == [12, 16, 20]
    keep = {group.name: np.arange(0, group.size, 2) for group in grouping.groups}
    slim = shrink(encoder, grouping, keep)
    config = sam.config.with_encoder(toy_encoder.config_of(slim, like=sam.config.encoder))
    assert config.encoder == dataclasses.replace(sam.config.encoder, dim=6, hidden=(10, 8))
    batch = random_images(SQUARE)
    one, other = (run_encoder(c, e, batch)[0] for c, e in ((sam.config, mask(encoder, grouping, keep)), (config, slim)))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_it_is_slimmed_by_alternate_slimming(material, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    teacher = toy_sam()
    checkpoint.save(dataclasses.replace(teacher, thresholds=random_sam(SQUARE).thresholds), tmp_path / "teacher")
    choices = {"teacher": tmp_path / "teacher", "recipe": "taylor", "set": ("distill.validations=1",)}
    numbers = compress_with(compress_options(material, tmp_path / "slim", **choices)).report
    slim = from_torch.load(tmp_path / "slim")
    assert slim.config.encoder.dim == 6 and sum(slim.config.encoder.hidden) == 18
    assert numbers["slim"]["encoder_parameters"] < 0.4 * numbers["teacher"]["encoder_parameters"]
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    losses = [entry for entry in log if "loss" in entry]
    assert {"hidden"} <= set(losses[0]) and {"stream", "previous"} <= set(losses[-1])
    assert [entry["stage"] for entry in losses] == ["distill"] * 4 + ["distill-2"] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "default", "set": ()}, "there is no projection: take --recipe taylor"),
        ({"recipe": "slimsam", "set": ()}, "known bugs are of SAM.s ViT"),
        ({"recipe": "taylor", "set": ("prune.allocation=macs",)}, "compete globally, locally or by params"),
        ({"recipe": "taylor", "set": (), "ratio": None, "budget": "params=9k"}, "is for SAM's ViT"),
    ],
)
def test_what_it_cannot_do_is_one_line(material, tmp_path, changes, message):
    checkpoint.save(toy_sam(), tmp_path / "teacher")
    options = compress_options(material, tmp_path / "slim", teacher=tmp_path / "teacher", **changes)
    with pytest.raises(InputError, match=message):
        compress_with(options)
    assert not (tmp_path / "slim").exists()


def test_counts_are_those_of_the_jaxpr():
    config = toy_sam().config
    cells, c = 16, config.encoder
    layers = 3 * 16 * 16 * c.dim + sum(2 * 9 * c.dim * width for width in c.hidden) + c.dim * c.out_chans
    assert sam_costs.encoder_macs(config) == (cells * layers, 0)
    size = sum(leaf.size for leaf in jax.tree.leaves(toy_sam().params["image_encoder"]))
    assert sam_costs.encoder_parameters(config) == size


def test_tiny_vit_is_a_family():
    encoder = uniform((16, 16, 24, 32), (1, 1, 1, 1), (1, 2, 2, 2), (7, 7, 14, 7), image_size=64)
    *stages, last = encoder.stages  # whose stride the original has from its width
    encoder = dataclasses.replace(encoder, stages=(*stages, dataclasses.replace(last, stride=1)))
    config = SamConfig(encoder, head_of((64, 64), **{**HEAD, "out_chans": 256}))
    shapes = abstract_params(config)["image_encoder"]
    assert tiny_vit.config_of(shapes, like=encoder) == encoder
    stages = {
        part: [g for g in groups_of(config).groups if tiny_vit.STAGES[part]([m.path for m in g.members])]
        for part in ("embedding", "bottleneck")
    }
    assert sorted(g.size for g in stages["embedding"]) == [16, 16, 24, 32]
    assert len(stages["bottleneck"]) > 10
