"""The one file that takes slim SAMs to PyTorch: it needs nothing of ours, and reads what its shapes tell."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from converters import from_torch, to_torch
from helpers.models import SQUARE, UNEVEN, embed, random_sam
from helpers.peers import segment_anything, state_dict, stock_sam
from slimsam_jax import data
from slimsam_jax.models.config import GLOBAL, Block, preset

RANDOM = np.random.default_rng(0)


@pytest.fixture()
def pth(uneven, tmp_path):
    to_torch.main(uneven, tmp_path / "uneven.pth")
    return tmp_path / "uneven.pth"


def normal(*shape) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def assert_embeds_alike(model, sam, images: np.ndarray):
    """Within 1e-5 of the largest value."""
    expected = embed(sam, images)
    with torch.no_grad():
        found = model.image_encoder(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_it_has_the_stock_names_and_our_values(uneven, slim_sam_torch):
    sam, model = from_torch.load(uneven), slim_sam_torch.load(uneven)
    expected, found = to_torch.to_state_dict(sam), state_dict(model)
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert_embeds_alike(model, sam, normal(2, 64, 64, 3))
    assert (model.pixel_mean.flatten().numpy() == np.float32(sam.config.pixel_mean)).all() and not model.training


def test_it_equals_the_teacher(slim_sam_torch):
    folder = data.embedded_teacher()
    assert_embeds_alike(slim_sam_torch.load(folder), from_torch.load(folder), normal(1, 256, 256, 3))


def test_it_is_read_back(uneven, slim_sam_torch, tmp_path):
    """Fine-tuned in PyTorch, a model comes back by its state dict, unequal widths and all."""
    torch.save(slim_sam_torch.load(uneven).state_dict(), tmp_path / "tuned.pth")
    assert from_torch.load(tmp_path / "tuned.pth").config == UNEVEN
    again = slim_sam_torch.load(tmp_path / "tuned.pth")
    assert again.image_encoder.img_size == 64 and again.image_encoder.blocks[1].attn.num_heads == 3


def test_it_needs_nothing_of_ours(slim_sam_torch):
    tree = ast.parse(Path(slim_sam_torch.__file__).read_text())
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = froms | {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    standard = {name for name in sys.stdlib_module_names if name != "this"}
    assert {name.partition(".")[0] for name in names} - standard == {"torch", "safetensors", "segment_anything"}


@pytest.mark.parametrize("damage", ["no folder", "no weights", "truncated", "format", "other shapes", "rectangle"])
def test_a_folder_is_refused_in_one_line(uneven, slim_sam_torch, damage):
    weights, config = uneven / "model.safetensors", uneven / "config.json"
    description = json.loads(config.read_text())
    if damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "format":
        description["format"] = "another"
    elif damage == "other shapes":
        description["architecture"]["blocks"][0]["mlp_dim"] += 1
    elif damage == "rectangle":
        description["architecture"]["image_size"] = [64, 48]
    config.write_text(json.dumps(description))
    assert_refused(slim_sam_torch, uneven / "nothing" if damage == "no folder" else uneven)


def assert_refused(slim_sam_torch, path: Path, reason: str = ".", **overrides) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} cannot be loaded: .*{reason}") as caught:
        slim_sam_torch.load(path, **overrides)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- a .pth by its shapes


CONFIGS = {name: preset(name) for name in ("vit_b", "vit_p77", "small")} | {
    "uneven": UNEVEN,
    "window larger than the grid": dataclasses.replace(SQUARE, blocks=(Block(2, 6, 8, 6), Block(1, 3, 5, GLOBAL))),
    "other sizes": dataclasses.replace(
        UNEVEN, patch_size=8, out_chans=48, decoder_depth=1, multimask_outputs=2, mask_in_chans=4, iou_head_dim=24
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_tell_the_architecture(slim_sam_torch, name):
    """Made anew from them, a model has the same arrays."""
    import flax.traverse_util

    from converters.tables.sam import rows
    from slimsam_jax.models.sam import abstract_params

    flat = flax.traverse_util.flatten_dict(abstract_params(CONFIGS[name]), sep="/")
    state = {}
    for row in rows(CONFIGS[name]):
        state[row.name] = row.to_theirs(np.broadcast_to(np.float32(0), flat[row.path].shape))
    found = slim_sam_torch.architecture_of({k.replace(".q.", ".qkv."): triple(k, v) for k, v in state.items()})
    assert found == json.loads(json.dumps(CONFIGS[name].to_json()), object_hook=tuples)


def triple(name: str, array: np.ndarray) -> np.ndarray:
    """q's array as that of q, k and v together."""
    return np.broadcast_to(np.float32(0), (3 * len(array), *array.shape[1:])) if ".attn.q." in name else array


def tuples(fields: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) and k != "blocks" else v for k, v in fields.items()}


def test_what_no_shape_tells_is_in_the_pth(tmp_path, slim_sam_torch):
    overrides = {"decoder_heads": 4, "pixel_mean": (1.0, 2.0, 3.0), "pixel_std": (4.0, 5.0, 6.0)}
    to_torch.save_sam(random_sam(dataclasses.replace(SQUARE, **overrides)), tmp_path / "other.pth")
    stock_sam(SQUARE).load_state_dict(read(tmp_path / "other.pth"), strict=True)  # stock code passes it over

    def found(name: str, **given):
        model = slim_sam_torch.load(tmp_path / name, **given)
        heads = model.mask_decoder.transformer.layers[0].self_attn.num_heads
        return heads, model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()

    assert found("other.pth") == (4, [1, 2, 3], [4, 5, 6])
    assert found("other.pth", pixel_mean=(7, 8, 9)) == (4, [7, 8, 9], [4, 5, 6])
    torch.save(dict(read(tmp_path / "other.pth")), tmp_path / "anew.pth")  # a plain dict has no room for it
    assert found("anew.pth", **overrides) == (4, [1, 2, 3], [4, 5, 6])
    assert found("anew.pth")[0] == 8
    assert_refused(slim_sam_torch, tmp_path / "anew.pth", "given was embed_dim", embed_dim=3)


def read(path: Path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("damage", ["missing", "no pth", "truncated", "no SAM", "surplus", "other heads", "no tensor"])
def test_a_pth_is_refused_in_one_line(pth, slim_sam_torch, damage):
    state = dict(read(pth))
    if damage == "surplus":
        state["image_encoder.extra"] = torch.zeros(1)
    elif damage == "other heads":
        state["image_encoder.blocks.0.attn.rel_pos_h"] = torch.zeros(5, 4)
    elif damage == "no tensor":
        state["image_encoder.pos_embed"] = "text"
    torch.save({"a": torch.zeros(1)} if damage == "no SAM" else state, pth)
    if damage == "no pth":
        pth.write_text("text")
    elif damage == "truncated":
        pth.write_bytes(pth.read_bytes()[:1000])
    elif damage == "missing":
        pth.unlink()
    assert_refused(slim_sam_torch, pth)


# -------------------------------------------------------------------------------- tools with a registry


def test_a_builder_wants_a_checkpoint(slim_sam_torch, pth, uneven):
    slim_sam_torch.register("slim", pth)
    slim_sam_torch.register("bare")
    slim_sam_torch.register("another", pth.with_name("absent.pth"))
    registry = segment_anything().sam_model_registry
    assert registry["slim"]().image_encoder.img_size == 64
    assert all(registry["another"](source).image_encoder.img_size == 64 for source in (uneven, str(pth)))
    with pytest.raises(ValueError, match="bare has no checkpoint"):
        registry["bare"]()


TOOL = """
import sys
from segment_anything import sam_model_registry
from beside import name
if __name__ == "__main__":
    sam = sam_model_registry[sys.argv[2]](checkpoint=sys.argv[1])
    print(name, *sys.argv[1:], len(sam.image_encoder.blocks))
"""


@pytest.mark.parametrize("model_type", ["slim", "vit_b", "default"])
@pytest.mark.parametrize("as_module", [False, True])
def test_tools_find_slim_models(slim_sam_torch, pth, tmp_path, monkeypatch, capsys, as_module, model_type):
    (tmp_path / "tool.py").write_text(TOOL)
    (tmp_path / "beside.py").write_text("name = 'ran'")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    if as_module:
        monkeypatch.chdir(tmp_path)
    tool = ["-m", "tool"] if as_module else [str(tmp_path / "tool.py")]
    slim_sam_torch.run([*tool, str(pth), model_type])
    assert capsys.readouterr().out.endswith(f"ran {pth} {model_type} 2\n")


@pytest.mark.parametrize("arguments", [[], ["-m"]])
def test_without_a_tool_it_says_how_it_is_used(slim_sam_torch, arguments):
    with pytest.raises(SystemExit, match=r"^usage: python slim_sam_torch\.py"):
        slim_sam_torch.run(arguments)
