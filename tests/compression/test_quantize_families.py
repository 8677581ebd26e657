"""Families other than ViT in integers, weights and inputs: made with images, kept in a folder, computed with."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from helpers.family_models import SLIM_REP_VIT, SLIM_TINY_VIT, SLIM_VIT, edge_sam, efficient_sam, random_params
from helpers.images import samples
from slimsam_jax import checkpoint, data
from slimsam_jax.compression import quantize as quantize_module
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.compression.quantize import PROMPTS, embed, prompted, quantize
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.sam import Sam, abstract_params, encode, folded
from slimsam_jax.quantization import is_quantized
from slimsam_jax.quantization.layers import find_layers
from slimsam_jax.quantize.__main__ import quantize_alone


def mobile_sam():
    encoder, sizes = SLIM_TINY_VIT, {"out_chans": 16, "mask_in_chans": 4, "decoder_mlp_dim": 8, "iou_head_dim": 8}
    config = SamConfig(encoder, head_of(encoder.image_size, encoder.stride, **sizes, decoder_heads=2, decoder_depth=1))
    return Sam(config, random_params(abstract_params(config)))


FAMILIES = {
    "tiny_vit": mobile_sam,
    "rep_vit": lambda: edge_sam(SLIM_REP_VIT),
    "efficient_sam": lambda: efficient_sam(SLIM_VIT),
}


@pytest.mark.parametrize("family", ["tiny_vit", "efficient_sam"])
def test_heads_are_calibrated_with_boxes_alone_and_clicks_alone(family, monkeypatch):
    """A quarter of the prompts each, also of a head that takes no prompt without a point."""
    monkeypatch.setattr(quantize_module, "encode", lambda *_: np.zeros((1, 4, 4, 16), np.float32))
    monkeypatch.setattr(quantize_module, "_decode", lambda *_: (np.zeros((PROMPTS, 1, 16, 16)),))
    sam, batch = FAMILIES[family](), {"image": None, "size": np.array([[64, 50]])}
    ((_, _, labels, *_),) = prompted(sam, iter([batch]), 0)
    prompts = [[label for label in row if label >= 0] for row in labels.tolist()]
    assert prompts[2:4] == [[2, 3]] * 2 and prompts[4:6] == [[1]] * 2
    assert sam.refusal(labels[2:6], False) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_is_a_layer_but_depthwise_ones(family):
    sam = FAMILIES[family]()
    encoder, shape = sam.params["image_encoder"], jax.ShapeDtypeStruct
    inputs = shape((2, *sam.config.image_size, 3), np.uint8), shape((2, 2), np.int32)
    layers = {layer.path for layer in find_layers(functools.partial(embed, sam.config), encoder, *inputs).layers}
    kernels = {path: leaf for path, leaf in flatten_dict(encoder, sep="/").items() if path.endswith("kernel")}
    assert len(layers & set(kernels)) >= 15
    assert {leaf.shape[-2] for path, leaf in kernels.items() if path not in layers} <= {1}


@pytest.mark.parametrize("family", ["tiny_vit", "rep_vit"])
def test_batch_norms_are_folded_before(family, monkeypatch):
    """So that what integers stand for is what every program and graph computes with."""
    monkeypatch.setattr(quantize_module, "see", lambda sam, *_: sam.params)
    monkeypatch.setattr(quantize_module, "with_integers", lambda sam, step, seen: seen)
    sam, photos = FAMILIES[family](), samples(sorted(data.embedded_images().glob("*.jpg"))[:1])
    small = quantize(sam, photos)
    assert sam.config.encoder.batch_norm and small.config == folded(sam).config
    assert not [path for path in flatten_dict(small.params["image_encoder"], sep="/") if "bn/" in path]


def test_a_size_is_said_of_what_a_share_is_of(tmp_path, monkeypatch, capsys):
    sam = mobile_sam()
    monkeypatch.setattr("converters.from_torch.load_sam", lambda path: sam)
    monkeypatch.setattr(quantize_module, "quantize", lambda sam, *_: folded(sam))
    quantize_alone(tmp_path / "m", tmp_path / "out", (), Quantize(), 0)
    size, own = (tmp_path / "out" / "model.safetensors").stat().st_size, jax.tree.leaves(folded(sam).params)
    assert f", {100 * size / sum(4 * leaf.size for leaf in own):.1f} % of its" in capsys.readouterr().out


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("tiny_vit", marks=pytest.mark.slow),
        pytest.param("rep_vit", marks=pytest.mark.slow),
        "efficient_sam",
    ],
)
def test_an_encoder_becomes_integers(family, tmp_path):
    """All of its kernels but for depthwise ones, and the inputs of all but the first; embeddings are near floats'."""
    sam = FAMILIES[family]()
    photos = samples(sorted(data.embedded_images().glob("*.jpg"))[:4])
    checkpoint.save(quantize(sam, photos, activations=8, ranges="token", head=False), tmp_path / "small")
    small = checkpoint.load(tmp_path / "small")
    flat = flatten_dict(small.params["image_encoder"], sep="/")
    kernels = {path: leaf for path, leaf in flat.items() if path.endswith("kernel")}
    integers = {path: leaf for path, leaf in kernels.items() if is_quantized(leaf)}
    assert {leaf.shape[-2] for path, leaf in kernels.items() if path not in integers} <= {1}
    assert sum(leaf.range is None for leaf in integers.values()) == 1
    height, width = sam.config.image_size
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8), np.array([[height, width]])
    plain, rounded = (jax.device_get(encode(each.config, each.params, *image)) for each in (sam, small))
    assert 0 < np.square(rounded - plain).mean() / plain.var() < 0.05
