"""File names that are no UTF-8, drive terminals or are formulas: in what is read, said, logged and drawn."""

from __future__ import annotations

import io
import json
import os

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from helpers.hostile import files as hostile
from helpers.hostile.outcomes import assert_harmless, assert_refused, folder_with, outcomes
from slimsam_jax.errors import InputError, RunError, printable
from slimsam_jax.evaluation import figures
from slimsam_jax.evaluation.tables import print_rows
from slimsam_jax.files import write_json
from slimsam_jax.training.run_folder import RunFolder

ODD_NAMES = list(hostile.NAMES.items())


def test_odd_names_and_odd_but_sound_tars_are_read(tmp_path):
    names = {name: folder_with(tmp_path / f"n{i}", file, hostile.GOOD) for i, (name, file) in enumerate(ODD_NAMES)}
    tars = {name: folder_with(tmp_path / name, "x.tar", content) for name, content in hostile.SOUND_TARS.items()}
    for name, each in zip(names | tars, outcomes([["check", str(p)] for p in (names | tars).values()]), strict=True):
        assert_harmless(each, name)
        assert each["code"] == 0 and "images: 2 (2 .png)" in each["out"], (name, each)


def test_odd_names_of_broken_images_and_shards_are_shown(tmp_path):
    cases = [(file, b"no image") for _, file in ODD_NAMES]
    cases += [(file.replace(b".png", b".tar"), b"no tar") for _, file in ODD_NAMES]
    places = [str(folder_with(tmp_path / str(i), *case)) for i, case in enumerate(cases)]
    found = outcomes([[command, place] for command in ("check", "read") for place in places])
    for (file, _), each in zip(cases * 2, found, strict=True):
        assert_refused(each, repr(file))


def test_logs_results_and_images_take_any_name(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    for _, name in ODD_NAMES:
        folder.log(skipped=os.fsdecode(name), reason="x")
    names = [os.fsdecode(name) for _, name in ODD_NAMES]
    assert [entry["skipped"] for entry in folder.read_log()] == names
    write_json(tmp_path / "x.json", dict.fromkeys(names, "x"))
    assert list(json.loads((tmp_path / "x.json").read_text())) == names
    figure = Figure()
    for axis, name in zip(figure.subplots(len(names)), names, strict=True):
        figures._show(axis, name, Image.new("RGB", (30, 20)), np.ones((1, 20, 30), bool))
    figure.savefig(io.BytesIO())


def test_tables_show_names_as_they_are(capsys):
    """What rich would take for markup or an emoji, in a heading as in a cell."""
    print_rows(["", "slim[a]", "x[/y]", ":dog:"], [["[b]", ":cat:", "[red]1", "2"]])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("slim[a]", "x[/y]", ":dog:", "[b]", ":cat:", "[red]1"))


def test_names_are_shown_escaped_and_cut():
    assert printable("a\x1b[31m\nb\udcffü 日") == "a\\x1b[31m\\nb\\udcffü 日"
    assert printable("a" * 400 + "b" * 400) == "a" * 150 + " … " + "b" * 150
    assert str(InputError("a\nb\x1b")) == "a b\\x1b" and str(RunError("\udcff" * 9000)).encode()
