"""`sam2_torch.py`, the file to copy: it gives the original's masks, and those of slim models of any widths."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from converters import sam2_torch, to_torch
from helpers import golden_sam2 as golden_file
from helpers.family_models import sam2
from helpers.images import random_image
from helpers.shared import shared
from slimsam_jax.inference.predictor import SamPredictor


@pytest.fixture(scope="module")
def golden():
    with np.load(shared("golden/sam2_image.npz")) as arrays:
        return {name: arrays[name] for name in arrays if not name.startswith(("grad/", "slim/", "trunk/"))}


@pytest.fixture(scope="module")
def predictor(golden) -> sam2_torch.Predictor:
    state = {name: torch.from_numpy(array) for name, array in golden_file.state_of(golden).items()}
    model = sam2_torch.Sam2(state, golden_file.given_of(golden_file.config_of(golden)))
    model.check()
    predictor = sam2_torch.Predictor(model)
    predictor.set_image(golden["image_uint8"])
    return predictor


def test_maps_of_the_original(golden, predictor):
    for ours, theirs in zip(predictor.maps, ("high_res/0", "high_res/1", "image_embedding"), strict=True):
        np.testing.assert_allclose(ours, golden[theirs], atol=1e-4)


@pytest.mark.parametrize(
    ("case", "prompt"),
    [
        ("point1", {"point_coords": "point1", "point_labels": "label1"}),
        ("points3", {"point_coords": "points3", "point_labels": "labels3"}),
        ("box", {"box": "box"}),
        ("mask", {"mask_input": "mask_input"}),
        ("point1_mask", {"point_coords": "point1", "point_labels": "label1", "mask_input": "mask_input"}),
    ],
)
def test_masks_of_the_original(golden, predictor, case, prompt):
    """The single one, which gives way in some of the cases, and the three."""
    given = {name: golden[f"prompt/{key}"] for name, key in prompt.items()}
    for name, several in (("multi", True), ("single", False)):
        masks, iou, low = predictor.predict(**given, multimask_output=several, return_logits=True)
        np.testing.assert_allclose(masks, golden[f"{case}/{name}/mask_logits"], atol=1e-3)
        np.testing.assert_allclose(iou, golden[f"{case}/{name}/scores"], atol=1e-5)
        assert len(low) == len(masks) and low.abs().max() <= 32
    single = golden[f"{case}/single/low_res_clamped"]
    np.testing.assert_allclose(low, single, atol=1e-3)


def test_a_slim_model_and_the_file_beside_it(tmp_path):
    """Widths that fit nothing, a rectangle, padded windows that are pooled."""
    slim, image = sam2(), random_image(0, 40, 60)
    to_torch.save_sam(slim, tmp_path / "slim.pt")
    assert (tmp_path / "sam2_torch.py").is_file()
    theirs, ours = sam2_torch.Predictor(sam2_torch.load(tmp_path / "slim.pt")), SamPredictor(slim)
    theirs.set_image(image)
    ours.set_image(image)
    prompt = {"point_coords": [[30, 20], [5, 6]], "point_labels": [1, 0], "box": [3, 4, 50, 30]}
    for several in (True, False):
        found = theirs.predict(**prompt, multimask_output=several, return_logits=True)
        wanted = ours.predict(**prompt, multimask_output=several, return_logits=True)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_half_a_prompt_is_refused(predictor):
    for labels in (None, [1, 0]):
        with pytest.raises(ValueError, match=r"point_coords \[n, 2\] and point_labels \[n\] go together"):
            predictor.predict(point_coords=[[1, 2]], point_labels=labels)
    with pytest.raises(ValueError, match=r"a box is \[4\].*not \[1, 8\]"):
        predictor.predict(box=[[1, 2, 3, 4, 5, 6, 7, 8]])


def test_a_check_holds_no_weights(predictor, monkeypatch):
    made = []
    hold = sam2_torch.hold
    monkeypatch.setattr(sam2_torch, "hold", lambda root, name, array: made.append(array) or hold(root, name, array))
    predictor.model.check()
    assert made and all(array.is_meta for array in made)


def test_the_published_layout_loads(tmp_path):
    """Of zeros; nothing needs to be given, and the memory of videos is passed by."""
    shapes = json.loads(golden_file.COUNTS.read_text())["shapes"]
    state = {name: torch.zeros(shape) for name, shape in (shapes["tiny"] | shapes["video"]).items()}
    model = sam2_torch.Sam2({n: array for n, array in state.items() if n.startswith(sam2_torch.READ)}, {})
    model.check()
    assert model.heads == [1, 2, 2, *[4] * 7, 8, 8] and model.windows == [8, 8, 4, 4, 14, 0, 14, 0, 14, 0, 14, 7]


def test_heads_of_another_width_are_no_published_ones():
    """A slim model that was saved again without its note: as many blocks, and heads that nobody knows."""
    parts = {"pos_embed": (1, 16, 7, 7), "patch_embed.proj.weight": (16, 3, 7, 7), "blocks.0.norm1.weight": (16,)}
    state = {f"image_encoder.trunk.{name}": torch.zeros(shape) for name, shape in parts.items()}
    state |= {f"image_encoder.trunk.blocks.{i}.norm1.weight": torch.zeros(16) for i in range(12)}
    with pytest.raises(ValueError, match="of width 16 nobody publishes 12 blocks: give heads="):
        sam2_torch.Sam2(state, {})
    model = sam2_torch.Sam2(state, {"heads": [2] * 12})
    assert model.heads == [2] * 12 and model.windows == [8, 8, 8, 8, 8, 0, 8, 0, 8, 0, 8, 8]


def test_half_precision_computes_in_float32(tmp_path):
    """What no gradient reaches, the frequencies of positions, too: they were a buffer in half precision, and failed."""
    to_torch.save_sam(sam2(), tmp_path / "slim.pt")
    state = torch.load(tmp_path / "slim.pt")["model"]
    for name, array in state.items():
        state[name] = array.half()
    torch.save({"model": state}, tmp_path / "half.pt")
    model = sam2_torch.load(tmp_path / "half.pt")
    assert {array.dtype for array in (*model.parameters(), *model.buffers())} == {torch.float32}
    predictor = sam2_torch.Predictor(model)
    predictor.set_image(random_image(0, 20, 30))
    masks, iou, _ = predictor.predict([[3, 4]], [1])
    assert masks.shape == (3, 20, 30) and iou.isfinite().all()


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    to_torch.save_sam(sam2(), tmp_path / "slim.pt")
    whole = torch.load(tmp_path / "slim.pt")["model"]
    bare = dict(whole)  # without the note
    torch.save({"model": bare}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"publishes 5 blocks: give heads=, windows= and global_blocks="):
        sam2_torch.load(tmp_path / "bare.pt")
    changes = {
        "neck": lambda state: state.pop("image_encoder.neck.convs.0.conv.bias"),
        "nothing reads image_encoder.neck.x": lambda state: state.update({"image_encoder.neck.x": torch.zeros(3)}),
        "size": lambda state: state.update({"image_encoder.trunk.blocks.1.norm2.bias": torch.zeros(3)}),
    }
    for change in changes.values():
        state = whole.copy()
        state._metadata = whole._metadata
        change(state)
        torch.save({"model": state}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="cannot be loaded") as refusal:
            sam2_torch.load(tmp_path / "x.pt")
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"nothing reads image_encoder\.neck\.x"):
        state = whole | {"image_encoder.neck.x": torch.zeros(3)}
        state._metadata = whole._metadata
        torch.save({"model": state}, tmp_path / "y.pt")
        sam2_torch.load(tmp_path / "y.pt")
