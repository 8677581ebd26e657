"""SAM 2 as ONNX: onnxruntime gives JAX's masks and the original's arrays, in both layouts; the page's export."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from PIL import Image

from converters import to_onnx
from converters.onnx import check
from converters.onnx import encoder as onnx_encoder
from converters.onnx.graph import FLOAT, Graph
from converters.onnx.sam2 import stable_first
from converters.tables import hiera as table
from helpers import golden_families as families
from helpers import golden_sam2 as golden_file
from helpers.family_models import sam2
from helpers.images import random_image
from helpers.shared import shared
from slimsam_jax import checkpoint
from slimsam_jax.demo import export
from slimsam_jax.errors import InputError
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.sam import Sam


@pytest.fixture(scope="module")
def sam() -> Sam:
    """Widths that fit nothing, padded windows that are pooled, a rectangle."""
    return sam2()


@pytest.fixture(scope="module")
def expected(sam):
    """An image that is shrunk along one axis and enlarged along the other."""
    return check.reference(sam, Image.fromarray(random_image(0, 90, 60)))


@pytest.mark.parametrize("layout", ["sam", "sam2"])
def test_masks_are_jaxs(sam, expected, tmp_path, layout, monkeypatch):
    monkeypatch.setattr(onnx_encoder, "LOGITS_AT_ONCE", 0 if layout == "sam" else 2**22)  # head by head, or at once
    found = to_onnx.measure(expected, layout, to_onnx.write(sam, tmp_path, layout, "float32"))
    assert max(found[:3]) < 2e-5 and found.agreement == 1
    single = to_onnx.write(sam, tmp_path / "single", layout, "float32", return_single_mask=True)
    assert max(to_onnx.measure(expected, layout, single, return_single_mask=True)[:3]) < 2e-5


def test_half_precision(sam, expected, tmp_path):
    half = to_onnx.write(sam, tmp_path, "sam", "float16")
    assert max(to_onnx.measure(expected, "sam", half)[:3]) < 2e-2


def test_the_memorys_place_and_the_finer_maps_are_folded(sam):
    encoder, _ = to_onnx.models(sam, "sam2", np.float32)
    names = {array.name for array in encoder.graph.initializer}
    assert "image_encoder/folded_0/kernel" in names
    assert not any("no_mem_embed" in name or "neck_3" in name or "high_res" in name for name in names)


def test_boxes_and_points_alone_go_into_two_calls(sam, tmp_path):
    _, path = to_onnx.write(sam, tmp_path, "sam", "float32")
    (h, w), width = sam.config.grid, sam.config.out_chans
    inputs = {
        "image_embeddings": np.ones((1, width, h, w), np.float32),
        "high_res_feats_0": np.ones((1, width // 8, 4 * h, 4 * w), np.float32),
        "high_res_feats_1": np.ones((1, width // 4, 2 * h, 2 * w), np.float32),
        "point_coords": np.ones((2, 2, 2), np.float32),
        "point_labels": np.array([[2, 3], [1, -1]], np.float32),
        "mask_input": np.zeros((1, 1, 4 * h, 4 * w), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([90, 60], np.float32),
    }
    run = check.session(path).run
    with pytest.raises(InvalidArgument, match="prompts_with_a_box_and_without_go_into_two_calls"):
        run(None, inputs)
    both = [run(None, {**inputs, "point_labels": np.float32(labels)})[2] for labels in ([[2, 3]] * 2, [[1, -1]] * 2)]
    alone = [
        run(None, {**inputs, "point_coords": np.ones((1, 2, 2), np.float32), "point_labels": np.float32(labels)})[2]
        for labels in ([[2, 3]], [[1, -1]])
    ]
    for pair, one in zip(both, alone, strict=True):
        np.testing.assert_allclose(pair, np.repeat(one, 2, axis=0), atol=1e-5)


def test_an_unstable_mask_gives_way():
    arrays = families.read(golden_file.SUBSET)
    g = Graph({})
    given = {"masks": arrays["stability/all_masks"], "ious": arrays["stability/all_ious"]}
    outputs = zip(("first_masks", "first_ious"), stable_first(g, *given), strict=True)
    shapes = {name: array.shape for name, array in given.items()}
    found = {name: (value, shape) for (name, value), shape in zip(outputs, shapes.values(), strict=True)}
    model = g.model("stable", sam2().config, {name: (FLOAT, shape) for name, shape in shapes.items()}, found)
    masks, ious = check.session(model.SerializeToString()).run(None, given)
    np.testing.assert_array_equal(masks[:, :1], arrays["stability/masks"])
    np.testing.assert_array_equal(ious[:, :1], arrays["stability/ious"])
    np.testing.assert_array_equal(masks[:, 1:], given["masks"][:, 1:])


@pytest.fixture(scope="module")
def golden():
    with np.load(shared("golden/sam2_image.npz")) as arrays:
        return {name: arrays[name] for name in arrays if not name.startswith(("grad/", "slim/", "trunk/"))}


@pytest.fixture(scope="module")
def original(golden) -> Sam:
    config = golden_file.config_of(golden)
    converted = table.from_state_dict(golden_file.state_of(golden), **golden_file.given_of(config))
    return Sam(SamConfig(converted.encoder, converted.head), converted.params)


def prompt_of(golden, case: str) -> dict[str, np.ndarray]:
    """A case as the layout sam2 takes it."""
    return {
        "point_coords": golden[f"{case}/model_frame_points"].astype(np.float32),
        "point_labels": golden[f"{case}/labels"].astype(np.float32),
        "mask_input": golden["prompt/mask_input"].reshape(1, 1, 32, 32).astype(np.float32),
        "has_mask_input": np.float32(["mask" in case]),
    }


def test_arrays_of_the_original(golden, original, tmp_path):
    """From the normalised image to masks; the single one, which falls back, and the others."""
    encoder, multi = to_onnx.write(original, tmp_path, "sam2", "float32")
    _, single = to_onnx.write(original, tmp_path / "single", "sam2", "float32", return_single_mask=True)
    maps = check.encode(encoder, {"image": golden["preprocessed"].reshape(1, 3, 128, 128)})
    assert list(maps) == ["high_res_feats_0", "high_res_feats_1", "image_embed"]
    for name, theirs in zip(maps, ("high_res/0", "high_res/1", "image_embedding"), strict=True):
        np.testing.assert_allclose(maps[name], golden[theirs], atol=1e-4)
    several, one = (check.session(path).run for path in (multi, single))
    for case in ("point1", "points3", "box_point", "point1_mask", "boxes2"):
        masks, iou = several(None, {**maps, **prompt_of(golden, case)})
        np.testing.assert_allclose(masks, golden[f"{case}/all/low_res_masks"][:, 1:].clip(-32, 32), atol=1e-3)
        np.testing.assert_allclose(iou, golden[f"{case}/all/iou_predictions"][:, 1:], atol=1e-5)
        masks, iou = one(None, {**maps, **prompt_of(golden, case)})
        wanted = golden[f"{case}/single/low_res_clamped"]
        np.testing.assert_allclose(masks, wanted.reshape(masks.shape), atol=1e-3, err_msg=case)
        np.testing.assert_allclose(iou, golden[f"{case}/single/scores"].reshape(iou.shape), atol=1e-5)


def test_masks_of_the_original_in_the_image(golden, original, tmp_path):
    """By the layout sam from the image itself; a mask alone is a prompt without any point."""
    encoder, decoder = to_onnx.write(original, tmp_path, "sam", "float32")
    maps = check.encode(encoder, {"images": golden["image_uint8"].transpose(2, 0, 1)[None]})
    height, width = golden["original_size"]
    scale = np.float32([128 / width, round(height * 128 / width) / height])  # as ResizeLongestSide has it
    run = check.session(decoder).run
    for case in ("point1", "boxes2", "mask"):
        prompt = prompt_of(golden, case) if case != "mask" else prompt_of(golden, "point1_mask")
        points = prompt["point_coords"] * [width / 128, height / 128] * scale
        given = {"point1": slice(None), "boxes2": slice(None), "mask": slice(0)}[case]
        points, labels = points[:, given], prompt["point_labels"][:, given]
        if case == "point1":
            points, labels = (
                np.pad(points, ((0, 0), (0, 1), (0, 0))),
                np.pad(labels, ((0, 0), (0, 1)), constant_values=-1),
            )
        further = {
            "point_coords": np.float32(points),
            "point_labels": labels,
            "orig_im_size": np.float32([height, width]),
        }
        masks, iou, _ = run(None, {**maps, **prompt, **further})
        name = f"{case}/single"
        wanted = golden[f"{name}/mask_logits"].reshape(masks[:, :1].shape)
        np.testing.assert_allclose(masks[:, :1], wanted, atol=2e-3, err_msg=case)
        np.testing.assert_allclose(iou[:, 0], golden[f"{name}/scores"].ravel(), atol=1e-5)


def test_the_page_exports_it(sam, tmp_path, capsys):
    checkpoint.save(sam, tmp_path / "sam2")
    ((fields, files),) = export.prepare((tmp_path / "sam2",), "float32", tmp_path / "cache")
    assert fields["whole"] and fields["most_points"] is None and all(path.is_file() for path in files)
    assert "masks agree to 100.00 %" in capsys.readouterr().out


def test_other_layouts_are_refused(sam):
    with pytest.raises(InputError, match="not for x, whose prompts are those of sam2; take sam or sam2"):
        to_onnx.check_model(sam, "x", "transformers_js")


def test_a_stable_model_keeps_its_single_mask(sam):
    """Without the rule there is none in the graph."""
    head = dataclasses.replace(sam.config.head, dynamic_multimask=False)
    plain = dataclasses.replace(sam, config=SamConfig(sam.config.encoder, head))
    kinds = [{node.op_type for node in to_onnx.models(s, "sam2", np.float32)[1].graph.node} for s in (sam, plain)]
    assert [("ArgMax" in kind) for kind in kinds] == [True, False]
