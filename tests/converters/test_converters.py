"""Every road in and out: exact there and back, strict about names and shapes, and nothing foreign is run."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import pickle
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import torch

from converters import from_torch, huggingface, to_torch, torch_file
from converters.tables import vit
from converters.tables.sam import rows
from helpers.models import embed, random_sam, tiny_config
from helpers.peers import state_dict, stock_sam
from slimsam_jax import checkpoint
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.imaging.transforms import resize_and_pad
from slimsam_jax.models import sam as sam_module
from slimsam_jax.models.config import Thresholds

SQUARE = tiny_config(image_size=(64, 64))


@pytest.fixture(scope="module")
def stock():
    return stock_sam(SQUARE)


@pytest.fixture()
def pth(stock, tmp_path):
    torch.save(stock.state_dict(), tmp_path / "sam.pth")
    return tmp_path / "sam.pth"


def assert_same(one, other):
    assert one.config == other.config
    chex.assert_trees_all_equal(one.params, other.params)


def test_reader_equals_torch(stock, pth):
    expected = state_dict(stock)
    found = torch_file.read(pth)
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_reader_takes_views_and_dtypes(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "t": base.T,
        "row": base[1:3, 2:5],
        "half": base.half(),
        "bf16": base.bfloat16(),
        "int": base.long(),
        "none": base[:0],
    }
    torch.save(state, tmp_path / "x.pth")
    found = torch_file.read(tmp_path / "x.pth")
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name].astype(np.float64), tensor.double().numpy(), err_msg=name)


def test_state_dict_there_and_back_is_exact(stock):
    expected = {k: v for k, v in state_dict(stock).items() if not k.startswith("pixel_")}
    found = to_torch.to_state_dict(from_torch.from_state_dict(state_dict(stock)))
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_split_qkv_and_data_parallel_are_read_alike(stock):
    expected = from_torch.from_state_dict(state_dict(stock))
    assert_same(from_torch.from_state_dict(vit.split_qkv(state_dict(stock))), expected)
    wrapped = {f"module.{name}": array for name, array in state_dict(stock).items()}
    assert_same(from_torch.from_state_dict(wrapped), expected)
    inner = {name.replace("image_encoder.", "image_encoder.module."): a for name, a in state_dict(stock).items()}
    assert_same(from_torch.from_state_dict(inner), expected)


def test_whole_module_pickle_is_read_as_data(stock, pth, tmp_path):
    torch.save(stock, tmp_path / "module.pth")
    assert_same(from_torch.load(tmp_path / "module.pth"), from_torch.load(pth))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_pixel_statistics_of_a_module_may_be_of_any_real_dtype(stock, tmp_path, dtype):
    module = copy.deepcopy(stock)
    module.pixel_mean, module.pixel_std = (torch.full((3, 1, 1), n, dtype=dtype) for n in (116, 57))
    torch.save(module, tmp_path / "module.pth")
    config = from_torch.load(tmp_path / "module.pth").config
    assert config.pixel_mean == (116,) * 3 and config.pixel_std == (57,) * 3


def test_the_whole_state_of_a_training_is_read(stock, pth, tmp_path):
    """With what else people save: optimizers, options, random states, sets, counts, keys that are no names."""
    optimizer = torch.optim.AdamW(stock.parameters())
    others = {"args": argparse.Namespace(out=Path("x")), "seen": {1, 2}, "best": np.float64(0.5), 5: (1, 2), (1,): b"x"}
    others |= {"counts": Counter("aab"), "by": defaultdict(list, a=[1]), "rng": torch.get_rng_state(), "big": 2**80}
    state = {"model": stock.state_dict(), "optimizer": optimizer.state_dict(), "dtype": torch.float32, **others}
    for protocol in (2, 5):
        torch.save(state, tmp_path / "all.pth", pickle_protocol=protocol)
        assert_same(from_torch.load(tmp_path / "all.pth"), from_torch.load(pth))


def test_nested_state_dicts_are_found(stock, pth, tmp_path):
    torch.save({"model": stock.state_dict(), "epoch": 3}, tmp_path / "nested.pth")
    assert_same(from_torch.load(tmp_path / "nested.pth"), from_torch.load(pth))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_no_foreign_code_is_run(stock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**stock.state_dict(), "evil": Malicious()}, "evil.pth")
    from_torch.load("evil.pth")  # the stand-in is no array, and so no part of the state dict
    assert not (tmp_path / "pwned").exists()


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path):
    storage = np.zeros(4, np.float32)
    for offset, size, stride in (
        (0, (5,), (1,)),
        (2, (3,), (1,)),
        (0, (2, 2), (3, 2)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
    ):
        with pytest.raises(pickle.UnpicklingError, match="beyond"):
            torch_file.rebuild_tensor(storage, offset, size, stride)
    assert torch_file.rebuild_tensor(storage, 4, (0,), (1,)).shape == (0,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a zip", "not a PyTorch zip checkpoint"),
        (None, "is not a readable PyTorch checkpoint"),
        ({"a": 1}, "neither a state dict nor a module"),
        ([1, 2], "neither a state dict nor a module"),
        ({"a": torch.zeros(2)}, "not a SAM checkpoint"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(tmp_path, content, message):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no pickle here")
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        from_torch.load(path)


def test_names_must_match_exactly(stock):
    state = state_dict(stock)
    missing = {k: v for k, v in state.items() if k != "mask_decoder.iou_token.weight"}
    with pytest.raises(InputError, match=r"- mask_decoder\.iou_token\.weight"):
        from_torch.from_state_dict(missing)
    with pytest.raises(InputError, match=r"\+ extra\.weight"):
        from_torch.from_state_dict({**state, "extra.weight": np.zeros(3)})


def test_shapes_must_match_exactly(stock):
    for name in ("mask_decoder.iou_token.weight", "image_encoder.blocks.0.norm1.weight", "image_encoder.neck.2.weight"):
        state = state_dict(stock)
        state[name] = np.concatenate([state[name]] * 2, axis=-1)
        with pytest.raises(InputError, match=r"shape"):
            from_torch.from_state_dict(state)


def test_model_folder_there_and_back(tmp_path, tiny_sam):
    checkpoint.save(tiny_sam, tmp_path / "model")
    loaded = from_torch.load(tmp_path / "model")
    assert_same(loaded, tiny_sam)
    assert loaded.provenance == tiny_sam.provenance
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    # Whoever may read other files of the user may read these, though they began as temporary ones of his own.
    (tmp_path / "other").touch()
    assert {p.stat().st_mode for p in (tmp_path / "model").iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_a_damaged_model_folder_is_refused(tmp_path, tiny_sam):
    checkpoint.save(tiny_sam, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.load(tmp_path / "model")
    weights.unlink()
    with pytest.raises(InputError, match=r"it has no model\.safetensors"):
        checkpoint.load(tmp_path / "model")
    with pytest.raises(InputError, match="does not exist"):
        from_torch.load(tmp_path / "nothing")


@pytest.mark.parametrize("array", [np.arange(3), np.ones(3, bool), np.array([1, np.nan]), np.array([1e39])], ids=str)
def test_arrays_that_are_no_weights_are_refused(array):
    wrong = "values that are not finite" if array.dtype.kind == "f" else f"{array.dtype}, and weights are real numbers"
    with pytest.raises(InputError, match=f"there: a/kernel holds {wrong}"):
        checkpoint.to_device({"a/kernel": array}, "there")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["architecture"].update(embed_dim=0),
        lambda d: d["architecture"].update(embed_dim="wide"),
        lambda d: d["architecture"].update(image_size=[64]),
        lambda d: d["architecture"].update(pixel_std=[1, 0, 1]),
        lambda d: d["architecture"].update(pixel_mean=None),
        lambda d: d["architecture"].update(decoder_heads=0),
        lambda d: d["architecture"]["blocks"][0].update(window=-1),
        lambda d: d["architecture"]["blocks"][0].update(heads=1.5),
        lambda d: d["architecture"].pop("blocks"),
        lambda d: d.update(format="slimsam_jax/99"),
        lambda d: d.pop("architecture"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path, tiny_sam, change):
    checkpoint.save(tiny_sam, tmp_path / "model")
    description = json.loads((tmp_path / "model" / "config.json").read_text())
    change(description)
    (tmp_path / "model" / "config.json").write_text(json.dumps(description))
    with pytest.raises(InputError):
        from_torch.load(tmp_path / "model")


def test_what_shapes_do_not_tell_is_read_off_a_huggingface_folder(tmp_path):
    """Heads of the decoder, and the pixels' mean and deviation."""
    config = dataclasses.replace(SQUARE, decoder_heads=4, pixel_mean=(1.0, 2.0, 3.0), pixel_std=(9.0, 8.0, 7.0))
    to_torch.save_huggingface(random_sam(config), tmp_path / "hf")
    assert from_torch.load(tmp_path / "hf").config == config


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_damaged_huggingface_folder_is_refused(tmp_path, name):
    to_torch.save_huggingface(random_sam(SQUARE), tmp_path / "hf")
    path = tmp_path / "hf" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError):
        from_torch.load(tmp_path / "hf")


def test_convert_command(pth, tmp_path, stock):
    from_torch.main(pth, tmp_path / "model")
    to_torch.main(tmp_path / "model", tmp_path / "again.pth", "sam")
    expected = state_dict(stock)
    for name, tensor in torch.load(tmp_path / "again.pth", weights_only=True).items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name])
    with pytest.raises(InputError, match="not empty"):
        from_torch.main(pth, tmp_path / "model")
    with pytest.raises(InputError, match="exists already"):
        to_torch.main(tmp_path / "model", tmp_path / "again.pth", "sam")


def test_failed_save_leaves_no_file(tmp_path, tiny_sam, monkeypatch):
    checkpoint.save(tiny_sam, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="No space"):
        checkpoint.save(random_sam(tiny_config(), 1), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_names_of_huggingface_are_a_bijection():
    names = [row.name for row in rows(SQUARE)]
    theirs = [huggingface.to_huggingface(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [huggingface.to_segment_anything(name) for name in theirs] == names


def test_pth_loads_strictly_into_stock_segment_anything(tmp_path):
    ours = random_sam(SQUARE, 3)
    to_torch.save_sam(ours, tmp_path / "out.pth")
    stock = stock_sam(SQUARE, 9)
    stock.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    images = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    expected = embed(ours, images)
    with torch.no_grad():
        found = stock.image_encoder(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert_same(from_torch.load(tmp_path / "out.pth"), ours)


@pytest.mark.slow  # importing transformers
def test_huggingface_there_and_back(tmp_path):
    from transformers import SamModel, SamProcessor

    ours = random_sam(SQUARE, 4)
    to_torch.save_huggingface(ours, tmp_path / "hf")
    model = SamModel.from_pretrained(tmp_path / "hf").eval()
    images = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    points = np.array([[[[10.0, 20.0], [30.0, 40.0]]]], np.float32)
    with torch.no_grad():
        out = model(pixel_values=torch.from_numpy(images), input_points=torch.from_numpy(points), multimask_output=True)
        embedding = model.get_image_embeddings(torch.from_numpy(images))[0].permute(1, 2, 0).numpy()
    expected = embed(ours, images.transpose(0, 2, 3, 1))[0]
    np.testing.assert_allclose(embedding, expected, atol=1e-5)
    coordinates, labels = sam_module_prompts(points[0])
    masks, iou = sam_module.decode(SQUARE, ours.params, expected, coordinates, labels)
    np.testing.assert_allclose(out.pred_masks[0], masks[:, 1:], atol=3e-5)
    np.testing.assert_allclose(out.iou_scores[0], iou[:, 1:], atol=1e-5)

    model.save_pretrained(tmp_path / "again")  # without our names for the shared matrix
    assert_same(from_torch.load(tmp_path / "again"), ours)
    assert_same(from_torch.load(tmp_path / "hf"), ours)
    processor = SamProcessor.from_pretrained(tmp_path / "hf")
    image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
    frame, size = resize_and_pad(image, (64, 64))
    pixels = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    np.testing.assert_allclose(
        pixels.transpose(1, 2, 0), sam_module.preprocess(SQUARE, frame[None], size[None])[0], atol=1e-5
    )


def sam_module_prompts(points):
    from slimsam_jax.imaging.prompts import prompt_points

    return prompt_points(points, np.ones(points.shape[:2], int))


def test_non_uniform_models_are_not_offered_to_transformers(tmp_path, tiny_sam):
    blocks = (dataclasses.replace(tiny_sam.config.blocks[0], mlp_dim=8), tiny_sam.config.blocks[1])
    uneven = random_sam(dataclasses.replace(SQUARE, blocks=blocks))
    checkpoint.save(uneven, tmp_path / "model")
    with pytest.raises(InputError, match="--uniform"):
        to_torch.main(tmp_path / "model", tmp_path / "x", "hf")
    assert not (tmp_path / "x").exists()


def test_published_presets_convert():
    """SAM-B and SlimSAM-77 by their shapes: every row of the table fits the tree."""
    from slimsam_jax.models.config import preset

    for name in ("vit_b", "vit_p77"):
        config = preset(name)
        shapes = sam_module.abstract_params(config)
        paths = {"/".join(str(k.key) for k in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(shapes)}
        assert {row.path for row in rows(config)} == paths


def test_a_pth_gives_back_what_shapes_do_not_tell(tmp_path):
    config = dataclasses.replace(SQUARE, decoder_heads=4, pixel_mean=(1.0, 2.0, 3.0), pixel_std=(9.0, 8.0, 7.0))
    sam = dataclasses.replace(random_sam(config), thresholds=Thresholds(0.4, 0.6, 2.0))
    to_torch.save_sam(sam, tmp_path / "x.pth")
    found = from_torch.load(tmp_path / "x.pth")
    assert_same(found, sam)
    assert found.thresholds == sam.thresholds


@pytest.mark.parametrize(
    "note",
    [
        {"decoder_heads": np.float64(4)},
        {"decoder_heads": 10**9},
        {"pixel_mean": (1, 2)},
        {"pixel_std": 5},
        {"thresholds": {"pred_iou_thresh": 2}},
        {"thresholds": 7},
        {"embed_dim": 24},
        {"decoder_heads": torch.ones(())},
    ],
    ids=str,
)
def test_a_foreign_note_is_refused(stock, tmp_path, note):
    state = OrderedDict(stock.state_dict())
    state._metadata = {"slimsam_jax": note}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError):
        from_torch.load(tmp_path / "x.pth")


def test_ordered_dict_metadata_is_harmless(tmp_path):
    state = OrderedDict(a=torch.ones(2))
    state._metadata = OrderedDict({"": {"version": 1}})
    torch.save(state, tmp_path / "x.pth")
    assert list(torch_file.read(tmp_path / "x.pth")) == ["a"]
