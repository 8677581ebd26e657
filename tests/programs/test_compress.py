"""The main command: what it leaves, how it resumes, and one clear line for everything that can go wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import chex
import numpy as np
import pytest
import torch
from PIL import Image

from converters import from_torch, to_torch
from experiments import recipes as lists
from helpers.images import truncated
from helpers.models import SQUARE, random_sam
from helpers.peers import state_dict, stock_sam
from helpers.programs import program
from helpers.runs import compress_options
from slimsam_jax import checkpoint, cli
from slimsam_jax.api import compress_with
from slimsam_jax.compression import prepare as run_module
from slimsam_jax.compression import report
from slimsam_jax.compression.budget import Budget, even_cut
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.plan import describe
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Distill, Optimizer, Validation
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.profiling import reference_macs


@pytest.fixture
def without_figure(monkeypatch):
    """Leaves out the image of the report, where nobody looks at it."""
    monkeypatch.setattr(report, "draw", lambda *_: None)


def run(name, *arguments, monkeypatch, capsys) -> tuple[int, str]:
    """A command line, in this process: (exit code, standard error)."""
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, arguments)])
    code = 0
    try:
        cli.run(Options, compress_with) if name == "compress" else cli.run(program(name).main)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


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
    assert 0.97 < reference_macs.encoder_macs(slim.config).total / reference_macs.encoder_macs(even).total <= 1
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


def test_the_same_seed_gives_the_same_model(finished, material, tmp_path):
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
def test_choices_run_to_the_end_and_do_what_they_say(material, tmp_path, without_figure, choices):
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
    ("recipe", "direction", "distilled"),
    [
        (lists.progressive(0.5), 0.5, ["distill", "distill-2", "distill-3", "distill-4"]),
        (lists.scratch(0.5), 0, ["distill"]),
    ],
    ids=["progressive", "scratch"],
)
def test_other_orders_than_the_papers(material, tmp_path, without_figure, recipe, direction, distilled):
    choices = ("distill.validations=1", f"distill.direction={direction}", "prune.criterion=magnitude")
    options = compress_options(material, tmp_path / "slim", limit=4, set=("distill.validations=1",), ratio=0.5)
    compress_with(options, change(recipe, (*choices, "distill.features=0")))
    slim = from_torch.load(tmp_path / "slim")
    assert slim.config.embed_dim == 12 and slim.provenance["images"]["count"] == 4
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 8 and all(np.isfinite(entry["loss"]) for entry in steps)
    assert list(dict.fromkeys(entry["stage"] for entry in steps)) == distilled
    assert ("direction" in steps[0]) == bool(direction)


def test_labelled_masks_can_tell_what_to_cut(material, tmp_path, without_figure):
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


def test_inspect_command(material, tmp_path, monkeypatch, capsys):
    arguments = (material / "teacher", "--images", material / "images", "--ratios", "0.3", "--out", tmp_path / "x.png")
    code, _ = run("inspect", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    with Image.open(tmp_path / "x.png") as image:
        assert min(image.size) > 500
    for wrong, message in (
        (("--ratio", "1"), "must lie between 0 and 1"),
        (("--images", material / "teacher"), "holds no images"),
        (("--set", "recipe"), "NAME=VALUE"),
        (("--out", tmp_path), "is a folder"),
        (("--seed", "-1"), "--seed -1 must be"),
    ):
        given = [part for part in zip(arguments[1::2], arguments[2::2], strict=True) if part[0] != wrong[0]]
        given = [arguments[0], *(part for pair in given for part in pair)]
        code, error = run("inspect", *given, *wrong, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and message in error and error.count("\n") == 1


def test_inspect_without_images_lists_the_blocks(material, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prog", str(material / "teacher")])
    cli.run(program("inspect").main)
    out = capsys.readouterr().out
    assert "2 x 12" in out and f"{reference_macs.encoder_parameters(SQUARE) / 1e6:.3f}" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--ratio", "0"), "--ratio 0 is not the share"),
        (("--ratio", "1"), "--ratio 1 is not the share"),
        (("--ratio", "1.5"), "--ratio 1.5 is not the share"),
        (("--ratio", "half"), "half"),
        (("--batch", "0"), "--batch 0 must be at least 1"),
        (("--steps", "-1"), "--steps -1 must not be negative"),
        (("--teacher", "missing.pth"), "missing.pth does not exist"),
        (("--teacher", "{root}/images/0.png"), "not a PyTorch zip checkpoint"),
        (("--teacher", "{root}/images"), "not a model folder"),
        (("--images", "{root}/teacher"), "holds no images"),
        (("--images", "{root}/nowhere"), "not a folder of images"),
        (("--out", "{root}/val"), "is not empty"),
        (("--out", "{root}/val/0.png"), "is a file"),
        (("--resume",), "no unfinished run"),
        (("--seed", "-1"), "--seed -1 must be between 0 and"),
        (("--batch", "100"), "--batch 100 is more than the 5 images"),
        (("--recipe", "magic"), "magic"),
        (("--budget", "9.1M"), "write params=9.1M, macs=47G or latency=120ms"),
        (("--budget", "params=9G"), "choose something between"),
        (("--budget", "params=30k", "--ratio", "0.5"), "give one of them"),
        (("--set", "prune.roundto=8"), "the nearest are prune.round_to"),
        (("--set", "prune.round_to=40"), "choose a smaller round_to"),
        (("--set", "prune.round_to=4", "--set", "prune.min_keep=0.1"), "--set is given twice"),
        (("--recipe", "slimsam", "--ratio", "0.95"), "leaves nothing of the embedding"),
        (("--recipe", "taylor", "--set", "prune.importance_loss=masks"), "needs annotated images"),
        (("--recipe", "taylor", "--set", "prune.head_channels=whole", "--uniform"), "goes neither with --uniform"),
        (("--set", "distill.flip=true", "--cache", "cache"), "goes with neither flip nor crop"),
        (("--cache", "{root}/val/0.png"), "cannot be made a folder"),
        (("--set", "distill.crop=0"), "crop 0.0 must be at least 0.01"),
        (("--set", "distill.ema=1"), "ema 1.0 must be a number from 0 to 1"),
        (("--set", "multiple=8"), "it is called prune.round_to=8 since 0.3"),
        (("--set", "alternate=true"), "since 0.3 a recipe is a list of steps"),
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
    code, error = run("compress", *arguments, *changed, monkeypatch=monkeypatch, capsys=capsys)
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
        code, error = run("compress", *arguments, monkeypatch=monkeypatch, capsys=capsys)
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
    code, error = run("compress", *arguments, "--uniform", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "--uniform needs a teacher whose blocks are alike" in error


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(material, tmp_path, monkeypatch, capsys):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_file", full)
    arguments = ("--teacher", material / "teacher", "--images", material / "images", "--out", tmp_path / "out")
    code, error = run("compress", *arguments, "--steps", "1", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1 and "error: cannot write" in error and error.endswith("No space left on device\n")
    assert not [p for p in (tmp_path / "out").rglob("*") if "safetensors" in p.name]


def test_an_unwritable_output_is_one_clear_line(material, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    arguments = ("--teacher", material / "teacher", "--images", material / "images", "--out", tmp_path / "file" / "out")
    code, error = run("compress", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "cannot be written" in error and error.count("\n") == 1


def test_numbers_that_are_not_finite_stop_the_run(material, tmp_path, monkeypatch, capsys):
    arguments = ("--teacher", material / "teacher", "--images", material / "images", "--steps", "3", "--out")
    optimizer = Optimizer(lr=1e-3, schedule="constant")
    object.__setattr__(optimizer, "lr", 1e30)  # more than a user may ask for
    wild = (*RECIPES["default"][:2], Distill("none", optimizer=optimizer, validation=Validation(1)))
    monkeypatch.setitem(RECIPES, "default", wild)
    code, error = run("compress", *arguments, tmp_path / "out", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1 and "error: the loss of step 2 is not finite (images" in error  # the first's is still the start's
    assert ".png" in error
    assert not list((tmp_path / "out").rglob("*.orbax-checkpoint-tmp"))
    judged = (*wild[:2], dataclasses.replace(wild[2], validation=Validation(2)))  # after each of two steps
    monkeypatch.setitem(RECIPES, "default", judged)
    arguments = (*arguments[:5], "1", "--out")
    code, error = run("compress", *arguments, tmp_path / "out1", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1 and "error: the student after step 1 gives no finite embeddings" in error
    assert not list((tmp_path / "out1").rglob("best"))
    sam = random_sam(SQUARE)
    sam.params["image_encoder"]["pos_embed"][0, 0, 0] = np.nan
    checkpoint.save(sam, tmp_path / "teacher")
    arguments = ("--teacher", tmp_path / "teacher", *arguments[2:])
    code, error = run("compress", *arguments, tmp_path / "out2", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "pos_embed holds values that are not finite" in error


def test_predict_command(material, tmp_path, monkeypatch, capsys):
    common = ("--model", material / "teacher", "--image", material / "images" / "0.png")
    out = tmp_path / "new" / "p.png"
    code, _ = run(
        "predict", *common, "--point", "3,4", "--box", "1,2,20,15", "--out", out, monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0
    with Image.open(out) as drawn:
        assert drawn.size == (30, 20)
    for arguments, message in (
        ((), "at least one --point"),
        (("--point", "3"), "'3' is not X,Y"),
        (("--box", "1,2,3"), "is not X0,Y0,X1,Y1"),
        (("--point", "300,4"), "outside the image of 30 x 20"),
        (("--box", "9,9,1,1"), "is not a box"),
    ):
        code, error = run("predict", *common, "--out", out, *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and message in error
    code, error = run(
        "predict", *common, "--point", "1,1", "--out", tmp_path / "p.gif", monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 2 and "should end in .png" in error


def test_help_and_import_are_quick():
    """Nothing heavy is imported before the arguments are known to be good."""
    import subprocess

    commands = (
        "slimsam_jax.compress, slimsam_jax.evaluate, slimsam_jax.predict, slimsam_jax.inspect, converters.from_torch, "
        "converters.to_torch"
    )
    program = f"import sys, {commands}; print('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
