"""EdgeSAM's checkpoints: names of published sizes there and back, refusals, and the doors that SAM's go through."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch

from converters import from_torch, to_onnx, to_torch
from converters.tables import rep_vit as table
from converters.tables.strict import Converted, abstract
from helpers.family_models import SLIM_REP_VIT, random_params
from helpers.golden_edge_sam import COUNTS
from helpers.models import SQUARE
from helpers.runs import compress_options
from helpers.shared import shared
from slimsam_jax import checkpoint, data
from slimsam_jax import inspect as inspect_program
from slimsam_jax.api import compress_with
from slimsam_jax.compression import report
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.compare import compare_models
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.predictor import SamPredictor
from slimsam_jax.inference.ranking import stability_scores
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.encoders import rep_vit
from slimsam_jax.models.sam import Sam, abstract_params

SMALL = {"out_chans": 32, "mask_in_chans": 8, "decoder_mlp_dim": 16, "iou_head_dim": 8}


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_the_published_size_there_and_back():
    """All 821 names and shapes, with values that tell rows and columns apart."""
    random = np.random.default_rng(0)
    shapes = json.loads(COUNTS.read_text())["state_dict"]
    state = {name: random.random(shape, np.float32) for name, shape in shapes.items()}
    for counter in [name for name in state if name.endswith(table.COUNTER)]:
        state[counter] = np.array(7, np.int64)
    model = table.from_state_dict({**state, "rpn_head.conv.weight": np.zeros(3), "fpn.0.bias": np.zeros(2)})
    assert len(state) == 821 and table.recognises(state) and not table.obstacle(model)
    assert model.encoder == rep_vit.PRESETS["rep_vit_m1"] and model.head.grid == (64, 64)
    assert_same(table.to_state_dict(model), state)


def test_the_golden_model_there_and_back():
    with np.load(shared("golden/edge_sam.npz")) as arrays:
        state = {name[3:]: arrays[name] for name in arrays if name.startswith("sd/")}
    assert_same(table.to_state_dict(table.from_state_dict(state, image_size=128)), state)


@pytest.fixture(scope="module")
def slim() -> Converted:
    """A RepViT-SAM whose widths fit no class of the original's."""
    head = head_of(SLIM_REP_VIT.image_size, **{**SMALL, "out_chans": 16, "decoder_depth": 1, "decoder_heads": 2})
    shapes = {"image_encoder": abstract(rep_vit.ImageEncoder(SLIM_REP_VIT)), **table.abstract_head(head)}
    return Converted(SLIM_REP_VIT, head, random_params(shapes), {})


@pytest.fixture(scope="module")
def slim_state(slim):
    return table.to_state_dict(slim)


TOLD = {"image_size": SLIM_REP_VIT.image_size, "decoder_heads": 2}


def test_a_slim_model_there_and_back(slim, slim_state):
    back = table.from_state_dict(slim_state, **TOLD)
    assert back[:2] == slim[:2] and len(back.kept) == len(table.norms(table.outline_of(SLIM_REP_VIT)))
    assert_same(table.to_state_dict(back), slim_state)
    without = {name: array for name, array in slim_state.items() if name not in back.kept}
    assert not table.from_state_dict(without, **TOLD).kept


def test_a_folded_model_is_written_in_trainings_form(slim, slim_state):
    folded = rep_vit.fold_batch_norm(jax.tree.map(np.asarray, slim.params["image_encoder"]))
    config = dataclasses.replace(SLIM_REP_VIT, batch_norm=False)
    state = table.to_state_dict(slim._replace(encoder=config, params={**slim.params, "image_encoder": folded}))
    assert {name: array.shape for name, array in state.items()} == {n: a.shape for n, a in slim_state.items()}
    again = rep_vit.fold_batch_norm(jax.device_get(table.from_state_dict(state, **TOLD).params["image_encoder"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, folded)


BLOCK = "image_encoder.features.3"  # stages_1/blocks_1, of two branches and squeeze-excite


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        (f"{BLOCK}.token_mixer.0.conv1.bn.running_var", None, f"- {BLOCK}.token_mixer.0.conv1.bn"),
        (f"{BLOCK}.token_mixer.1.fc2.bias", None, f"- {BLOCK}.token_mixer.1.fc2.bias"),
        (f"{BLOCK}.token_mixer.1.fc1.weight", None, f"+ {BLOCK}.token_mixer.1.fc1.bias"),
        ("image_encoder.features.2.token_mixer.2.c.weight", None, "in stages, and a RepViT has 4"),
        ("image_encoder.features.2.channel_mixer.m.0.bn.num_batches_tracked", None, "- image_encoder.features.2"),
        ("image_encoder.fuse_stage3.op_list.0.weight", None, "- image_encoder.fuse_stage3"),
        ("image_encoder.pos_embed", np.zeros(3, np.float32), "+ image_encoder.pos_embed"),
        ("image_encoder.features.9.token_mixer.1.x", np.zeros(3, np.float32), "- image_encoder.features.6"),
        (f"{BLOCK}.channel_mixer.m.2.c.weight", np.zeros((10, 8, 1, 1), np.float32), "mixer_2/kernel"),
        (f"{BLOCK}.token_mixer.0.conv1.c.weight", np.zeros((10, 1, 3, 3), np.float32), "conv1/kernel"),
        (f"{BLOCK}.token_mixer.0.conv1.c.weight", np.zeros(10, np.float32), "does not fit its place"),
        ("image_encoder.neck.1.weight", np.full(16, np.nan, np.float32), "not finite"),
        ("image_encoder.features.1.token_mixer.0.conv1.weight", np.zeros(3, np.float32), "later edition"),
        ("features.0.0.c.weight", np.zeros(3, np.float32), "an image encoder alone"),
        ("mask_decoder.iou_token.weight", np.zeros(16, np.float32), "decoder"),
    ],
)  # fmt: skip
def test_what_is_no_edge_sam_is_refused(slim_state, name, array, reason):
    rest = {n: a for n, a in slim_state.items() if n != name}
    with pytest.raises(InputError) as refusal:
        table.from_state_dict(rest if array is None else {**rest, name: array}, "x.pth", **TOLD)
    assert reason in str(refusal.value) and str(refusal.value).startswith("x.pth") and "\n" not in str(refusal.value)


def test_more_blocks_than_are_taken_are_refused(slim_state):
    more = {f"image_encoder.features.{i}.x": np.zeros(1, np.float32) for i in range(200)}
    with pytest.raises(InputError, match=r"199 blocks, and at most 128"):
        table.from_state_dict({**slim_state, **more}, **TOLD)
    with pytest.raises(InputError, match="multiples of the embedding's stride"):
        table.from_state_dict(slim_state, image_size=48, decoder_heads=2)


M1 = rep_vit.PRESETS["rep_vit_m1"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (M1, ""),
        (dataclasses.replace(M1, image_size=(512, 512)), ""),
        (dataclasses.replace(M1, stem_dim=20), "stem"),
        (dataclasses.replace(M1, stages=(rep_vit.Stage(48, (rep_vit.Block(90, 16),)), *M1.stages[1:])), "mixers"),
        (dataclasses.replace(M1, stages=(rep_vit.Stage(48, (rep_vit.Block(96, 12),)), *M1.stages[1:])), "squeeze"),
        (dataclasses.replace(M1, fuse_dim=200), "256"),
    ],
)
def test_why_the_originals_class_cannot_hold_an_encoder(config, reason):
    why = table.obstacle(SimpleNamespace(encoder=config))
    assert reason in why and bool(reason) == bool(why)


# ------------------------------------------------------------------------------------------- doors


@pytest.fixture(scope="module")
def sam() -> Sam:
    """As the images of `material` are taken; it teaches, too."""
    encoder = rep_vit.uniform((8, 8, 16, 16), ((True,), (False, False), (False,), (False,)), 64)
    encoder = dataclasses.replace(encoder, fuse_dim=32, out_chans=SQUARE.out_chans)
    config = SamConfig(encoder, SQUARE.head)  # whose programs other tests compile, too
    return Sam(config, random_params(abstract_params(config)))


@pytest.fixture
def pth(sam, tmp_path):
    """As EdgeSAM publishes it, or its training saves it: under "model"."""
    state = {name: torch.from_numpy(array.copy()) for name, array in to_torch.to_state_dict(sam).items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "edge_sam.pth")
    return tmp_path / "edge_sam.pth"


def test_it_loads_predicts_and_becomes_a_folder(sam, pth, tmp_path):
    again = from_torch.load(pth, image_size=64)
    assert again.config == sam.config and again.provenance["source"] == "edge_sam.pth"
    jax.tree.map(np.testing.assert_array_equal, again.params, sam.params)
    from_torch.main(pth, tmp_path / "folder", image_size=64)
    assert checkpoint.load(tmp_path / "folder").config == sam.config
    assert from_torch.load(pth).config.image_size == (1024, 1024)
    predictor = SamPredictor(again)
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    ask = lambda **how: predictor.predict(np.array([[9.0, 5.0]]), np.array([1]), return_logits=True, **how)
    four = ask(num_multimask_outputs=4)
    for how, outputs in (
        ({"num_multimask_outputs": 1}, np.s_[:1]),
        ({"num_multimask_outputs": 3}, np.s_[1:]),
        ({}, np.s_[1:]),
    ):
        for found, wanted in zip(ask(**how), four, strict=True):
            np.testing.assert_array_equal(found, wanted[outputs])
    stable = ask(num_multimask_outputs=4, use_stability_score=True)
    np.testing.assert_array_equal(stable.iou_predictions, stability_scores(four.low_res_masks))
    with pytest.raises(InputError, match="num_multimask_outputs 2 is none of 1, 3, 4"):
        ask(num_multimask_outputs=2)
    with pytest.raises(InputError, match="use_stability_score"):
        ask(use_stability_score="yes")


def test_everything_goes_by_stability(sam):
    """Filtered and ranked by it where other families are by their own estimate, which is out of all bounds here."""
    image = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    everything = lambda **how: SamAutomaticMaskGenerator(
        sam, points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0, **how
    ).generate(image)
    by_stability = [record["predicted_iou"] for record in everything()]
    assert by_stability and all(0 <= score <= 1 for score in by_stability)
    assert by_stability == sorted(by_stability, reverse=True)
    assert [record["predicted_iou"] for record in everything(use_stability_score=False)] != by_stability


def test_it_is_compared_inspected_and_written_back(sam, material, tmp_path, capsys):
    measured = compare_models(sam, sam, data.find([material / "val"]))
    assert measured["annotated_images"] == 2 and measured["agreement"] == 1
    checkpoint.save(sam, tmp_path / "edge")
    inspect_program.main(tmp_path / "edge")
    assert "stages_1" in capsys.readouterr().out
    for call, message in (
        (lambda: to_torch.main(tmp_path / "edge", tmp_path / "x", "hf"), "goes to --format sam alone"),
        (lambda: inspect_program.main(tmp_path / "edge", (material / "images",)), "take --recipe taylor"),
    ):
        with pytest.raises(InputError, match=message):
            call()
        assert not (tmp_path / "x").exists()
    to_torch.main(tmp_path / "edge", tmp_path / "back.pth")
    assert "EdgeSAM's class cannot hold this encoder: it has another sum of stages" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, from_torch.load(tmp_path / "back.pth", 64).params, sam.params)


def test_it_is_slimmed(sam, material, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    checkpoint.save(dataclasses.replace(sam, thresholds=None), tmp_path / "teacher")
    with pytest.raises(InputError, match="no projection: take --recipe taylor"):
        compress_with(
            compress_options(material, tmp_path / "none", teacher=tmp_path / "teacher", recipe="default", set=())
        )
    choices = {"teacher": tmp_path / "teacher", "recipe": "taylor", "set": ("prune.criterion=magnitude",), "steps": 0}
    numbers = compress_with(compress_options(material, tmp_path / "slim", **choices)).report
    before, after = sam.config.encoder, from_torch.load(tmp_path / "slim").config.encoder
    assert (after.image_size, after.out_chans) == (before.image_size, before.out_chans)
    assert sum(stage.dim for stage in after.stages) == sum(stage.dim for stage in before.stages) / 2
    inner = lambda c: c.stem_dim + c.fuse_dim + sum(b.hidden + b.squeezed for s in c.stages for b in s.blocks)
    assert inner(after) == inner(before) / 2 and all(block.hidden for stage in after.stages for block in stage.blocks)
    assert numbers["slim"]["encoder_parameters"] < numbers["teacher"]["encoder_parameters"]
    to_onnx.main(tmp_path / "slim", tmp_path / "onnx")  # compares with JAX
    assert "stability 0.0e+00; masks agree to 100.00 %" in capsys.readouterr().out
