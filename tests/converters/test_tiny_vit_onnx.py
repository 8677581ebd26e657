"""TinyViT as ONNX: onnxruntime gives JAX's masks, in both signatures, in half precision, for the page."""

from __future__ import annotations

import dataclasses
import json

import flax.traverse_util
import numpy as np
import pytest
from PIL import Image

from converters import to_onnx
from converters.onnx import check
from helpers.family_models import SLIM_TINY_VIT, random_params
from helpers.images import random_image
from slimsam_jax import checkpoint
from slimsam_jax.demo import export
from slimsam_jax.errors import InputError
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.sam import Sam, abstract_params, folded


@pytest.fixture(scope="module")
def sam() -> Sam:
    """Windows that are padded, widths that fit nothing, a rectangle; its decoder has no single mask."""
    head = head_of(SLIM_TINY_VIT.image_size, 8, out_chans=16, mask_in_chans=4, decoder_mlp_dim=8, iou_head_dim=8)
    config = SamConfig(SLIM_TINY_VIT, dataclasses.replace(head, decoder_heads=2, decoder_depth=1), single_mask=False)
    return Sam(config, random_params(abstract_params(config)))


@pytest.fixture(scope="module")
def expected(sam):
    return check.reference(sam, Image.fromarray(random_image(0, 40, 60)))


def written(sam, folder, layout, dtype="float32", **options):
    return to_onnx.write(sam, folder, layout, dtype, **options)


@pytest.mark.parametrize("layout", ["sam", "transformers_js"])
def test_masks_are_jaxs(sam, expected, tmp_path, layout):
    found = to_onnx.measure(expected, layout, written(sam, tmp_path, layout))
    assert max(found[:3]) < 2e-5 and found.agreement == 1


def test_half_precision_and_one_mask(sam, expected, tmp_path):
    found = to_onnx.measure(expected, "sam", written(sam, tmp_path, "sam", "float16"))
    assert max(found[:3]) < 2e-2
    single = written(sam, tmp_path / "single", "sam", return_single_mask=True)
    assert max(to_onnx.measure(expected, "sam", single, return_single_mask=True)[:3]) < 2e-5


def test_batch_norms_are_folded_and_tables_are_stored_once(sam):
    encoder, _ = to_onnx.models(sam, "sam", np.float32)
    names = {array.name: array for array in encoder.graph.initializer}
    assert not any("/bn/" in name for name in names)
    kept = {name for name in names if name.startswith("image_encoder/")}
    flat = flax.traverse_util.flatten_dict(folded(sam).params["image_encoder"], sep="/")
    assert kept == {f"image_encoder/{path}" for path in flat}
    assert {node.op_type for node in encoder.graph.node}.isdisjoint({"BatchNormalization"})
    assert json.loads(encoder.metadata_props[0].value) == json.loads(json.dumps(folded(sam).config.to_json()))


def test_the_page_exports_it(sam, tmp_path, capsys):
    checkpoint.save(sam, tmp_path / "tiny")
    ((fields, files),) = export.prepare((tmp_path / "tiny",), "float32", tmp_path / "cache")
    assert fields["image_size"] == (32, 48) and all(path.is_file() for path in files)
    assert "masks agree to 100.00 %" in capsys.readouterr().out


def test_a_family_without_a_graph_is_refused(sam, monkeypatch):
    from converters.onnx import layouts

    monkeypatch.delitem(layouts.ENCODERS, "tiny_vit")
    with pytest.raises(
        InputError, match="x is a tiny_vit, and ONNX is written of vit, efficient_sam, rep_vit, hiera alone"
    ):
        to_onnx.check_model(sam, "x")
