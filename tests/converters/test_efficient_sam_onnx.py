"""EfficientSAM as ONNX: onnxruntime gives JAX's masks, and the original's arrays; what it cannot take fails by name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from PIL import Image

from converters import efficient_sam_torch, to_onnx, to_torch
from converters.onnx import check, frames
from converters.onnx import encoder as onnx_encoder
from converters.onnx.graph import FLOAT, Graph
from converters.tables import efficient_sam as table
from helpers.family_models import efficient_sam
from helpers.images import random_image
from helpers.models import SQUARE, random_sam
from helpers.shared import shared
from slimsam_jax import checkpoint
from slimsam_jax.demo import export
from slimsam_jax.errors import InputError
from slimsam_jax.imaging.bicubic import bicubic_matrix
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.sam import Sam


@pytest.fixture(scope="module")
def sam() -> Sam:
    """Blocks of different heads and widths, values of others than keys, a rectangle."""
    return efficient_sam()


@pytest.fixture(scope="module")
def expected(sam):
    return check.reference(sam, Image.fromarray(random_image(0, 40, 60)))


def session(model: onnx.ModelProto):
    onnx.checker.check_model(model, full_check=True)
    run = check.session(model.SerializeToString()).run
    return lambda **inputs: run(None, inputs)


@pytest.mark.parametrize("layout", ["sam", "efficient_sam"])
def test_masks_are_jaxs(sam, expected, tmp_path, layout, monkeypatch):
    monkeypatch.setattr(onnx_encoder, "LOGITS_AT_ONCE", 0 if layout == "sam" else 2**22)  # head by head, or at once
    found = to_onnx.measure(expected, layout, to_onnx.write(sam, tmp_path, layout, "float32"))
    assert max(found[:3]) < 5e-5 and found.agreement == 1


def test_half_precision_and_one_mask(sam, expected, tmp_path):
    half = to_onnx.write(sam, tmp_path, "sam", "float16")
    assert max(to_onnx.measure(expected, "sam", half)[:3]) < 2e-2
    single = to_onnx.write(sam, tmp_path / "single", "sam", "float32", return_single_mask=True)
    assert max(to_onnx.measure(expected, "sam", single, return_single_mask=True)[:3]) < 5e-5


@pytest.fixture(scope="module")
def decoder(sam):
    return session(to_onnx.models(sam, "sam", np.float32)[1])


def inputs(sam, labels, masked=0.0):
    (h, w), count = sam.config.grid, len(labels)
    return {
        "image_embeddings": np.ones((1, sam.config.out_chans, h, w), np.float32),
        "point_coords": np.linspace(0, 20, 2 * count, dtype=np.float32).reshape(1, count, 2),
        "point_labels": np.array([labels], np.float32),
        "mask_input": np.zeros((1, 1, 4 * h, 4 * w), np.float32),
        "has_mask_input": np.array([masked], np.float32),
        "orig_im_size": np.array([40, 60], np.float32),
    }


@pytest.mark.parametrize(
    ("labels", "masked", "reason"),
    [
        ([1, 0, -1], 0.0, "EfficientSAM_knows_no_background_points"),
        ([1, 1, 2, 3, 1, 1, 1], 0.0, "EfficientSAM_takes_6_points_at_most"),
        ([1, -1], 1.0, "EfficientSAM_takes_no_mask_as_a_prompt"),
        ([1, 4], 0.0, "labels_are_-1_1_2_3"),
    ],
)
def test_what_it_cannot_take_fails_by_name(sam, decoder, labels, masked, reason):
    with pytest.raises(InvalidArgument, match=reason):
        decoder(**inputs(sam, labels, masked))


def test_what_fills_up_makes_room_for_points(sam, decoder):
    """Six points and SAM's padding are seven: the padding goes, wherever it stands, and whatever its place."""
    full = inputs(sam, [1, 1, 1, 1, 2, 3, -1])
    order = [6, 3, 0, 1, 2, 4, 5]
    turned = {**full, **{name: full[name][:, order] for name in ("point_coords", "point_labels")}}
    turned["point_coords"][0, 0] = 7
    for one, other in zip(decoder(**full), decoder(**turned), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("void", [(0, 0), (30, 20), (-1, -1), (-3, 20)])
def test_a_void_point_counts_at_its_place_as_in_the_original(sam, tmp_path, void):
    """In its own layout; that of Segment Anything's tools has padding at (0, 0), which is moved to (-1, -1)."""
    to_torch.save_sam(sam, tmp_path / "slim.pt")
    embedding = np.random.default_rng(0).standard_normal((1, sam.config.out_chans, *sam.config.grid), np.float32)
    points, labels = np.array([[[[10, 20], void]]], np.float32), np.array([[[1, -1]]], np.float32)
    found = session(to_onnx.models(sam, "efficient_sam", np.float32)[1])(
        image_embeddings=embedding,
        batched_point_coords=points,
        batched_point_labels=labels,
        orig_im_size=np.array([40, 60]),
    )
    with torch.no_grad():
        wanted = efficient_sam_torch.load(tmp_path / "slim.pt").predict_masks(
            *map(torch.from_numpy, (embedding, points, labels)), True, 40, 60, 40, 60
        )
    for one, other in zip(found, wanted, strict=False):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(other.abs().max()))


def test_layouts_that_cannot_hold_a_model_are_refused(sam):
    with pytest.raises(InputError, match="not for x, whose prompts are those of efficient_sam; take sam or eff"):
        to_onnx.check_model(sam, "x", "transformers_js")
    with pytest.raises(InputError, match=r"--layout efficient_sam is not for y, .* take sam or transformers_js"):
        to_onnx.check_model(random_sam(SQUARE), "y", "efficient_sam")


@pytest.mark.parametrize(("source", "target"), [(8, 29), (12, 5), (4, 1)])
def test_bicubic_weights(source, target):
    g = Graph({})
    weights = frames.bicubic_matrix(g, source, g.op("Squeeze", "target"))
    model = g.model("weights", SQUARE, {"target": (FLOAT, (1,))}, {"weights": (weights, ("target", source + 4))})
    (found,) = session(model)(target=np.array([target], np.float32))
    edges = np.clip(np.arange(-2, source + 2), 0, source - 1)
    np.testing.assert_allclose(found @ np.eye(source)[edges], bicubic_matrix(source, target).toarray(), atol=1e-5)


def test_arrays_of_the_original(tmp_path):
    with np.load(shared("golden/efficient_sam.npz")) as arrays:
        golden = dict(arrays)
    state = {name[3:]: array for name, array in golden.items() if name.startswith("sd/")}
    converted = table.from_state_dict(state, image_size=256, heads=3)
    sam = Sam(SamConfig(converted.encoder, converted.head), converted.params)
    encoder, decoder = (check.session(path).run for path in to_onnx.write(sam, tmp_path, "efficient_sam", "float32"))
    image = (golden["image_uint8"].transpose(2, 0, 1)[None] / 255).astype(np.float32)
    (embedding,) = encoder(None, {"batched_images": image})
    np.testing.assert_allclose(embedding, golden["image_embedding"], atol=5e-5)
    for case in ("point1", "box", "queries4"):
        prompts = {
            "image_embeddings": embedding,
            "batched_point_coords": golden[f"{case}/points"],
            "batched_point_labels": golden[f"{case}/labels"].astype(np.float32),
            "orig_im_size": np.array(image.shape[2:]),
        }
        masks, iou, low = decoder(None, prompts)
        np.testing.assert_allclose(masks, golden[f"{case}/multi/mask_logits"], atol=1e-4)
        np.testing.assert_allclose(iou, golden[f"{case}/multi/iou_predictions"], atol=1e-4)
        np.testing.assert_allclose(low, golden[f"{case}/multi/low_res_masks"][0], atol=1e-4)


def test_the_page_exports_it_and_knows_what_it_cannot_take(sam, tmp_path, capsys):
    checkpoint.save(sam, tmp_path / "efficient")
    ((fields, files),) = export.prepare((tmp_path / "efficient",), "float32", tmp_path / "cache")
    assert fields["whole"] and fields["most_points"] == 6 and all(path.is_file() for path in files)
    assert fields["no_background"].startswith("EfficientSAM knows no background points")
    assert "predicted IoU" in capsys.readouterr().out
    other = export.describe("sam", random_sam(SQUARE), files)
    assert (other["whole"], other["most_points"], other["no_background"]) == (False, None, None)
