"""Our predictor against the original's modules, and a batch of mixed prompts against each of them alone."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from converters.from_torch import from_state_dict, load
from helpers import peers
from helpers.images import random_image, truncated
from helpers.models import SQUARE, random_sam
from helpers.shared import shared
from slimsam_jax.errors import InputError
from slimsam_jax.imaging.transforms import resized_shape
from slimsam_jax.inference import engine
from slimsam_jax.inference.predictor import Prompt, SamPredictor
from slimsam_jax.models import sam as models
from slimsam_jax.models import sam_head

CLICKS = [[12.0, 7.5], [25.0, 15.0], [3.0, 18.0]]
BOX = [4.0, 3.0, 22.0, 17.0]
PROMPTS = {
    "one point": {"point_coords": CLICKS[:1], "point_labels": [1]},
    "points": {"point_coords": CLICKS, "point_labels": [1, 0, 1]},
    "box": {"box": BOX},
    "box and points": {"point_coords": CLICKS[:2], "point_labels": [1, 0], "box": BOX},
    "mask": {"mask_input": True},
    "all": {"point_coords": CLICKS, "point_labels": [0, 1, 1], "box": BOX, "mask_input": True},
}


def prompt(kind: str, sam, seed: int = 0) -> dict:
    fields = dict(PROMPTS[kind])
    if fields.pop("mask_input", None):
        shape = (1, *(4 * side for side in sam.config.grid))
        fields["mask_input"] = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return fields


class Original:
    """`segment_anything`'s predictor; its transform, which needs torchvision, replaced by the PIL call it makes."""

    def __init__(self, sam):
        self.predictor = peers.segment_anything().SamPredictor(sam)
        self.size = (sam.image_encoder.img_size,) * 2

    def set_image(self, image: np.ndarray) -> None:
        height, width = resized_shape(image.shape[:2], self.size)
        small = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        pixels = torch.as_tensor(small).permute(2, 0, 1)[None].contiguous()
        self.predictor.set_torch_image(pixels, image.shape[:2])

    def predict(self, **fields):
        return self.predictor.predict(**{name: np.asarray(value) for name, value in fields.items()}, return_logits=True)


@pytest.fixture(scope="module")
def pair():
    stock = peers.stock_sam(SQUARE)
    return SamPredictor(from_state_dict(peers.state_dict(stock))), Original(stock)


@pytest.mark.parametrize("kind", PROMPTS)
def test_masks_equal_the_originals(pair, kind):
    ours, original = pair
    for each in pair:
        each.set_image(random_image())
    fields = prompt(kind, ours.model)
    found, wanted = ours.predict(**fields, return_logits=True), original.predict(**fields)
    assert found.masks.shape == (3, 20, 30)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ours.predict(**fields).masks, found.masks > 0)
    np.testing.assert_allclose(ours.get_image_embedding(), original.predictor.get_image_embedding(), atol=1e-4)


def test_mixed_prompts_on_many_images_equal_each_alone():
    ours = SamPredictor(random_sam(SQUARE))
    images = [random_image(0), random_image(1, 33, 21), random_image(2)]
    asked = [["one point", "all", "box"], [], ["mask", "points", "box and points", "box"]]
    prompts = [[Prompt(**prompt(kind, ours.model)) for kind in kinds] for kinds in asked]
    found = ours.predict_batch(images, prompts, return_logits=True)
    assert [len(each) for each in found] == [3, 0, 4] and not ours.is_image_set
    for image, given, together in zip(images, prompts, found, strict=True):
        ours.set_image(image)
        for one, expected in zip(given, together, strict=True):
            alone = ours.predict(*one, return_logits=True)
            for a, b in zip(alone, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_images_may_be_one_array():
    images = np.stack([random_image(0), random_image(1)])
    prompts = [[Prompt(**PROMPTS["box"])]] * 2
    ours = SamPredictor(random_sam(SQUARE))
    for (one,), (other,) in zip(*(ours.predict_batch(given, prompts) for given in (images, list(images))), strict=True):
        np.testing.assert_array_equal(one.low_res_masks, other.low_res_masks)


def test_single_mask_is_the_first_output():
    ours = SamPredictor(random_sam(SQUARE))
    ours.set_image(random_image())
    single, three = (ours.predict(**PROMPTS["box"], multimask_output=flag) for flag in (False, True))
    assert single.masks.shape == (1, 20, 30) and three.iou_predictions.shape == (3,)
    assert not np.allclose(single.low_res_masks[0], three.low_res_masks[0])


def test_every_form_of_an_image_is_the_same(tmp_path):
    ours, pixels = SamPredictor(random_sam(SQUARE)), random_image()
    Image.fromarray(pixels).save(tmp_path / "x.png")
    given = [pixels, Image.fromarray(pixels), tmp_path / "x.png", str(tmp_path / "x.png")]
    embeddings = []
    for image in given:
        ours.set_image(image)
        embeddings.append(ours.get_image_embedding())
    for array in (pixels[..., ::-1], torch.from_numpy(pixels[..., ::-1].copy())):
        ours.set_image(array, image_format="BGR")
        embeddings.append(ours.get_image_embedding())
    ours.set_image(Image.fromarray(pixels), image_format="BGR")  # of arrays alone
    for embedding in [*embeddings, ours.get_image_embedding()]:
        np.testing.assert_array_equal(embedding, embeddings[0])
    ours.reset_image()
    assert not ours.is_image_set


def test_buckets_are_compiled_once(monkeypatch):
    """Other images, other numbers of prompts and of points within a bucket compile nothing."""
    sam = random_sam(SQUARE)
    for module, name in ((models, "encode"), (sam_head, "decode")):
        function = getattr(module, name)
        static = ("config", "dtype") if name == "encode" else "config"
        traced = chex.assert_max_traces(function.__wrapped__, n=1)
        monkeypatch.setattr(module, name, jax.jit(traced, static_argnames=static))
    monkeypatch.setattr(engine, "encode", models.encode)
    ours = SamPredictor(sam)
    for seed, (height, width) in enumerate([(20, 30), (30, 20), (50, 50)]):
        ours.set_image(random_image(seed, height, width))
        ours.predict(CLICKS[: max(1, seed)], box=BOX)
        ours.predict(CLICKS)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "a prompt needs points, a box or a mask"),
        ({"point_labels": [1]}, "point_labels without point_coords"),
        ({"point_coords": [[1, 2, 3]]}, r"point_coords must be finite numbers of shape \[n, 2\]"),
        ({"point_coords": []}, r"point_coords must be finite numbers of shape \[n, 2\]"),
        ({"point_coords": [[1, np.nan]]}, "point_coords must be finite"),
        ({"point_coords": [[1, 2]], "point_labels": [1, 0]}, r"point_labels must be finite numbers of shape \[1\]"),
        ({"point_coords": [[1, 2]], "point_labels": [7]}, r"point_labels are 1 \(foreground\) and 0"),
        ({"box": [1, 2, 3]}, r"box must be finite numbers of shape \[4\]"),
        ({"box": "abcd"}, "box must be finite"),
        ({"mask_input": np.zeros((1, 7, 7))}, r"mask_input must be logits of shape \[1, 16, 16\], not \[1, 7, 7\]"),
    ],
    ids=str,
)
def test_prompts_that_are_none_are_refused(fields, line):
    ours = SamPredictor(random_sam(SQUARE))
    with pytest.raises(InputError, match="call set_image first"):
        ours.predict(**PROMPTS["box"])
    ours.set_image(random_image())
    with pytest.raises(InputError, match=line):
        ours.predict(**fields)


def test_images_that_are_none_are_refused(tmp_path):
    ours = SamPredictor(random_sam(SQUARE))
    truncated(tmp_path / "short.jpg")
    for image, line in (
        (Image.new("RGB", (0, 4)), "an image of 0 x 4 pixels has none; each side needs at least 1"),
        (Image.new("L", (5, 0)), "an image of 5 x 0 pixels has none"),
        (Image.open(tmp_path / "short.jpg"), r"the image cannot be read \(OSError: image file is truncated"),
        (random_image().astype(np.float32), r"uint8 \[height, width, 3\], and this is float32 \[20, 30, 3\]"),
        (random_image()[..., 0], r"this is uint8 \[20, 30\]"),
        (random_image()[:0], r"this is uint8 \[0, 30, 3\]"),
        (tmp_path / "none.png", "does not exist"),
    ):
        with pytest.raises(InputError, match=line):
            ours.set_image(image)
    with pytest.raises(InputError, match="neither RGB nor BGR"):
        ours.set_image(random_image(), image_format="RGBA")
    with pytest.raises(InputError, match="1 images and 2 lists of prompts"):
        ours.predict_batch([random_image()], [[], []])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truck.jpg", "dog.jpg", "groceries.jpg"])
def test_real_photographs(name):
    """Logits within 1e-3, at most one pixel in a thousand on the other side of zero."""
    path = shared("teacher/sam_small_256.pth")
    sam = load(path)
    stock = peers.stock_sam(sam.config)
    stock.load_state_dict(torch.load(path, weights_only=True))
    ours, original = SamPredictor(sam), Original(stock)
    image = np.asarray(Image.open(shared(f"data/photos/{name}")).convert("RGB"))
    scale = np.array(image.shape[1::-1]) / np.array([30, 20])
    for each in (ours, original):
        each.set_image(image)
    for kind in PROMPTS:
        fields = prompt(kind, sam)
        if "point_coords" in fields:
            fields["point_coords"] = np.array(fields["point_coords"]) * scale
        if "box" in fields:
            fields["box"] = np.array(fields["box"]) * np.tile(scale, 2)
        found, (masks, scores, low) = ours.predict(**fields, return_logits=True), original.predict(**fields)
        assert np.abs(found.masks - masks).max() < 1e-3 and np.abs(found.low_res_masks - low).max() < 1e-3
        assert np.abs(found.iou_predictions - scores).max() < 1e-4
        assert ((found.masks > 0) != (masks > 0)).mean() < 1e-3
