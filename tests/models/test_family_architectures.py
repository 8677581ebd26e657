"""Architectures of encoder families as data: JSON, bounds, read off trees; counts equal to the originals'."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from converters.tables import tiny_vit, tiny_vit_unused
from converters.tables.strict import abstract
from helpers import golden_families as families
from helpers.family_models import SLIM_TINY_VIT, SLIM_VIT
from slimsam_jax.models import efficient_sam_head
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import counts, efficient_sam_vit
from slimsam_jax.models.encoders import tiny_vit as tiny_vit_encoder
from slimsam_jax.models.encoders.architecture import Block
from slimsam_jax.models.sam import abstract_head

COUNTED = json.loads((families.HERE / "families_counts.json").read_text())
VIT_T = tiny_vit_encoder.PRESETS["vit_t"]


def test_counts_of_tiny_vit_equal_the_originals():
    counted, config = COUNTED["vit_t"], VIT_T
    shapes = abstract(tiny_vit_encoder.ImageEncoder(config))
    folded = abstract(tiny_vit_encoder.ImageEncoder(dataclasses.replace(config, batch_norm=False)))
    assert counts.parameters(shapes) == counted["encoder_params_without_dead_head"] == 5_743_892
    assert counts.parameters(folded) == counted["fused_params"]
    dead = tiny_vit_unused.fresh([], config)
    assert sum(array.size for array in dead.values()) == counted["dead_head_params"]
    macs = (counted["encoder_macs_linear_conv"], counted["encoder_macs_attention_products"])
    assert counts.macs(config) == macs and counts.macs(config).total == counted["encoder_macs"]
    head = Config((1024, 1024), 0, ())
    assert counts.decoder_macs(head, 2) == counted["mask_decoder_macs_linear_conv_2_sparse_tokens"]
    head_shapes = tiny_vit.abstract_head(head)
    assert counts.parameters(head_shapes["mask_decoder"]) == counted["mask_decoder_params"]
    assert counts.parameters(head_shapes["prompt_encoder"]) == counted["prompt_encoder_params"]


@pytest.mark.parametrize("name", ["efficient_sam_ti", "efficient_sam_s"])
def test_counts_of_efficient_sam_equal_the_originals(name):
    counted, config = COUNTED[name], efficient_sam_vit.PRESETS[name]
    encoder = counts.parameters(abstract(efficient_sam_vit.ImageEncoder(config)))
    head = efficient_sam_head.HeadConfig((1024, 1024))
    shapes = abstract_head(head)
    assert encoder == counted["encoder_params"]
    assert counts.parameters(shapes["mask_decoder"]) == counted["mask_decoder_params"]
    assert counts.parameters(shapes["prompt_encoder"]) == counted["prompt_encoder_params"]
    assert encoder + counts.parameters(shapes) == counted["total_params"]
    macs = (counted["encoder_macs_linear_conv"], counted["encoder_macs_attention_products"])
    assert counts.macs(config) == macs
    assert counts.decoder_macs(head, 6) == counted["mask_decoder_macs_linear_conv_6_sparse_tokens"]


@pytest.mark.parametrize("family", ["tiny_vit", "efficient_sam_vit"])
def test_counts_of_uneven_widths_equal_those_of_the_traced_program(monkeypatch, family):
    """Products and convolutions of the jaxpr; those with batch axes are attention's."""
    encoder = {
        "tiny_vit": tiny_vit_encoder.ImageEncoder(SLIM_TINY_VIT),
        "efficient_sam_vit": efficient_sam_vit.ImageEncoder(SLIM_VIT),
    }[family]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # depthwise convolutions as such
    images = jax.ShapeDtypeStruct((1, *encoder.config.image_size, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, x: encoder.apply({"params": p}, x)[0])(abstract(encoder), images)
    linear, attention = traced_macs(jaxpr.jaxpr)
    if family == "efficient_sam_vit":  # the interpolation of the positions
        (h, w), side, dim = encoder.config.grid, encoder.config.pretrain_grid, encoder.config.embed_dim
        linear -= min(h * side * side * dim + h * w * side * dim, w * side * side * dim + h * w * side * dim)
    assert counts.macs(encoder.config) == (linear, attention)


def traced_macs(jaxpr) -> tuple[int, int]:
    linear = attention = 0
    for equation in jaxpr.eqns:
        out, operands = equation.outvars[0].aval, [variable.aval for variable in equation.invars]
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            macs = out.size * int(np.prod([operands[0].shape[axis] for axis in contracted]))
            linear, attention = (linear, attention + macs) if batch else (linear + macs, attention)
        elif equation.primitive.name == "conv_general_dilated":
            linear += out.size * int(np.prod(operands[1].shape[:-1]))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            inside = traced_macs(inner)
            linear, attention = linear + inside[0], attention + inside[1]
    return linear, attention


CONFIGS = [SLIM_TINY_VIT, VIT_T, *efficient_sam_vit.PRESETS.values()]


@pytest.mark.parametrize("config", CONFIGS)
def test_architectures_are_json_and_back(config):
    fields = json.loads(json.dumps(config.to_json()))
    assert type(config).from_json(fields) == config
    with pytest.raises(ValueError, match="unexpected"):
        type(config).from_json({**fields, "depth": 3})
    with pytest.raises(ValueError, match="not an architecture"):
        type(config).from_json({name: value for name, value in fields.items() if name != "image_size"})
    head = efficient_sam_head.HeadConfig((64, 32), upscaling_dims=(8, 4))
    assert efficient_sam_head.HeadConfig.from_json(json.loads(json.dumps(head.to_json()))) == head


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": (36, 48)}, {"image_size": (0, 48)}, {"image_size": (1 << 20, 48)}, {"image_size": (32.0, 48)},
        {"stem_dim": 0}, {"conv_dim": 1 << 17}, {"conv_blocks": ()}, {"conv_blocks": (True,)},
        {"conv_blocks": (4,) * 127}, {"stages": ()}, {"out_chans": "16"}, {"batch_norm": 1},
        {"image_size": (32, 48, 3)},
    ],
)  # fmt: skip
def test_bounds_of_tiny_vit(change):
    with pytest.raises(ValueError):
        dataclasses.replace(SLIM_TINY_VIT, **change)


@pytest.mark.parametrize(
    "change", [{"embed_dim": 0}, {"blocks": ()}, {"blocks": (Block(1, 1, 1, 1),) * 129}, {"image_size": (8, 16)}]
)
def test_bounds_of_efficient_sam(change):
    with pytest.raises(ValueError):
        dataclasses.replace(SLIM_VIT, **change)
    with pytest.raises(ValueError):
        Block(1, 0, 1, 1)


def test_architectures_are_read_off_trees():
    """Published, slim, folded; and what is no such tree is refused."""
    assert tiny_vit_encoder.config_of(abstract(tiny_vit_encoder.ImageEncoder(VIT_T))) == VIT_T
    assert tiny_vit_encoder.config_of(abstract(tiny_vit_encoder.ImageEncoder(SLIM_TINY_VIT)), (32, 48)) == SLIM_TINY_VIT
    ti = efficient_sam_vit.PRESETS["efficient_sam_ti"]
    tree = abstract(efficient_sam_vit.ImageEncoder(ti))
    assert efficient_sam_vit.config_of(tree) == ti
    with pytest.raises(ValueError, match="TinyViT"):
        tiny_vit_encoder.config_of(tree)
    with pytest.raises(ValueError, match="EfficientSAM"):
        efficient_sam_vit.config_of({})
