"""Parity of the Flax SAM with the original, in rungs: attention, encoder, prompts, decoder, the whole."""

from __future__ import annotations

import dataclasses
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from converters.from_torch import from_state_dict
from helpers.models import random_images, random_sam, tiny_config
from helpers.peers import segment_anything, state_dict, stock_sam
from helpers.shared import shared
from slimsam_jax.imaging.prompts import prompt_points
from slimsam_jax.imaging.transforms import resize_and_pad, resize_masks, resized_shape, to_model_frame
from slimsam_jax.models import sam
from slimsam_jax.models.config import GLOBAL, PRESETS, Block, Config, preset
from slimsam_jax.models.encoders.vit import ImageEncoder, window_partition, window_unpartition
from slimsam_jax.models.mask_decoder import Doubling
from slimsam_jax.models.sam import run_encoder

SQUARE = tiny_config(image_size=(64, 64))


def test_programs_are_optimised_here():
    """And what is started from here: see tests/conftest.py, which optimises no other room's."""
    assert not jax.config.read("jax_disable_most_optimizations")
    assert os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0"


@pytest.fixture(scope="module")
def stock():
    return stock_sam(SQUARE)


@pytest.fixture(scope="module")
def ours(stock):
    return from_state_dict(state_dict(stock))


def embed(model, images: np.ndarray) -> np.ndarray:
    """Normalised [b, H, W, 3] -> [b, h, w, C]."""
    return jax.jit(ImageEncoder(model.config).apply)({"params": model.params["image_encoder"]}, images)[0]


def test_architecture_is_read_off_the_checkpoint(ours):
    assert ours.config == SQUARE


def test_image_encoder_equals_the_original(stock, ours):
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = stock.image_encoder(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(embed(ours, images), expected, atol=1e-5)


def test_rectangular_image_encoder_equals_the_original(stock):
    """The original takes rectangles once its position tables are rectangular."""
    state = state_dict(stock)
    random = np.random.default_rng(1)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    rows, columns = 3, 5
    state["image_encoder.pos_embed"] = normal(1, rows, columns, 24)
    state["image_encoder.blocks.1.attn.rel_pos_h"] = normal(2 * rows - 1, 12)
    state["image_encoder.blocks.1.attn.rel_pos_w"] = normal(2 * columns - 1, 12)
    model = from_state_dict(state)
    assert model.config.image_size == (48, 80) and model.config.blocks[0].window == 3

    rectangular = stock_sam(SQUARE)
    for name, array in state.items():
        *path, leaf = name.split(".")
        module = rectangular.get_submodule(".".join(path))
        module._parameters[leaf] = torch.nn.Parameter(torch.from_numpy(array))
    images = normal(1, 48, 80, 3)
    with torch.no_grad():
        expected = rectangular.image_encoder(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(embed(model, images), expected, atol=1e-5)


@pytest.mark.parametrize("case", ["point", "points", "box", "box and point", "mask", "point and mask", "batch"])
def test_prompts_and_decoder_equal_the_original(stock, ours, case):
    random = np.random.default_rng(2)
    embedding = random.standard_normal((4, 4, 32)).astype(np.float32)
    count = {"points": 3}.get(case, 1)
    prompts = 3 if case == "batch" else 1
    points = (
        random.uniform(0, 64, (prompts, count, 2)).astype(np.float32) if "point" in case or case == "batch" else None
    )
    labels = np.array([[1, 0, -1][:count]] * prompts) if points is not None else None
    boxes = np.array([[3.5, 8, 40, 60]], np.float32) if "box" in case else None
    masks = 10 * random.standard_normal((1, 16, 16, 1)).astype(np.float32) if "mask" in case else None

    as_torch = lambda array: None if array is None else torch.from_numpy(array)
    with torch.no_grad():
        sparse, dense = stock.prompt_encoder(
            points=None if points is None else (as_torch(points), as_torch(labels)),
            boxes=as_torch(boxes),
            masks=None if masks is None else as_torch(masks).permute(0, 3, 1, 2),
        )
        expected_masks, expected_iou = stock.mask_decoder.predict_masks(
            image_embeddings=torch.from_numpy(embedding).permute(2, 0, 1)[None],
            image_pe=stock.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
    found_masks, found_iou = sam.decode(
        ours.config, ours.params, embedding, *prompt_points(points, labels, boxes), masks
    )
    np.testing.assert_allclose(found_masks, expected_masks.numpy(), atol=1e-6)
    np.testing.assert_allclose(found_iou, expected_iou.numpy(), atol=1e-6)


def test_prompts_are_float32_and_int32():
    point, label, box = np.ones((2, 1, 2)), np.ones((2, 1), int), np.ones((2, 4))
    for given in ((point, label), (point, label, box), (None, None, box), ()):
        points, labels = prompt_points(*given)
        assert points.dtype == np.float32 and labels.dtype == np.int32
        assert points.shape[:2] == labels.shape


def test_mask_postprocessing_equals_the_original(stock):
    low = np.random.default_rng(3).standard_normal((2, 3, 16, 16)).astype(np.float32)
    for size, original in (((64, 40), (90, 57)), ((33, 64), (17, 33)), ((64, 64), (64, 64)), ((1, 64), (3, 500))):
        expected = stock.postprocess_masks(torch.from_numpy(low), size, original).numpy()
        np.testing.assert_allclose(resize_masks(SQUARE.image_size, low, size, original), expected, atol=1e-5)


def test_preprocessing_equals_the_original(stock):
    image = np.random.default_rng(4).integers(0, 256, (40, 64, 3), np.uint8)
    frame, size = resize_and_pad(image, (64, 64))
    expected = stock.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(sam.preprocess(SQUARE, frame[None], size[None])[0], expected, atol=1e-6)


def test_resized_shape_equals_the_original():
    expected = segment_anything().utils.transforms.ResizeLongestSide.get_preprocess_shape
    for height, width in ((480, 640), (640, 481), (1500, 2250), (333, 333), (7, 1000), (1365, 2048)):
        assert resized_shape((height, width), (1024, 1024)) == expected(height, width, 1024)
    assert resized_shape((100, 400), (64, 128)) == (32, 128)  # a rectangular frame: what fits
    assert resized_shape((1, 4000), (1024, 1024)) == (1, 1024)  # never empty


@pytest.mark.parametrize("grid", [(4, 3), (6, 6), (5, 7)])
def test_windows_are_undone(grid):
    x = np.random.default_rng(5).standard_normal((2, *grid, 3)).astype(np.float32)
    windows = window_partition(x, 3)
    assert windows.shape[1:] == (3, 3, 3)
    np.testing.assert_array_equal(window_unpartition(windows, grid), x)


def test_features_are_named_and_shaped(tiny_sam):
    config = tiny_sam.config
    _, features = jax.eval_shape(
        lambda *inputs: run_encoder(config, *inputs), tiny_sam.params["image_encoder"], random_images(config)
    )
    assert set(features) == {"patch", "blocks_0", "blocks_1"}
    window, whole = features["blocks_0"], features["blocks_1"]
    chex.assert_shape(
        [window["q"], window["k"], window["v"]], (2 * 2 * 1, 3, 3, 2, 12)
    )  # 4 x 3 tokens in 3 x 3 windows
    chex.assert_shape([whole["q"], whole["k"], whole["v"]], (2, 4, 3, 2, 12))
    chex.assert_shape([whole["mlp"]], (2, 4, 3, 40))
    chex.assert_shape([window["middle"], window["out"], features["patch"]["out"]], (2, 4, 3, 24))


def test_remat_and_bfloat16_change_no_more_than_they_should(tiny_sam):
    images = np.random.default_rng(6).standard_normal((1, *tiny_sam.config.image_size, 3)).astype(np.float32)
    variables = {"params": tiny_sam.params["image_encoder"]}
    apply = lambda **kw: jax.jit(lambda v, x: ImageEncoder(tiny_sam.config, **kw).apply(v, x)[0])(variables, images)
    expected = apply()
    remat = apply(remat=True)
    np.testing.assert_allclose(remat, expected, atol=1e-6)
    half = apply(dtype=jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - expected).mean() < 0.02 * np.abs(expected).mean()


def test_widths_are_free_per_block():
    config = dataclasses.replace(
        tiny_config(), embed_dim=17, blocks=(Block(2, 5, 11, 3), Block(2, 7, 23, GLOBAL), Block(2, 1, 1, 2))
    )
    model = random_sam(config)
    assert not config.uniform
    embedding = sam.encode(
        config, model.params, **{"images": random_images(config)["image"], "sizes": random_images(config)["size"]}
    )
    chex.assert_shape(embedding, (2, 4, 3, 32))
    chex.assert_tree_all_finite(embedding)


def test_equal_blocks_are_traced_once_and_all_have_shapes():
    config = tiny_config()
    config = dataclasses.replace(config, blocks=(*config.blocks, Block(1, 4, 6, 2), *config.blocks[::-1]))
    assert sam.abstract_params(config) == jax.eval_shape(lambda key: sam.init(config, key), jax.random.key(0))


def test_encode_and_decode_compile_once(tiny_sam):
    chex.clear_trace_counter()
    encode = jax.jit(chex.assert_max_traces(sam.encode.__wrapped__, n=1), static_argnames=("config", "dtype"))
    for seed in range(3):
        batch = random_images(tiny_sam.config, seed=seed)
        encode(tiny_sam.config, tiny_sam.params, batch["image"], batch["size"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = preset(name)
    assert config.uniform and config.grid == ((16, 16) if name.startswith("small") else (64, 64))
    assert preset(name, (512, 256)).grid == (32, 16)
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="multiples of the patch"):
        preset(name, 1000)


GOLDEN_CASES = ("point1", "points3", "box", "box_point", "mask", "point1_mask", "batch2")


@pytest.fixture(scope="module")
def golden():
    arrays = np.load(shared("golden/tiny_sam.npz"))
    model = from_state_dict({key[3:]: arrays[key] for key in arrays.files if key.startswith("sd/")})
    frame, size = resize_and_pad(arrays["image_uint8"], model.config.image_size)
    return arrays, model, frame, size


def test_golden_encoder(golden):
    arrays, model, frame, size = golden
    np.testing.assert_array_equal(frame[: size[0], : size[1]], arrays["resized_uint8"])
    assert not frame[size[0] :].any()
    pixels = sam.preprocess(model.config, frame[None], size[None])[0]
    np.testing.assert_allclose(pixels.transpose(2, 0, 1), arrays["preprocessed"], atol=1e-6)
    embedding = sam.encode(model.config, model.params, frame[None], size[None])
    np.testing.assert_allclose(embedding.transpose(0, 3, 1, 2), arrays["image_embedding"], atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_prompts(golden, case):
    arrays, model, _, size = golden
    given = lambda name: arrays[f"{case}/{name}"] if f"{case}/{name}" in arrays.files else None
    original = tuple(arrays["original_size"])
    points, boxes = given("model_frame_points"), given("model_frame_boxes")
    labels = None
    if points is not None:
        points = points.reshape(-1, *points.shape[-2:])
        labels = arrays["prompt/labels3"].reshape(1, -1) if case == "points3" else np.ones(points.shape[:2], int)
        own = {"points3": "point3", "batch2": "batch2_points"}.get(case, "point1")
        scaled = to_model_frame(arrays[f"prompt/{own}"], size, original)
        np.testing.assert_allclose(scaled.reshape(points.shape), points, atol=1e-4)
    masks = np.asarray(arrays["prompt/mask_input"]).reshape(1, 32, 32, 1) if "mask" in case else None
    coordinates, kinds = prompt_points(points, labels, None if boxes is None else boxes.reshape(-1, 4))
    embedding = arrays["image_embedding"][0].transpose(1, 2, 0)
    low, iou = sam.decode(model.config, model.params, embedding, coordinates, kinds, masks)
    for mode, outputs in (("single", slice(0, 1)), ("multi", slice(1, None))):
        found = np.asarray(low)[:, outputs]
        np.testing.assert_allclose(found, given(f"{mode}/low_res_masks"), atol=5e-5)
        np.testing.assert_allclose(iou[:, outputs], given(f"{mode}/iou_predictions"), atol=1e-5)
        logits = resize_masks(model.config.image_size, found, tuple(size), original)
        np.testing.assert_allclose(logits, given(f"{mode}/mask_logits"), atol=5e-5)


def test_doubling_is_a_transposed_convolution():
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((2, 3, 4, 5), (2, 2, 6, 5))))
    found = Doubling(6).apply({"params": {"kernel": kernel, "bias": jnp.zeros(6)}}, x)
    assert found.shape == (2, 3, 4, 2, 2, 6)  # the rows and columns of each position still apart
    expected = jax.lax.conv_transpose(x, kernel, (2, 2), "VALID", transpose_kernel=True)
    np.testing.assert_allclose(found.transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 8, 6), expected, atol=1e-5)
