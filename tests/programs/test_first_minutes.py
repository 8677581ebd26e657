"""What a user sees of a run before, while and after it computes, and what is not loaded for it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from helpers.images import samples
from helpers.models import SQUARE, random_sam
from helpers.programs import program
from helpers.runs import shaken
from slimsam_jax import cli, progress
from slimsam_jax.compression import pipeline as run_module
from slimsam_jax.compression.steps import Distill, Validation
from slimsam_jax.training.run_folder import RunFolder

HEAVY = "tensorflow_datasets", "tensorflow", "pyarrow", "pandas", "torch", "transformers", "matplotlib", "onnx", "chex"
ANNOUNCED = """
import sys
import slimsam_jax
import slimsam_jax.compress
from slimsam_jax.compression.options import Options, announce
announce(Options())
sys.stdout.flush()
assert not {*sys.argv[1:], "jax", "numpy"} & {*sys.modules}, "before the first word"
from slimsam_jax import data
from slimsam_jax.compression import pipeline
assert len(data.find([data.embedded_images()])) == 28
print(*({*sys.argv[1:]} & {*sys.modules}))
"""


def test_what_will_be_done_is_said_before_jax_and_without_what_is_not_needed():
    done = subprocess.run([sys.executable, "-c", ANNOUNCED, *HEAVY], capture_output=True, text=True, check=True)
    *said, loaded = done.stdout.split("\n")[:-1]
    assert loaded == ""
    for line, what in zip(said, ("small SAM", "photographs", "default, to cut: 50 %", "slim/"), strict=True):
        assert what in line


def test_help_loads_nothing_that_computes():
    program = "import runpy, sys\ntry: runpy.run_module('slimsam_jax.compress', run_name='__main__', alter_sys=True)\n"
    program += f"except SystemExit: print(*({{'jax', 'numpy', *{HEAVY}}} & {{*sys.modules}}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert "--teacher" in done.stdout and done.stderr.strip() == ""


def test_the_last_line_is_a_command_that_runs(finished, material, tmp_path, capsys, monkeypatch):
    val = samples(sorted((material / "val").glob("*.png")))
    run_module.say_what_to_do(finished, val)
    *_, last = capsys.readouterr().out.splitlines()
    command = shlex.split(last.removeprefix(" " * 6 + "next"))
    assert command[:3] == ["python", "-m", "slimsam_jax.predict"]
    with monkeypatch.context() as by_name:  # whoever typed `slimsam compress` gets a command of the same program
        by_name.setattr(cli, "program", "slimsam compress")
        run_module.say_what_to_do(finished, val)
    *_, named = capsys.readouterr().out.splitlines()
    assert shlex.split(named)[1:] == ["slimsam", "predict", *command[3:]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["predict", *command[3:]])
    cli.run(program("predict").main)
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.size == (30, 20)


@pytest.mark.parametrize(
    ("keep", "line"),
    [
        ("best", "last/: the last, of step 6; the model itself is the best, of step 4 of distill"),
        ("last", "best/: the best, of step 4; the model itself is the last, of step 6 of distill"),
    ],
)
def test_a_second_model_is_named(tmp_path, capsys, keep, line):
    """The best or the last; of two that are the same there is one."""
    sam, out = random_sam(SQUARE), tmp_path / "slim"
    step = SimpleNamespace(name="distill", optimizer_steps=6, step=Distill(validation=Validation(keep_checkpoint=keep)))
    run = SimpleNamespace(plan=[step], folder=RunFolder(out, {}), options=SimpleNamespace(out=out), provenance={})
    for step, score in ((2, -3.0), (4, -1.0), (6, -2.0)):
        run.folder.log(stage="distill", step=step, score=score)
    assert run_module.save_other(run, sam) is None
    for name in ("best", "last"):
        run.folder.save_model("distill", name, shaken(sam))
    other = run_module.save_other(run, sam)
    assert other == f"{out}/{line}" and (out / line[:4] / "model.safetensors").exists()
    run_module.say_what_to_do(out, [], other)
    assert f"       and  {other}\n" in capsys.readouterr().out
    assert run_module.save_other(run, shaken(sam)) is None
    run.folder.release()


def test_a_stage_says_that_it_compiles_and_counts_images(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock, 104.0))
    assert list(progress.track("abc", "stage: distilling", per_item=4, compiles=True)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "stage: distilling: compiling"
    assert lines[1].startswith("stage: distilling: 4/12 images")
    assert "12 images done" in lines[-1]


def test_the_rate_leaves_compilation_out(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    rate = progress.Rate("images", compiles=True)
    assert [rate(4), rate(8), rate(12)] == ["", "2.0 images/s", "2.0 images/s"]
    assert rate.summary() == "(100.0 s until the first, 2.0 images/s)"


@pytest.mark.parametrize("compiles", [False, True])
def test_a_bar_on_a_terminal(compiles, capsys, monkeypatch):
    terminal = progress.Console(file=sys.stderr, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda file: terminal)
    for index, _ in enumerate(progress.track("abc", "stage: distilling", per_item=4, compiles=compiles)):
        if index == 0:
            first = capsys.readouterr().err
    assert ("compiling" in first) == compiles and "stage: distilling" in first
    assert "12/12 images" in capsys.readouterr().err
