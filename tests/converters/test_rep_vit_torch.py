"""RepViT SAMs in PyTorch: the loader that goes beside a .pth gives the original's arrays, and our masks."""

from __future__ import annotations

import ast
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch

from converters import from_torch, to_torch
from converters.families import FAMILIES
from converters.tables import rep_vit as table
from helpers.family_models import SLIM_REP_VIT, edge_sam, images_of, random_params, run
from helpers.images import random_image
from helpers.loaders import assert_refused
from helpers.peers import segment_anything
from helpers.shared import shared
from slimsam_jax import checkpoint
from slimsam_jax.inference.predictor import SamPredictor
from slimsam_jax.inference.ranking import stability_scores
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.encoders import rep_vit
from slimsam_jax.models.sam import Sam, abstract_params, folded

stock = segment_anything()
from converters import rep_vit_sam_torch  # noqa: E402 (needs segment_anything, which needs the stand-in)

M1 = rep_vit.PRESETS["rep_vit_m1"]


def uneven_m1() -> rep_vit.Config:
    """As many blocks as EdgeSAM's, squeeze-excite where it has it, random widths."""
    random = np.random.default_rng(0)
    width = lambda least=3, most=24: int(random.integers(least, most))
    block = lambda whole: rep_vit.Block(width(), whole.squeezed and width(1, 6))
    stages = (rep_vit.Stage(width(), tuple(map(block, stage.blocks))) for stage in M1.stages)
    return rep_vit.Config((64, 96), width(), tuple(stages), fuse_dim=width(), out_chans=16)


# Of one channel a convolution is no depthwise one.
NARROW = dataclasses.replace(
    SLIM_REP_VIT,
    stem_dim=1,
    stages=(
        rep_vit.Stage(3, (rep_vit.Block(1, 1),)),
        rep_vit.Stage(1, (rep_vit.Block(4), rep_vit.Block(1, 2))),
        rep_vit.Stage(5, (rep_vit.Block(1),)),
        rep_vit.Stage(1, (rep_vit.Block(3, 1),)),
    ),
    fuse_dim=2,
)


def assert_alike(found, expected):
    """Within 1e-5 of the largest value."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def embedding_of(encoder, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return encoder(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("config", [SLIM_REP_VIT, NARROW, uneven_m1()], ids=["rectangle", "narrow", "as M1"])
def test_embeddings_are_ours(config):
    sam = edge_sam(config)
    state = {name: torch.from_numpy(array) for name, array in to_torch.to_state_dict(sam).items()}
    state = {name[14:]: array for name, array in state.items() if name.startswith("image_encoder.")}
    encoder = rep_vit_sam_torch.RepViT(state, 0).eval()
    encoder.load_state_dict(state)
    images = images_of(config, 2)
    ours, _ = run(rep_vit.ImageEncoder(config), sam.params["image_encoder"], images)
    assert np.abs(ours[0] - ours[1]).max() > 0.1
    assert_alike(embedding_of(encoder, images), np.asarray(ours))


@pytest.fixture(scope="module")
def sam() -> Sam:
    """Widths that EdgeSAM's class cannot hold; logits on both sides of 1 and -1, of which stability is made."""
    encoder = dataclasses.replace(SLIM_REP_VIT, image_size=(64, 64))
    head = head_of((64, 64), out_chans=16, mask_in_chans=8, decoder_mlp_dim=9, iou_head_dim=7, decoder_heads=2)
    config = SamConfig(encoder, head)
    params = random_params(abstract_params(config))
    for i in range(4):
        last = params["mask_decoder"][f"output_hypernetworks_mlps_{i}"]["layers_2"]
        last |= {name: 60 * array for name, array in last.items()}
    return Sam(config, params, thresholds=Thresholds(0.5, 0.6, 1.0))


@pytest.fixture(scope="module")
def pth(sam, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edge")
    checkpoint.save(sam, folder / "slim")
    to_torch.main(folder / "slim", folder / "slim.pth")
    return folder / "slim.pth"


PROMPTS = {
    "point": {"point_coords": np.array([[9.0, 5.0]]), "point_labels": np.array([1])},
    "box and points": {
        "point_coords": np.array([[9.0, 5.0], [2.0, 25.0]]),
        "point_labels": np.array([1, 0]),
        "box": np.array([3.0, 4.0, 17.0, 22.0]),
    },
    "mask": {
        "point_coords": np.array([[12.0, 3.0]]),
        "point_labels": np.array([0]),
        "mask_input": np.random.default_rng(5).standard_normal((1, 16, 16)).astype(np.float32),
    },
}


def test_masks_are_ours(sam, pth):
    loaded = rep_vit_sam_torch.load(pth)
    assert loaded.thresholds == sam.thresholds.to_json() and loaded.single_mask and not loaded.training
    ours, theirs = SamPredictor(sam), stock.SamPredictor(loaded)
    for predictor in (ours, theirs):
        predictor.set_image(random_image(0, 30, 20))
    assert_alike(theirs.get_image_embedding().numpy(), ours.get_image_embedding())
    everywhere = []
    for prompt in PROMPTS.values():
        for several in (True, False):
            how = {**prompt, "multimask_output": several, "return_logits": True}
            masks, scores, low = ours.predict(**how, use_stability_score=True)
            their_masks, their_scores, their_low = theirs.predict(**how)
            assert their_masks.shape == (3 if several else 1, 30, 20)
            assert_alike(their_masks, masks)
            assert_alike(their_low, low)
            np.testing.assert_allclose(their_scores, scores, atol=1e-6)
            loaded.mask_decoder.use_stability_score = False
            assert_alike(theirs.predict(**how)[1], ours.predict(**how).iou_predictions)
            loaded.mask_decoder.use_stability_score = True
            everywhere += [*scores]
    assert len({*everywhere}) > 6 and 0 < np.mean(everywhere) < 1


def test_scores_are_stabilities_unless_estimates_are_asked_for(pth):
    low = np.array([[[2.0, 1.0], [0.0, -1.0]], [[-3.0, -2.0], [-1.0, -9.0]], [[5.0, 5.0], [5.0, 5.0]]])
    np.testing.assert_array_equal(rep_vit_sam_torch.stability(torch.from_numpy(low)), stability_scores(low))
    assert rep_vit_sam_torch.load(pth).mask_decoder.use_stability_score
    assert not rep_vit_sam_torch.load(pth, use_stability_score=False).mask_decoder.use_stability_score


def test_it_is_the_originals(tmp_path):
    """Embedding, logits and stabilities that EdgeSAM's code has computed, from an image and prompts."""
    with np.load(shared("golden/edge_sam.npz")) as arrays:
        golden = dict(arrays)
    torch.save({n[3:]: torch.from_numpy(golden[n]) for n in golden if n.startswith("sd/")}, tmp_path / "edge_sam.pth")
    loaded = rep_vit_sam_torch.load(tmp_path / "edge_sam.pth", image_size=int(golden["config/img_size"]))
    predictor = stock.SamPredictor(loaded)
    predictor.set_image(golden["image_uint8"])
    np.testing.assert_allclose(predictor.get_image_embedding(), golden["image_embedding"], atol=5e-5)
    for case in ("point1", "points3", "box"):
        prompt = {"box": golden["box/boxes"].reshape(4)} if case == "box" else {}
        if case != "box":
            points, labels = golden[f"{case}/points"].reshape(-1, 2), golden[f"{case}/labels"].reshape(-1)
            prompt = {"point_coords": points, "point_labels": labels}
        for count in (1, 3):
            _, scores, low = predictor.predict(**prompt, multimask_output=count == 3)
            wanted = {name: golden[f"{case}/n{count}/{name}"][0] for name in ("low_res_masks", "stability_scores")}
            np.testing.assert_allclose(low, wanted["low_res_masks"], atol=1e-4)
            np.testing.assert_allclose(scores, wanted["stability_scores"], atol=1e-6)


def test_a_folded_model_gives_the_same(sam, tmp_path):
    to_torch.save_sam(folded(sam), tmp_path / "folded.pth")
    images = images_of(sam.config.encoder)
    ours, _ = run(rep_vit.ImageEncoder(sam.config.encoder), sam.params["image_encoder"], images)
    assert_alike(embedding_of(rep_vit_sam_torch.load(tmp_path / "folded.pth").image_encoder, images), np.asarray(ours))


def test_a_file_saved_anew_loads_with_what_it_no_longer_notes(sam, pth, tmp_path):
    """As training saves it, with what finds boxes beside it, and in half precision."""
    loaded = rep_vit_sam_torch.load(pth)
    state = loaded.state_dict() | {"rpn_head.conv.weight": torch.zeros(3), "fpn.0.bias": torch.zeros(2)}
    torch.save({"model": state, "epoch": 3}, tmp_path / "tuned.pth")
    again = rep_vit_sam_torch.load(tmp_path / "tuned.pth", image_size=64, decoder_heads=2)
    for name, array in loaded.state_dict().items():
        assert torch.equal(array, again.state_dict()[name]), name
    assert (again.image_encoder.img_size, again.mask_decoder.transformer.layers[0].self_attn.num_heads) == (64, 2)
    assert not again.thresholds and rep_vit_sam_torch.load(tmp_path / "tuned.pth").image_encoder.img_size == 1024
    back = from_torch.load(tmp_path / "tuned.pth", image_size=64)
    assert back.config.encoder == sam.config.encoder
    jax.tree.map(np.testing.assert_array_equal, back.params["image_encoder"], sam.params["image_encoder"])
    torch.save({name: array.half() for name, array in state.items()}, tmp_path / "half.pth")
    half = rep_vit_sam_torch.load(tmp_path / "half.pth", image_size=64, decoder_heads=2)
    assert {array.dtype for array in half.parameters()} == {torch.float32}


def test_it_is_written_and_read_back(sam, pth, tmp_path, capsys):
    assert {path.name for path in pth.parent.iterdir()} == {"slim", "slim.pth", "rep_vit_sam_torch.py"}
    back = from_torch.load(pth)  # which notes what no array tells
    assert back.config == sam.config and back.thresholds == sam.thresholds
    jax.tree.map(np.testing.assert_array_equal, back.params, sam.params)
    to_torch.main(pth, tmp_path / "again.pth")
    said = capsys.readouterr().out
    assert "import rep_vit_sam_torch; rep_vit_sam_torch.load(" in said
    assert "EdgeSAM's class cannot hold this encoder: it has a stem" in said
    config = lambda encoder: SimpleNamespace(encoder=encoder, image_size=encoder.image_size)
    lines = lambda encoder: table.how_to_load(SimpleNamespace(config=config(encoder)), Path("x.pth"))
    assert "with EdgeSAM's code: load_state_dict(torch.load('x.pth'), strict=True)" in lines(M1)
    assert "rep_vit_sam_torch cannot load it: segment_anything wants square images" in lines(SLIM_REP_VIT)


def test_a_tiny_sams_decoder_is_known_again(sam, tmp_path):
    """Its first mask is not for use: with another encoder it is not, either."""
    without = dataclasses.replace(sam, config=dataclasses.replace(sam.config, single_mask=False))
    to_torch.save_sam(without, tmp_path / "slim.pth")
    assert from_torch.load(tmp_path / "slim.pth").config == without.config
    assert rep_vit_sam_torch.load(tmp_path / "slim.pth").single_mask is False


def test_every_family_has_a_loader():
    assert {*to_torch.LOADERS} == {"vit", *FAMILIES} and all(path.is_file() for path in to_torch.LOADERS.values())


def test_it_needs_nothing_of_ours():
    tree = ast.parse(Path(rep_vit_sam_torch.__file__).read_text())
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = froms | {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert foreign == {"torch", "segment_anything"}


def test_tools_find_it_in_the_registry(pth):
    rep_vit_sam_torch.register("edge-slim", pth)
    rep_vit_sam_torch.register("edge-bare", use_stability_score=False)
    try:
        assert stock.sam_model_registry["edge-slim"]().image_encoder.img_size == 64
        assert not stock.sam_model_registry["edge-bare"](checkpoint=pth).mask_decoder.use_stability_score
        with pytest.raises(ValueError, match="edge-bare has no checkpoint"):
            stock.sam_model_registry["edge-bare"]()
    finally:
        del stock.sam_model_registry["edge-slim"], stock.sam_model_registry["edge-bare"]


BLOCK = "image_encoder.features.3"  # stages_1/blocks_1, of branches and squeeze-excite


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ({}, {"heads": 3}, "can be given, and there was heads"),
        ({}, {"image_size": (64, 96)}, "wants square images"),
        ({}, {"image_size": 48}, "no multiple of 32"),
        ({"image_encoder.neck.1.bias": None}, {}, "Missing key"),
        ({f"{BLOCK}.token_mixer.0.conv1.bn.running_var": None}, {}, "Missing key"),
        ({f"{BLOCK}.channel_mixer.m.0.c.weight": None}, {}, f"KeyError.*{BLOCK[14:]}.channel_mixer.m.0"),
        ({f"{BLOCK}.token_mixer.1.fc1.weight": None}, {}, "Unexpected key"),
        ({f"{BLOCK}.channel_mixer.m.2.c.weight": torch.zeros(10, 8, 1, 1)}, {}, "size mismatch"),
        ({"image_encoder.pos_embed": torch.zeros(1)}, {}, "Unexpected key"),
    ],
)
def test_what_does_not_load_is_one_line(pth, change, overrides, message):
    assert_refused(rep_vit_sam_torch, pth, change, overrides, message)


def test_what_is_no_state_dict_is_one_line(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for path in (tmp_path / "list.pth", tmp_path / "text.pth", tmp_path / "nothing.pth"):
        with pytest.raises(ValueError, match="cannot be loaded") as refusal:
            rep_vit_sam_torch.load(path)
        assert "\n" not in str(refusal.value)
