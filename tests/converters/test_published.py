"""Files as SlimSAM publishes them: what its scripts pickle, its uniform checkpoints, its Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
import pickletools
import sys
import types
import zipfile

import chex
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from converters import from_torch, to_torch
from helpers.models import embed, random_sam, tiny_config
from helpers.peers import segment_anything, stock_sam
from slimsam_jax import checkpoint
from slimsam_jax.models.config import GLOBAL, Block

# Globally pruned: widths differ per block, the number of heads never does, and no 3 heads make 14.
PRUNED = dataclasses.replace(
    tiny_config(image_size=(64, 64)), embed_dim=14, blocks=(Block(3, 4, 18, 3), Block(3, 7, 30, GLOBAL))
)


def forward(self, x):
    """What SlimSAM's second script puts in place of the encoder's own."""
    raise AssertionError("reading a checkpoint ran its code")


@pytest.fixture()
def published(tmp_path, monkeypatch):
    """A SAM, and a file of it as SlimSAM's scripts pickle their globally pruned ones: the module as a whole, its
    encoder in DataParallel and with a method on the instance, q, k and v apart, classes that no reader has."""
    segment_anything()
    from converters import slim_sam_torch

    ours = random_sam(PRUNED, 5)
    checkpoint.save(ours, tmp_path / "model")
    sam = slim_sam_torch.load(tmp_path / "model")
    with monkeypatch.context() as here:
        package = types.ModuleType("segment_anything_kd")
        here.setitem(sys.modules, package.__name__, package)
        for module in sam.modules():
            if not type(module).__module__.startswith("torch."):
                name = type(module).__name__
                fields = {"__module__": package.__name__, "forward": forward}
                module.__class__ = package.__dict__.get(name) or type(name, (nn.Module,), fields)
                setattr(package, name, type(module))
        for block in sam.image_encoder.blocks:
            split_qkv(block.attn)
        sam.image_encoder.forward = types.MethodType(forward, sam.image_encoder)
        sam.image_encoder = nn.DataParallel(sam.image_encoder)
        torch.save(sam, tmp_path / "SlimSAM.pth")
    return ours, tmp_path / "SlimSAM.pth"


def split_qkv(attention: nn.Module) -> None:
    weights, biases = attention.qkv.weight.detach().chunk(3), attention.qkv.bias.detach().chunk(3)
    del attention.qkv
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        layer = nn.Linear(*weight.shape[::-1])
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        setattr(attention, name, layer)


def test_the_pickle_is_as_published(published):
    """As its scripts make it: global names and a bound method that a plain torch.load would look up and run."""
    _, path = published
    assert "segment_anything_kd" not in sys.modules
    with zipfile.ZipFile(path) as archive:
        pickle = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    words = {str(argument) for _, argument, _ in pickletools.genops(pickle)}
    for name in ("segment_anything_kd ImageEncoderViT", "torch.nn.parallel.data_parallel DataParallel"):
        assert name in words
    assert words & {"builtins getattr", "__builtin__ getattr"}
    with pytest.raises(ModuleNotFoundError, match="segment_anything_kd"):
        torch.load(path, weights_only=False)


def test_a_globally_pruned_pickle_is_read_exactly(published):
    ours, path = published
    found = from_torch.load(path)
    assert found.config == PRUNED
    chex.assert_trees_all_equal(found.params, ours.params)


def test_a_globally_pruned_pickle_reaches_stock_code(published, tmp_path):
    """What its users ask for: from the pickle to a checkpoint that stock segment_anything loads strictly."""
    ours, path = published
    to_torch.main(path, tmp_path / "stock.pth", "sam", pad_to_uniform=True)
    twin = from_torch.load(tmp_path / "stock.pth").config
    stock = stock_sam(twin)
    stock.load_state_dict(torch.load(tmp_path / "stock.pth", weights_only=True), strict=True)
    images = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    expected = embed(ours, images)
    with torch.no_grad():
        found = stock.image_encoder(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))


def test_parameters_with_attributes_are_read(published, tmp_path):
    """PyTorch pickles those by another function."""
    ours, _ = published
    state = {name: torch.from_numpy(array) for name, array in to_torch.to_state_dict(ours).items()}
    marked = nn.Parameter(state["image_encoder.pos_embed"])
    marked.pruned_dims = [3]
    torch.save({**state, "image_encoder.pos_embed": marked}, tmp_path / "marked.pth")
    chex.assert_trees_all_equal(from_torch.load(tmp_path / "marked.pth").params, ours.params)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_huggingface_folders_of_transformers_4(tmp_path, weights):
    """SlimSAM-uniform: 12 heads of 14; one matrix under two names; more fields than we write."""
    config = tiny_config(image_size=(64, 64), embed_dim=168, heads=12, head_dim=14, mlp_dim=696)
    ours = random_sam(config, 2)
    folder = tmp_path / "SlimSAM-uniform-77"
    to_torch.save_huggingface(ours, folder)
    state = load_file(folder / "model.safetensors")
    shared = state["shared_image_embedding.positional_embedding"].clone()
    state["prompt_encoder.shared_embedding.positional_embedding"] = shared
    (folder / "model.safetensors").unlink()
    if weights == "pytorch_model.bin":
        torch.save(state, folder / weights)
    elif weights.endswith(".index.json"):
        places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
        for shard in set(places.values()):
            torch.save({name: state[name] for name in state if places[name] == shard}, folder / shard)
        (folder / weights).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        from safetensors.torch import save_file

        save_file(state, folder / weights)
    description = json.loads((folder / "config.json").read_text())
    description |= {"initializer_range": 0.02, "torch_dtype": "float32", "transformers_version": "4.29.0.dev0"}
    (folder / "config.json").write_text(json.dumps(description))
    found = from_torch.load(folder)
    assert found.config == config
    chex.assert_trees_all_equal(found.params, ours.params)
