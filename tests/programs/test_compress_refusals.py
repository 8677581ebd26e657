"""One clear line for everything that can go wrong with the main command, and nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from converters import from_torch
from helpers.images import truncated
from helpers.models import SQUARE, random_sam
from helpers.programs import run_program
from helpers.runs import compress_options
from slimsam_jax import checkpoint
from slimsam_jax.api import compress_with
from slimsam_jax.compression import prepare as run_module
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.steps import Distill, Optimizer, Validation
from slimsam_jax.errors import InputError, RunError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--ratio", "0"), "--ratio 0 is not the share"),
        (("--ratio", "1"), "--ratio 1 is not the share"),
        (("--ratio", "77"), "0 < ratio < 1 (for 77 % give 0.77)"),
        (("--ratio", "half"), "--ratio half is not a number"),
        (("--batch", "0"), "--batch 0 must be at least 1"),
        (("--steps", "-1"), "--steps -1 must be at least 0"),
        (("--teacher", "missing.pth"), "missing.pth does not exist"),
        (("--teacher", "{root}/images/0.png"), "not a PyTorch zip checkpoint"),
        (("--teacher", "{root}/images"), "not a model folder"),
        (("--images", "{root}/teacher"), "holds no images"),
        (("--images", "{root}/nowhere"), "nowhere does not exist; give a folder of images"),
        (("--out", "{root}/val"), "is not empty"),
        (("--out", "{root}/val/0.png"), "is a file"),
        (("--resume",), "no unfinished run"),
        (("--seed", "-1"), "--seed -1 must be between 0 and"),
        (("--batch", "100"), "--batch 100 is more than the 5 images"),
        (("--recipe", "magic"), "magic"),
        (("--budget", "9.1M"), "write params=9.1M, macs=47G or latency=120ms"),
        (("--budget", "params=9G"), "choose something between"),
        (("--budget", "params=30k", "--ratio", "0.5"), "give one of them"),
        (("--set", "prune.ratio=0.5", "--ratio", "0.7"), "prune.ratio and --ratio or --budget both say how much"),
        (
            ("--set", "prune.ratio=0.5", "--budget", "params=30k"),
            "prune.ratio and --ratio or --budget both say how much",
        ),
        (("--set", "prune.importance_loss=masks"), "a projection needs no labels"),
        (("--set", "quirks.zeroed_rel_pos=true"), "known bugs are of cuts of whole channels"),
        (("--set", "prune.roundto=8"), "the nearest are prune.round_to"),
        (("--set", "prune.round_to=40"), "choose a smaller round_to"),
        (("--set", "prune.round_to=4", "--set", "prune.min_keep=0.1"), "--set is given twice"),
        (("--recipe", "slimsam", "--ratio", "0.95"), "leaves nothing of the embedding"),
        (("--recipe", "taylor", "--set", "prune.importance_loss=masks"), "needs annotated images"),
        (("--recipe", "taylor", "--set", "prune.head_channels=whole", "--uniform"), "goes neither with --uniform"),
        (("--set", "distill.flip=true", "--cache", "cache"), "goes with neither flip nor crop"),
        (("--cache", "{root}/val/0.png"), "cannot be made a folder"),
        (("--cache-as", "int8"), "give --cache FOLDER, too"),
        (("--set", "distill.crop=0"), "crop 0.0 must be at least 0.01"),
        (("--set", "distill.ema=1"), "ema 1.0 must be a number from 0 to 1"),
        (("--set", "multiple=8"), "it is called prune.round_to=8 since 0.3"),
        (("--set", "alternate=true"), "since 0.3 a recipe is a list of steps"),
        (("--criterion", "fisher"), "--criterion: it is called prune.criterion=VALUE since 0.3 (--set NAME=VALUE)"),
        (("--least=0.1",), "--least: it is called prune.min_keep=0.1 since 0.3"),
        (("--passes", "3"), "--passes: it is distill.epochs since 0.3"),
        (("--prune.min-keep=0.1",), "--prune.min-keep: it is a choice of the recipe: --set prune.min_keep=0.1"),
        (("--nothing",), "Unrecognized options: --nothing"),
        (("--limit", "0"), "--limit 0 must be at least 1"),
        (("--set", "distill.clip=-1"), "clip -1.0 must be at least 0"),
        (("--fsdp", "3"), "--fsdp 3 does not divide the 1 devices"),
        (("--accumulate", "2", "--batch", "3"), "must be a multiple of the 1 devices times the 2 parts"),
        (("--distributed", "here"), "give auto, or HOST:PORT,PROCESSES,INDEX"),
        (("--distributed", "127.0.0.1:1,2,2"), "give auto, or HOST:PORT,PROCESSES,INDEX"),
    ],
)
def test_bad_input_is_one_clear_line(material, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    given = {
        "--teacher": material / "teacher",
        "--images": material / "images",
        "--out": tmp_path / "out",
        "--steps": 1,
    }
    changed = [str(c).format(root=material) for c in changes]
    arguments = [part for name, value in given.items() if name not in changed for part in (name, value)]
    code, _, error = run_program(monkeypatch, capsys, "compress", *arguments, *changed)
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_read_are_refused_before_anything_is_written(material, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken").mkdir()
    truncated(tmp_path / "broken" / "x.jpg")
    for name in ("--images", "--val"):
        given = {"--teacher": material / "teacher", "--images": material / "images", "--out": tmp_path / "out"}
        given[name] = tmp_path / "broken"
        arguments = [part for pair in given.items() for part in pair]
        code, _, error = run_program(monkeypatch, capsys, "compress", *arguments)
        assert code == 2 and "none of the 1 images can be read" in error
        assert not (tmp_path / "out").exists()


def test_unreadable_images_of_val_are_counted(material, tmp_path, without_figure, monkeypatch):
    """At the start, if they are met there; else when all is written."""
    shutil.copytree(material / "val", tmp_path / "val")
    truncated(tmp_path / "val" / "z.jpg")
    options = compress_options(material, tmp_path / "slim", val=(tmp_path / "val",), steps=0)
    with pytest.raises(InputError, match=r"1 of 3 images of --val cannot be used, more than .* 0\.1; .*z\.jpg"):
        compress_with(options)
    assert not (tmp_path / "slim").exists()
    monkeypatch.setattr("slimsam_jax.compression.prepare.IMAGES", 2)
    with pytest.raises(RunError, match=r"slim is finished, and measured on the rest; but 1 of 3 images of --val"):
        compress_with(options)
    assert json.loads((tmp_path / "slim" / "report.json").read_text())["images"] == 2
    assert not (tmp_path / "slim" / "checkpoints").exists()
    compress_with(dataclasses.replace(options, out=tmp_path / "other", max_broken=0.4))


def test_images_held_out_are_a_share_of_all_images(material, tmp_path):
    shutil.copytree(material / "images", tmp_path / "images")
    truncated(tmp_path / "images" / "0.png")  # the one of six that is held out
    held = lambda **kw: compress_options(material, tmp_path / "slim", images=(tmp_path / "images",), val=(), **kw)
    with pytest.raises(InputError, match=r"none of the 1 images"):
        run_module.prepare(held(), from_torch.load(material / "teacher"))
    for i in range(3):
        shutil.copy(material / "images" / "1.png", tmp_path / "images" / f"9{i}.png")
    assert len(run_module.prepare(held(max_broken=1 / 9), from_torch.load(material / "teacher")).val) == 2
    with pytest.raises(InputError, match=r"1 of 9 images cannot be used, and --strict"):
        run_module.prepare(held(strict=True), from_torch.load(material / "teacher"))


def test_uniform_needs_a_uniform_teacher(material, tmp_path, monkeypatch, capsys):
    blocks = (SQUARE.blocks[0], dataclasses.replace(SQUARE.blocks[1], mlp_dim=8))
    checkpoint.save(random_sam(dataclasses.replace(SQUARE, blocks=blocks)), tmp_path / "teacher")
    arguments = ("--teacher", tmp_path / "teacher", "--images", material / "images", "--out", tmp_path / "out")
    code, _, error = run_program(monkeypatch, capsys, "compress", *arguments, "--uniform")
    assert code == 2 and "--uniform needs a teacher whose blocks are alike" in error


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(material, tmp_path, monkeypatch, capsys):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_file", full)
    arguments = ("--teacher", material / "teacher", "--images", material / "images", "--out", tmp_path / "out")
    code, _, error = run_program(monkeypatch, capsys, "compress", *arguments, "--steps", "1")
    assert code == 1 and "error: cannot write" in error and error.endswith("No space left on device\n")
    assert not [p for p in (tmp_path / "out").rglob("*") if "safetensors" in p.name]


def test_an_unwritable_output_is_one_clear_line(material, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    arguments = ("--teacher", material / "teacher", "--images", material / "images", "--out", tmp_path / "file" / "out")
    code, _, error = run_program(monkeypatch, capsys, "compress", *arguments)
    assert code == 2 and "cannot be written" in error and error.count("\n") == 1


def test_numbers_that_are_not_finite_stop_the_run(material, tmp_path, monkeypatch, capsys):
    arguments = ("--teacher", material / "teacher", "--images", material / "images", "--steps", "3", "--out")
    optimizer = Optimizer(lr=1e-3, schedule="constant")
    object.__setattr__(optimizer, "lr", 1e30)  # more than a user may ask for
    wild = (*RECIPES["default"][:2], Distill("none", optimizer=optimizer, validation=Validation(1)))
    monkeypatch.setitem(RECIPES, "default", wild)
    code, _, error = run_program(monkeypatch, capsys, "compress", *arguments, tmp_path / "out")
    assert code == 1 and "error: the loss of step 2 is not finite (images" in error  # the first's is still the start's
    assert ".png" in error
    assert not list((tmp_path / "out").rglob("*.orbax-checkpoint-tmp"))
    judged = (*wild[:2], dataclasses.replace(wild[2], validation=Validation(2)))  # after each of two steps
    monkeypatch.setitem(RECIPES, "default", judged)
    arguments = (*arguments[:5], "1", "--out")
    code, _, error = run_program(monkeypatch, capsys, "compress", *arguments, tmp_path / "out1")
    assert code == 1 and "error: the student after step 1 gives no finite outputs" in error
    assert not list((tmp_path / "out1").rglob("best"))
    sam = random_sam(SQUARE)
    sam.params["image_encoder"]["pos_embed"][0, 0, 0] = np.nan
    checkpoint.save(sam, tmp_path / "teacher")
    arguments = ("--teacher", tmp_path / "teacher", *arguments[2:])
    code, _, error = run_program(monkeypatch, capsys, "compress", *arguments, tmp_path / "out2")
    assert code == 2 and "pos_embed holds values that are not finite" in error
