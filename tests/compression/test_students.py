"""Every recipe that distils into another encoder goes on where it was stopped, and is the same on eight devices."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from helpers import students
from helpers.images import save_image, write_annotation
from helpers.models import random_sam
from helpers.runs import compiled_once
from helpers.students import TEACHER, small
from slimsam_jax import checkpoint
from slimsam_jax.compression import distill, mask_distill, pipeline, prepare, pretrain
from slimsam_jax.compression.options import Options
from slimsam_jax.errors import InputError, RunError, Stopped
from slimsam_jax.models.config import Thresholds
from slimsam_jax.training import preemption
from slimsam_jax.training.loop import Loop

# mobile_sam is the first training of tiny_sam, and efficient_sam's second one is a training by masks as theirs.
GOING_ON = ("edge_sam", "tiny_sam", "efficient_sam")
# Softmax does not see it: its gradient is rounding alone, of which Adam makes steps as of any other.
BLIND = ("/k/bias", "/k_proj/bias")
# One of each kind of step; TinySAM's masks have the most terms, EdgeSAM's are the teacher's, for boxes, too.
PROGRAMS = {"mobile_sam": [1], "edge_sam": [1, 2], "tiny_sam": [2], "efficient_sam": [1]}


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """A teacher, and eight images with a mask each."""
    root = tmp_path_factory.mktemp("annotated")
    checkpoint.save(random_sam(TEACHER), root / "teacher")
    for i in range(8):
        write_annotation(save_image(root / "images" / f"{i}.png", seed=i))
    return root


@pytest.fixture()
def quick(monkeypatch):
    """Each step that is built again runs the program of the first; nothing is judged or drawn."""
    monkeypatch.setattr(prepare, "validator", lambda *_: lambda sam: 0.0)
    monkeypatch.setattr(pretrain.Pretraining, "score", lambda *_: {"score": 0.0})
    with compiled_once(distill, mask_distill, pretrain):
        yield


def options_of(root, out, name, **changes):
    images = (str(root / "images"),)
    return Options(
        teacher=root / "teacher",
        images=images,
        val=images,
        out=out,
        batch=8,
        steps=len(small(name)) - 1,  # two in each training
        save_every=1,
        **changes,
    )


def carried_out(root, out, name, **changes):
    """A recipe up to its report: the student and the log."""
    run = prepare.prepare(options_of(root, out, name, **changes), checkpoint.load(root / "teacher"), small(name))
    with run.folder, preemption.at_once("finished steps are kept"):
        return pipeline.carry_out(run)[0], run.folder.read_log()


def interrupted(monkeypatch, stage, step_number, ending):
    """Ends the run within a step of a training."""

    def step(self, state, number, batch, whole=Loop.step):
        if (self.planned.name, number) == (stage, step_number):
            ending()
        return whole(self, state, number, batch)

    monkeypatch.setattr(Loop, "step", step)


def pulled():
    raise RunError("pulled the plug")


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", GOING_ON)
def test_it_goes_on_where_it_was_stopped(name, annotated, quick, tmp_path, monkeypatch):
    """Killed within one of its trainings, and asked to stop within another."""
    whole, log = carried_out(annotated, tmp_path / "whole", name)
    stages = list(dict.fromkeys(entry["stage"] for entry in log if "loss" in entry))
    assert len(stages) == len(small(name)) - 1
    for i, stage in enumerate(stages):
        error, number, ending = ((RunError, 2, pulled), (Stopped, 1, terminated))[i]  # a signal is heard after the step
        with monkeypatch.context() as patched, pytest.raises(error):
            interrupted(patched, stage, number, ending)
            carried_out(annotated, tmp_path / "slim", name, resume=i > 0)
    again, own = carried_out(annotated, tmp_path / "slim", name, resume=True)
    chex.assert_trees_all_equal(again.params, whole.params)
    assert own == log


def test_the_teachers_thresholds_stay(annotated, quick, tmp_path):
    """They decide which masks the teacher finds, of which some may lie in the folder."""
    teacher, options = random_sam(TEACHER), lambda **how: options_of(annotated, tmp_path / "slim", "edge_sam", **how)
    prepare.prepare(options(), teacher, small("edge_sam")).folder.release()
    other = dataclasses.replace(teacher, thresholds=Thresholds(0.0, 0.5, 0.9))
    with pytest.raises(InputError, match=r"teacher thresholds stability_score_thresh: None -> 0\.5"):
        prepare.prepare(options(resume=True), other, small("edge_sam"))
    prepare.prepare(options(resume=True), teacher, small("edge_sam")).folder.release()


@pytest.mark.slow
def test_eight_devices_take_the_same_steps(tmp_path):
    """2 x 4: images split over all of them, parameters over four."""
    one, eight = tmp_path / "one", tmp_path / "eight"
    for folder in (one, eight):
        folder.mkdir()
    arguments = {"out": str(eight), "fsdp": 4, "trainings": PROGRAMS}
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    command = [sys.executable, "-m", "helpers.students", json.dumps(arguments)]
    subprocess.run(command, env=environment, check=True, timeout=900)
    students.main(str(one), 1, PROGRAMS)
    assert len(list(one.iterdir())) == sum(map(len, PROGRAMS.values()))
    for path in one.iterdir():
        with np.load(path) as expected, np.load(eight / path.name) as found:
            assert set(expected) == set(found) and np.isfinite(expected["losses"]).all()
            for key in set(expected) - {name for name in expected if name.endswith(BLIND)}:
                close = {"atol": 1e-5, "rtol": 1e-4, "err_msg": f"{path.stem} {key}"}
                np.testing.assert_allclose(found[key], expected[key], **close)
