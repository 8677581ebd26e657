"""A run that is stopped, killed or damaged ends where the uninterrupted one ends."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from converters import from_torch
from experiments.recipes import decoder
from helpers.images import truncated
from helpers.runs import compiled_once, compress_options
from slimsam_jax import cli, sharding
from slimsam_jax.api import compress_with
from slimsam_jax.compression import distill, pipeline
from slimsam_jax.compression.distill import Distillation
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Initialize, Prune
from slimsam_jax.errors import InputError, RunError, Stopped
from slimsam_jax.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("unmeasured", "programs")


@pytest.fixture(scope="module")
def programs():
    """Runs of the same shapes and step share a program; that each may compile its own is seen by processes, below."""
    with compiled_once(distill):
        yield


def assert_same_run(out: Path, finished: Path) -> None:
    chex.assert_trees_all_equal(from_torch.load(out).params, from_torch.load(finished).params)
    assert (out / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()


@pytest.mark.parametrize("stop", [("distill", 3), ("distill-2", 1)])
def test_a_resumed_run_equals_an_uninterrupted_one(finished, material, tmp_path, monkeypatch, stop):
    def step(self, state, number, batch, whole=Distillation.step):
        if (self.planned.name, number - 1) == stop:
            raise RunError("pulled the plug")
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", step)
        with pytest.raises(RunError, match="plug"):
            compress_with(compress_options(material, tmp_path / "slim"))
    assert not (tmp_path / "slim" / "model.safetensors").exists()
    with pytest.raises(InputError, match="options seed: 0 -> 7"):
        compress_with(compress_options(material, tmp_path / "slim", resume=True, seed=7))
    compress_with(compress_options(material, tmp_path / "slim", resume=True))
    assert_same_run(tmp_path / "slim", finished)


@pytest.mark.slow
def test_the_default_recipe_is_resumed(material, tmp_path, monkeypatch):
    """Its only distillation is guided by the model before the second cut, which was not distilled."""
    choices = {"set": ("distill.validations=2",), "steps": 2, "save_every": 1}
    compress_with(compress_options(material, tmp_path / "whole", **choices))

    def step(self, state, number, batch, whole=Distillation.step):
        if number == 2:
            raise RunError("pulled the plug")
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", step)
        with pytest.raises(RunError, match="plug"):
            compress_with(compress_options(material, tmp_path / "slim", **choices))
    compress_with(compress_options(material, tmp_path / "slim", **choices, resume=True))
    assert_same_run(tmp_path / "slim", tmp_path / "whole")


@pytest.mark.slow
def test_the_stage_of_another_recipe_is_resumed_too(material, tmp_path, monkeypatch):
    """With everything that a step draws or carries along."""
    options = compress_options(material, tmp_path / "whole", set=("distill.validations=2", "distill.ema=0.5"))
    *cuts, _, last = decoder(0.5)
    recipe = change((*cuts, Initialize(), last), options.set)
    compress_with(options, recipe)

    def step(self, state, number, batch, whole=Distillation.step):
        if number == 2:
            raise RunError("pulled the plug")
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", step)
        with pytest.raises(RunError, match="plug"):
            compress_with(dataclasses.replace(options, out=tmp_path / "slim"), recipe)
    compress_with(dataclasses.replace(options, out=tmp_path / "slim", resume=True), recipe)
    assert_same_run(tmp_path / "slim", tmp_path / "whole")
    decoders = (from_torch.load(folder).params["mask_decoder"] for folder in (material / "teacher", tmp_path / "slim"))
    assert not all(map(np.array_equal, *map(jax.tree.leaves, decoders)))


@pytest.mark.slow
def test_broken_images_are_named_and_skipped(material, tmp_path, monkeypatch, capsys):
    """Also those that were met before the run was stopped; each once a stage."""
    shutil.copytree(material / "images", tmp_path / "images")
    for name in ("a.jpg", "b.jpg"):
        truncated(tmp_path / "images" / name)
    options = compress_options(material, tmp_path / "slim", images=(tmp_path / "images",), max_broken=0.5)

    def step(self, state, number, batch, whole=Distillation.step):
        if (self.planned.name, number) == ("distill-2", 4):
            raise RunError("pulled the plug")
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", step)
        with pytest.raises(RunError, match="plug"):
            compress_with(options)
    compress_with(dataclasses.replace(options, resume=True))
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    names = [(entry["stage"], Path(entry["skipped"]).name) for entry in log if "skipped" in entry]
    assert names == [(stage, name) for stage in ("distill", "distill-2") for name in ("a.jpg", "b.jpg")]
    assert "a.jpg is not a readable image" in capsys.readouterr().out


def test_what_another_process_cannot_read_counts_here(material, tmp_path, monkeypatch):
    """Before a stage's checkpoints, so that it is in the log; and after pruning, where it may be too much."""
    name = str(material / "images" / "3.png")
    monkeypatch.setattr(sharding, "gather_json", lambda own: [own, {name: "torn elsewhere"}])
    compress_with(compress_options(material, tmp_path / "slim", max_broken=0.2))
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in log if "skipped" in entry] == ["torn elsewhere"] * 2
    with pytest.raises(RunError, match=r"1 of 6 images cannot be used, more than --max-broken 0\.1; the last: torn"):
        compress_with(compress_options(material, tmp_path / "other"))
    assert not (tmp_path / "other" / "checkpoints" / "prune-embedding").exists()


def test_sigterm_saves_and_ends_cleanly(finished, material, tmp_path, monkeypatch, capsys):
    def step(self, state, number, batch, whole=Distillation.step):
        if (self.planned.name, number) == ("distill", 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", step)
        with pytest.raises(Stopped, match="after step 3 of the step distill"):
            compress_with(compress_options(material, tmp_path / "slim", save_every=100))
    saved = tmp_path / "slim" / "checkpoints" / "distill" / "steps" / "3"
    assert saved.exists() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    compress_with(compress_options(material, tmp_path / "slim", resume=True))
    assert_same_run(tmp_path / "slim", finished)

    def stopped(_):
        raise Stopped("stopped after step 3")

    monkeypatch.setattr(sys, "argv", ["prog"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(Options, stopped)
    assert end.value.code == 143 and capsys.readouterr().err == "stopped after step 3\n"


def test_sigterm_while_pruning_says_how_to_go_on(material, tmp_path, monkeypatch):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("nobody listens")

    monkeypatch.setitem(pipeline.STEP_FUNCTIONS, Prune, killed)
    for resume in (False, True):  # the second finds the folder as the first one left it, and nobody at work in it
        with pytest.raises(Stopped, match="finished steps are kept: continue with --resume"):
            compress_with(compress_options(material, tmp_path / "slim", resume=resume))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(InputError, match="not empty: --resume continues the unfinished run in it"):
        compress_with(compress_options(material, tmp_path / "slim"))


def test_an_interrupt_says_how_to_go_on(material, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(pipeline.STEP_FUNCTIONS, Prune, interrupted)
    with pytest.raises(KeyboardInterrupt, match="finished steps are kept: continue with --resume"):
        compress_with(compress_options(material, tmp_path / "slim"))


def test_other_images_to_measure_on_are_refused(material, tmp_path, monkeypatch):
    """But where a run of older code has not recorded which they were."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(pipeline.STEP_FUNCTIONS, Prune, interrupted)
    shutil.copytree(material / "val", tmp_path / "val")
    options = compress_options(material, tmp_path / "slim", val=(tmp_path / "val",))
    with pytest.raises(KeyboardInterrupt):
        compress_with(options)
    shutil.copy(material / "images" / "0.png", tmp_path / "val" / "other.png")
    with pytest.raises(InputError, match=r"was started otherwise \(val count: 2 -> 3; val sha256_of_names: '"):
        compress_with(dataclasses.replace(options, resume=True))
    origin = tmp_path / "slim" / "checkpoints" / "origin.json"
    recorded = json.loads(origin.read_text())
    assert recorded.pop("val")["count"] == 2
    origin.write_text(json.dumps(recorded))
    with pytest.raises(KeyboardInterrupt):
        compress_with(dataclasses.replace(options, resume=True))


@pytest.mark.slow
def test_killed_again_and_again(finished, material, tmp_path):
    """`kill -9` at moments that nobody chose, until the run comes through."""
    out, random, kills = tmp_path / "slim", np.random.default_rng(0), 0
    program = """
import sys, jax
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
from pathlib import Path
from helpers.runs import compress_options
from slimsam_jax.api import compress_with
out = Path(sys.argv[2])
compress_with(compress_options(Path(sys.argv[1]), out, resume=(out / "checkpoints" / "origin.json").exists()))
"""
    arguments = [str(material), str(out), jax.config.jax_compilation_cache_dir]
    while not (out / "report.json").exists() or (out / "checkpoints").exists():
        run = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE)
        try:
            _, error = run.communicate(timeout=random.uniform(3, 7) + 6 * kills)
            assert run.returncode == 0, error.decode()
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
            kills += 1
    assert kills > 0
    assert_same_run(out, finished)
    assert "checkpoints" not in {path.name for path in out.iterdir()}


def test_half_a_line_of_a_killed_run_costs_nothing_after_it(tmp_path):
    folder = RunFolder(tmp_path / "out", {})
    folder.log(step=1)
    with (tmp_path / "out" / "log.jsonl").open("a") as file:
        file.write('{"sta')
    folder.log(step=2)
    assert folder.read_log() == [{"step": 1}, {"step": 2}]
