"""EdgeSAM against arrays of its own code: module by module, both forms, training, gradients, prompts, stability.

The vectors are in the shared material; a part of them, without the neck and the decoder, is in tests/golden.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.tables import rep_vit as table
from converters.tables.strict import abstract
from helpers import golden_edge_sam as subset
from helpers import golden_families as families
from helpers.family_models import run, run_all
from helpers.shared import shared
from slimsam_jax.compression.trainer import within_image
from slimsam_jax.distillation.losses import mse
from slimsam_jax.imaging.prompts import ABSENT, IGNORED, prompt_points
from slimsam_jax.imaging.transforms import resize_and_pad, resize_masks, to_model_frame
from slimsam_jax.inference.ranking import outputs_of, stability_scores
from slimsam_jax.models import sam
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import layers, rep_vit
from slimsam_jax.models.prompt_encoder import PromptEncoder


def config_of(arrays) -> rep_vit.Config:
    """Of rows (kernel, expansion, width, squeeze-excite, activation, stride)."""
    dims, flags = [int(arrays["config/blocks"][0, 2])], [[]]
    for _, expansion, width, squeeze, _, stride in arrays["config/blocks"].tolist():
        assert expansion == 2
        if stride == 2:
            dims.append(width)
            flags.append([])
        flags[-1].append(bool(squeeze))
    return rep_vit.uniform(dims, flags, int(arrays["config/img_size"]))


@pytest.fixture(scope="module")
def whole():
    with np.load(shared("golden/edge_sam.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(whole):
    state = {name[3:]: array for name, array in whole.items() if name.startswith("sd/")}
    converted = table.from_state_dict(state, image_size=128)
    assert converted.encoder == config_of(whole)
    return converted


@pytest.fixture(scope="module", params=["subset", "whole"])
def golden(request):
    """(arrays, config, encoder's parameters): of the subset, where weights are missing, zeros."""
    if request.param == "whole":
        model = request.getfixturevalue("model")
        return request.getfixturevalue("whole"), model.encoder, model.params["image_encoder"]
    arrays = families.read(subset.SUBSET)
    config = config_of(arrays)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract(rep_vit.ImageEncoder(config)))
    rows = table.rows(table.outline_of(config))
    state = table.to_state({"image_encoder": zeros}, rows)
    state |= {name[3:]: arrays[name] for name in arrays if name.startswith("sd/") and not name.endswith(table.COUNTER)}
    return arrays, config, table.to_params(state, rows, {"image_encoder": zeros}, "")["image_encoder"]


def pixels_of(arrays, config) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """The golden image in the model frame [H, W, 3], its size there, and normalised [1, H, W, 3]."""
    frame, size = resize_and_pad(arrays["image_uint8"], config.image_size)
    return frame, size, sam.preprocess(Config(config.image_size, 0, ()), frame[None], size[None])


@pytest.fixture(scope="module")
def found(golden):
    arrays, config, params = golden
    embedding, features, modules = run_all(rep_vit.ImageEncoder(config), params, pixels_of(arrays, config)[2])
    streams = {f"{path}/{name}": array for path, part in features.items() for name, array in part.items()}
    fine, coarse = modules["fuse_2"], modules["fuse_3"]
    return {**modules, **streams, "doubled": rep_vit.doubled(coarse), "fine": fine, "embedding": embedding}


def planes(x) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def assert_equal(arrays, name: str, ours, atol: float = 5e-5, rtol: float = 0) -> None:
    """Of a subset's array the part that it is."""
    ours = np.asarray(ours)
    ours = ours if ours.shape == arrays[name].shape else subset.thinned(name, ours)
    np.testing.assert_allclose(ours, arrays[name], atol=atol, rtol=rtol, err_msg=name)


def test_the_subset_is_cut_from_the_whole(whole):
    wanted, stored = subset.cut(whole), families.read(subset.SUBSET)
    assert set(stored) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


def test_preprocessing(whole, model):
    frame, (height, width), pixels = pixels_of(whole, model.encoder)
    assert (height, width) == tuple(whole["input_size"])
    np.testing.assert_array_equal(frame[:height, :width], whole["resized_uint8"])
    assert_equal(whole, "preprocessed", planes(pixels)[0], 1e-6)


def ours_of(config) -> dict[str, str]:
    """{their module: ours}: blocks by their numbers, stages in order."""
    blocks = [f"stages_{i}/blocks_{j}" for i, stage in enumerate(config.stages) for j in range(len(stage.blocks))]
    names = {"features.0": "stem/out", "fuse_stage2": "fine", "fuse_stage3.op_list.0": "fuse_3"}
    names |= {"fuse_stage3": "doubled", **{f"neck.{i}": f"neck_{i}" for i in range(4)}}
    for number, block in enumerate(blocks, start=1):
        names |= {f"features.{number}": f"{block}/out", f"features.{number}.token_mixer": f"{block}/middle"}
    return names


def test_every_module(golden, found):
    arrays, config, _ = golden
    names = [name for name in arrays if name.startswith("encoder/f") or name.startswith("encoder/n")]
    assert len(names) == (28 if "image_embedding" in arrays else 24)
    for name in names:
        module = ours_of(config)[name.removeprefix("encoder/")]
        assert_equal(arrays, name, planes(found[module]), rtol=5e-6)  # of values up to 60
    if "image_embedding" in arrays:
        assert_equal(arrays, "image_embedding", planes(found["embedding"]))


def test_folding(golden, found):
    """Arrays of the original's own folding, and the same embedding: in float64, whose last bits are no processor's."""
    arrays, config, params = golden
    folded = rep_vit.fold_batch_norm(jax.device_get(params))
    block, their = folded["stages_0"]["blocks_0"], "fused_sd/image_encoder.features.1."
    assert_equal(arrays, f"{their}token_mixer.0.weight", block["conv"]["kernel"].transpose(3, 2, 0, 1), 2e-6)
    assert_equal(arrays, f"{their}token_mixer.0.bias", block["conv"]["bias"], 2e-6)
    assert_equal(arrays, f"{their}channel_mixer.m.2.weight", block["mixer_2"]["kernel"].T[..., None, None], 2e-6)
    if "image_embedding" not in arrays:
        return
    encoder = rep_vit.ImageEncoder(dataclasses.replace(config, batch_norm=False))
    embedding, _ = run(encoder, folded, pixels_of(arrays, config)[2])
    assert_equal(arrays, "fused/image_embedding", planes(embedding))
    with jax.enable_x64():
        wide = lambda params: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        pixels, params = np.asarray(pixels_of(arrays, config)[2], np.float64), wide(params)
        expected, _ = run(rep_vit.ImageEncoder(config, jnp.float64), params, pixels)
        same, _ = run(dataclasses.replace(encoder, dtype=jnp.float64), rep_vit.fold_batch_norm(params), pixels)
        np.testing.assert_allclose(same, expected, atol=1e-10)
    again = rep_vit.fold_batch_norm(rep_vit.unfold_batch_norm(folded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, folded)


def test_exported_graphs_with_another_gelu(whole, model):
    encoder = rep_vit.ImageEncoder(model.encoder, tanh_gelu=True)
    embedding, _ = run(encoder, model.params["image_encoder"], pixels_of(whole, model.encoder)[2])
    assert_equal(whole, "gelu_tanh/image_embedding", planes(embedding))


def test_exported_graphs_with_another_interpolation(whole, model):
    """From the stages' ends, which are the same: nothing is compiled."""
    coarse = whole["encoder/fuse_stage3.op_list.0"].transpose(0, 2, 3, 1)
    assert_equal(whole, "bilinear/fuse_stage3", planes(rep_vit.doubled(jnp.asarray(coarse), bilinear=True)))
    numbers = dict(zip((f"stages_{i}" for i in range(4)), whole["encoder/stage_last_block"].tolist(), strict=True))

    def shortcut(following, args, kwargs, context):
        if not isinstance(context.module, rep_vit.MixerStage):
            return following(*args, **kwargs)
        end = whole[f"encoder/features.{numbers[context.module.name]}"]
        return jnp.asarray(end.transpose(0, 2, 3, 1)), {}

    encoder = rep_vit.ImageEncoder(model.encoder, bilinear=True)
    with nn.intercept_methods(shortcut):
        embedding, _ = encoder.apply({"params": model.params["image_encoder"]}, jnp.zeros((1, 128, 128, 3)))
    assert_equal(whole, "bilinear/image_embedding", planes(embedding))


def test_training_with_statistics_of_the_batch(whole, model):
    encoder, images = rep_vit.ImageEncoder(model.encoder, of_batch=True), whole["train/images"].transpose(0, 2, 3, 1)
    params = model.params["image_encoder"]
    apply = jax.jit(lambda params, images: encoder.apply({"params": params}, images, mutable=["statistics"]))
    (embedding, _), seen = apply(params, images)
    assert_equal(whole, "train/embedding", planes(embedding))
    moved = {"image_encoder": layers.with_statistics(params, seen["statistics"])}
    state = table.to_state(moved, table.rows(table.outline_of(model.encoder)))
    names = [name for name in whole if name.startswith("train/sd_after/") and "running" in name]
    assert len(names) == 2 * len(table.norms(table.outline_of(model.encoder)))
    for name in names:
        assert_equal(whole, name, state[name.removeprefix("train/sd_after/")], 5e-6)


def test_gradients(whole, model):
    """Of EdgeSAM's first loss: squares, mean over channels, summed over valid positions of each image.

    The original divides each image's sum by each image's number of them, and takes the mean over all pairs.
    """
    encoder = rep_vit.ImageEncoder(model.encoder)
    inputs = [whole[f"pixel_loss/{name}"].transpose(0, 2, 3, 1) for name in ("images", "teacher_embedding")]
    counting = lambda embedding: within_image(embedding, whole["pixel_loss/sizes_before_pad"], 16)

    @jax.jit
    def gradient(params, images, teacher):
        def loss(params):
            return mse(counting(encoder.apply({"params": params}, images)[0]), counting(teacher))

        return jax.value_and_grad(loss)(params)

    value, tree = gradient(model.params["image_encoder"], *inputs)
    np.testing.assert_allclose(value, whole["pixel_loss/value"], rtol=1e-5)
    state = table.to_state({"image_encoder": tree}, table.rows(table.outline_of(model.encoder)))
    names = [name for name in whole if name.startswith("pixel_loss/grad/")]
    assert len(names) == 7 and not any(array.any() for name, array in state.items() if "running" in name)
    for name in names:
        assert_equal(whole, name, state[name.removeprefix("pixel_loss/grad/")], 1e-4 * np.abs(whole[name]).max())


CASES = ("point1", "points3", "points_ignored", "box", "box_point", "boxes2", "batch2", "point1_mask")
TOKENS = 5


def prompts(whole, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Points and labels of a case, in the model frame."""
    if case == "export":  # whose caller pads
        return whole["export/point_coords"], whole["export/point_labels"].astype(int)
    if case.startswith("images2"):
        points = None if case.endswith("boxes") else whole["images2/points"]
        return prompt_points(points, np.ones((3, 1), int), whole["images2/boxes"] if points is None else None)
    given = lambda name: whole.get(f"{case}/{name}")
    labels = given("labels")
    labels = None if labels is None else np.where(labels == -2, IGNORED, labels)
    return prompt_points(given("model_frame_points"), labels, given("model_frame_boxes"))


@pytest.fixture(scope="module")
def batch(whole):
    """Embeddings, points, labels, masks, masked of all cases as one, missing tokens absent; and their places."""
    parts, places = [], {}
    one, two = (whole[name].transpose(0, 2, 3, 1) for name in ("image_embedding", "images2/embedding"))
    for case in (*CASES, "export", "images2/points", "images2/boxes"):
        points, labels = prompts(whole, case)
        fill, count = ((0, 0), (0, TOKENS - labels.shape[1])), len(labels)
        masks = np.zeros((count, 32, 32, 1), np.float32)
        masks += whole["prompt/mask_input"][0].transpose(1, 2, 0) if case == "point1_mask" else 0
        start = sum(len(part[2]) for part in parts)
        places[case] = np.s_[start : start + count], np.s_[: labels.shape[1]]
        of_prompt = np.repeat(two, whole["images2/num_prompts"], 0) if "images2" in case else np.repeat(one, count, 0)
        labels = np.pad(labels, fill, constant_values=ABSENT)
        parts.append((of_prompt, np.pad(points, (*fill, (0, 0))), labels, masks, np.full(count, case == "point1_mask")))
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)], places


@pytest.fixture(scope="module")
def decoded(model, batch):
    return [np.asarray(array) for array in sam.decode(model.head, model.params, *batch[0])]


@pytest.mark.parametrize("case", CASES)
def test_masks_and_which_is_the_best(whole, model, batch, decoded, case):
    whole_sam = sam.Sam(SamConfig(model.encoder, model.head), model.params)
    low, iou = (array[batch[1][case][0]] for array in decoded)
    for count in (1, 3, 4):
        key, chosen = f"{case}/n{count}", outputs_of(whole_sam, count)
        assert_equal(whole, f"{key}/low_res_masks", low[:, chosen], 1e-4)
        assert_equal(whole, f"{key}/iou_predictions", iou[:, chosen], 1e-5)
        stability = stability_scores(low[:, chosen])
        np.testing.assert_array_equal(stability, whole[f"{key}/stability_scores"])
        np.testing.assert_array_equal(stability.argmax(1), whole[f"{key}/best_by_stability"])
        np.testing.assert_array_equal(iou[:, chosen].argmax(1), whole[f"{key}/best_by_iou"])
    if f"{case}/n4/mask_logits" in whole:
        sizes = (model.head.image_size, low, tuple(whole["input_size"]), tuple(whole["original_size"]))
        assert_equal(whole, f"{case}/n4/mask_logits", resize_masks(*sizes), 1e-4)


def test_the_exported_decoder_and_prompts_on_several_images(whole, batch, decoded):
    of_case = lambda case: [array[batch[1][case][0]] for array in decoded]
    low, iou = of_case("export")
    assert_equal(whole, "export/masks", low, 1e-4)
    assert_equal(whole, "export/stability_False/scores", iou, 1e-5)
    np.testing.assert_array_equal(stability_scores(low), whole["export/stability_True/scores"])
    for kind, count in (("points", 4), ("boxes", 1)):
        low, iou = of_case(f"images2/{kind}")
        assert_equal(whole, f"images2/{kind}_n{count}/masks", low[:, :count], 1e-4)
        assert_equal(whole, f"images2/{kind}_n{count}/iou", iou[:, :count], 1e-5)


def test_the_predictor_by_stability(whole, model, batch, decoded):
    low = decoded[0][batch[1]["points3"][0]][0]
    wanted, sizes = whole["predictor/points3_n4_stability/masks"], ("input_size", "original_size")
    logits = resize_masks(model.head.image_size, low, *(tuple(whole[name]) for name in sizes))
    sure = np.abs(logits) > 1e-4
    np.testing.assert_array_equal((logits > 0)[sure], wanted[sure])
    assert sure.mean() > 0.999
    np.testing.assert_array_equal(stability_scores(low), whole["predictor/points3_n4_stability/scores"])


def test_prompt_tokens(whole, model, batch):
    (_, points, labels, masks, _), places = batch
    encode = lambda module: (*module(points, labels, masks), module.dense_positions())
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(nn.apply(encode, PromptEncoder(model.head)))
        sparse, dense, positions = apply({"params": model.params["prompt_encoder"]})
    for case in CASES:
        assert_equal(whole, f"{case}/sparse", np.asarray(sparse)[places[case]], 2e-5)
    assert not np.asarray(sparse)[places["points_ignored"][0]][0, 1].any()
    assert_equal(whole, "dense_pe", planes(positions[None]), 2e-5)
    assert_equal(whole, "point1_mask/dense", planes(dense[places["point1_mask"][0]]), 5e-5)


@pytest.mark.parametrize("case", ["point1", "points3", "batch2"])
def test_points_in_the_model_frame(whole, case):
    scaled = to_model_frame(whole[f"{case}/points"], tuple(whole["input_size"]), tuple(whole["original_size"]))
    np.testing.assert_allclose(scaled, whole[f"{case}/model_frame_points"], atol=1e-4)
