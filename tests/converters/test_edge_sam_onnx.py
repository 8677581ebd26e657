"""EdgeSAM as ONNX: onnxruntime gives JAX's masks, and EdgeSAM's own arrays; masks are ranked by stability; the page."""

from __future__ import annotations

import flax.traverse_util
import numpy as np
import pytest
from PIL import Image

from converters import to_onnx
from converters.onnx import check
from converters.tables import rep_vit as table
from helpers.family_models import edge_sam
from helpers.images import random_image
from helpers.shared import shared
from slimsam_jax import checkpoint
from slimsam_jax.demo import export
from slimsam_jax.inference.ranking import stability_scores
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.sam import Sam, folded


@pytest.fixture(scope="module")
def sam() -> Sam:
    """Widths that fit nothing, squeeze-excite in strided blocks, too, a rectangle."""
    return edge_sam()


@pytest.fixture(scope="module")
def expected(sam):
    return check.reference(sam, Image.fromarray(random_image(0, 40, 60)))


@pytest.mark.parametrize("layout", ["sam", "transformers_js"])
def test_masks_are_jaxs_and_ranked_by_stability(sam, expected, tmp_path, layout):
    found = to_onnx.measure(expected, layout, to_onnx.write(sam, tmp_path, layout, "float32"))
    assert max(found[:3]) < 2e-5 and found.agreement == 1
    assert found.iou < 1e-6 and 0 < expected.prompts[0].iou.max() <= 1


def test_half_precision_and_the_most_stable_mask(sam, expected, tmp_path):
    half = to_onnx.write(sam, tmp_path, "sam", "float16")
    assert max(to_onnx.measure(expected, "sam", half)[:3]) < 2e-2
    single = to_onnx.write(sam, tmp_path / "single", "sam", "float32", return_single_mask=True)
    assert max(to_onnx.measure(expected, "sam", single, return_single_mask=True)[:3]) < 2e-5


def test_a_block_has_one_filter(sam):
    encoder, _ = to_onnx.models(sam, "sam", np.float32)
    kept = {array.name for array in encoder.graph.initializer if array.name.startswith("image_encoder/")}
    flat = flax.traverse_util.flatten_dict(folded(sam).params["image_encoder"], sep="/")
    assert kept == {f"image_encoder/{path}" for path in flat}
    assert not any("/bn/" in name or "conv1" in name for name in kept)


def test_arrays_of_edge_sams_own_export(tmp_path):
    with np.load(shared("golden/edge_sam.npz")) as arrays:
        golden = {name: arrays[name] for name in arrays if not name.startswith(("train/", "loop/"))}
    state = {name[3:]: array for name, array in golden.items() if name.startswith("sd/")}
    converted = table.from_state_dict(state, image_size=128)
    sam = Sam(SamConfig(converted.encoder, converted.head), converted.params)
    encoder, decoder = (check.session(path).run for path in to_onnx.write(sam, tmp_path, "sam", "float32"))
    (embedding,) = encoder(None, {"images": golden["resized_uint8"].transpose(2, 0, 1)[None]})
    np.testing.assert_allclose(embedding, golden["image_embedding"], atol=5e-5)
    inputs = {
        "image_embeddings": golden["image_embedding"],
        "point_coords": golden["export/point_coords"],
        "point_labels": golden["export/point_labels"],
        "mask_input": np.zeros((1, 1, 32, 32), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": golden["original_size"].astype(np.float32),
    }
    _, scores, low = decoder(None, inputs)
    np.testing.assert_allclose(low, golden["export/masks"], atol=1e-4)
    np.testing.assert_allclose(scores, golden["export/stability_True/scores"], atol=1e-6)


def test_the_page_exports_it_and_says_stability(sam, tmp_path, capsys):
    checkpoint.save(sam, tmp_path / "edge")
    ((fields, files),) = export.prepare((tmp_path / "edge",), "float32", tmp_path / "cache")
    assert fields["score"] == "stability" and all(path.is_file() for path in files)
    assert "stability 0.0e+00; masks agree to 100.00 %" in capsys.readouterr().out


def test_stability_of_empty_masks_is_zero():
    empty = np.full((1, 2, 4, 4), -3, np.float32)
    assert check.largest_error(stability_scores(empty), np.zeros((1, 2), np.float32)) == 0
