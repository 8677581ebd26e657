"""ONNX: the same numbers as JAX, as Meta's SamOnnxModel and as transformers' SamModel, and files only if so."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from converters import to_onnx, to_torch
from converters.onnx import check
from converters.onnx import encoder as onnx_encoder
from helpers.models import random_images, random_sam, tiny_config
from helpers.peers import segment_anything, stock_sam
from helpers.shared import shared
from slimsam_jax import checkpoint, cli, data
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.imaging.prompts import prompt_points
from slimsam_jax.imaging.transforms import resize_masks, resized_shape
from slimsam_jax.models import sam as jax_sam
from slimsam_jax.models.config import GLOBAL, Block

SQUARE = tiny_config(image_size=(64, 64))
UNEVEN = dataclasses.replace(
    tiny_config(),
    embed_dim=20,
    blocks=(Block(2, 5, 17, 3), Block(3, 7, 40, GLOBAL), Block(1, 4, 9, 2)),
    out_chans=48,
    decoder_depth=1,
    multimask_outputs=2,
)
CONFIGS = {"rectangular": tiny_config(), "uneven": UNEVEN}
POINTS = np.array([[[10, 20], [30, 5]], [[1, 2], [40, 50]], [[12.5, 30], [3, 3]]], np.float32)
LABELS = np.array([[1, 0], [1, 1], [0, 1]])
BOXES = np.array([[5, 6, 30, 40], [1, 2, 20, 60], [8, 3, 44, 33]], np.float32)
PROMPTS = {
    "points": prompt_points(POINTS, LABELS),
    "boxes": prompt_points(boxes=BOXES),
    "both": prompt_points(POINTS, LABELS, BOXES),
}
# All kinds in one call, which compiles once: two points, a box, points and a box.
MIXED = PROMPTS["both"][0], np.array([[1, 0, -1, -1], [-1, -1, 2, 3], [0, 1, 2, 3]])


@pytest.fixture(scope="module", params=CONFIGS)
def sam(request):
    return random_sam(CONFIGS[request.param], 1)


def sessions(sam, layout="sam", dtype=np.float32, **options):
    """Encoder and decoder as functions of their inputs, by name."""
    found = []
    for model in to_onnx.models(sam, layout, dtype, **options):
        onnx.checker.check_model(model, full_check=True)
        run = check.session(model.SerializeToString()).run
        found.append(lambda run=run, **inputs: run(None, inputs))
    return found


def embed(sam, batch):
    """JAX's [b, C, h, w], and the normalised images [b, 3, H, W]."""
    embedding = jax_sam.encode(sam.config, sam.params, batch["image"], batch["size"])
    pixels = jax_sam.preprocess(sam.config, batch["image"], batch["size"])
    return np.asarray(embedding).transpose(0, 3, 1, 2), np.asarray(pixels).transpose(0, 3, 1, 2)


def random_embedding(config, count=1, seed=0):
    return np.random.default_rng(seed).standard_normal((count, config.out_chans, *config.grid)).astype(np.float32)


def random_masks(config, count, seed=0):
    h, w = config.grid
    return 3 * np.random.default_rng(seed).standard_normal((count, 1, 4 * h, 4 * w)).astype(np.float32)


def decode(sam, embedding, points, labels, masks=None):
    """JAX's masks and IoU of an embedding [C, h, w] and mask prompts [p, 1, 4h, 4w]."""
    masks = None if masks is None else masks.transpose(0, 2, 3, 1)
    return map(np.asarray, jax_sam.decode(sam.config, sam.params, embedding.transpose(1, 2, 0), points, labels, masks))


def sam_inputs(config, embedding, points, labels, masks=None, original_size=(100, 57)):
    h, w = config.grid
    return {
        "image_embeddings": embedding,
        "point_coords": points.astype(np.float32),
        "point_labels": labels.astype(np.float32),
        "mask_input": np.zeros((1, 1, 4 * h, 4 * w), np.float32) if masks is None else masks,
        "has_mask_input": np.array([masks is not None], np.float32),
        "orig_im_size": np.array(original_size, np.float32),
    }


def assert_close(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    assert check.largest_error(np.asarray(found), np.asarray(wanted)) < tolerance


@pytest.mark.parametrize("logits", [0, onnx_encoder.LOGITS_AT_ONCE])  # one head after the other, or all at once
def test_encoders(sam, logits, monkeypatch):
    monkeypatch.setattr(onnx_encoder, "LOGITS_AT_ONCE", logits)
    batch = random_images(sam.config, 3)
    wanted, pixels = embed(sam, batch)
    encoder, _ = sessions(sam, "transformers_js")
    for part in (slice(0, 3), slice(1, 2)):  # any number of images
        embedding, positions = encoder(pixel_values=pixels[part])
        assert_close(embedding, wanted[part])
        assert positions.shape == embedding.shape
    encoder, _ = sessions(sam)
    for image, size, expected in zip(batch["image"], batch["size"], wanted, strict=True):
        scaled = image[: size[0], : size[1]].transpose(2, 0, 1)[None]
        assert_close(encoder(images=scaled)[0], expected[None])


def test_an_image_that_was_not_scaled_is_refused(tiny_sam):
    encoder, _ = sessions(tiny_sam)
    with pytest.raises(Exception, match="broadcast"):
        encoder(images=np.zeros((1, 3, 64, 100), np.uint8))


def test_decoder_of_meta(sam):
    _, decoder = sessions(sam)
    embedding, size = random_embedding(sam.config), (100, 57)
    one = random_masks(sam.config, 1)
    three = random_masks(sam.config, 3)
    for masks, wanted_masks in ((None, None), (three, three), (one, one.repeat(3, 0))):
        wanted, iou = decode(sam, embedding[0], *MIXED, wanted_masks)
        full, found_iou, low = decoder(**sam_inputs(sam.config, embedding, *MIXED, masks, size))
        frame = resized_shape(size, sam.config.image_size)
        assert_close(low, wanted)
        assert_close(found_iou, iou)
        assert_close(full, resize_masks(sam.config.image_size, wanted, frame, size))


def test_decoder_of_transformers_js(sam):
    encoder, decoder = sessions(sam, "transformers_js")
    embeddings = random_embedding(sam.config, 2)
    _, positions = encoder(pixel_values=np.zeros((2, 3, *sam.config.image_size), np.float32))
    (points, labels), orders = MIXED, (np.array([0, 1, 2]), np.array([2, 0, 1]))
    inputs = {
        "input_points": np.stack([points[order] for order in orders]).astype(np.float32),
        "input_labels": np.stack([labels[order] for order in orders]).astype(np.int64),
    }
    iou, masks = decoder(**inputs, image_embeddings=embeddings, image_positional_embeddings=positions)
    for image, order in enumerate(orders):
        wanted, wanted_iou = decode(sam, embeddings[image], points[order], labels[order])
        assert_close(masks[image], wanted[:, 1:])
        assert_close(iou[image], wanted_iou[:, 1:])


@pytest.mark.parametrize("single", [False, True])
def test_decoder_equals_the_original_onnx_model(single):
    segment_anything()
    from segment_anything.utils.onnx import SamOnnxModel

    ours, stock = random_sam(SQUARE, 5), stock_sam(SQUARE)
    tensors = {name: torch.from_numpy(array) for name, array in to_torch.to_state_dict(ours).items()}
    stock.load_state_dict(tensors, strict=True)
    original = SamOnnxModel(stock, return_single_mask=single)
    _, decoder = sessions(ours, return_single_mask=single)
    embedding = random_embedding(SQUARE)
    for points, labels in PROMPTS.values():  # with two points and with more, where the single mask is another
        for masks, size in ((None, (33, 64)), (random_masks(SQUARE, 1), (90, 31)), (None, (1, 50))):
            inputs = sam_inputs(SQUARE, embedding, points[:1], labels[:1], masks, size)
            wanted = original(**{name: torch.from_numpy(array) for name, array in inputs.items()})
            for found, expected in zip(decoder(**inputs), wanted, strict=True):
                assert_close(found, expected.numpy())


def test_each_prompt_chooses_its_single_mask(tiny_sam):
    embedding, (points, labels) = random_embedding(tiny_sam.config), PROMPTS["boxes"]
    _, iou = decode(tiny_sam, embedding[0], points, labels)
    head = dict(tiny_sam.params["mask_decoder"]["iou_prediction_head"])
    head["layers_2"] = {**head["layers_2"], "bias": head["layers_2"]["bias"] - iou.mean(0)}  # none is best by itself
    decoder = {**tiny_sam.params["mask_decoder"], "iou_prediction_head": head}
    sam = dataclasses.replace(tiny_sam, params={**tiny_sam.params, "mask_decoder": decoder})

    masks, iou = decode(sam, embedding[0], points, labels)
    best = 1 + iou[:, 1:].argmax(1)
    assert len(set(best)) > 1
    _, choose = sessions(sam, return_single_mask=True)
    _, found_iou, low = choose(**sam_inputs(sam.config, embedding, points, labels))
    assert_close(low[:, 0], masks[np.arange(3), best])
    np.testing.assert_allclose(found_iou[:, 0], iou[np.arange(3), best], atol=1e-5)


@pytest.mark.slow  # importing transformers
def test_decoder_equals_samodel_of_transformers(tmp_path):
    from transformers import SamModel

    ours = random_sam(SQUARE, 4)
    to_torch.save_huggingface(ours, tmp_path / "hf")
    model = SamModel.from_pretrained(tmp_path / "hf").eval()
    pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    encoder, decoder = sessions(ours, "transformers_js")
    embedding, positions = encoder(pixel_values=pixels)
    points, labels = np.stack([POINTS, POINTS + 3]), np.stack([LABELS, -LABELS])
    labels[1, 2, 0] = -10
    for name, value in (("image_embeddings", embedding), ("image_positional_embeddings", positions)):
        assert value.shape == (2, SQUARE.out_chans, *SQUARE.grid), name
    with torch.no_grad():
        np.testing.assert_allclose(
            positions, model.get_image_wide_positional_embeddings().repeat(2, 1, 1, 1), atol=1e-5
        )
        prompts = {"input_points": torch.from_numpy(points), "input_labels": torch.from_numpy(labels)}
        wanted = model(pixel_values=torch.from_numpy(pixels), **prompts, multimask_output=True)
        boxed = model(
            pixel_values=torch.from_numpy(pixels[:1]), input_boxes=torch.from_numpy(BOXES[None]), multimask_output=True
        )
    given = {"image_embeddings": embedding, "image_positional_embeddings": positions}
    iou, masks = decoder(input_points=points, input_labels=labels, **given)
    assert_close(masks, wanted.pred_masks.numpy())
    assert_close(iou, wanted.iou_scores.numpy())
    corners, kinds = (x[None] for x in PROMPTS["boxes"])
    first = {name: value[:1] for name, value in given.items()}
    iou, masks = decoder(input_points=corners.astype(np.float32), input_labels=kinds.astype(np.int64), **first)
    assert_close(masks, boxed.pred_masks.numpy())
    assert_close(iou, boxed.iou_scores.numpy())


def write_model(folder, config=SQUARE):
    checkpoint.save(random_sam(config, 2), folder)
    return folder


def convert(*arguments):
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["to_onnx", *map(str, arguments)])
        cli.run(to_onnx.main)


def test_command(tmp_path, capsys):
    """All dtypes; errors of half precision and of int8 are bounded by about twice what they measure here."""
    convert(write_model(tmp_path / "m", UNEVEN), tmp_path / "out", "--dtype", "float32", "float16", "int8")
    names = {f"{part}{suffix}.onnx" for part in ("encoder", "decoder") for suffix in ("", "_fp16", "_quantized")}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    printed = capsys.readouterr().out
    assert "float32: largest error" in printed and "decoder_quantized.onnx" in printed
    expected = check.reference(random_sam(UNEVEN, 2), Image.new("RGB", (50, 20), (200, 90, 30)))
    for suffix, bound in (("", 1e-5), ("_fp16", 1.5e-3), ("_quantized", 0.03)):
        paths = [tmp_path / "out" / f"{part}{suffix}.onnx" for part in ("encoder", "decoder")]
        assert max(check.compare_sam(expected, *paths)[:3]) < bound
    kinds = {node.name: node.op_type for node in onnx.load(tmp_path / "out" / "decoder_quantized.onnx").graph.node}
    path = "mask_decoder/transformer/layers_0"
    assert kinds[f"{path}/cross_attn_image_to_token/q_proj"] == "MatMul"
    assert kinds[f"{path}/mlp_lin1_quant"] == "MatMulInteger"
    metadata = {p.key: p.value for p in onnx.load(tmp_path / "out" / "encoder.onnx").metadata_props}
    assert json.loads(metadata["config"]) == json.loads(json.dumps(UNEVEN.to_json()))


def test_command_for_transformers_js(tmp_path, capsys):
    blocks = (dataclasses.replace(SQUARE.blocks[0], mlp_dim=8), SQUARE.blocks[1])
    model, out = write_model(tmp_path / "m", dataclasses.replace(SQUARE, blocks=blocks)), tmp_path / "out"
    convert(model, out, "--layout", "transformers_js", "--dtype", "float16", "int8")
    stems = ("vision_encoder", "prompt_encoder_mask_decoder")
    names = {f"{stem}{suffix}.onnx" for stem in stems for suffix in ("_fp16", "_quantized")}
    assert {p.name for p in (out / "onnx").iterdir()} == names
    assert {p.name for p in out.iterdir()} == {"onnx", "config.json", "preprocessor_config.json"}
    described = json.loads((out / "config.json").read_text())
    assert described["model_type"] == "sam" and "mlp_dim" not in described["vision_config"]
    assert [block["mlp_dim"] for block in described["slimsam_jax"]["blocks"]] == [8, 40]
    assert "float32:" not in capsys.readouterr().out  # no such file; int8 is timed beside it


def test_models_beyond_protobufs_limit_keep_arrays_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx, "LARGEST_FILE", 20_000)
    arguments = ("--layout", "transformers_js", "--dtype", "float32", "int8")
    convert(write_model(tmp_path / "m"), tmp_path / "out", *arguments)
    names = {p.name for p in (tmp_path / "out" / "onnx").iterdir()}
    assert {"vision_encoder.onnx", "vision_encoder.onnx_data", "vision_encoder_quantized.onnx"} <= names
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["vision_config"]["mlp_dim"] == 40
    external = {"vision_encoder.onnx": True, "prompt_encoder_mask_decoder.onnx": True}
    assert described["transformers.js_config"] == {"use_external_data_format": external}


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys):
    model = write_model(tmp_path / "m", tiny_config())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    before = sorted(tmp_path.rglob("*"))
    for arguments, part in (
        ((tmp_path / "absent", tmp_path / "o"), "does not exist"),
        ((model, tmp_path / "full"), "is not empty"),
        ((model, tmp_path / "o", "--layout", "transformers_js"), "square"),
        ((model, tmp_path / "o", "--layout", "transformers_js", "--return-single-mask"), "--layout sam"),
        ((model, tmp_path / "o", "--dtype", "int8", "int8"), "each once"),
        ((model, tmp_path / "o", "--image", tmp_path / "broken.jpg"), "broken.jpg"),
    ):
        with pytest.raises(SystemExit) as stop:
            convert(*arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and part in error
    assert sorted(tmp_path.rglob("*")) == before


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install onnx onnxruntime"):
        to_onnx.main(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("fault", ["wrong", "infinite", "full"])
def test_files_that_are_not_the_model_are_not_kept(tmp_path, monkeypatch, fault):
    model = write_model(tmp_path / "m")
    right, save = to_onnx.models, to_onnx.save

    def wrong(sam, *arguments):
        values = {"wrong": 1.01, "infinite": np.inf, "full": 1.0}
        neck = dict(sam.params["image_encoder"]["neck_3"])
        neck["scale"] = np.asarray(neck["scale"]) * values[fault]
        encoder = {**sam.params["image_encoder"], "neck_3": neck}
        return right(dataclasses.replace(sam, params={**sam.params, "image_encoder": encoder}), *arguments)

    def full(model, path):
        if fault == "full" and "decoder" in path.name:
            raise RunError("cannot write decoder.onnx: No space left on device")
        save(model, path)

    monkeypatch.setattr(to_onnx, "models", wrong)
    monkeypatch.setattr(to_onnx, "save", full)
    reason = {"wrong": "differs from JAX", "infinite": "not finite", "full": "No space"}[fault]
    with pytest.raises(RunError, match=reason):
        to_onnx.main(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
def test_a_trained_sam_gives_the_same_masks(tmp_path):
    """The same image and point in JAX and in each dtype; bounds are about twice what is measured."""
    from converters.from_torch import load

    teacher = load(shared("teacher/sam_small_256.pth"))
    image = data.read_image(data.embedded_images() / "chelsea_cat.jpg")
    expected = check.reference(teacher, image)
    to_onnx.export(teacher, tmp_path / "out", "sam", ("float32", "float16", "int8"), image)
    for suffix, agreement in (("", 0.9999), ("_fp16", 0.999), ("_quantized", 0.985)):
        paths = [tmp_path / "out" / f"{part}{suffix}.onnx" for part in ("encoder", "decoder")]
        assert check.compare_sam(expected, *paths).agreement > agreement
