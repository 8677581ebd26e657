"""SAM 2's checkpoints through the doors that SAM's go through: its names, the memory of videos, Hugging Face."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from converters import from_torch, huggingface_sam2, to_torch
from converters.tables import hiera as table
from helpers import golden_sam2 as golden_file
from helpers.family_models import SMALL_HIERA, sam2
from helpers.shared import shared
from slimsam_jax import checkpoint
from slimsam_jax.errors import InputError
from slimsam_jax.imaging.prompts import prompt_points
from slimsam_jax.models import sam, sam2_head
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.encoders import hiera
from slimsam_jax.models.encoders.architecture import Block

COUNTED = json.loads(golden_file.COUNTS.read_text())
VIDEO = {"no_obj_ptr": np.ones((1, 16), np.float32), "mask_downsample.weight": np.ones((1, 1, 4, 4), np.float32)}


def test_every_array_of_the_original_goes_there_and_back():
    with np.load(shared("golden/sam2_image.npz")) as arrays:
        state, config = golden_file.state_of(arrays), golden_file.config_of(arrays)
    model = table.from_state_dict(state, **golden_file.given_of(config))
    assert model.encoder == config and model.head == sam2_head.HeadConfig((128, 128))
    back = table.to_state_dict(model)
    assert set(back) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_real_names_and_shapes_with_the_memory_of_videos():
    """Of zeros: the architecture is the published one, and videos' arrays come back as they were, the very same."""
    zeros = lambda shape: np.broadcast_to(np.float32(0), shape)
    shapes = COUNTED["shapes"]["tiny"] | COUNTED["shapes"]["video"]
    state = {name: zeros(shape) for name, shape in shapes.items()}
    model = table.from_state_dict(state)
    assert model.encoder == hiera.PRESETS["sam2_tiny"] and model.head == sam2_head.HeadConfig((1024, 1024))
    assert set(model.kept) == set(COUNTED["shapes"]["video"])
    assert sum(array.size for array in model.kept.values()) == COUNTED["tiny"]["video_only_params"]
    back = table.to_state_dict(model)
    assert {name: list(array.shape) for name, array in back.items()} == shapes
    assert all(back[name] is state[name] for name in model.kept)
    theirs = huggingface_sam2.to_huggingface(back)
    assert {name: list(array.shape) for name, array in theirs.items()} == COUNTED["transformers"]
    again = huggingface_sam2.to_original(
        {**theirs, "memory_attention.x": zeros((1,)), "no_object_pointer": zeros((1,))}
    )
    assert {name: list(array.shape) for name, array in again.items()} == COUNTED["shapes"]["tiny"]


@pytest.fixture(scope="module")
def small() -> sam.Sam:
    return dataclasses.replace(sam2(SMALL_HIERA), kept=VIDEO, thresholds=Thresholds(0.8))


@pytest.fixture
def pt(small, tmp_path):
    """As SAM 2 publishes it: the state dict under "model"."""
    state = {name: torch.from_numpy(array.copy()) for name, array in to_torch.to_state_dict(small).items()}
    torch.save({"model": state}, tmp_path / "sam2.pt")
    return tmp_path / "sam2.pt"


def assert_equal(one: sam.Sam, other: sam.Sam) -> None:
    assert (one.config, one.thresholds) == (other.config, other.thresholds) and set(one.kept) == set(other.kept)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    jax.tree.map(np.testing.assert_array_equal, one.kept, other.kept)


GIVEN = {"image_size": 64, "heads": (1, 2, 4, 4, 8), "windows": (8, 4, 6, 3), "global_blocks": (3,), "decoder_heads": 2}


def test_a_folder_and_the_way_back_hold_all_of_it(small, pt, tmp_path, capsys):
    """What no array tells is noted in files of ours, so that nothing needs to be given again."""
    state = {name: tensor.numpy() for name, tensor in torch.load(pt)["model"].items()}
    assert_equal(from_torch.from_state_dict(state, **GIVEN), small)
    checkpoint.save(small, tmp_path / "folder")
    description = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert description["family"] == "hiera" and description["architecture"]["head"]["kind"] == "sam2"
    assert_equal(checkpoint.load(tmp_path / "folder"), small)
    to_torch.main(tmp_path / "folder", tmp_path / "back.pt")
    said = capsys.readouterr().out
    assert "sam2_torch.load(" in said and "own classes cannot hold it: it has another decoder" in said
    assert set(torch.load(tmp_path / "back.pt")) == {"model"} and (tmp_path / "sam2_torch.py").is_file()
    again = from_torch.load(tmp_path / "back.pt")
    assert_equal(again, small)
    assert again.provenance["source"] == "back.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": None}, "number of heads must be given"),
        ({"heads": (1, 2, 4)}, "no numbers of heads of 5 blocks"),
        ({"heads": (1, 3, 4, 4, 8)}, "are no 3 heads"),
        (
            {"windows": None},
            r"\(1, 1, 2, 1\) blocks are no published model's: .*from_state_dict takes windows=, global_blocks=",
        ),
        ({"windows": (4, 4, 6, 3)}, "are not those of its 4 stages"),
        ({"windows": (8, 4, 6)}, "are not those of its 4 stages"),
        ({"windows": (8, 5, 6, 3)}, "must be even"),
        ({"global_blocks": (5,)}, "no places among 5 blocks"),
        ({"global_blocks": (3,) * 6}, "no places among 5 blocks"),
        ({"image_size": (1 << 13, 1 << 14)}, "has more than 67108864 pixels"),
        ({"image_size": 48}, "must be multiples"),
    ],
)
def test_what_no_array_tells_must_fit_the_arrays(small, change, message):
    given = {name: value for name, value in (GIVEN | change).items() if value is not None}
    with pytest.raises(InputError, match=message) as refusal:
        from_torch.from_state_dict(to_torch.to_state_dict(small), **given)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("no_mem_embed", None, "- no_mem_embed"),
        ("image_encoder.trunk.blocks.2.attn.qkv.weight", None, "- image_encoder.trunk.blocks.2.attn"),
        ("image_encoder.trunk.pos_embed_window", np.zeros((1, 9, 8, 8), np.float32), "pos_embed_window"),
        ("image_encoder.trunk.blocks.1.mlp.layers.1.weight", np.zeros((16, 65), np.float32), "mlp_lin2/kernel"),
        ("sam_mask_decoder.conv_s1.weight", np.zeros((4, 16, 3, 3), np.float32), "does not fit its place"),
        ("memory", np.zeros(1, np.float32), "[+] memory"),
        ("image_encoder.trunk.blocks.2.attn.proj.weight", np.ones((), np.float32), "out of range"),
        ("maskmem_tpos_enc", np.broadcast_to(np.float32(0), (1 << 26) + 1), "268435588 bytes .* at most 268435456"),
    ],
)
def test_arrays_that_are_none_of_it_are_refused(small, name, array, message):
    state = to_torch.to_state_dict(small) | {name: array}
    state = {name: array for name, array in state.items() if array is not None}
    with pytest.raises(InputError, match=message):
        from_torch.from_state_dict(state, **GIVEN)


def test_what_the_originals_can_hold():
    """A uniform cut; not one of a stage or of its MLPs alone. Hugging Face's class is free in widths of stages."""
    config = SamConfig(hiera.PRESETS["sam2_tiny"], sam2_head.HeadConfig((1024, 1024)))
    half = hiera.uniform(48, 1, (1, 2, 7, 2), (5, 7, 9))
    for encoder in (config.encoder, half):
        assert (
            table.obstacle(config.with_encoder(encoder))
            == ""
            == huggingface_sam2.obstacle(config.with_encoder(encoder))
        )
    said = lambda config, kept=VIDEO: table.how_to_load(sam.Sam(config, {}, kept=kept), "x.pt")
    assert "embed_dim=48" in said(config.with_encoder(half)) and "image_size" not in said(config)
    assert said(config, {}).endswith("cannot hold it: it has no memory of videos, which they load strictly")
    small = SamConfig(dataclasses.replace(config.encoder, image_size=(512, 512)), sam2_head.HeadConfig((512, 512)))
    assert "++model.image_size=512" in said(small)
    pooling = config.with_encoder(dataclasses.replace(half, global_blocks=(3, 5)))
    assert table.obstacle(pooling) == huggingface_sam2.obstacle(pooling) == "it has a global block that pools"
    *others, last = half.stages
    wide = half.stages[0].blocks[0]
    narrow = dataclasses.replace(last, dim=192, blocks=(dataclasses.replace(wide, heads=4, mlp_dim=768),) * 2)
    one = config.with_encoder(dataclasses.replace(half, stages=(*others, narrow)))
    assert "do not double" in table.obstacle(one) and huggingface_sam2.obstacle(one) == ""
    thin = dataclasses.replace(last, blocks=(dataclasses.replace(last.blocks[0], mlp_dim=9), last.blocks[1]))
    two = config.with_encoder(dataclasses.replace(half, stages=(*others, thin)))
    assert "MLPs" in table.obstacle(two) and "MLPs" in huggingface_sam2.obstacle(two)
    assert "cannot hold it: it has MLPs" in said(two)


@pytest.mark.parametrize(
    "widths",
    [((42, 97), (84, 194), (168, 388), (336, 776)), ((10, 23), (16, 38), (20, 47), (40, 95))],
    ids=["a ratio that rounds down", "not the first one's"],
)
def test_one_ratio_gives_all_mlps_of_a_model(widths):
    """Their class multiplies and rounds down: 336 * (97 / 42) is a little less than 776."""
    pairs = zip(SMALL_HIERA.stages, widths, strict=True)
    stages = [
        dataclasses.replace(old, dim=d, blocks=(Block(1, d, d, mlp),) * len(old.blocks)) for old, (d, mlp) in pairs
    ]
    config = SamConfig(
        dataclasses.replace(SMALL_HIERA, stages=tuple(stages)), sam2_head.HeadConfig((64, 64), out_chans=16)
    )
    assert huggingface_sam2.obstacle(config) == ""
    ratio = huggingface_sam2.description(config)["vision_config"]["backbone_config"]["mlp_ratio"]
    assert [int(dim * ratio) for dim, _ in widths] == [mlp for _, mlp in widths]


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"backbone_config": {"blocks_per_stage": [1, 1 << 40, 1, 1]}}, "no numbers of blocks"),
        ({"backbone_config": {"patch_stride": [2, 2]}}, r"patch_stride is \[2, 2\], and SAM 2 has"),
        ({"backbone_config": {"num_attention_heads_per_stage": [1]}}, "cannot be read"),
        ({"backbone_config": {"blocks_per_stage": [1, 1]}}, "no numbers of blocks"),
        ({"backbone_config": {"blocks_per_stage": 4}}, "no numbers of blocks"),
        ({"backbone_config": 3}, "cannot be read"),
        ({}, "has neither model.safetensors"),
    ],
)
def test_folders_that_are_none_of_it_are_refused(tmp_path, vision, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam2_video", "vision_config": vision}))
    with pytest.raises(InputError, match=message) as refusal:
        from_torch.load(tmp_path)
    assert "\n" not in str(refusal.value)


def transformers_model():
    """A small `Sam2Model` with random weights, stages of widths that do not double."""
    from transformers import Sam2Config, Sam2Model

    stages = []
    for stage, dim, heads in zip(SMALL_HIERA.stages, (8, 12, 16, 24), (1, 2, 2, 4), strict=True):
        block = Block(heads, dim // heads, dim // heads, 5 * dim // 2)
        stages.append(dataclasses.replace(stage, dim=dim, blocks=(block,) * len(stage.blocks)))
    encoder = dataclasses.replace(SMALL_HIERA, stages=tuple(stages))
    head = sam2_head.HeadConfig(
        (64, 64), out_chans=16, mask_in_chans=4, decoder_heads=2, decoder_mlp_dim=8, iou_head_dim=6
    )
    fields = huggingface_sam2.description(SamConfig(encoder, head))
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    model, random = Sam2Model(Sam2Config(**{name: fields[name] for name in parts})).eval(), np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            values = scale * random.standard_normal(tuple(parameter.shape)) + ("norm" in name and "weight" in name)
            parameter.copy_(torch.from_numpy(values))
        frequencies = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(frequencies)
    return model


@pytest.mark.slow  # importing transformers
def test_hugging_face_gives_equal_maps_and_masks_and_is_written_back(tmp_path):
    model = transformers_model()
    model.save_pretrained(tmp_path / "theirs")
    ours = from_torch.load(tmp_path / "theirs")
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    maps = sam.encode(ours.config, ours.params, image, np.array([[64, 64]]))
    pixels = np.asarray(sam.preprocess(ours.config, image, np.array([[64, 64]]))).transpose(0, 3, 1, 2)
    points, box = np.array([[[20.0, 30.0]]], np.float32), np.array([[10.0, 20, 40, 50]], np.float32)
    pixels, prompts = (
        torch.from_numpy(pixels.copy()),
        (torch.from_numpy(points)[None], torch.ones(1, 1, 1, dtype=torch.int)),
    )
    with torch.no_grad():
        several = model(pixel_values=pixels, input_points=prompts[0], input_labels=prompts[1])
        single = model(pixel_values=pixels, input_boxes=torch.from_numpy(box)[None], multimask_output=False)
    for name, theirs in zip(("high_res_0", "high_res_1", "embedding"), several.image_embeddings, strict=True):
        np.testing.assert_allclose(np.asarray(maps[name]).transpose(0, 3, 1, 2), theirs, atol=1e-4, err_msg=name)
    one = sam.embedding_of(maps, 0)
    # As one batch: the point's prompt has as many tokens as the box's.
    batch = [
        np.concatenate(x) for x in zip(prompt_points(points, np.ones((1, 1))), prompt_points(boxes=box), strict=True)
    ]
    low, iou = sam.decode(ours.config, ours.params, one, *batch)
    for theirs, place in ((several, np.s_[:1, 1:]), (single, np.s_[1:, :1])):
        np.testing.assert_allclose(low[place], theirs.pred_masks[0], atol=1e-3)
        np.testing.assert_allclose(iou[place], theirs.iou_scores[0], atol=1e-5)
    checkpoint.save(ours, tmp_path / "folder")
    to_torch.main(tmp_path / "folder", tmp_path / "back", "hf")
    again, about = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(about.values())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert "Sam2Model.from_pretrained" in (tmp_path / "back" / "README.md").read_text()
