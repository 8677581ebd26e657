"""What `python -m slimsam_jax.data` says and writes."""

from __future__ import annotations

import json
import os
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from helpers.images import samples, save_image, truncated, write_annotation
from slimsam_jax import cli
from slimsam_jax.data import __main__ as commands
from slimsam_jax.data import check, find, sources
from slimsam_jax.imaging import draw


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        write_annotation(save_image(tmp_path / "in" / f"{i}.jpg", 20, 30, seed=i), id=7)
    return tmp_path / "in"


def run(*arguments) -> int:
    """The exit code of the command."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["data", *map(str, arguments)])
        try:
            cli.run({"check": commands.check, "prepare": commands.prepare})
        except SystemExit as end:
            return end.code
    return 0


def test_a_sound_folder(folder, tmp_path, capsys):
    save_image(folder / "bare.png", 40, 10)
    assert run("check", folder, "--sheet", tmp_path / "sheets" / "x.png") == 0
    out = capsys.readouterr().out
    assert "images: 4 (3 .jpg, 1 .png)" in out and "annotated: 3 images with 3 masks" in out and "problems: none" in out
    assert "10 x 40 to 30 x 20" in out
    sheet = np.asarray(Image.open(tmp_path / "sheets" / "x.png"))
    assert draw.ROW / 2 < len(sheet) < 2 * draw.ROW and tiles(sheet) == 4 and sheet.std() > 10


def test_files_that_nothing_reads_are_counted(folder, capsys):
    """A phone's folder has more of them than images; what is hidden or read counts for nothing."""
    (folder / "sub").mkdir()
    for name in ("a.HEIC", "sub/b.heic", "notes", ".hidden.heic", "left.json"):
        (folder / name).write_bytes(b"x")
    assert run("check", folder, folder) == 0
    out = capsys.readouterr().out
    assert "images: 3 (3 .jpg)" in out and "not read: 3 (2 .heic, 1 without suffix); convert" in out


def test_folders_that_are_not_looked_into_are_named(folder, tmp_path, monkeypatch, capsys):
    """Who links folders together would miss images without a word; exit code and images are as without them."""
    save_image(tmp_path / "elsewhere" / "x.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "others").mkdir()
    scan = os.scandir

    def forbidden(path):
        if str(path).endswith("others"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    assert run("check", folder, folder) == 0
    line = "not looked into: 2 folders, links or not yours to list: "
    out = capsys.readouterr().out
    assert f"{line}{folder / 'link'}, {folder / 'others'}\n" in out and "images: 3 (3 .jpg)" in out


def test_folders_are_walked_over_and_coco_read_once(folder, tmp_path, monkeypatch, capsys):
    """Millions of files on a network's disk, or the gigabyte of LVIS, take minutes each time."""
    images = [{"id": 1, "file_name": "x.png", "height": 20, "width": 30}]
    save_image(tmp_path / "coco" / "x.png", 20, 30)
    (tmp_path / "coco" / "annotations.json").write_text(json.dumps({"images": images, "annotations": []}))
    seen = []
    for module, name in ((sources.folder, "walk"), (sources.coco, "read")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, original=original: seen.append(path) or original(path))
    assert run("check", folder, tmp_path / "coco") == 0
    assert seen == [folder, tmp_path / "coco" / "annotations.json"] and "images: 4" in capsys.readouterr().out


def tiles(sheet: np.ndarray) -> int:
    """How many images lie in the only row of a sheet, between columns that are white."""
    used = (sheet[draw.TITLE : draw.TITLE + draw.ROW // 2] < 255).any((0, 2))
    return int(used[0]) + int((np.diff(used.astype(int)) == 1).sum())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bbox": [4, 5, 27, 5]}, "a box that leaves the image (annotation 7)"),
        ({"bbox": [14, 15, 6, 5]}, "a box that does not hold its mask (annotation 7)"),
        ({"bbox": [4, 5, 6, 16]}, "a box that leaves the image (annotation 7)"),
        ({"point_coords": [[6.5, 20.5]]}, "a point outside of the image (annotation 7)"),
        ({"point_coords": [[30.5, 6.5]]}, "a point outside of the image (annotation 7)"),
        ({"segmentation": {"size": [20, 30], "counts": [600]}}, "an empty mask (annotation 7)"),
        ({"segmentation": {"size": [30, 20], "counts": [0, 600]}}, "a mask of 20 x 30 pixels, the image has 30 x 20"),
        ({"bbox": [1, 2]}, "cannot be read (ValueError"),
    ],
)
def test_each_problem_is_named(folder, capsys, changes, problem):
    write_annotation(folder / "1.jpg", id=7, **changes)
    assert run("check", folder) == 1
    out = capsys.readouterr().out
    assert "problems: in 1 images" in out and problem in out and "1.jpg" in out


def test_repeated_ids_and_broken_images(folder, tmp_path, capsys):
    fields = json.loads((folder / "0.json").read_text())
    (folder / "0.json").write_text(json.dumps({"annotations": fields["annotations"] * 2}))
    truncated(folder / "2.jpg")
    assert run("check", folder, "--sheet", tmp_path / "x.png") == 1
    out = capsys.readouterr().out
    assert "the same id more than once (annotation 7)" in out and "2.jpg is not a readable image" in out
    assert tiles(np.asarray(Image.open(tmp_path / "x.png"))) == 2


def test_annotations_without_an_image_are_named(folder, tmp_path, capsys):
    """In a folder, in a shard in it and in a shard; not what annotates nothing, nor COCO."""
    annotation = (folder / "0.json").read_text()
    (folder / "notes.json").write_text('{"author": "nobody"}')
    (folder / "coco.json").write_text('{"images": [], "annotations": []}')
    (folder / "torn.json").write_text("{")
    assert run("check", folder) == 0
    (folder / "sub").mkdir()
    (folder / "sub" / "lost.json").write_text(annotation)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, path in (("x.jpg", "0.jpg"), ("x.json", "0.json"), ("y.json", "0.json"), ("z.json", "notes.json")):
            tar.add(folder / path, name)
    capsys.readouterr()
    assert run("check", folder) == 1
    lines = capsys.readouterr().out.splitlines()
    said = " annotates no image: there is none of its name"
    assert lines[-2:] == [f"{folder / 'sub' / 'lost.json'}{said}", f"{folder / 'a.tar'}/y.json{said}"]
    assert run("check", folder / "a.tar") == 1 and said in capsys.readouterr().out


def test_a_sheet_of_nothing_readable(tmp_path):
    assert check.draw_sheet(samples([truncated(tmp_path / "a.jpg")])).getextrema() == ((255, 255),) * 3


def test_prepare(folder, tmp_path, capsys):
    truncated(folder / "2.jpg")
    assert run("prepare", folder, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "2.jpg is not a readable image" in out and f"wrote 2 images; read them with tfds:{tmp_path / 'out'}" in out
    assert len(find([f"tfds:{tmp_path / 'out'}"])) == 2
    assert run("prepare", folder, "--out", tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err


def test_nothing_given(capsys):
    assert run("check") == 2
    assert capsys.readouterr().err == "error: no folder of images is given, nor anything else that holds some\n"
