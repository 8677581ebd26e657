"""A FastSAM through the programs that SAM goes through; and a table with both."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

import slimsam_jax
from helpers.fast_sam_models import TINY, random_fast_sam
from helpers.programs import run_program
from slimsam_jax import checkpoint, pruning
from slimsam_jax.compression import fast_sam
from slimsam_jax.compression.fast_sam import groups_of, prune, raw
from slimsam_jax.errors import InputError
from slimsam_jax.everything import Options, everything
from slimsam_jax.models.fast_sam import config_of
from slimsam_jax.profiling.fast_sam_costs import macs_of, parameters_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two FastSAMs: one that detects something, and one that detects nothing."""
    root = tmp_path_factory.mktemp("fast_sam")
    for name, bias in (("some", 0), ("none", -20)):
        checkpoint.save(random_fast_sam(bias=bias), root / name)
    return root


def test_all_protocols_measure_it(folders, material, tmp_path):
    names = ("point", "point-center", "box", "clicks", "everything", "agreement")
    found = slimsam_jax.evaluate([folders / "some", folders / "none"], material / "val", names, clicks=3, resamples=5)
    assert {key.partition("/")[0] for key in found.summary} == set(names)
    for key, rows in found.summary.items():
        if not key.startswith(("agreement", "clicks/noc")):
            assert rows[1]["mean"] == 0, key  # nothing detected is no mask, and no error
    means = {key: rows[0]["mean"] for key, rows in found.summary.items()}
    assert means["box/iou_oracle"] >= max(means["box/iou"], means["box/iou_best"]) > 0 and means["clicks/iou_3"] > 0
    found.save_json(tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["models"]["some"]["sha256"]


def test_one_table_holds_sam_and_fast_sam(folders, material, tmp_path):
    found = slimsam_jax.evaluate([material / "teacher", folders / "some"], material / "val", "point", resamples=5)
    assert all(len(rows) == 2 and np.isfinite(rows[1]["difference"]) for rows in found.summary.values())
    found.save_markdown(tmp_path / "scores.md")
    assert "some" in (tmp_path / "scores.md").read_text()


def test_everything_writes_what_is_detected(folders, material, tmp_path, capsys):
    def run(model, **more):
        everything(Options(folders / model, (str(material / "images"),), tmp_path / "masks.json", **more))
        return json.loads((tmp_path / "masks.json").read_text())["annotations"]

    masks = run("some", sheet=tmp_path / "sheet.png")
    assert len(masks) > 6 and (tmp_path / "sheet.png").stat().st_size
    assert len(run("some", pred_iou_thresh=0.9, box_nms_thresh=0.1)) < len(masks)
    assert run("none") == []
    assert "nothing is detected with a confidence above 0.40; lower --pred-iou-thresh" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--points-per-side is of SAM's grid of points, and .*some is a FastSAM"):
        run("some", points_per_side=8)


def test_predict_says_where_no_mask_is(folders, material, tmp_path, monkeypatch, capsys):
    arguments = ("--image", material / "images" / "0.png", "--out", tmp_path / "x.png", "--box", "2,2,20,15")
    for name in ("some", "none"):
        code, said, _ = run_program(monkeypatch, capsys, "predict", "--model", folders / name, *arguments)
        assert code == 0 and ("the model has no mask at this prompt" in said) == (name == "none"), said
        assert " pixels, confidence 0." in said
        assert Image.open(tmp_path / "x.png").size == (30, 20)


def test_inspect_and_calibrate(folders, material, tmp_path, monkeypatch, capsys):
    code, said, _ = run_program(monkeypatch, capsys, "inspect", folders / "some")
    size, macs = parameters_of(TINY), macs_of(TINY)
    assert code == 0 and f"{macs / 1e9:.3f} G MACs, whole model {size / 1e6:.3f} M parameters" in said
    assert f"{TINY.image_size} x {TINY.image_size} pixels" in said
    arguments = (folders / "some", "--images", material / "images", "--out", tmp_path / "x.png")
    code, _, error = run_program(monkeypatch, capsys, "inspect", *arguments)
    assert code == 2 and "tried of SAMs alone" in error
    code, _, error = run_program(monkeypatch, capsys, "calibrate", folders / "some")
    assert code == 2 and "this is a FastSAM" in error


def test_groups_are_those_of_the_facts():
    """C2f's two halves, residuals, joins with several readers: which places one channel has."""
    grouping = groups_of(TINY)
    assert not [group.name for group in grouping.groups if group.crossed]
    of = {group.name: {member.path.removesuffix("/kernel") for member in group.members} for group in grouping.groups}
    place = lambda path, axis: next(g for g in grouping.groups if (path, axis) in {(m.path, m.axis) for m in g.members})
    # The first half of C2f is free; the second is every residual's, and what the joining convolution reads of them.
    assert of["layers_4/cv1/kernel:1.0"] & {"layers_4/cv1", "layers_4/cv2"} == {"layers_4/cv1", "layers_4/cv2"}
    stream = of["layers_4/blocks_0/cv1/kernel:2"]
    assert {f"layers_4/blocks_{i}/{conv}" for i, conv in ((0, "cv1"), (1, "cv1"), (0, "cv2"), (1, "cv2"))} <= stream
    # Without a residual the blocks are free of their input.
    assert "layers_15/blocks_0/cv2" not in of["layers_15/blocks_0/cv1/kernel:2"]
    joined = {m.path.split("/")[0] for m in place("layers_15/cv2/kernel", 1).members}
    assert joined == {"layers_15", "layers_16", "prototypes", "boxes_0", "scores_0", "coefficients_0"}
    pool = place("layers_9/cv1/kernel", 1)
    assert {m.path.removesuffix("/kernel") for m in pool.members} >= {"layers_9/cv1", "layers_9/cv2"}
    twice = {m.path.split("/")[0] for m in place("layers_6/cv2/kernel", 1).members}
    assert twice == {"layers_6", "layers_7", "layers_12"}
    fixed = ("prototypes/cv3/kernel:1", "coefficients_1/out/kernel:1", "boxes_2/out/kernel:1", "layers_0/kernel:2")
    assert set(fixed) <= set(grouping.frozen)


def test_a_pruned_fast_sam_still_detects(tmp_path):
    model, image = random_fast_sam(), np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    slim = prune(model, 0.5)
    assert slim.config.stages[1].second == 2 and slim.config.prototypes == (4, 3, 4, 32)
    assert parameters_of(slim.config) < 0.4 * parameters_of(model.config)
    slimsam_jax.save(slim, tmp_path / "slim")
    again = slimsam_jax.load(tmp_path / "slim")
    assert again.config == slim.config and again.provenance["pruned"] == {"ratio": 0.5, "criterion": "magnitude"}
    masks, scores, _ = slimsam_jax.predict(again, image, box=[4, 4, 60, 40])
    assert masks.shape == (1, 48, 64) and np.isfinite(scores).all()


def test_taylor_reads_gradients_of_the_images(monkeypatch):
    """What `disturbed_gradients` computes is tested elsewhere, and takes 20 seconds to compile here."""
    model, image = random_fast_sam(), np.zeros((30, 64, 3), np.uint8)

    def gradients(embed, params, frames, key):
        frames = list(frames)
        assert [frame.shape for frame in frames] == [(1, 64, 64, 3)] * 2
        assert jax.eval_shape(embed, params, frames[0]).ndim == 2
        scaled = jax.tree.map(np.zeros_like, params)
        scaled["layers_0"]["kernel"][..., [1, 4, 5]] = 1  # all that matters
        return scaled

    monkeypatch.setattr(fast_sam, "disturbed_gradients", gradients)
    slim = prune(model, 0.5, "taylor", [image, image])
    kept = slim.params["layers_0"]["kernel"]
    np.testing.assert_array_equal(kept, model.params["layers_0"]["kernel"][..., [1, 4, 5]])


def test_masked_is_cut():
    params, grouping = random_fast_sam().params, groups_of(TINY)
    keep = pruning.select(pruning.score(params, grouping, criterion="random", seed=3), 0.4)
    pixels = np.random.default_rng(0).random((1, 64, 64, 3)).astype(np.float32)
    cut = pruning.shrink(params, grouping, keep)
    wanted = jax.jit(raw, static_argnums=0)(config_of(cut, 64), cut, pixels)
    masked = jax.jit(grouping.run)(pruning.mask(params, grouping, keep), pixels)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(masked / scale, wanted / scale, atol=1e-5)


def test_what_cannot_be_pruned_is_one_line():
    with pytest.raises(InputError, match=r"criterion 'taylor' needs images; magnitude, .*random need none"):
        prune(random_fast_sam(), 0.5, "taylor")
    with pytest.raises(InputError, match="would leave no channel"):
        prune(random_fast_sam(), 1.0)
