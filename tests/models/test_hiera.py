"""Hiera against SAM 2's own code: blocks, positions, maps, gradients, slim ones; counts of the published sizes.

The vectors of the original are in the shared material; half of an encoder is in tests/golden for any clone.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.tables import hiera as table
from converters.tables.strict import abstract
from helpers import golden_families as families
from helpers import golden_sam2 as golden_file
from helpers.family_models import SLIM_HIERA, images_of, random_params, run, run_all
from helpers.shared import shared
from slimsam_jax import pruning
from slimsam_jax.compression.found_groups import groups_of
from slimsam_jax.models import sam, sam2_head
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.encoders import counts, hiera
from slimsam_jax.models.encoders.architecture import Block
from slimsam_jax.profiling.macs import count

COUNTED = json.loads(golden_file.COUNTS.read_text())
MAPS = {"embedding": "image_embedding", "high_res_1": "high_res_1", "high_res_0": "high_res_0"}


@pytest.fixture(scope="module")
def whole():
    with np.load(shared("golden/sam2_image.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module", params=["subset", "whole"])
def golden(request):
    """(arrays, config, encoder's parameters): of the subset, where weights are missing, zeros."""
    arrays = families.read(golden_file.SUBSET) if request.param == "subset" else request.getfixturevalue("whole")
    config = golden_file.config_of(arrays)
    head = sam2_head.HeadConfig(config.image_size)
    shapes = sam.abstract_params(SamConfig(config, head))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    state = table.to_state_dict(table.Converted(config, head, zeros, {})) | golden_file.state_of(arrays)
    params = table.from_state_dict(state, **golden_file.given_of(config)).params
    return arrays, config, params["image_encoder"]


def pixels_of(arrays, config) -> jax.Array:
    head = sam2_head.HeadConfig(config.image_size)
    frame, size = head.frame.place(arrays["image_uint8"])
    return sam.preprocess(head, frame[None], size[None])


@pytest.fixture(scope="module")
def found(golden):
    arrays, config, params = golden
    pixels = pixels_of(arrays, config)
    return pixels, *run_all(hiera.ImageEncoder(config), params, pixels)


def assert_equal(arrays, name: str, ours, atol: float) -> None:
    """Of a subset's array the part that it is."""
    ours = np.asarray(ours)
    ours = ours if ours.shape == arrays[name].shape else golden_file.thinned(name, ours)
    np.testing.assert_allclose(ours, arrays[name], atol=atol, rtol=0, err_msg=name)


def channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def test_the_subset_is_cut_from_the_whole(whole):
    wanted, stored = golden_file.cut(whole), families.read(golden_file.SUBSET)
    assert set(stored) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


def test_preprocessing_and_every_block(golden, found):
    arrays, config, params = golden
    pixels, _, features, modules = found
    assert_equal(arrays, "preprocessed", channels_first(pixels)[0], 3e-6)
    assert_equal(arrays, "trunk/patch_embed", modules["patch_embed_proj"], 1e-4)
    positions = hiera.positions(params["pos_embed"], params["pos_embed_window"], config.grids[0])
    assert_equal(arrays, "trunk/pos_embed_total", positions[None], 1e-5)
    blocks = [name for name in arrays if name.startswith("trunk/blocks.")]
    assert len(blocks) == (31 if "image_embedding" in arrays else 13)
    ours = {"mlp": "mlp_lin2"}
    for name in blocks:
        _, block, *part = name.removeprefix("trunk/").split(".")
        path = f"blocks_{block}"
        value = modules[f"{path}/{ours.get(part[0], part[0])}"] if part else features[path]["out"]
        assert_equal(arrays, name, value, 1e-4)


def test_maps(golden, found):
    arrays, config, _ = golden
    if "image_embedding" not in arrays:
        return
    _, maps, features, modules = found
    for stage in range(4):
        last = (*config.firsts[1:], config.depth)[stage] - 1
        assert_equal(arrays, f"trunk/stage{stage + 1}", channels_first(features[f"blocks_{last}"]["out"]), 1e-4)
    assert_equal(arrays, "fpn/0_rows_0_to_8", channels_first(modules["neck_3"])[:, :, :8], 1e-4)
    assert_equal(arrays, "fpn/1", channels_first(modules["neck_2"]), 1e-4)
    assert_equal(arrays, "fpn/3", channels_first(modules["neck_0"]), 1e-4)
    for ours, theirs in MAPS.items():
        assert_equal(arrays, theirs.replace("res_", "res/"), channels_first(maps[ours]), 1e-4)
    shapes = {name: map.shape[1:] for name, map in maps.items()}
    assert shapes == hiera.embedding_shapes(config)


def cut(whole, config, params, part: str):
    """The golden slim encoder and its parameters, cut by our groups."""
    grouping = groups_of(SamConfig(config, sam2_head.HeadConfig(config.image_size)))
    keep = {}
    if part in ("stream", "both"):
        names = ["patch_embed_proj/kernel:3", *(f"blocks_{first}/proj/kernel:1" for first in config.firsts[1:])]
        keep |= {name: whole[f"slim/keep_stage{i + 1}"] for i, name in enumerate(names)}
    for i in range(config.depth) if part in ("bottleneck", "both") else ():
        channels, attention = whole[f"slim/keep_head_channels/{i}"], f"blocks_{i}/attn"
        channels = channels[0] if len(channels) == 1 else channels
        keep |= {f"{attention}/q/kernel:2": channels, f"{attention}/v/kernel:2": channels}
        keep[f"blocks_{i}/mlp_lin1/kernel:1"] = whole[f"slim/keep_mlp/{i}"]
    before = jax.tree.map(np.asarray, params)
    slim = hiera.keep_logit_scale(pruning.shrink(before, grouping, keep), before)
    return hiera.config_of(slim, like=config), slim


@pytest.mark.parametrize("part", ["both"])  # the other two hold as well, at a program's compilation each
def test_slim_encoders(whole, part):
    """Channels that the original's code was cut by, each head its own; the softmax keeps its temperature."""
    config = golden_file.config_of(whole)
    params = table.from_state_dict(golden_file.state_of(whole), **golden_file.given_of(config)).params["image_encoder"]
    config, slim = cut(whole, config, params, part)
    maps, _ = run(hiera.ImageEncoder(config), slim, pixels_of(whole, config))
    for ours, theirs in MAPS.items():
        assert_equal(whole, f"slim/{part}/{theirs}", channels_first(maps[ours]), 1e-4)
    beside = ("no_mem_embed", "high_res_0", "high_res_1")  # which the original counts elsewhere
    encoder = {name: leaf for name, leaf in slim.items() if name not in beside}
    assert counts.parameters(encoder) == whole[f"slim/{part}/encoder_params"]


@pytest.mark.parametrize("name", ["tiny", "small", "base_plus", "large"])
def test_counts_equal_the_originals(name):
    """Here the encoder has the decoder's convolutions of the finer maps, and `no_mem_embed`: once an image."""
    counted, config = COUNTED[name], hiera.PRESETS[f"sam2_{name}"]
    head = sam2_head.HeadConfig((1024, 1024))
    shapes = sam.abstract_params(SamConfig(config, head))
    moved = counts.parameters([shapes["image_encoder"][f"high_res_{i}"] for i in (0, 1)])
    no_memory = counted["no_mem_embed_params"]
    assert counts.parameters(shapes["image_encoder"]) == counted["image_encoder_params"] + moved + no_memory
    assert counts.parameters(shapes["mask_decoder"]) == counted["mask_decoder_params"] - moved
    assert counts.parameters(shapes["prompt_encoder"]) == counted["prompt_encoder_params"]
    assert counts.parameters(shapes) == counted["image_mode_params"]
    linear = counted["encoder_macs_linear_conv"] + counted["conv_s0_s1_macs"]
    assert counts.macs(config) == (linear, counted["encoder_macs_attention_products"])
    assert counts.macs(config).total == counted["set_image_macs"]
    assert counts.decoder_macs(head, 2) == counted["mask_decoder_macs_linear_conv_2_sparse_tokens"]


@pytest.fixture(scope="module")
def small():
    return random_params(hiera.abstract_params(SLIM_HIERA))


def test_shapes_and_counts_of_uneven_widths_are_those_of_the_traced_program(small):
    encoder = hiera.ImageEncoder(SLIM_HIERA)
    traced = abstract(encoder)
    assert traced == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), small)
    images = jax.ShapeDtypeStruct((1, *SLIM_HIERA.image_size, 3), jnp.float32)
    found = count(lambda p, x: encoder.apply({"params": p}, x)[0], traced, images)
    (h, w), (rows, columns), dim = SLIM_HIERA.grids[0], SLIM_HIERA.pos_grid, SLIM_HIERA.stages[0].dim
    ways = (h * rows * columns * dim + h * w * columns * dim, w * rows * columns * dim + h * w * rows * dim)
    resizing = [way for way in ways if (found.linear - way, found.attention) == counts.macs(SLIM_HIERA)]
    assert len(resizing) == 1


def test_architectures_are_json_and_read_off_trees():
    for config in (SLIM_HIERA, *hiera.PRESETS.values()):
        fields = json.loads(json.dumps(config.to_json()))
        assert hiera.Config.from_json(fields) == config
        assert hiera.config_of(hiera.abstract_params(config), like=config) == config
    with pytest.raises(ValueError, match="unexpected"):
        hiera.Config.from_json({**fields, "depth": 3})
    with pytest.raises(ValueError, match="not an architecture"):
        hiera.Config.from_json({"image_size": [64, 64], "stages": 3})
    with pytest.raises(ValueError, match="not the parameters of a Hiera"):
        hiera.config_of({})


FIRST, *OTHERS = SLIM_HIERA.stages


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": (48, 96)}, {"image_size": (1 << 20, 96)}, {"image_size": (64,)}, {"out_chans": 12},
        {"image_size": (1 << 13, 1 << 14)}, {"global_blocks": (3,) * 6},
        {"out_chans": 0}, {"stages": SLIM_HIERA.stages[:3]}, {"global_blocks": (5,)}, {"global_blocks": (True,)},
        {"pos_grid": (0, 3)}, {"pos_grid": (3, 3, 3)}, {"pos_grid": (3, 1 << 20)},
        {"stages": (dataclasses.replace(FIRST, window=7), *OTHERS)},
        {"stages": (dataclasses.replace(FIRST, blocks=FIRST.blocks * 129), *OTHERS)},
    ],
)  # fmt: skip
def test_bounds(change):
    with pytest.raises(ValueError):
        dataclasses.replace(SLIM_HIERA, **change)
    with pytest.raises(ValueError):
        hiera.Stage(8, 8, ())


def test_groups_are_those_of_the_architecture_and_masked_is_cut(small):
    """Four streams; of every block heads, channels of q and k, of v and proj, and the MLP's."""
    grouping = groups_of(SamConfig(SLIM_HIERA, sam2_head.HeadConfig(SLIM_HIERA.image_size, out_chans=16)))
    sizes = {part: [] for part in hiera.STAGES}
    for group in grouping.groups:
        for part, holds in hiera.STAGES.items():
            sizes[part] += [group.size] if holds([member.path for member in group.members]) else []
    assert sizes["embedding"] == [8, 10, 12, 14]
    inner = [(b.heads, b.key_dim, b.value_dim, b.mlp_dim) for b in blocks_of(SLIM_HIERA)]
    assert sizes["bottleneck"] == [size for block in inner for size in block if size > 1]
    kept = [g for g in grouping.groups if hiera.STAGES["bottleneck"]([m.path for m in g.members])]
    within = [g for g in kept if g.copies or not any(other.copies == g.name for other in kept)]
    keep = {group.name: np.arange(0, group.size, 2) for group in within}
    slim = hiera.keep_logit_scale(pruning.shrink(small, grouping, keep), small)
    config = hiera.config_of(slim, like=SLIM_HIERA)
    half = lambda width: -(-width // 2)
    halved = [Block(b.heads, *map(half, (b.key_dim, b.value_dim, b.mlp_dim))) for b in blocks_of(SLIM_HIERA)]
    assert blocks_of(config) == halved
    images = images_of(SLIM_HIERA)
    masked, _ = run(hiera.ImageEncoder(SLIM_HIERA), pruning.mask(small, grouping, keep), images)
    shrunk, _ = run(hiera.ImageEncoder(config), slim, images)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5), shrunk, masked)


def blocks_of(config: hiera.Config) -> list[Block]:
    return [block for stage in config.stages for block in stage.blocks]


def test_half_precision_ends_in_maps_of_float32(small):
    images = jax.ShapeDtypeStruct((2, *SLIM_HIERA.image_size, 3), jnp.float32)
    encoder = hiera.ImageEncoder(SLIM_HIERA, jnp.bfloat16, remat=True)
    maps, features = jax.eval_shape(lambda p, x: encoder.apply({"params": p}, x), small, images)
    assert {x.dtype for x in jax.tree.leaves(features)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(maps)} == {jnp.dtype(jnp.float32)}
    shapes = hiera.embedding_shapes(SLIM_HIERA)
    assert {name: x.shape[1:] for name, x in maps.items()} == shapes == {
        "embedding": (4, 6, 16), "high_res_1": (8, 12, 4), "high_res_0": (16, 24, 2)
    }  # fmt: skip
    block = features["blocks_1"]  # two images of 2 x 3 windows of 8 x 8 tokens; then as many of 4 x 4
    assert block["q"].shape == (2 * 2 * 3, 8, 8, 2, 5) and block["heads"].shape == (2 * 2 * 3, 4, 4, 2, 3)
    assert block["out"].shape == (2, 8, 12, 10)
