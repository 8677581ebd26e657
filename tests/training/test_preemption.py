"""SIGTERM ends a run wherever it comes, and nobody takes it for anything else."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from slimsam_jax.data import Sample, sample
from slimsam_jax.errors import Stopped, writing
from slimsam_jax.files import new_folder, replacing
from slimsam_jax.training import preemption


def terminated(*_) -> bytes:
    os.kill(os.getpid(), signal.SIGTERM)
    return b""


def write_file(folder: Path) -> None:
    with writing(folder), replacing(folder / "x.json"):
        terminated()


def write_folder(folder: Path) -> None:
    with writing(folder), new_folder(folder / "x"):
        terminated()


COMES = {
    "an image is read": lambda folder: Sample("a.jpg", terminated).read(),
    "annotations are read": lambda folder: Sample("a.jpg", bytes, terminated).annotations((2, 2)),
    "an image is decoded": lambda folder: sample.decode(b"", "a.jpg"),
    "a file is written": write_file,
    "a folder is written": write_folder,
}


@pytest.mark.parametrize("while_", COMES)
def test_a_run_that_shall_end_goes_on_with_no_other_image(tmp_path, monkeypatch, while_):
    """Whoever catches what is wrong with a foreign file does not catch this, and temporary files are gone."""
    monkeypatch.setattr(sample, "_formats", terminated)
    with pytest.raises(Stopped, match="stopped; steps are kept"), preemption.at_once("steps are kept"):
        COMES[while_](tmp_path)
    assert not list(tmp_path.iterdir())
