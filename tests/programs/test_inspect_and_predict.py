"""The programs inspect and predict; and that none imports JAX before its arguments are known to be good."""

from __future__ import annotations

import re
import sys

import numpy as np
from PIL import Image

from helpers.family_models import edge_sam
from helpers.models import SQUARE
from helpers.programs import program, run_program
from slimsam_jax import checkpoint
from slimsam_jax.inference.predictor import Prediction
from slimsam_jax.profiling import sam_costs


def test_inspect_command(material, tmp_path, monkeypatch, capsys):
    arguments = (material / "teacher", "--images", material / "images", "--ratios", "0.3", "--out", tmp_path / "x.png")
    code, *_ = run_program(monkeypatch, capsys, "inspect", *arguments)
    assert code == 0
    with Image.open(tmp_path / "x.png") as image:
        assert min(image.size) > 500
    for wrong, message in (
        (("--ratio", "1"), "must lie between 0 and 1"),
        (("--images", material / "teacher"), "holds no images"),
        (("--set", "recipe"), "NAME=VALUE"),
        (("--set", "prune.ratio=0.5"), "leave --set prune.ratio out"),
        (("--out", tmp_path), "is a folder"),
        (("--seed", "-1"), "--seed -1 must be"),
    ):
        given = [part for part in zip(arguments[1::2], arguments[2::2], strict=True) if part[0] != wrong[0]]
        given = [arguments[0], *(part for pair in given for part in pair)]
        code, _, error = run_program(monkeypatch, capsys, "inspect", *given, *wrong)
        assert code == 2 and message in error and error.count("\n") == 1


def test_inspect_without_images_lists_the_blocks(material, monkeypatch, capsys):
    _, out, _ = run_program(monkeypatch, capsys, "inspect", material / "teacher", "--layers")
    assert re.search(r"(?m)^neck_2 +\|.*\| +1 x .* x \d+ \|", out)
    assert "2 x 12" in out and f"{sam_costs.encoder_parameters(SQUARE) / 1e6:.3f}" in out


def test_predict_command(material, tmp_path, monkeypatch, capsys):
    common = ("--model", material / "teacher", "--image", material / "images" / "0.png")
    out = tmp_path / "new" / "p.png"
    code, said, _ = run_program(
        monkeypatch, capsys, "predict", *common, "--point", "3,4", "--box", "1,2,20,15", "--out", out
    )
    assert code == 0 and " pixels, predicted IoU " in said
    with Image.open(out) as drawn:
        assert drawn.size == (30, 20)
    for arguments, message in (
        ((), "at least one --point"),
        (("--point", "3"), "'3' is not X,Y"),
        (("--box", "1,2,3"), "is not X0,Y0,X1,Y1"),
        (("--point", "300,4"), "outside the image of 30 x 20"),
        (("--box", "9,9,1,1"), "is not a box"),
    ):
        code, _, error = run_program(monkeypatch, capsys, "predict", *common, "--out", out, *arguments)
        assert code == 2 and message in error
    code, _, error = run_program(monkeypatch, capsys, "predict", *common, "--point", "1,1", "--out", tmp_path / "p.gif")
    assert code == 2 and "should end in .png" in error


def test_predict_says_what_the_score_of_an_edge_sam_is(material, tmp_path, monkeypatch, capsys):
    """Its decoder estimates no IoU. Nothing is compiled."""
    checkpoint.save(edge_sam(), tmp_path / "edge")
    found = Prediction(np.ones((1, 20, 30), bool), np.float32([0.5]), np.zeros((1, 16, 16)))
    monkeypatch.setattr(program("predict").api, "predict", lambda *_, **__: found)
    arguments = ("--model", tmp_path / "edge", "--image", material / "images" / "0.png", "--out", tmp_path / "p.png")
    code, said, _ = run_program(monkeypatch, capsys, "predict", *arguments, "--point", "3,4")
    assert code == 0 and "mask of 600 pixels, stability 0.500" in said


def test_help_and_import_are_quick():
    """Nothing heavy is imported before the arguments are known to be good."""
    import subprocess

    commands = (
        "slimsam_jax.compress, slimsam_jax.evaluate, slimsam_jax.predict, slimsam_jax.inspect, converters.from_torch, "
        "converters.to_torch"
    )
    script = f"import sys, {commands}; print('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
