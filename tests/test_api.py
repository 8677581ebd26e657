"""The Python API: its examples run, its names stay functions, and it knows every option of the command."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

import converters
import slimsam_jax
from converters import model_card
from helpers.fast_sam_models import random_fast_sam
from helpers.images import write_annotation
from helpers.models import SQUARE, random_sam
from slimsam_jax import api, checkpoint
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.steps import Prune
from slimsam_jax.errors import InputError
from slimsam_jax.inference.fast_sam_predictor import FastSamPredictor

FUNCTIONS = [
    "load",
    "save",
    "compress",
    "evaluate",
    "predict",
    "quantize",
]  # in the order in which the examples build on each other
CLASSES = ["SamPredictor", "SamAutomaticMaskGenerator", "FastSamPredictor", "FastSamMaskGenerator"]
ROOT = Path(__file__).parents[1]


def example(name: str) -> str:
    """The code in a function's docstring."""
    (code,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(getattr(slimsam_jax, name)), re.DOTALL)
    return "\n".join(line.removeprefix("  ") for line in code.splitlines())


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """What the examples name: a teacher, photographs, annotated ones, and one to predict on."""
    root = tmp_path_factory.mktemp("api")
    checkpoint.save(random_sam(SQUARE), root / "sam_vit_b_01ec64.pth")  # a folder, which loads as well
    for folder, count in (("photos", 6), ("annotated", 2)):
        (root / folder).mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    for path in (root / "annotated").glob("*.png"):
        write_annotation(path)
    Image.new("RGB", (700, 400), "green").save(root / "truck.jpg")
    return root


@pytest.fixture(scope="module")
def said(there):
    """What the examples print, run there one after the other."""
    printed = io.StringIO()
    with contextlib.chdir(there), contextlib.redirect_stdout(printed):
        for name in FUNCTIONS:
            exec(compile(example(name), name, "exec"), {})
    return printed.getvalue().splitlines()


def test_the_examples_run_one_after_the_other(there, said):
    assert all(len(example(name).splitlines()) <= 5 for name in FUNCTIONS)
    assert said[0] == "24 (64, 64)" and said[-1].startswith("(1, 400, 700) [")
    assert {"sam_b", "slim77", "scores.json", "slim77_int4"} <= {path.name for path in there.iterdir()}
    slim = checkpoint.load(there / "slim77")
    assert slim.config.embed_dim == 6 and slim.provenance["options"]["ratio"] == 0.77


@pytest.mark.usefixtures("said")
def test_the_example_of_the_readme_runs_as_it_stands(there, monkeypatch):
    """But for the line that compresses, which is the docstring's, and has run."""
    monkeypatch.chdir(there)
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (line,) = [line for line in code.splitlines() if line.startswith("slim, report = ")]
    assert line in example("compress")
    found: dict = {}
    exec(code.replace(line, 'slim = slimsam_jax.load("slim77")'), found)
    assert found["masks"].shape == (1, 400, 700) and found["scores"].shape == (1,)
    assert isinstance(found["predictor"], slimsam_jax.SamPredictor) and isinstance(found["everything"], list)
    assert "point/iou" in found["result"].summary


def test_compress_takes_steps_and_returns_what_it_writes(there, tmp_path, capsys):
    slim, report = slimsam_jax.compress(
        there / "sam_vit_b_01ec64.pth",
        there / "photos",
        recipe=[Prune("embedding")],
        set=["prune.round_to=4"],
        out=tmp_path / "o",
    )
    assert "1 steps of your own" in capsys.readouterr().out
    assert slim.config.embed_dim == 12 and slim.config.blocks[0].mlp_dim == SQUARE.blocks[0].mlp_dim
    assert [step["round_to"] for step in slim.provenance["recipe"]] == [4]
    assert slim.provenance["options"]["recipe"] is None
    assert "with\n5 images by steps of its own, otherwise as by:" in model_card.origin(slim.provenance)
    assert set(report["seconds"]) == {"prune-embedding", "measuring"}
    chex.assert_trees_all_equal(slim.params, checkpoint.load(tmp_path / "o").params)


def test_models_in_memory_are_measured_as_those_on_disk(there):
    path, sam = there / "sam_vit_b_01ec64.pth", random_sam(SQUARE)
    result = slimsam_jax.evaluate((path, sam), there / "annotated", "point", resamples=10)
    assert result.names == ["sam_vit_b_01ec64.pth", "model 2"] and result.paths == [path, None]
    first, second = result.summary["point/iou"]
    assert first["mean"] == second["mean"] and second["difference"] == 0


def test_a_prompt_gives_one_mask_or_three(there):
    sam, image = random_sam(SQUARE), np.zeros((20, 30, 3), np.uint8)
    predictor = slimsam_jax.SamPredictor(sam)
    predictor.set_image(image)
    for several, count in ((False, 1), (True, 3)):
        found = slimsam_jax.predict(sam, image, box=[1, 2, 20, 15], multimask_output=several)
        assert found.masks.shape == (count, 20, 30) and found.iou_predictions.shape == (count,)
        np.testing.assert_array_equal(
            found.masks, predictor.predict(box=[1, 2, 20, 15], multimask_output=several).masks
        )


def test_a_text_and_its_clip_are_checked_before_the_network_runs(monkeypatch):
    model, image = random_fast_sam(), np.zeros((20, 30, 3), np.uint8)
    monkeypatch.setattr(FastSamPredictor, "set_image", lambda *given: pytest.fail("the network ran"))
    clip = types.SimpleNamespace(similarity=None)
    for given, message in (
        ({"text": "a dog", "clip": "a folder"}, "clip is what slimsam_jax.load_clip gives, not a str"),
        ({"text": "a dog"}, "text prompts need a CLIP, which is no part of this package: give a folder"),
        ({"text": "a dog", "clip": clip, "labels": [1]}, "a text and its CLIP are a prompt by themselves"),
        ({"text": "a dog", "clip": clip, "points": [[3, 3]]}, "a text and its CLIP are a prompt by themselves"),
        ({"clip": clip, "box": [1, 2, 20, 15]}, "a text and its CLIP are a prompt by themselves"),
    ):
        with pytest.raises(InputError, match=message):
            slimsam_jax.predict(model, image, **given)


def test_compress_knows_every_option_of_the_command():
    given = inspect.signature(api.compress).parameters
    wanted = {field.name: field.default for field in dataclasses.fields(Options)}
    assert {*given} == {*wanted}
    assert {name: str(each.default) for name, each in given.items()} == {name: str(d) for name, d in wanted.items()}


def test_numbers_of_numpy_are_written_into_a_runs_record():
    recorded = json.dumps(Options(seed=np.int64(3), ratio=np.float32(0.5)).fixing_the_result())
    assert {"seed": 3, "ratio": 0.5}.items() <= json.loads(recorded).items()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: slimsam_jax.compress(ratio=2), "--ratio 2 is not the share"),
        (lambda: slimsam_jax.compress(ratio="0.77"), "--ratio '0.77' is not the share"),
        (lambda: slimsam_jax.compress(steps="10"), "--steps '10' is not a whole number"),
        (lambda: slimsam_jax.compress(seed="0"), "--seed '0' must be between"),
        (lambda: slimsam_jax.compress(seed=True), "--seed True must be between"),
        (lambda: slimsam_jax.compress(max_broken="x"), "--max-broken 'x' is not a share"),
        (lambda: slimsam_jax.compress(set=8), "--set 8: no such choice"),
        (lambda: slimsam_jax.compress(set={"prune.round_to": 8}), "say what it shall be, prune.round_to=VALUE"),
        (lambda: slimsam_jax.compress(recipe="best"), "--recipe 'best' is none of default, taylor, slimsam, "),
        (lambda: slimsam_jax.compress(dtype="float8"), "--dtype 'float8' is none of"),
        (lambda: slimsam_jax.compress(recipe=[Prune]), "nor a list of Prune"),
        (lambda: slimsam_jax.compress(recipe=[]), "a recipe needs a step that prunes"),
        (lambda: slimsam_jax.compress(random_sam(SQUARE)), r"teacher is a path, .*; slimsam_jax.save"),
        (lambda: slimsam_jax.compress(out=""), "out is a path"),
        (lambda: slimsam_jax.evaluate([], "annotated"), "--model needs at least one value"),
        (lambda: slimsam_jax.evaluate(["a", "a"], "annotated"), "--model has a model twice"),
        (lambda: slimsam_jax.evaluate(["a"], "annotated", "points"), "--protocol 'points' is none of point, "),
        (lambda: slimsam_jax.evaluate([3], "annotated"), "a model must be given"),
        (lambda: slimsam_jax.evaluate("a", "annotated", "agreement"), "at least two models"),
        (lambda: slimsam_jax.predict(3, "truck.jpg"), "a model must be given"),
        (lambda: slimsam_jax.save("slim", "other"), "a model must be given"),
        (lambda: slimsam_jax.load(3), "takes the path"),
    ],
)
def test_bad_arguments_get_one_line_and_leave_nothing(tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        call()
    assert not list(tmp_path.iterdir())


EVERY_MODULE = """
import importlib, sys
import slimsam_jax
assert callable(slimsam_jax.compress)
for name in sys.argv[1:]:
    importlib.import_module(name)
from slimsam_jax.compress import compress_with
from slimsam_jax import predict
for name in slimsam_jax.__all__:
    assert callable(getattr(slimsam_jax, name)), name
assert slimsam_jax.compress.__module__ == predict.__module__ == "slimsam_jax.api"
assert sys.modules["slimsam_jax.compress"].compress_with is compress_with
"""


def test_names_stay_functions_whatever_is_imported():
    """The programs `slimsam_jax.compress`, `evaluate` and `predict` have the names of functions."""
    packages = ((slimsam_jax, "slimsam_jax."), (converters, "converters."))
    found = [each.name for package, start in packages for each in pkgutil.walk_packages(package.__path__, start)]
    copied = ("slim_sam_torch", "tiny_vit_sam_torch", "rep_vit_sam_torch")  # files to copy, which need torchvision
    names = [name for name in found if name.removeprefix("converters.") not in copied]
    assert len(names) > 100 and {"slimsam_jax.compress", "slimsam_jax.evaluate"} < {*names}
    subprocess.run([sys.executable, "-c", EVERY_MODULE, *names], check=True)


def test_the_package_lists_what_it_gives_and_is_typed():
    assert {*FUNCTIONS, *CLASSES, "load_clip"} == {*slimsam_jax.__all__} <= {*dir(slimsam_jax)}
    for name in FUNCTIONS:
        hints = inspect.get_annotations(getattr(slimsam_jax, name))
        assert {*inspect.signature(getattr(slimsam_jax, name)).parameters} | {"return"} == {*hints}
    text = Path(slimsam_jax.__file__).read_text()
    for_checkers = text[text.index("if TYPE_CHECKING") : text.index("__version__")]
    assert all(re.search(rf"\b{name}\b", for_checkers) for name in slimsam_jax.__all__)
    assert (ROOT / "slimsam_jax" / "py.typed").is_file() and (ROOT / "converters" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'comprss'"):
        slimsam_jax.comprss  # noqa: B018


def test_asking_for_the_package_imports_nothing_that_takes_long():
    program = "import sys, slimsam_jax, slimsam_jax.api; dir(slimsam_jax); print({'jax', 'numpy'} & {*sys.modules})"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"
    assert importlib.import_module("slimsam_jax.api") is api
