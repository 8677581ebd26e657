"""Published state dicts of encoder families there and back: exact, strict, refused in one line; counts to the digit."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from converters.tables import efficient_sam, tiny_vit, tiny_vit_unused
from converters.tables.strict import Converted, abstract
from helpers import golden_families as families
from helpers.family_models import SLIM_TINY_VIT, SLIM_VIT, random_params
from helpers.shared import shared
from slimsam_jax.errors import InputError
from slimsam_jax.models import efficient_sam_head
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import efficient_sam_vit
from slimsam_jax.models.encoders import tiny_vit as tiny_vit_encoder
from slimsam_jax.models.encoders.architecture import Block
from slimsam_jax.models.sam import abstract_head

COUNTED = json.loads((families.HERE / "families_counts.json").read_text())
PRESETS = {
    "vit_t": (tiny_vit, tiny_vit_encoder, "vit_t"),
    "efficient_sam_ti": (efficient_sam, efficient_sam_vit, "efficient_sam_ti"),
    "efficient_sam_s": (efficient_sam, efficient_sam_vit, "efficient_sam_s"),
}
SMALL_HEAD = {"out_chans": 16, "decoder_mlp_dim": 8, "decoder_depth": 1, "iou_head_dim": 8}


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("name", PRESETS)
def test_real_sizes_there_and_back(name):
    """All names and shapes of the published models, with values that tell rows and columns apart."""
    table, encoder, preset = PRESETS[name]
    random = np.random.default_rng(0)
    state = {name: random.random(shape, np.float32) for name, shape in COUNTED[name]["state_dict"].items()}
    for counter in [name for name in state if name.endswith(".num_batches_tracked")]:
        state[counter] = np.array(7, np.int64)
    assert table.recognises(state) and len(state) == (439 if name == "vit_t" else 278)
    model = table.from_state_dict(state)
    assert model.encoder == encoder.PRESETS[preset] and model.head.grid == (64, 64)
    assert_same(table.to_state_dict(model), state)


def test_a_family_is_recognised_by_its_names():
    names = {name: set(COUNTED[name]["state_dict"]) for name in PRESETS}
    found = {name: [table.recognises(state) for table in (tiny_vit, efficient_sam)] for name, state in names.items()}
    assert found == {"vit_t": [True, False], "efficient_sam_ti": [False, True], "efficient_sam_s": [False, True]}
    assert not any(table.recognises({"image_encoder.patch_embed.proj.weight"}) for table in (tiny_vit, efficient_sam))


@pytest.mark.parametrize(
    ("file", "table", "told"), [("tiny_vit_sam", tiny_vit, {}), ("efficient_sam", efficient_sam, {"heads": 3})]
)
def test_golden_models_there_and_back(file, table, told):
    with np.load(shared(f"golden/{file}.npz")) as arrays:
        state = {name[3:]: arrays[name] for name in arrays if name.startswith("sd/")}
    assert_same(table.to_state_dict(table.from_state_dict(state, image_size=256, **told)), state)


@pytest.fixture(scope="module")
def slim() -> Converted:
    """A TinyViT-SAM whose widths fit no class of the original's."""
    head = Config(SLIM_TINY_VIT.image_size, 0, (), patch_size=SLIM_TINY_VIT.stride, **SMALL_HEAD)
    shapes = {"image_encoder": abstract(tiny_vit_encoder.ImageEncoder(SLIM_TINY_VIT)), **tiny_vit.abstract_head(head)}
    return Converted(SLIM_TINY_VIT, head, random_params(shapes), {})


@pytest.fixture(scope="module")
def slim_state(slim):
    return tiny_vit.to_state_dict(slim)


def test_a_slim_model_there_and_back(slim, slim_state):
    """Without what was kept the original's dead arrays are made, which come back as kept."""
    back = tiny_vit.from_state_dict(slim_state, image_size=SLIM_TINY_VIT.image_size)
    assert (back.encoder, back.head) == (SLIM_TINY_VIT, slim.head)
    assert set(back.kept) == {name for name in slim_state if tiny_vit_unused.is_kept(name)}
    assert back.kept["image_encoder.head.weight"].shape == (1000, 12)
    assert_same(tiny_vit.to_state_dict(back), slim_state)
    without = {name: array for name, array in slim_state.items() if name not in back.kept}
    assert not tiny_vit.from_state_dict(without, image_size=SLIM_TINY_VIT.image_size).kept


@pytest.mark.parametrize("there", [tiny_vit_unused.COUNTER, "head."])
def test_what_a_file_lacks_of_the_dead_arrays_is_made(slim_state, there):
    """Of the classifier and the counters, one without the other: the original's class loads strictly."""
    dead = {name for name in slim_state if tiny_vit_unused.is_kept(name)}
    part = {name: slim_state[name] + (name in dead) for name in slim_state if name not in dead or there in name}
    model = tiny_vit.from_state_dict(part, image_size=SLIM_TINY_VIT.image_size)
    assert 0 < len(model.kept) < len(dead)
    assert_same(tiny_vit.to_state_dict(model), {**slim_state, **part})


def changed(state, name: str, array=None):
    """Without the array of this name, or with another one."""
    rest = {n: a for n, a in state.items() if n != name}
    return rest if array is None else {**rest, name: array}


ATTENTION = "image_encoder.layers.1.blocks.1.attn"


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("image_encoder.layers.0.blocks.1.conv2.bn.running_var", None, "- image_encoder.layers.0.blocks.1.conv2.bn"),
        ("image_encoder.layers.1.blocks.1.mlp.fc1.weight", None, "- image_encoder.layers.1.blocks.1.mlp.fc1.weight"),
        (f"{ATTENTION}.qkv.bias", None, f"- {ATTENTION}.k.bias"),
        (f"{ATTENTION}.attention_biases", None, f"it has no {ATTENTION}"),
        ("image_encoder.norm_head.bias", None, "- image_encoder.norm_head.bias"),
        ("image_encoder.neck.0.bn.num_batches_tracked", np.zeros((), int), "+ image_encoder.neck.0.bn"),
        ("image_encoder.patch_embed.seq.0.bn.num_batches_tracked", None, "- image_encoder.patch_embed.seq.0.bn"),
        ("image_encoder.pos_embed", np.zeros(3, np.float32), "+ image_encoder.pos_embed"),
        ("image_encoder.layers.3.blocks.0.attn.attention_biases", np.zeros((1, 4), np.float32), "- image_enc"),
        ("image_encoder.layers.9.blocks.0.mlp.fc1.bias", np.zeros(1, np.float32), "1 + 8 stages"),
        ("image_encoder.layers.1.blocks.4.mlp.fc1.bias", np.zeros(1, np.float32), "it has no"),
        ("image_encoder.layers.2.blocks.0.mlp.fc2.weight", np.zeros((12, 14), np.float32), "fc2/kernel"),
        (f"{ATTENTION}.qkv.weight", np.zeros((47, 10), np.float32), "no 3 heads"),
        (f"{ATTENTION}.qkv.weight", np.zeros((54, 10), np.float32), "q/"),
        (f"{ATTENTION}.attention_biases", np.zeros((3, 24), np.float32), "square window"),
        (f"{ATTENTION}.attention_biases", np.zeros((3, 16), np.float32), "attention_biases"),
        ("image_encoder.head.weight", np.zeros((1000, 9), np.float32), "head.weight"),
        ("image_encoder.neck.1.weight", np.full(16, np.nan, np.float32), "not finite"),
        ("image_encoder.layers.0.blocks.0.conv1.c.weight", np.zeros((12, 8, 3, 3), np.float32), "does not fit"),
        ("mask_decoder.iou_token.weight", np.zeros(16, np.float32), "decoder"),
    ],
)  # fmt: skip
def test_what_is_no_tiny_vit_is_refused(slim_state, name, array, reason):
    with pytest.raises(InputError) as refusal:
        tiny_vit.from_state_dict(changed(slim_state, name, array), "x.pth", image_size=SLIM_TINY_VIT.image_size)
    assert reason in str(refusal.value) and str(refusal.value).startswith("x.pth") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"image_size": 1004}, "multiples of the embedding's stride 8"),
        ({"image_size": (32, 0)}, "image_size"),
        ({"image_size": 64, "strides": (2,)}, "each of 2 downsamplings"),
        ({"image_size": 64, "strides": (2, 3)}, "stride 3"),
        ({"image_size": 64, "decoder_heads": 3}, "decoder's heads"),
    ],
)
def test_what_is_told_and_cannot_be_is_refused(slim_state, told, reason):
    with pytest.raises(InputError, match=reason):
        tiny_vit.from_state_dict(slim_state, **told)


def test_a_tree_that_misses_an_array_is_not_written(slim):
    params = {**slim.params, "image_encoder": changed(slim.params["image_encoder"], "neck_1")}
    with pytest.raises(InputError, match="- image_encoder/neck_1/bias"):
        tiny_vit.to_state_dict(slim._replace(params=params))
    with pytest.raises(InputError, match="surplus"):
        tiny_vit.to_state_dict(slim._replace(kept={"image_encoder.norm.weight": np.zeros(3)}))


VIT_T = tiny_vit_encoder.PRESETS["vit_t"]


def with_stage(index: int, **changes):
    stages = list(VIT_T.stages)
    stages[index] = dataclasses.replace(stages[index], **changes)
    return dataclasses.replace(VIT_T, stages=tuple(stages))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (VIT_T, ""),
        (with_stage(0, blocks=(Block(4, 16, 32, 512), Block(4, 32, 32, 512))), "heads"),
        (with_stage(0, blocks=(Block(4, 32, 32, 512), Block(2, 64, 64, 512))), "heads"),
        (with_stage(1, blocks=(Block(5, 32, 32, 600),) * 6), "MLPs"),
        (with_stage(1, entry_dim=80), "downsamplings"),
        (with_stage(2, stride=2), "strides"),
        (with_stage(2, dim=160, entry_dim=160, blocks=(Block(5, 32, 32, 640),) * 2), "strides"),
        (dataclasses.replace(VIT_T, conv_blocks=(256, 128)), "MBConvs"),
        (dataclasses.replace(VIT_T, stem_dim=16), "stem"),
        (dataclasses.replace(VIT_T, image_size=(512, 512)), "image size"),
        (dataclasses.replace(VIT_T, out_chans=128), "256 channels"),
        (tiny_vit_encoder.uniform((64, 128, 320), (2, 2, 2), (2, 4, 10), (7, 7, 7)), "four"),
        (tiny_vit_encoder.uniform((32, 64, 96, 320), (1, 2, 3, 1), (1, 2, 3, 10), (7, 7, 14, 7), 2.0), ""),
    ],
)
def test_why_the_originals_class_cannot_hold_an_encoder(config, reason):
    assert reason in tiny_vit_unused.obstacle(config) and bool(reason) == bool(tiny_vit_unused.obstacle(config))


@pytest.fixture(scope="module")
def slim_vit() -> Converted:
    config = SLIM_VIT
    head = efficient_sam_head.HeadConfig(
        (48, 32), decoder_mlp_dim=8, out_chans=16, iou_head_dim=6, upscaling_dims=(5, 3)
    )
    shapes = {"image_encoder": abstract(efficient_sam_vit.ImageEncoder(config)), **abstract_head(head)}
    return Converted(config, head, random_params(shapes), {})


def test_a_slim_efficient_sam_there_and_back(slim_vit):
    state = efficient_sam.to_state_dict(slim_vit)
    back = efficient_sam.from_state_dict(state, image_size=(48, 32), heads=(2, 3))
    assert back[:2] == slim_vit[:2]
    assert_same(efficient_sam.to_state_dict(back), state)


@pytest.mark.parametrize(
    ("told", "name", "array", "reason"),
    [
        ({}, None, None, "heads="),
        ({"heads": 2}, None, None, "no 2 heads"),
        ({"heads": (2, 3, 3)}, None, None, "of 2 blocks"),
        ({"heads": (2, 0)}, None, None, "no numbers of heads"),
        ({"heads": (2, 3), "image_size": 1000}, None, None, "multiples"),
        ({"heads": (2, 3), "decoder_heads": 3}, None, None, "does not fit"),
        ({"heads": (2, 3)}, "image_encoder.blocks.1.norm1.weight", None, "of 1 blocks"),
        ({"heads": (2, 3)}, "image_encoder.pos_embed", np.zeros((1, 18, 10), np.float32), "pos_embed"),
        ({"heads": (2, 3)}, "image_encoder.blocks.1.attn.qkv.bias", np.zeros(47, np.float32), "v.bias"),
        ({"heads": (2, 3)}, "prompt_encoder.no_mask_embed.weight", np.zeros((1, 16), np.float32), "+ prompt_encoder"),
        ({"heads": (2, 3)}, "mask_decoder.transformer.layers.1.mlp.fc.weight", None, "- mask_decoder.transformer"),
        ({"heads": (2, 3)}, "mask_decoder.final_output_upscaling_layers.0.1.weight", np.zeros(4, np.float32), "up"),
    ],
)  # fmt: skip
def test_what_is_no_efficient_sam_is_refused(slim_vit, told, name, array, reason):
    state = efficient_sam.to_state_dict(slim_vit)
    state = state if name is None else changed(state, name, array)
    with pytest.raises(InputError) as refusal:
        efficient_sam.from_state_dict(state, "x.pt", **{"image_size": (48, 32), **told})
    assert reason in str(refusal.value) and str(refusal.value).startswith("x.pt") and "\n" not in str(refusal.value)
