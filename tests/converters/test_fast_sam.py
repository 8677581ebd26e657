"""FastSAM's files: names and shapes of the published sizes, pickles of whole modules as data, there and back."""

from __future__ import annotations

import json
import re
import sys
import types

import jax
import numpy as np
import pytest
import torch

from converters import from_torch, to_onnx, to_torch
from converters.tables import fast_sam as table
from helpers import golden_fast_sam as golden
from helpers.fast_sam_models import TINY, random_fast_sam
from slimsam_jax import checkpoint
from slimsam_jax.errors import InputError
from slimsam_jax.models.fast_sam import folded
from slimsam_jax.models.fast_sam_config import PRESETS

COUNTED = json.loads(golden.COUNTS.read_text())


@pytest.fixture(scope="module")
def model():
    return random_fast_sam()


@pytest.fixture(scope="module")
def state(model):
    return to_torch.to_state_dict(model)


@pytest.mark.parametrize("name", COUNTED)
def test_names_and_shapes_of_the_published_sizes(name):
    """Of zeros that take no memory: broadcast from one."""
    shapes = COUNTED[name]["state_dict"]
    state = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
    state |= {n: np.int64(0) for n in shapes if n.endswith(table.COUNTER)}
    state[table.BINS_NAME] = np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1)
    config = table.config_of(table.shapes(used(state), table.rows_of(PRESETS[name]), name))
    assert config == PRESETS[name]
    back = table.to_state_dict(config, jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), tree_of(name)))
    assert {n: list(array.shape) for n, array in back.items()} == shapes
    assert {n for n, array in back.items() if array.dtype == np.int64} == {n for n in shapes if n.endswith("tracked")}


def used(state):
    return {n: array for n, array in state.items() if n != table.BINS_NAME and not n.endswith(table.COUNTER)}


def tree_of(name):
    from slimsam_jax.models.fast_sam import abstract_params

    return abstract_params(PRESETS[name])


def test_there_and_back_is_exact(model, state):
    config, params = table.from_state_dict(state, image_size=64)
    assert config == TINY
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    again = table.to_state_dict(config, params)
    assert again.keys() == state.keys() and all(np.array_equal(again[n], state[n]) for n in state)


def test_a_fused_file_has_biases_in_place_of_batch_norms(model):
    fused = folded(model)
    state = to_torch.to_state_dict(fused)
    assert "model.0.conv.bias" in state and not any(".bn." in name for name in state)
    config, params = table.from_state_dict(state, image_size=64)
    assert config == fused.config
    jax.tree.map(np.testing.assert_array_equal, params, fused.params)


@pytest.fixture
def foreign(monkeypatch):
    """A module of a package that is there while a file is written, and not when it is read."""
    module = types.ModuleType("ultralytics_of_the_test.nn.tasks")
    kinds = {name: type(name, (torch.nn.Module,), {"__module__": module.__name__}) for name in ("Model", "Part")}
    module.__dict__.update(kinds)
    packages = [module.__name__.rsplit(".", i)[0] for i in range(3)]
    for name in packages:
        monkeypatch.setitem(sys.modules, name, module)

    def save(state, path, **more):
        root = kinds["Model"]()
        for name, array in state.items():
            *parents, leaf = name.split(".")
            part = root
            for parent in parents:
                part = part._modules.setdefault(parent, kinds["Part"]())
            tensor = torch.from_numpy(np.array(array))
            if tensor.dtype == torch.float32 and not leaf.startswith("running"):
                part.register_parameter(leaf, torch.nn.Parameter(tensor))
            else:
                part.register_buffer(leaf, tensor)
        torch.save({"epoch": -1, "model": root.half(), "ema": None, "train_args": {"imgsz": 1024}, **more}, path)
        for package in packages:
            monkeypatch.delitem(sys.modules, package)

    return save


def test_a_published_pickle_is_read_as_data(model, state, foreign, tmp_path):
    """A whole module in half precision, whose classes nobody here has."""
    foreign(state, tmp_path / "FastSAM-s.pt", date="2023", optimizer=None)
    found = from_torch.load(tmp_path / "FastSAM-s.pt", image_size=64)
    assert found.config == TINY and found.provenance["source"] == "FastSAM-s.pt"
    assert "ultralytics_of_the_test" not in sys.modules
    half = lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float16).astype(np.float32))
    jax.tree.map(half, found.params, model.params)
    assert from_torch.load(tmp_path / "FastSAM-s.pt").config.image_size == 1024


def test_the_doors_of_files(model, tmp_path):
    checkpoint.save(model, tmp_path / "folder")
    description = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (description["family"], description["provenance"]) == ("fast_sam", {"source": "random"})
    to_torch.main(tmp_path / "folder", tmp_path / "fast.pth")
    assert all(name.startswith("model.") for name in torch.load(tmp_path / "fast.pth"))
    from_torch.main(tmp_path / "fast.pth", tmp_path / "again")
    again = from_torch.load(tmp_path / "again", image_size=64)  # which `to_torch` has noted
    assert again.config == TINY
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_what_it_cannot_become_is_one_line(model, tmp_path):
    checkpoint.save(model, tmp_path / "folder")
    for call, message in (
        (
            lambda: to_torch.main(tmp_path / "folder", tmp_path / "x", "hf"),
            "a fast_sam, and transformers has no",
        ),
        (lambda: to_onnx.main(tmp_path / "folder", tmp_path / "x"), "this is a FastSAM, which has neither"),
        (lambda: from_torch.load(tmp_path / "folder", image_size=96), "takes images of 64 x 64 pixels"),
    ):
        with pytest.raises(InputError, match=message):
            call()
        assert not (tmp_path / "x").exists()


def without(*names):
    return lambda state: {name: array for name, array in state.items() if not any(n in name for n in names)}


def changed(name, shape):
    return lambda state: {**state, name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("dfl"), "does not hold a FastSAM: it has no model.22.dfl"),
        (changed("model.22.dfl.conv.weight", (1, 16, 1, 1)), "must be the numbers 0 to 15"),
        (without("model.9.cv2.conv"), "- model.9.cv2.conv.weight"),
        (without("model.5.bn.num_batches"), "- model.5.bn.num_batches_tracked"),
        (changed("model.22.one2one.weight", (3,)), "+ model.22.one2one.weight"),
        (without("model.4.m."), "its stages have 1, 0, 1"),
        (changed("model.4.m.700.cv1.conv.weight", (3, 3, 3, 3)), "- model.4.m.2.cv1"),
        (changed("model.1.conv.weight", (8, 6, 3)), "model.1.conv.weight has shape (8, 6, 3), which does not fit"),
        (changed("model.1.conv.weight", (8, 5, 3, 3)), "arrays of the wrong shape: layers_1/kernel"),
        (changed("model.22.cv3.0.2.weight", (80, 8, 1, 1)), "arrays of the wrong shape: scores_0/out/kernel"),
        (changed("model.4.m.0.cv2.conv.weight", (5, 4, 3, 3)), "residual blocks of another width"),
        (changed("model.0.bn.running_var", (6, 1)), "running_var has shape (6, 1)"),
        (lambda s: {**s, "model.0.conv.weight": np.full((6, 3, 3, 3), np.nan, np.float32)}, "not finite in float32"),
    ],
)
def test_strange_files_are_refused_in_one_line(edit, message, state, tmp_path):
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in edit(state).items()}
    torch.save(tensors, tmp_path / "strange.pt")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        from_torch.load(tmp_path / "strange.pt", image_size=64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [65, (64, 96), -32, 1 << 30])
def test_sizes_that_no_frame_has(size, state, tmp_path):
    torch.save({name: torch.from_numpy(np.array(array)) for name, array in state.items()}, tmp_path / "fast.pt")
    with pytest.raises(InputError, match="is one side in pixels, a multiple of 32"):
        from_torch.load(tmp_path / "fast.pt", image_size=size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {}}, "not an architecture of slimsam_jax"),
        ({"architecture": {"stages": [{"first": 1, "second": 1, "blocks": [[1, 1]] * 64, "out": 1}] * 8}}, "convs"),
        ({"family": "fast_sam_2"}, "is of the family 'fast_sam_2'"),
    ],
)
def test_folders_that_are_none(changes, message, model, tmp_path):
    checkpoint.save(model, tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description = {**description, **changes}
    if changes.get("architecture"):
        description["architecture"] = {**json.loads(json.dumps(TINY.to_json())), **changes["architecture"]}
        message = "- layers_2/blocks_63/cv1/kernel"  # seen before the architecture is traced
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=re.escape(message)):
        checkpoint.load(tmp_path)
