"""TinyViT-SAM against MobileSAM's own code: stage by stage, gradients, prompts, batch norm.

The vectors of the original are in the shared material; a part of them, without the last stage and the decoder, is in
tests/golden for any clone.
"""

from __future__ import annotations

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.tables import tiny_vit as table
from converters.tables.strict import abstract
from helpers import golden_families as families
from helpers.family_models import run_all
from helpers.shared import shared
from slimsam_jax.imaging.prompts import ABSENT, prompt_points
from slimsam_jax.imaging.transforms import resize_and_pad, resize_masks, to_model_frame
from slimsam_jax.models import sam
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import layers, tiny_vit
from slimsam_jax.models.prompt_encoder import PromptEncoder

SUBSET = families.HERE / "tiny_vit_subset.npz"


def golden_config(arrays) -> tiny_vit.Config:
    told = json.loads(str(arrays["config/json"]))
    names = ("embed_dims", "depths", "num_heads", "window_sizes", "mlp_ratio", "mbconv_expand_ratio")
    return tiny_vit.uniform(*(told["enc"][name] for name in names), image_size=told["img"])


def state_of(arrays) -> dict[str, np.ndarray]:
    return {name[3:]: arrays[name] for name in arrays if name.startswith("sd/")}


@pytest.fixture(scope="module")
def whole():
    with np.load(shared("golden/tiny_vit_sam.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(whole):
    return table.from_state_dict(state_of(whole), image_size=256)


def pixels_of(arrays, config) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """The golden image in the model frame [H, W, 3], its size there, and normalised [1, H, W, 3]."""
    frame, size = resize_and_pad(arrays["image_uint8"], config.image_size)
    return frame, size, sam.preprocess(Config(config.image_size, 0, ()), frame[None], size[None])


@pytest.fixture(scope="module", params=["subset", "whole"])
def golden(request):
    """(arrays, config, encoder's parameters): of the subset, where weights are missing, zeros."""
    if request.param == "whole":
        model = request.getfixturevalue("model")
        return request.getfixturevalue("whole"), model.encoder, model.params["image_encoder"]
    arrays = families.read(SUBSET)
    config = golden_config(arrays)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract(tiny_vit.ImageEncoder(config)))
    state = encoder_state(config, zeros) | state_of(arrays)
    form = table.outline_of(config)
    state = table.split_qkv({name: array for name, array in state.items() if not table.unused.is_kept(name)}, form)
    return arrays, config, table.to_params(state, table.rows(form), {"image_encoder": zeros}, "")["image_encoder"]


def encoder_state(config, params) -> dict[str, np.ndarray]:
    form = table.outline_of(config)
    return table.fuse_qkv(table.to_state({"image_encoder": params}, table.rows(form)), form)


@pytest.fixture(scope="module")
def found(golden):
    """What ours makes of the golden image, under the original's names of stages."""
    arrays, config, params = golden
    frame, size, pixels = pixels_of(arrays, config)
    embedding, features, modules = run_all(tiny_vit.ImageEncoder(config), params, pixels)
    streams = {f"{path}/out": part["out"] for path, part in features.items()}
    return {"frame": frame, "size": size, "pixels": pixels[0], "embedding": embedding, **modules, **streams}


def test_the_subset_is_cut_from_the_whole(whole):
    wanted, stored = families.cut(whole, families.TINY_VIT), families.read(SUBSET)
    assert set(stored) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


def assert_equal(arrays, name: str, ours, atol: float) -> None:
    """Of a subset's array the part that it is."""
    ours = np.asarray(ours)
    ours = ours if ours.shape == arrays[name].shape else families.thinned(name, ours)
    np.testing.assert_allclose(ours, arrays[name], atol=atol, rtol=0, err_msg=name)


def test_preprocessing(golden, found):
    arrays, (height, width) = golden[0], found["size"]
    np.testing.assert_array_equal(found["size"], arrays["input_size"])
    assert_equal(arrays, "preprocessed", np.asarray(found["pixels"]).transpose(2, 0, 1), 1e-6)
    if "resized_uint8" in arrays:
        np.testing.assert_array_equal(found["frame"][:height, :width], arrays["resized_uint8"])


def test_every_stage(golden, found):
    """The outputs of all modules that the original's were kept of, those of windows with their padding."""
    arrays = golden[0]
    names = [name for name in arrays if name.startswith("stage/")]
    assert len(names) == (20 if "image_embedding" in arrays else 14)
    for name in names:
        path = re.sub(r"\.(\d+)", r"_\1", name.removeprefix("stage/")).replace(".", "/")
        path = {"patch_embed": "patch/out"}.get(path, f"{path}/out" if path.startswith("layers_0/b") else path)
        x = found[path]
        x = x.transpose(0, 3, 1, 2) if arrays[name].ndim == 4 else x.reshape(x.shape[0], -1, x.shape[-1])
        assert_equal(arrays, name, x, 2e-4)


def test_embedding(golden, found):
    arrays = golden[0]
    if "image_embedding" in arrays:
        assert_equal(arrays, "image_embedding", found["embedding"].transpose(0, 3, 1, 2), 2e-4)


def test_gradients(whole, model):
    """Of the disturbed embedding's distance, in all parameters; running statistics and the dead classifier get none."""
    encoder, noise = tiny_vit.ImageEncoder(model.encoder), whole["grad/noise"].transpose(0, 2, 3, 1)

    @jax.jit
    def gradient(params, pixels):
        def loss(params):
            embedding, _ = encoder.apply({"params": params}, pixels)
            # From ours itself: rounding of 4e-5 beside noise of 1e-2 would be most of the difference.
            return jnp.square(embedding - (jax.lax.stop_gradient(embedding) + noise)).mean()

        return jax.grad(loss)(params)

    tree = gradient(model.params["image_encoder"], pixels_of(whole, model.encoder)[2])
    state = {name.removeprefix("image_encoder."): array for name, array in encoder_state(model.encoder, tree).items()}
    names = set(whole["grad/names"].tolist())
    assert {name for name in state if "running" not in name} == names and names.isdisjoint(whole["grad/none"].tolist())
    norms = [np.linalg.norm(state[name].astype(np.float64)) for name in whole["grad/names"]]
    np.testing.assert_allclose(norms, whole["grad/l2"], rtol=1e-4)
    assert not any(array.any() for name, array in state.items() if "running" in name)
    full = [name for name in names if f"grad/{name}" in whole]
    assert len(full) == 9
    for name in full:
        wanted = whole[f"grad/{name}"]
        np.testing.assert_allclose(state[name], wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0, err_msg=name)


CASES = ("point1", "points3", "box", "box_point", "mask", "point1_mask", "batch2")


def prompts(arrays, case: str):
    """(points, labels, mask or None) of a golden case, in the model frame."""
    given = lambda name: arrays.get(f"{case}/{name}")
    points, boxes = given("model_frame_points"), given("model_frame_boxes")
    labels = None if points is None else np.ones(points.shape[:2], int)
    labels = arrays["prompt/labels3"][None] if case == "points3" else labels
    return *prompt_points(points, labels, boxes), arrays["prompt/mask_input"][0] if "mask" in case else None


@pytest.fixture(scope="module")
def batch(whole):
    """Points, labels, masks, masked of all cases as one, where tokens are missing to four absent; and their places."""
    parts, places = [], {}
    for case in CASES:
        points, labels, mask = prompts(whole, case)
        fill, count = ((0, 0), (0, 4 - labels.shape[1])), len(labels)
        masks = np.zeros((count, 64, 64, 1), np.float32) + (0 if mask is None else mask.transpose(1, 2, 0))
        start = sum(len(part[1]) for part in parts)
        places[case] = np.s_[start : start + count], np.s_[: labels.shape[1]]
        points = np.pad(points, (*fill, (0, 0)))
        parts.append((points, np.pad(labels, fill, constant_values=ABSENT), masks, np.full(count, mask is not None)))
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)], places


@pytest.fixture(scope="module")
def decoded(whole, model, batch):
    embedding = whole["image_embedding"][0].transpose(1, 2, 0)
    return [np.asarray(array) for array in sam.decode(model.head, model.params, embedding, *batch[0])]


@pytest.mark.parametrize("case", CASES)
def test_masks(whole, model, batch, decoded, case):
    low, iou = (array[batch[1][case][0]] for array in decoded)
    size, original = tuple(whole["input_size"]), tuple(whole["original_size"])
    for mode, outputs in (("single", slice(0, 1)), ("multi", slice(1, None))):
        assert_equal(whole, f"{case}/{mode}/low_res_masks", low[:, outputs], 3e-4)
        assert_equal(whole, f"{case}/{mode}/iou_predictions", iou[:, outputs], 1e-5)
        logits = resize_masks(model.head.image_size, low[:, outputs], size, original)
        assert_equal(whole, f"{case}/{mode}/mask_logits", logits, 3e-4)
    if case == "points3":
        sure = np.abs(whole["points3/multi/mask_logits"][0]) > 3e-4
        np.testing.assert_array_equal((logits[0] > 0)[sure], whole["predictor/points3_multi/masks"][sure])
        np.testing.assert_allclose(iou[0, 1:], whole["predictor/points3_multi/scores"], atol=1e-5)


def test_prompt_tokens(whole, model, batch):
    """The prompt encoder is SAM's own."""
    (points, labels, masks, _), places = batch
    encode = lambda module: (*module(points, labels, masks), module.dense_positions())
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(nn.apply(encode, PromptEncoder(model.head)))
        sparse, _, positions = apply({"params": model.params["prompt_encoder"]})
    for case, place in places.items():
        assert_equal(whole, f"{case}/sparse", np.asarray(sparse)[place], 2e-5)
    assert_equal(whole, "dense_pe", positions.transpose(2, 0, 1)[None], 2e-5)


@pytest.mark.parametrize(
    ("case", "name"), [("point1", "point1"), ("points3", "points3"), ("box", "box"), ("batch2", "batch2_points")]
)
def test_points_in_the_model_frame(whole, case, name):
    points = whole[f"prompt/{name}"].reshape(-1, 2)
    scaled = to_model_frame(points, tuple(whole["input_size"]), tuple(whole["original_size"]))
    wanted = whole[f"{case}/model_frame_{'boxes' if case == 'box' else 'points'}"]
    np.testing.assert_allclose(scaled.reshape(wanted.shape), wanted, atol=1e-4)


def test_attention_in_a_rectangular_window(golden):
    arrays = golden[0]
    inputs = {f"attn.{name[13:]}": arrays[name] for name in arrays if name.startswith("attn_rect/sd/")}
    window = tuple(arrays["attn_rect/resolution"].tolist())
    rows = [row for row in table.placed("a", "a", table.BLOCK, n=2, h=window[0]) if row.path.startswith("a/attn/")]
    state = table.split_qkv({f"image_encoder.layers.1.blocks.0.{k}": v for k, v in inputs.items()}, RECT)
    state = {name.replace("image_encoder.layers.1.blocks.0", "a"): array for name, array in state.items()}
    shapes = {"a": {"attn": dict(abstract_attention(window))}}
    params = table.to_params(state, rows, shapes, "")["a"]["attn"]
    x = arrays["attn_rect/in"].reshape(-1, *window, 8)
    out, _ = tiny_vit.Attention(RECT_BLOCK, window).apply({"params": params}, x)
    assert_equal(arrays, "attn_rect/out", out.reshape(2, -1, 8), 1e-6)
    np.testing.assert_array_equal(
        tiny_vit.by_distance(jnp.arange(15).reshape(1, *window))[0], arrays["attn_rect/bias_idxs"]
    )


RECT = table.Outline(0, (((2, 3),),))
RECT_BLOCK = tiny_vit.Block(2, 4, 4, 1)


def abstract_attention(window):
    x = jax.ShapeDtypeStruct((1, *window, 8), jnp.float32)
    return jax.eval_shape(lambda x: tiny_vit.Attention(RECT_BLOCK, window).init(jax.random.key(0), x)["params"], x)


def golden_layers(arrays):
    """The state dict's convolutions with batch norm by their names, in our layout."""
    state = {name.removeprefix("sd/image_encoder."): arrays[name] for name in arrays if name.startswith("sd/image")}
    for name in [name[:-9] for name in state if name.endswith(".c.weight")]:
        rows = table._conv_norm(name, name, table.CONV)
        yield name, {path.removeprefix(f"{name}/"): table.Row(n, path, p, {}).to_ours(state[n]) for n, path, p in rows}


def nested(leaves):
    norm = {name.removeprefix("bn/"): array for name, array in leaves.items() if name.startswith("bn/")}
    return {"kernel": leaves["kernel"], "bn": norm}


def test_folded_layers_equal_the_originals(golden):
    arrays, count = golden[0], 0
    for name, leaves in golden_layers(arrays):
        if f"fused/{name}/weight" in arrays:
            folded, count = layers.fold_batch_norm(nested(leaves)), count + 1
            np.testing.assert_allclose(
                folded["kernel"].transpose(3, 2, 0, 1), arrays[f"fused/{name}/weight"], atol=1e-6
            )
            np.testing.assert_allclose(folded["bias"], arrays[f"fused/{name}/bias"], atol=2e-6)
    assert count >= 3


def test_statistics_of_a_batch(golden):
    """The patch embedding in training mode: normalised by the biased variance, and the unbiased remembered."""
    arrays = golden[0]
    params = {name.removeprefix("patch_embed."): nested(x) for name, x in golden_layers(arrays) if "patch" in name}
    x = arrays["train/images"].transpose(0, 2, 3, 1)
    for i, features in ((0, 8), (2, 16)):
        conv = layers.ConvNorm(features, 3, 2, of_batch=True)
        x, seen = conv.apply({"params": params[f"seq.{i}"]}, x, mutable=["statistics"])
        moved = layers.with_statistics(params[f"seq.{i}"], seen["statistics"])
        for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
            assert_equal(arrays, f"train/after/seq.{i}.bn.{theirs}", moved["bn"][ours], 2e-6)
        np.testing.assert_array_equal(moved["kernel"], params[f"seq.{i}"]["kernel"])
        x = layers.gelu(x) if i == 0 else x
    assert_equal(arrays, "train/patch_embed_out", x.transpose(0, 3, 1, 2), 5e-6)
