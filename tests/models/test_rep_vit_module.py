"""RepViT at widths that no original has: both forms, rectangles, features, groups of channels, counts."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.tables.sam_head import abstract_head
from converters.tables.strict import abstract
from helpers.family_models import SLIM_REP_VIT, images_of, mirrored, random_params, run
from helpers.golden_edge_sam import COUNTS
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders import counts, name_of, rep_vit
from slimsam_jax.models.sam import abstract_params
from slimsam_jax.profiling import macs, sam_costs
from slimsam_jax.pruning import find_groups, mask, shrink

COUNTED = json.loads(COUNTS.read_text())
M1 = rep_vit.PRESETS["rep_vit_m1"]
FOLDED = dataclasses.replace(SLIM_REP_VIT, batch_norm=False)


@pytest.fixture(scope="module")
def small():
    return random_params(abstract(rep_vit.ImageEncoder(SLIM_REP_VIT)))


@pytest.fixture(scope="module")
def grouping():
    module = rep_vit.ImageEncoder(SLIM_REP_VIT)
    images = jax.ShapeDtypeStruct((1, *SLIM_REP_VIT.image_size, 3), jnp.float32)
    return find_groups(lambda params, images: module.apply({"params": params}, images)[0], abstract(module), images)


def test_counts_equal_the_originals():
    """In both forms, through the counters of programs, too."""
    shapes, folded = (abstract(rep_vit.ImageEncoder(c)) for c in (M1, dataclasses.replace(M1, batch_norm=False)))
    assert counts.parameters(shapes) == COUNTED["encoder_params"] == 5_517_552
    assert counts.parameters(folded) == COUNTED["encoder_params_fused"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 5_517_552 + COUNTED["encoder_bn_running_floats"]
    parts = {"fuse_2": "fuse_stage2", "fuse_3": "fuse_stage3"}
    assert all(
        counts.parameters(shapes[ours]) == COUNTED["encoder_params_by_part"][name] for ours, name in parts.items()
    )
    assert counts.macs(M1) == (COUNTED["encoder_macs"], 0) == (20_045_639_680, 0)
    assert counts.macs(dataclasses.replace(M1, batch_norm=False)) == (COUNTED["encoder_macs_fused"], 0)
    head = abstract_head(Config(M1.image_size, 0, ()))
    assert counts.parameters(head["prompt_encoder"]) == COUNTED["prompt_encoder_params"]
    assert counts.parameters(head["mask_decoder"]) == COUNTED["mask_decoder_params"]
    sam = SamConfig(M1, head_of(M1.image_size))
    assert sam_costs.sam_parameters(sam) == COUNTED["total_params"]
    assert sam_costs.encoder_macs(sam) == (COUNTED["encoder_macs"], 0)
    dims = [stage.dim for stage in M1.stages]
    assert {str(dim): rep_vit.squeezed_dim(dim) for dim in dims} == COUNTED["se_reduced_channels"]


@pytest.mark.parametrize("config", [SLIM_REP_VIT, FOLDED], ids=["branches", "folded"])
def test_counts_of_uneven_widths_equal_those_of_the_traced_program(monkeypatch, config):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # depthwise convolutions as such
    encoder, images = rep_vit.ImageEncoder(config), jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    traced = macs.count(lambda p, x: encoder.apply({"params": p}, x)[0], abstract(encoder), images)
    (h, w), c = config.grids[3], config.fuse_dim  # enlarging, by rows or by columns first, does not count
    enlarging = {2 * h * h * w * c + 4 * h * w * w * c, 2 * w * h * w * c + 4 * h * h * w * c}
    assert traced.total - counts.macs(config).total in enlarging


def test_architectures_are_json_and_read_off_trees():
    for config in (SLIM_REP_VIT, FOLDED, M1):
        fields = json.loads(json.dumps(config.to_json()))
        assert rep_vit.Config.from_json(fields) == config and name_of(config) == "rep_vit"
        assert rep_vit.config_of(abstract(rep_vit.ImageEncoder(config)), config.image_size) == config
        with pytest.raises(ValueError, match="not an architecture"):
            rep_vit.Config.from_json({name: value for name, value in fields.items() if name != "stages"})
    assert rep_vit.config_of(abstract(rep_vit.ImageEncoder(FOLDED)), like=SLIM_REP_VIT) == FOLDED
    with pytest.raises(ValueError, match="RepViT"):
        rep_vit.config_of({"stem_0": {}})


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": (48, 64)}, {"image_size": (0, 64)}, {"image_size": (32.0, 64)}, {"image_size": (1 << 20, 32)},
        {"stem_dim": 0}, {"fuse_dim": 1 << 17}, {"out_chans": "16"}, {"batch_norm": 1}, {"stages": ()},
        {"stages": SLIM_REP_VIT.stages[:3]}, {"stages": (rep_vit.Stage(4, (rep_vit.Block(4),) * 33),) * 4},
    ],
)  # fmt: skip
def test_bounds(change):
    with pytest.raises(ValueError):
        dataclasses.replace(SLIM_REP_VIT, **change)
    for record in (lambda: rep_vit.Stage(0, (rep_vit.Block(4),)), lambda: rep_vit.Stage(4, ())):
        with pytest.raises(ValueError):
            record()
    for widths in ((0,), (4, -1), (4, True)):
        with pytest.raises(ValueError):
            rep_vit.Block(*widths)


def test_folding_changes_nothing_but_the_tree(small):
    folded = rep_vit.fold_batch_norm(small)
    shapes = jax.tree.map(lambda leaf: leaf.shape, folded)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract(rep_vit.ImageEncoder(FOLDED)))
    images = images_of(SLIM_REP_VIT)
    expected, _ = run(rep_vit.ImageEncoder(SLIM_REP_VIT), small, images)
    np.testing.assert_allclose(run(rep_vit.ImageEncoder(FOLDED), folded, images)[0], expected, atol=1e-5)


def test_a_mirrored_rectangle_gives_the_mirrored_embedding(small):
    """Rows and columns are told apart nowhere: strides, padding, enlarging."""
    images, folded = images_of(SLIM_REP_VIT), rep_vit.fold_batch_norm(small)
    embedding, _ = run(rep_vit.ImageEncoder(FOLDED), folded, images)
    assert embedding.shape == (1, *SLIM_REP_VIT.grid, 16) and SLIM_REP_VIT.grid == (2, 4)
    turned = rep_vit.ImageEncoder(dataclasses.replace(FOLDED, image_size=(64, 32)))
    other, _ = run(turned, mirrored(folded), images.swapaxes(1, 2))
    np.testing.assert_allclose(other.swapaxes(1, 2), embedding, atol=2e-5)


def test_features_are_named_and_shaped_in_half_precision():
    images = jax.ShapeDtypeStruct((2, *SLIM_REP_VIT.image_size, 3), jnp.float32)
    encoder = rep_vit.ImageEncoder(SLIM_REP_VIT, jnp.bfloat16, remat=True)
    embedding, features = jax.eval_shape(lambda p, x: encoder.apply({"params": p}, x), abstract(encoder), images)
    assert embedding.shape == (2, 2, 4, 16) and embedding.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(features)} == {jnp.dtype(jnp.bfloat16)}
    shape = lambda path, name: features[path][name].shape
    assert shape("stem", "hidden") == (2, 16, 32, 5) and shape("stem", "out") == (2, 8, 16, 8)
    assert shape("stages_1/blocks_0", "middle") == shape("stages_1/blocks_1", "out") == (2, 4, 8, 10)
    assert shape("stages_2/blocks_0", "hidden") == (2, 2, 4, 11)
    sides = rep_vit.features(SLIM_REP_VIT, features)
    assert {side: tuple(parts) for side, parts in sides.items()} == rep_vit.FEATURES
    count = lambda side: {name: len(parts) for name, parts in sides[side].items()}
    assert count("embedding") == {"stem": 1, "mlp": 5} and count("bottleneck") == {"stream": 10}
    assert rep_vit.kept_elements(SLIM_REP_VIT) == sum(leaf.size for leaf in sides["bottleneck"]["stream"]) / 2


def test_groups_are_those_of_the_facts(grouping):
    """A width a stage, hidden layers, squeezed ones, the stem's, the sum's and the neck's, and no other."""
    of_stage = {
        part: sorted(g.size for g in grouping.groups if holds([m.path for m in g.members]))
        for part, holds in rep_vit.STAGES.items()
    }
    assert of_stage == {"embedding": [6, 8, 10, 12], "bottleneck": sorted([5, 12, 7, 9, 11, 13, 3, 2, 4, 9])}
    assert sorted(g.size for g in grouping.groups) == sorted([*of_stage["embedding"], *of_stage["bottleneck"], 16])
    (second,) = (g for g in grouping.groups if g.size == 10)
    members = {(m.path, m.axis) for m in second.members}
    coupled = [("stages_1/blocks_0/project/kernel", 1), ("stages_1/blocks_1/conv/kernel", 3)]
    coupled += [("stages_1/blocks_1/conv1/kernel", 3), ("stages_1/blocks_1/conv1/bn/mean", 0)]
    coupled += [("stages_1/blocks_1/squeeze/fc1/kernel", 0), ("stages_1/blocks_1/squeeze/fc2/bias", 0)]
    coupled += [("stages_1/blocks_1/mixer_2/bn/var", 0), ("stages_2/blocks_0/conv/kernel", 3)]
    coupled += [("stages_2/blocks_0/squeeze/fc2/kernel", 1), ("stages_2/blocks_0/project/kernel", 0)]
    assert set(coupled) <= members and ("stages_2/blocks_0/project/kernel", 1) not in members


def test_masked_is_cut(small, grouping):
    """Every second channel of every group but the neck's, where LayerNorm counts what is zero."""
    free = [group for group in grouping.groups if group.size != 16]
    keep = {group.name: np.arange(0, group.size, 2) for group in free}
    slim = shrink(small, grouping, keep)
    config = rep_vit.config_of(slim, like=SLIM_REP_VIT)
    assert [stage.dim for stage in config.stages] == [4, 5, 6, 3] and config.stages[0].blocks == (rep_vit.Block(6, 2),)
    images = images_of(SLIM_REP_VIT)
    masked, _ = run(rep_vit.ImageEncoder(SLIM_REP_VIT), mask(small, grouping, keep), images)
    np.testing.assert_allclose(run(rep_vit.ImageEncoder(config), slim, images)[0], masked, atol=1e-5)
    assert config.to_json() == rep_vit.config_of(slim, (32, 64)).to_json()


def test_a_folded_encoder_is_a_sam_like_another():
    config = SamConfig(FOLDED, head_of((32, 64), out_chans=16, mask_in_chans=4, decoder_heads=1, decoder_mlp_dim=8))
    assert "conv1" not in abstract_params(config)["image_encoder"]["stages_0"]["blocks_0"]
    assert SamConfig.from_json(rep_vit, json.loads(json.dumps(config.to_json()))) == config
