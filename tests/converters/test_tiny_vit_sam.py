"""MobileSAM's and TinySAM's checkpoints through the doors that SAM's go through."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import torch

from converters import from_torch, to_torch
from converters.tables import tiny_vit_unused
from converters.tables.tiny_vit import how_to_load, to_state_dict
from helpers.family_models import random_params
from slimsam_jax import checkpoint
from slimsam_jax.compression.pipeline import without_misfits
from slimsam_jax.errors import InputError
from slimsam_jax.inference.predictor import SamPredictor
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.encoders.tiny_vit_config import PRESETS, Config, uniform
from slimsam_jax.models.sam import Sam, abstract_params


def small_encoder() -> Config:
    encoder = uniform((16, 16, 24, 32), (1, 1, 1, 1), (1, 2, 2, 2), (2, 2, 3, 2), image_size=64)
    *stages, last = encoder.stages  # whose stride the original has from its width
    stages = (*stages, dataclasses.replace(last, stride=1))
    return dataclasses.replace(encoder, stages=stages, out_chans=32)


@pytest.fixture(scope="module")
def sam() -> Sam:
    head = head_of((64, 64), out_chans=32, mask_in_chans=8, decoder_mlp_dim=16, iou_head_dim=8)
    config = SamConfig(small_encoder(), head)
    return Sam(config, random_params(abstract_params(config)))


@pytest.fixture
def pth(sam, tmp_path):
    """As MobileSAM publishes it: a plain state dict, with a classifier that is never run."""
    state = to_torch.to_state_dict(sam)
    assert "image_encoder.head.weight" in state
    torch.save({name: torch.from_numpy(array.copy()) for name, array in state.items()}, tmp_path / "mobile_sam.pt")
    return tmp_path / "mobile_sam.pt"


def test_it_loads_predicts_and_becomes_a_folder(sam, pth, tmp_path):
    again = from_torch.load(pth, image_size=64)
    assert again.config == sam.config and again.provenance["source"] == "mobile_sam.pt"
    jax.tree.map(np.testing.assert_array_equal, again.params, sam.params)
    from_torch.main(pth, tmp_path / "folder", image_size=64)
    assert checkpoint.load(tmp_path / "folder").config == sam.config
    predictor = SamPredictor(again)
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    masks, scores, _ = predictor.predict(np.array([[9.0, 5.0]]), np.array([1]))
    assert masks.shape == (3, 20, 30) and np.isfinite(scores).all()


def test_what_no_array_tells_is_the_published_value(sam, pth):
    assert from_torch.load(pth).config.image_size == (1024, 1024)
    with pytest.raises(InputError, match="must be multiples"):
        from_torch.load(pth, image_size=65)


def test_where_arrays_tell_it_another_image_size_is_refused(material):
    assert from_torch.load(material / "teacher", image_size=64).config.image_size == (64, 64)
    with pytest.raises(InputError, match="takes images of 64 x 64 pixels, and image_size is 1024"):
        from_torch.load(material / "teacher", image_size=1024)


def test_what_the_original_cannot_hold_is_refused_with_the_reason(sam, tmp_path):
    checkpoint.save(sam, tmp_path / "tiny")
    for call, message in (
        (
            lambda: to_torch.main(tmp_path / "tiny", tmp_path / "x", "hf"),
            "transformers has no SAM with such an encoder",
        ),
        (lambda: to_torch.main(tmp_path / "tiny", tmp_path / "x", "sam", True), "it has no padded twin"),
    ):
        with pytest.raises(InputError, match=message):
            call()
        assert not (tmp_path / "x").exists() and not (tmp_path / "x.pth").exists()


def test_the_way_back_is_a_file_that_loads(sam, tmp_path):
    to_torch.save_sam(sam, tmp_path / "back.pth")
    assert {path.name for path in tmp_path.iterdir()} == {"back.pth", "tiny_vit_sam_torch.py"}
    state = torch.load(tmp_path / "back.pth", weights_only=True)
    for name, array in to_state_dict(from_torch_converted(sam)).items():
        np.testing.assert_array_equal(state[name].numpy(), array)
    back = from_torch.load(tmp_path / "back.pth")  # which notes what no array tells
    assert back.config == sam.config
    jax.tree.map(np.testing.assert_array_equal, back.params, sam.params)
    with pytest.raises(InputError, match="takes images of 64 x 64 pixels, and image_size is 1024"):
        from_torch.load(tmp_path / "back.pth", 1024)


def from_torch_converted(sam: Sam):
    from converters.tables.strict import Converted

    return Converted(sam.config.encoder, sam.config.head, sam.params, {})


def test_what_is_never_run_comes_back_as_it_was(sam, pth, tmp_path):
    """Through a model folder, too; nowhere is it a parameter, and no folder keeps another model's."""
    random = np.random.default_rng(0)
    state = {name: tensor.numpy() for name, tensor in torch.load(pth, weights_only=True).items()}
    unread = [name for name in state if tiny_vit_unused.is_kept(name)]
    state |= {name: random.random(state[name].shape, np.float32) for name in unread if "num_batches" not in name}
    state |= {name: np.array(i, np.int64) for i, name in enumerate(unread) if "num_batches" in name}
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, pth)
    loaded = from_torch.load(pth, 64)
    assert set(loaded.kept) == set(unread) and jax.tree.structure(loaded.params) == jax.tree.structure(sam.params)
    folder = tmp_path / "folder"
    checkpoint.save(loaded, folder)
    again = checkpoint.load(folder)
    to_torch.save_sam(again, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert set(back) == set(state)
    for name, array in state.items():
        assert back[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(back[name].numpy(), array, err_msg=name)
    checkpoint.save(sam, folder)
    assert not (folder / "kept.safetensors").exists() and not checkpoint.load(folder).kept


def test_how_mobile_sams_code_loads_it():
    """It makes ready the tables of attention before they are loaded, and does not know other classes than 1000."""
    model = Sam(SamConfig(PRESETS["vit_t"], head_of((1024, 1024))), {})
    lines = lambda kept: how_to_load(dataclasses.replace(model, kept=kept), "x.pth")
    assert lines({}).endswith("mobile_sam.sam_model_registry['vit_t'](checkpoint='x.pth').eval()")
    assert lines({"image_encoder.head.bias": np.zeros(1000)}) == lines({})
    assert lines({"image_encoder.head.bias": np.zeros(5)}).endswith("this encoder: it has 5 classes, not 1000")
    wide = Sam(SamConfig(dataclasses.replace(PRESETS["vit_t"], image_size=(640, 1024)), head_of((640, 1024))), {})
    assert how_to_load(wide, "x.pth").startswith("tiny_vit_sam_torch cannot load it: segment_anything wants square")


def test_what_was_kept_must_fit(sam, pth, tmp_path, monkeypatch):
    loaded = from_torch.load(pth, 64)
    narrow = {**loaded.kept, "image_encoder.norm_head.bias": np.zeros(5, np.float32)}
    with pytest.raises(InputError, match="what was kept has arrays of the wrong shape"):
        to_torch.to_state_dict(dataclasses.replace(loaded, kept=narrow))
    checkpoint.save(loaded, tmp_path / "folder")
    monkeypatch.setattr(checkpoint, "MOST_KEPT", 1000)
    with pytest.raises(InputError, match="at most 1000 are kept"):
        checkpoint.load(tmp_path / "folder")
    (tmp_path / "folder" / "kept.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="safetensors cannot be read"):
        checkpoint.load(tmp_path / "folder")


def test_a_cut_of_the_last_stage_drops_what_was_kept(sam, pth, capsys):
    loaded = from_torch.load(pth, 64)
    *stages, last = loaded.config.encoder.stages
    cut = lambda **widths: dataclasses.replace(
        loaded,
        config=loaded.config.with_encoder(
            dataclasses.replace(loaded.config.encoder, stages=(*stages, dataclasses.replace(last, **widths)))
        ),
    )
    assert without_misfits(cut(entry_dim=5), loaded).kept == loaded.kept and not capsys.readouterr().out
    assert without_misfits(cut(dim=5), loaded).kept == {}
    assert "classifier" in capsys.readouterr().out


def test_a_decoder_without_a_single_mask_gives_the_best_of_the_others(sam, pth, tmp_path):
    """As TinySAM's: told by the file's name or by the caller, remembered by folders and files of ours."""
    tiny = pth.rename(tmp_path / "tinysam.pth")
    with_mask, without = from_torch.load(tiny, 64, single_mask=True), from_torch.load(tiny, 64)
    assert with_mask.config == sam.config and without.config == dataclasses.replace(sam.config, single_mask=False)
    image, (points, labels) = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8), ([[9.0, 5.0]], [1])
    torch.save({f"module.{k}": v for k, v in torch.load(tiny, weights_only=True).items()}, tmp_path / "tinysam_dp.pth")
    assert from_torch.load(tmp_path / "tinysam_dp.pth", 64).config == without.config
    found = {}
    for name, model in (("with", with_mask), ("without", without)):
        predictor = SamPredictor(model)
        predictor.set_image(image)
        found[name] = [predictor.predict(points, labels, multimask_output=many) for many in (False, True)]
    (single, three), (best, same) = found["with"], found["without"]
    for ours, theirs in zip(same, three, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    chosen = three.iou_predictions.argmax()
    np.testing.assert_array_equal(best.low_res_masks[0], three.low_res_masks[chosen])
    assert best.masks.shape == (1, 20, 30) and best.iou_predictions[0] == three.iou_predictions[chosen]
    assert np.abs(single.low_res_masks - best.low_res_masks).max() > 1e-3
    checkpoint.save(without, tmp_path / "folder")
    to_torch.save_sam(checkpoint.load(tmp_path / "folder"), tmp_path / "back.pth")
    assert from_torch.load(tmp_path / "back.pth", 64).config == without.config
    with pytest.raises(InputError, match="folder has no single mask, and single_mask is True"):
        from_torch.load(tmp_path / "folder", single_mask=True)


def test_sams_own_decoder_has_a_single_mask(material, sam):
    with pytest.raises(InputError, match="has a single mask, and single_mask is False"):
        from_torch.load(material / "teacher", single_mask=False)
    with pytest.raises(ValueError, match="neither true nor false"):
        dataclasses.replace(sam.config, single_mask=1)
    with pytest.raises(ValueError, match="has none"):
        SamConfig(sam.config.encoder, dataclasses.replace(sam.config.head, multimask_outputs=0), single_mask=False)


def test_a_quantised_tinysam_is_refused_with_the_reason(tmp_path):
    """Of its published module the classes' buffers are known, not where they are in it."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    module[0].register_buffer("w_interval", torch.ones(1, 1, 1, 1))
    torch.save(module, tmp_path / "tinysam_w8a8.pth")
    with pytest.raises(InputError, match=r"tinysam_w8a8.pth is a TinySAM whose layers round floats.*slimsam quantize"):
        from_torch.load(tmp_path / "tinysam_w8a8.pth")
