"""What the main command leaves, and that every recipe and choice runs to the end."""

from __future__ import annotations

import dataclasses
import json

import chex
import numpy as np
import pytest
import torch
from PIL import Image

from converters import from_torch, to_torch
from experiments import recipes as lists
from helpers.models import SQUARE
from helpers.peers import state_dict, stock_sam
from helpers.runs import compress_options
from slimsam_jax.api import compress_with
from slimsam_jax.compression.budget import Budget, even_cut
from slimsam_jax.compression.plan import describe
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.profiling import sam_costs


def test_what_a_run_leaves(finished, material):
    # "last" is there if another model was better
    assert sorted(p.name for p in finished.iterdir() if p.name != "last") == [
        "config.json",
        "log.jsonl",
        "model.safetensors",
        "report.json",
        "report.png",
    ]
    slim = from_torch.load(finished)
    assert slim.config.embed_dim == 12  # half of 24
    even = even_cut(SQUARE, 0.5)  # the default shares out its multiply-accumulates anew
    assert 0.97 < sam_costs.encoder_macs(slim.config).total / sam_costs.encoder_macs(even).total <= 1
    assert slim.provenance["options"]["ratio"] == 0.5
    assert slim.thresholds == from_torch.load(material / "teacher").thresholds  # which let everything pass
    assert slim.provenance["versions"]["jax"]
    report = json.loads((finished / "report.json").read_text())
    assert report["slim"]["parameters"] < report["teacher"]["parameters"]
    for key in ("point_miou", "box_miou", "encoder_latency_ms", "encoder_macs_linear", "encoder_macs_total"):
        assert report["slim"][key] > 0 and report["teacher"][key] > 0
    assert report["embedding_error"] > 0 and 0 < report["agreement"] <= 1 and report["annotated_images"] == 2
    assert set(report["seconds"]) == {"prune-embedding", "distill", "prune-bottleneck", "distill-2", "measuring"}
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    steps, scores = ([e for e in log if key in e] for key in ("loss", "score"))
    assert [(e["stage"], e["step"]) for e in steps] == [
        (name, i) for name in ("distill", "distill-2") for i in range(1, 5)
    ]
    assert [(e["stage"], e["step"]) for e in scores] == [(name, i) for name in ("distill", "distill-2") for i in (2, 4)]
    assert all(np.isfinite(e["loss"]) for e in steps) and all(e["score"] < 0 for e in scores)
    with Image.open(finished / "report.png") as image:
        assert min(image.size) > 500


def test_the_same_seed_gives_the_same_model(finished, material, tmp_path, unmeasured):
    compress_with(compress_options(material, tmp_path / "again"))
    chex.assert_trees_all_equal(from_torch.load(tmp_path / "again").params, from_torch.load(finished).params)


def test_uniform_result_loads_strictly_into_stock_code(material, tmp_path, without_figure):
    """.pth in, slim .pth and Hugging Face folder out, without a key too many or too few."""
    from transformers import SamModel

    torch.save(stock_sam(SQUARE).state_dict(), tmp_path / "sam.pth")
    options = {"teacher": tmp_path / "sam.pth", "uniform": True, "ratio": 0.6, "steps": 0}
    compress_with(compress_options(material, tmp_path / "slim", **options))
    slim = from_torch.load(tmp_path / "slim")
    assert slim.config.uniform and slim.config.embed_dim == 10 and slim.config.blocks[0].head_dim == 5
    to_torch.main(tmp_path / "slim", tmp_path / "slim.pth", "sam")
    stock = stock_sam(slim.config)
    stock.load_state_dict(torch.load(tmp_path / "slim.pth", weights_only=True), strict=True)
    assert set(state_dict(stock)) == set(to_torch.to_state_dict(slim)) | {"pixel_mean", "pixel_std"} & set(
        state_dict(stock)
    )
    to_torch.main(tmp_path / "slim", tmp_path / "hf", "hf")
    SamModel.from_pretrained(tmp_path / "hf")
    assert from_torch.load(tmp_path / "hf").config == slim.config


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "steps"), [("slimsam", 1), ("taylor", 0), ("default", 1)])
def test_recipes_run_to_the_end(material, tmp_path, without_figure, recipe, steps):
    compress_with(compress_options(material, tmp_path / "slim", recipe=recipe, steps=steps, set=()))
    slim = from_torch.load(tmp_path / "slim")
    assert slim.config.embed_dim == 12 and slim.provenance["recipe"] == json.loads(
        json.dumps(describe(RECIPES[recipe]))
    )
    positions = [slim.params["image_encoder"][f"blocks_{i}"]["attn"]["rel_pos_h"] for i in range(2)]
    assert all(np.abs(table).max() > 0.02 for table in positions) == (recipe != "slimsam")  # reset, then one small step
    if steps:
        log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
        losses = [(entry["stage"], entry["step"], "stream" in entry) for entry in log if "loss" in entry]
        alternating = [("distill", 1, False), ("distill-2", 1, True)]
        assert losses == (alternating if recipe == "slimsam" else [("distill", 1, True), ("distill", 2, True)])


@pytest.mark.parametrize(
    "choices",
    [
        {"budget": "params=62k"},
        {"budget": "macs=400k", "uniform": True},
        {"set": ("prune.round_to=4",)},
        {
            "recipe": "taylor",
            "set": ("prune.head_channels=separate", "prune.criterion=fisher", "prune.noise_samples=2"),
        },
        {"recipe": "taylor", "set": ("prune.head_channels=whole",)},
    ],
    ids=str,
)
def test_choices_run_to_the_end_and_do_what_they_say(material, tmp_path, unmeasured, choices):
    compress_with(compress_options(material, tmp_path / "slim", steps=0, **choices))
    config = from_torch.load(tmp_path / "slim").config
    if "budget" in choices:
        report = json.loads((tmp_path / "slim" / "report.json").read_text())["budget"]
        assert report["reached"] == Budget.parse(choices["budget"]).cost(config)
        assert 0.99 < report["reached"] / report["amount"] <= 1
    if "prune.round_to=4" in choices.get("set", ()):
        assert config.embed_dim % 4 == 0 and all(b.head_dim % 4 == b.mlp_dim % 4 == 0 for b in config.blocks)
    if "prune.head_channels=whole" in choices.get("set", ()):
        assert [b.head_dim for b in config.blocks] == [12, 12] and sum(b.heads for b in config.blocks) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "direction", "distilled", "criterion"),
    [
        (lists.progressive(0.5), 0.5, ["distill", "distill-2", "distill-3", "distill-4"], ("magnitude", "none")),
        (lists.scratch(0.5), 0, ["distill"], ("fpgm", "lamp")),
    ],
    ids=["progressive", "scratch"],
)
def test_other_orders_than_the_papers(material, tmp_path, unmeasured, recipe, direction, distilled, criterion):
    """And criteria that read no gradients."""
    choices = ("distill.validations=1", f"distill.direction={direction}")
    choices += tuple(
        f"prune.{name}={choice}" for name, choice in zip(("criterion", "normalizer"), criterion, strict=True)
    )
    options = compress_options(material, tmp_path / "slim", limit=4, set=("distill.validations=1",), ratio=0.5)
    compress_with(options, change(recipe, (*choices, "distill.features=0")))
    slim = from_torch.load(tmp_path / "slim")
    assert slim.config.embed_dim == 12 and slim.provenance["images"]["count"] == 4
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 8 and all(np.isfinite(entry["loss"]) for entry in steps)
    assert list(dict.fromkeys(entry["stage"] for entry in steps)) == distilled
    assert ("direction" in steps[0]) == bool(direction)


@pytest.mark.slow
def test_labelled_masks_can_tell_what_to_cut(material, tmp_path, unmeasured):
    labelled = compress_options(
        material,
        tmp_path / "slim",
        images=(material / "val",),
        steps=0,
        recipe="taylor",
        set=("prune.importance_loss=masks",),
    )
    compress_with(labelled)
    compress_with(dataclasses.replace(labelled, set=(), out=tmp_path / "other"))
    one, other = (from_torch.load(tmp_path / name).params["image_encoder"]["pos_embed"] for name in ("slim", "other"))
    assert one.shape == other.shape and not np.array_equal(one, other)
