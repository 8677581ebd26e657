"""EfficientSAM against its own code: frames, encoder stage by stage, prompts, decoder.

The vectors of the original are in the shared material; a part of them, with half of the blocks and without the decoder,
is in tests/golden for any clone.
"""

from __future__ import annotations

import dataclasses
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from converters.tables import efficient_sam as table
from converters.tables.strict import abstract
from helpers import golden_families as families
from helpers.family_models import SLIM_VIT, images_of, mirrored, random_params, run, run_all
from helpers.shared import shared
from slimsam_jax.imaging.bicubic import bicubic_matrix
from slimsam_jax.imaging.frames import Squashed
from slimsam_jax.imaging.prompts import ABSENT, prompt_points
from slimsam_jax.models import efficient_sam_head
from slimsam_jax.models.encoders import efficient_sam_vit as vit
from slimsam_jax.models.sam import abstract_head

SUBSET = families.HERE / "efficient_sam_subset.npz"
CASES = ("point1", "points2", "box", "points6", "points8", "queries4", "batch2")
HEAD = efficient_sam_head.HeadConfig((256, 256))
FRAME = Squashed((256, 256))


def read(request, name: str) -> dict[str, np.ndarray]:
    return families.read(SUBSET) if name == "subset" else request.getfixturevalue("whole")


@pytest.fixture(scope="module")
def whole():
    with np.load(shared("golden/efficient_sam.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(whole):
    state = {name[3:]: whole[name] for name in whole if name.startswith("sd/")}
    return table.from_state_dict(state, image_size=256, heads=3)


@pytest.fixture(scope="module", params=["subset", "whole"])
def golden(request):
    return read(request, request.param)


@pytest.fixture(scope="module")
def params(golden):
    """The encoder's and the prompt encoder's; of the subset, where weights are missing, zeros."""
    told = json.loads(str(golden["config/json"]))
    config = vit.uniform(told["dim"], told["depth"], told["heads"], told["mlp"], told["img"])
    expected = {"image_encoder": abstract(vit.ImageEncoder(config)), **abstract_head(HEAD)}
    del expected["mask_decoder"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), expected)
    outline = table.Outline((3,) * told["depth"], 0, 8, 0)
    rows = [row for row in table.rows(outline) if not row.path.startswith("mask_decoder")]
    state = table.fuse_qkv(table.to_state(zeros, rows))
    state |= {name[3:]: golden[name] for name in golden if name[3:] in state}
    return config, table.to_params(table.split_qkv(state, outline), rows, expected, "")


def normalised(image) -> np.ndarray:
    """As the encoder takes it, [256, 256, 3]."""
    pixels, size = HEAD.frame.place(image)
    assert size.tolist() == [256, 256] and pixels.dtype == np.float32
    return (pixels - np.float32(HEAD.pixel_mean)) / np.float32(HEAD.pixel_std)


@pytest.fixture(scope="module")
def found(golden, params):
    """What ours makes of the golden images, by path of the module."""
    images = [golden["image_uint8"], golden.get("image2_uint8", golden["image_uint8"])]
    pixels = np.stack(list(map(normalised, images)))
    embedding, _, modules = run_all(vit.ImageEncoder(params[0]), params[1]["image_encoder"], pixels)
    return {"pixels": pixels, "embedding": embedding, **modules}


def assert_equal(arrays, name: str, ours, atol: float) -> None:
    """Of a subset's array the part that it is."""
    ours = np.asarray(ours)
    ours = ours if ours.shape == arrays[name].shape else families.thinned(name, ours)
    np.testing.assert_allclose(ours, arrays[name], atol=atol, rtol=0, err_msg=name)


def test_the_subset_is_cut_from_the_whole(whole):
    wanted, stored = families.cut(whole, families.EFFICIENT_SAM), families.read(SUBSET)
    assert set(stored) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


def test_preprocessing(golden, found):
    """Squashed, up and down, without antialiasing."""
    assert_equal(golden, "preprocessed", found["pixels"][:1].transpose(0, 3, 1, 2), 2e-6)
    if "down/image_uint8" in golden:
        down = normalised(golden["down/image_uint8"])
        assert_equal(golden, "down/preprocessed", down.transpose(2, 0, 1)[None], 2e-6)


def test_positions(golden, params):
    positions = vit.resized(params[1]["image_encoder"]["pos_embed"][1:], 14, (16, 16))
    assert_equal(golden, "pos_embed_resized", positions[None], 1e-6)


def test_every_stage(golden, found):
    names = [name for name in golden if name.startswith("stage/")]
    assert len(names) == (10 if "image_embedding" in golden else 6)
    for name in names:
        path = re.sub(r"\.(\d+)", r"_\1", name.removeprefix("stage/")).replace(".", "/")
        x = found[{"patch_embed": "patch_embed_proj", "blocks_0/mlp": "blocks_0/mlp_lin2"}.get(path, path)][:1]
        x = x.transpose(0, 3, 1, 2) if golden[name].ndim == 4 else x.reshape(1, -1, x.shape[-1])
        assert_equal(golden, name, x, 5e-5)


def test_embeddings_of_two_images(whole, found_whole):
    embedding = found_whole.transpose(0, 3, 1, 2)
    assert_equal(whole, "image_embedding", embedding[:1], 5e-5)
    assert_equal(whole, "batch2/image_embeddings", embedding, 5e-5)


@pytest.fixture(scope="module")
def found_whole(whole, model):
    pixels = [normalised(whole[name]) for name in ("image_uint8", "image2_uint8")]
    return run_all(vit.ImageEncoder(model.encoder), model.params["image_encoder"], np.stack(pixels))[0]


def prompts(arrays, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Of all images and queries, [b * q, 6, 2] and [b * q, 6]."""
    points, labels = arrays[f"{case}/points"], arrays[f"{case}/labels"]
    scaled = FRAME.points(points, (256, 256), (90, 130))
    np.testing.assert_array_equal(scaled, arrays[f"{case}/rescaled_points"])
    return efficient_sam_head.fill_points(scaled.reshape(-1, *scaled.shape[2:]), labels.reshape(-1, labels.shape[-1]))


def test_prompts(golden, params):
    """To the bit, then their tokens: positions of what was filled up, no embedding of a background point."""
    given = [prompts(golden, case) for case in CASES]
    for case, (points, labels) in zip(CASES, given, strict=True):
        np.testing.assert_array_equal(points, golden[f"{case}/padded_points"])
        np.testing.assert_array_equal(labels, golden[f"{case}/padded_labels"])
    encoder = efficient_sam_head.PromptEncoder(HEAD)
    apply = jax.jit(nn.apply(lambda module, *prompts: (module(*prompts), module.dense_positions()), encoder))
    with jax.default_matmul_precision("highest"):
        tokens, positions = apply(
            {"params": params[1]["prompt_encoder"]}, *map(np.concatenate, zip(*given, strict=True))
        )
    start = 0
    for case, (points, _) in zip(CASES, given, strict=True):
        assert_equal(golden, f"{case}/sparse", tokens[start : start + len(points)], 2e-5)
        start += len(points)
    if "dense_pe" in golden:
        assert_equal(golden, "dense_pe", positions.transpose(2, 0, 1)[None], 2e-5)


@pytest.fixture(scope="module")
def decoded(whole, model):
    """(masks, iou, tokens) of every case, decoded in one call, each prompt with its image's embedding."""
    given = {case: prompts(whole, case) for case in CASES}
    embeddings = whole["batch2/image_embeddings"].transpose(0, 2, 3, 1)
    counts = [len(points) for points, _ in given.values()]
    of_image = np.concatenate(
        [np.arange(n) // 2 if case == "batch2" else np.zeros(n, int) for case, n in zip(CASES, counts, strict=True)]
    )
    inputs = map(np.concatenate, zip(*given.values(), strict=True))
    low, iou, tokens = efficient_sam_head.run(model.head, model.params, embeddings[of_image], *inputs)
    places = {case: np.s_[end - n : end] for case, n, end in zip(CASES, counts, np.cumsum(counts), strict=True)}
    return np.asarray(low), np.asarray(iou), tokens, places


@pytest.mark.parametrize("case", CASES)
def test_masks(whole, decoded, case):
    low, iou, _, places = decoded
    shape = whole[f"{case}/points"].shape[:2]
    for mode, outputs in (("single", slice(0, 1)), ("multi", slice(1, None))):
        masks = low[places[case]][:, outputs].reshape(*shape, -1, 64, 64)
        assert_equal(whole, f"{case}/{mode}/low_res_masks", masks, 1e-4)
        assert_equal(whole, f"{case}/{mode}/iou_predictions", iou[places[case]][:, outputs].reshape(*shape, -1), 1e-5)
        if f"{case}/{mode}/mask_logits" in whole:
            resized = FRAME.resize_masks(masks, (256, 256), (90, 130))
            assert_equal(whole, f"{case}/{mode}/mask_logits", resized, 1e-4)
    if case == "points2":  # the original's end to end, which is always its three masks
        assert_equal(whole, "forward/points2/masks", resized, 1e-4)
        assert_equal(whole, "forward/points2/iou", iou[places[case]][None, :, 1:].reshape(1, 1, 3), 1e-5)


def test_tokens_of_the_transformer(whole, decoded):
    tokens = decoded[2]
    for name, array in (("layer0_queries", tokens["layers"][0]), ("layer1_queries", tokens["layers"][1])):
        assert_equal(whole, f"point1/transformer/{name}", array[:1], 2e-5)
    assert_equal(whole, "point1/transformer/queries", tokens["out"][:1], 2e-5)


def test_one_image_of_many_prompts_is_decoded_alike(whole, model, decoded):
    embedding = whole["image_embedding"][0].transpose(1, 2, 0)
    low, _, _ = efficient_sam_head.run(model.head, model.params, embedding, *prompts(whole, "queries4"))
    np.testing.assert_allclose(low, decoded[0][decoded[3]["queries4"]], atol=5e-5)


@pytest.mark.parametrize("xp", [np, jnp])
def test_prompts_of_sam_are_filled(xp):
    """What only fills up goes, wherever it stands, and what is filled up is where the original has it."""
    points, labels = prompt_points([[[1, 2]], [[3, 4]]], [[1], [-1]], [[5, 6, 7, 8], [9, 10, 11, 12]])
    points, labels = efficient_sam_head.fill_points(xp.asarray(points), xp.asarray(labels))
    np.testing.assert_array_equal(labels, [[1, 2, 3, -1, -1, -1], [2, 3, -1, -1, -1, -1]])
    np.testing.assert_array_equal(points[1], [[9, 10], [11, 12], [-1, -1], [-1, -1], [-1, -1], [-1, -1]])
    assert points.dtype == np.float32 and labels.dtype == np.int32 and isinstance(points, xp.ndarray)
    long = np.full((1, 9), ABSENT)
    long[0, [2, 8]] = 1
    _, labels = efficient_sam_head.fill_points(np.zeros((1, 9, 2)), long)
    np.testing.assert_array_equal(labels, [[1, 1, -1, -1, -1, -1]])


@pytest.mark.parametrize(
    ("labels", "masked", "reason"),
    [
        ([[1, 0, -1]], False, "background"),
        ([[1] * 7, [1] * 6 + [-1]], False, "6 points at most, of which a box is two, not 7"),
        ([[2, 3]], True, "no mask"),
        ([[1, -1], [-1, -1]], False, "a point or a box"),
        ([[1] * 6 + [-1]], False, None),
        ([[1, 2, 3]], False, None),
    ],
)
def test_prompts_that_it_cannot_take_are_refused(labels, masked, reason):
    refusal = efficient_sam_head.refusal(np.array(labels), masked)
    assert refusal is None if reason is None else reason in refusal and "\n" not in refusal


@pytest.mark.parametrize(("source", "target"), [(14, 64), (64, 90), (64, 41), (14, 14), (3, 7)])
def test_bicubic_equals_torch(source, target):
    x = np.random.default_rng(0).standard_normal((1, 1, source, source)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(x), (target, target), mode="bicubic")
    matrix = bicubic_matrix(source, target)
    np.testing.assert_allclose(matrix @ x[0, 0] @ matrix.T, expected[0, 0].numpy(), atol=5e-6)
    if source == target:
        np.testing.assert_array_equal(matrix.toarray(), np.eye(source))


@pytest.fixture(scope="module")
def small():
    return random_params(abstract(vit.ImageEncoder(SLIM_VIT)))


def test_a_mirrored_rectangle_gives_the_mirrored_embedding(small):
    """Rows and columns are told apart nowhere."""
    images = images_of(SLIM_VIT, 2)
    embedding, _ = run(vit.ImageEncoder(SLIM_VIT), small, images)
    assert embedding.shape == (2, 3, 2, 16)
    config = dataclasses.replace(SLIM_VIT, image_size=SLIM_VIT.image_size[::-1])
    other, _ = run(vit.ImageEncoder(config), mirrored(small), images.swapaxes(1, 2))
    np.testing.assert_allclose(other.swapaxes(1, 2), embedding, atol=2e-5)
    assert np.abs(embedding[0] - embedding[1]).max() > 0.1


def test_half_precision_and_remat(small):
    images = images_of(SLIM_VIT, 2)
    expected, _ = run(vit.ImageEncoder(SLIM_VIT), small, images)
    half, features = run(vit.ImageEncoder(SLIM_VIT, jnp.bfloat16, remat=True), small, images)
    assert half.dtype == jnp.float32 and features["blocks_0"]["out"].dtype == jnp.bfloat16
    assert 0 < np.abs(half - expected).mean() < 0.03 * np.abs(expected).mean()


def test_features_are_named_and_shaped():
    images = jax.ShapeDtypeStruct((2, *SLIM_VIT.image_size, 3), jnp.float32)
    params = abstract(vit.ImageEncoder(SLIM_VIT))
    _, features = jax.eval_shape(lambda p, x: vit.ImageEncoder(SLIM_VIT).apply({"params": p}, x), params, images)
    assert features["blocks_1"]["q"].shape == features["blocks_1"]["k"].shape == (2, 3, 2, 3, 5)
    assert features["blocks_1"]["heads"].shape == (2, 3, 2, 3, 6)
    assert features["blocks_0"]["mlp"].shape == (2, 3, 2, 17) and features["patch"]["out"].shape == (2, 3, 2, 10)
    sides = vit.features(SLIM_VIT, features)
    assert set(sides) == set(vit.STAGES)
    assert {name: len(parts) for name, parts in sides["embedding"].items()} == {"qkv": 6, "mlp": 2}
    assert {name: len(parts) for name, parts in sides["bottleneck"].items()} == {"stream": 5}


@pytest.mark.parametrize(
    ("paths", "stage"),
    [
        (("pos_embed", "blocks_0/norm1/bias", "blocks_0/attn/q/kernel", "neck_0/kernel"), "embedding"),
        (("blocks_0/attn/q/kernel", "blocks_0/attn/k/bias"), "bottleneck"),
        (("blocks_0/mlp_lin1/bias", "blocks_0/mlp_lin2/kernel"), "bottleneck"),
        (("neck_0/kernel", "neck_1/bias", "neck_2/kernel"), None),
        (("pos_embed",), None),
    ],
)
def test_groups_belong_to_stages(paths, stage):
    for prefix in ("", "image_encoder/"):
        found = [name for name, holds in vit.STAGES.items() if holds([prefix + path for path in paths])]
        assert found == ([stage] if stage else [])
