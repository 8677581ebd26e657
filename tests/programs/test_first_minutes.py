"""What a user sees of a run before, while and after it computes, and what is not loaded for it."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from PIL import Image

from helpers.images import samples
from helpers.programs import program
from slimsam_jax import cli, progress
from slimsam_jax.compression import pipeline as run_module

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
