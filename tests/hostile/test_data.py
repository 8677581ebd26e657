"""Hostile images, annotations, archives and names: one line each, an exit code, in a second, without crash or hang."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile

import pytest

from helpers.hostile import annotations
from helpers.hostile import files as hostile
from helpers.hostile.outcomes import assert_refused, folder_with, outcomes
from slimsam_jax import data
from slimsam_jax.data import tfds_writer
from slimsam_jax.data.batches import Batches
from slimsam_jax.errors import InputError, RunError

KINDS = {  # {kind: (name of the file, {what is wrong: its content})}
    "SA-1B masks": ("x.json", {n: json.dumps({"annotations": [row]}).encode() for n, row in annotations.MASKS.items()}),
    "SA-1B files": ("x.json", annotations.SA1B_FILES),
    "COCO masks": ("annotations.json", {name: annotations.coco(row) for name, row in annotations.MASKS.items()}),
    "COCO polygons": ("annotations.json", {name: annotations.coco(row) for name, row in annotations.POLYGONS.items()}),
    "COCO files": ("annotations.json", annotations.COCO_FILES),
    "tars": ("x.tar", hostile.TARS),
    "images": ("y.png", hostile.IMAGES),
    "no annotation files": ("x.json", hostile.NOT_FILES),
    "no shard files": ("x.tar", hostile.NOT_FILES),
    "no image files": ("y.jpg", hostile.NOT_FILES),
}
SOUND = annotations.row()["segmentation"]
LINES = {"tars": 2}  # that may be said of one: of the member that is cut, and of what followed it


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_refused_in_one_line(tmp_path, kind):
    """By the command `check`, and by the reader that training and evaluation call."""
    file, contents = KINDS[kind]
    places = [str(folder_with(tmp_path / str(i), file, content)) for i, content in enumerate(contents.values())]
    found = outcomes([[command, place] for command in ("check", "read") for place in places])
    for name, each in zip([*contents, *contents], found, strict=True):
        assert_refused(each, f"{kind}: {name}", LINES.get(kind, 1))
        assert each["code"] < 2 or kind.startswith("COCO"), (name, each)  # what lies beside it is read


@pytest.mark.parametrize("kind", ["truth", "boxes"])
def test_what_pycocotools_would_be_given_is_refused(tmp_path, kind):
    rows = {n: row for n, row in (annotations.MASKS | annotations.POLYGONS).items() if row["segmentation"] != SOUND}
    masks = {name: annotations.coco(row) for name, row in rows.items()}
    contents = annotations.BOXES if kind == "boxes" else masks | annotations.TRUTHS
    for i, content in enumerate(contents.values()):
        (tmp_path / f"{i}.json").write_bytes(content)
    found = outcomes([[kind, str(tmp_path / f"{i}.json")] for i in range(len(contents))])
    for name, each in zip(contents, found, strict=True):
        assert each["code"] == 2, (name, each)
        assert_refused(each, name)


def test_locations_that_are_no_files_or_absurd_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "x.tar"), os.mkfifo(tmp_path / "x.json")
    (tmp_path / "y.tar").symlink_to("/dev/zero")
    places = [str(tmp_path / name) for name in ("loop", "x.tar", "x.json", "y.tar", "n" * 5000, "\x1b[31m", "a\nb")]
    places += ["~nobody/x", "/dev/zero", "\udcff\udcfe", "tfds:\x1b", f"tfds:{tmp_path}"]
    for place, each in zip(places, outcomes([["check", place] for place in places]), strict=True):
        assert each["code"] == 2
        assert_refused(each, repr(place))


def test_folders_are_searched_whatever_they_are_called(tmp_path):
    for name in ("x.tar", "y.jpg", "z.json", "d" * 200):
        folder_with(tmp_path / name, "y.png", hostile.GOOD)
    made = [deep := tmp_path]
    try:
        for _ in range(1500):  # deeper than Python recurses, so that pytest could not remove it
            os.mkdir(deep := deep / "d")
            made.append(deep)
        (deep / "x.png").write_bytes(hostile.GOOD)
        (each,) = outcomes([["check", str(tmp_path)]])
    finally:
        (deep / "x.png").unlink(missing_ok=True)
        for folder in reversed(made[1:]):
            folder.rmdir()
    assert each["code"] == 0 and "images: 9 (9 .png)" in each["out"], each


def test_a_bad_shard_counts_like_a_bad_image(tmp_path):
    for i in range(3):
        folder_with(tmp_path / str(i), "y.png", hostile.GOOD)
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    locations = [tmp_path / "0", tmp_path / "bad.tar", tmp_path]
    found = data.find(locations)
    assert len(found) == 7 and [sample.name for sample in found if sample.lost] == [str(tmp_path / "bad.tar")]
    stream = Batches(found, (32, 32), 1, 0, max_broken=1 / 7)
    for _ in range(10):
        next(stream)
    assert list(stream.skipped) == [str(tmp_path / "bad.tar")]
    with pytest.raises(RunError, match=r"1 of 7 images cannot be used, and --strict allows none; the last: .*bad.tar"):
        for _ in zip(range(10), Batches(found, (32, 32), 1, 0, max_broken=0), strict=False):
            pass
    with pytest.raises(InputError, match=r"bad.tar is not an uncompressed tar"):
        data.find([tmp_path / "bad.tar"])


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_are_read_as_tarfile_does(tmp_path, kind):
    names = ["a.png", f"{'d' * 80}/{'e' * 90}.png", "ü/é.png", os.fsdecode(b"\xff.png")]
    names += [] if kind == tarfile.USTAR_FORMAT else [f"{'d' * 200}/{'f' * 250}.png"]
    with tarfile.open(tmp_path / "x.tar", "w", format=kind, pax_headers={"comment": "x"}) as out:
        for name in names:
            out.addfile(tarfile.TarInfo(f"{name}.d"))
            member = tarfile.TarInfo(name)
            member.size = len(hostile.GOOD)
            out.addfile(member, io.BytesIO(hostile.GOOD))
    with tarfile.open(tmp_path / "x.tar") as expected:
        members = sorted(member.name for member in expected if member.name.endswith(".png"))
    found = data.find([tmp_path / "x.tar"])
    assert [sample.name for sample in found] == [f"{tmp_path / 'x.tar'}/{name}" for name in members]
    assert sorted(members) == sorted(names) and all(sample.read() == hostile.GOOD for sample in found)


def test_too_many_masks_for_any_memory(tmp_path):
    (tmp_path / "x.png").write_bytes(hostile.image_bytes(4000, 4000, mode="1"))
    row = annotations.masked([0, 4000 * 4000], [4000, 4000])
    (tmp_path / "x.json").write_text(json.dumps({"annotations": [row] * 300}))
    (each,) = outcomes([["check", str(tmp_path)]])
    assert_refused(each, "300 masks")
    assert "300 masks of 4000 x 4000 pixels, more than can be held" in each["out"]


def test_a_tfds_folder_is_not_believed(tmp_path):
    """Above all: tfds imports the module that a feature is said to be of."""
    folder_with(tmp_path / "in", "y.png", hostile.GOOD)
    assert not tfds_writer.prepare(data.find([tmp_path / "in"]), tmp_path / "sound")
    info, features = "dataset_info.json", "features.json"
    (records,) = (tmp_path / "sound").rglob("*array_record*")
    scalar = '"tensorflow_datasets.core.features.scalar.Scalar"'
    changes = {
        "module": (features, lambda text: text.replace(scalar, '"evil.Feature"')),
        "module, other spelling": (features, lambda text: text.replace(f'"pythonClassName": {scalar}', OTHER)),
        "module, escaped": (features, lambda text: text.replace(f'"pythonClassName": {scalar}', ESCAPED)),
        "old": (features, lambda text: '{"type": "evil.Feature", "content": {}}'),
        "deep": (features, lambda text: annotations.DEEP),
        "many": (info, lambda text: text.replace('"2"', '"1000000000000"')),
        "elsewhere": (info, lambda text: text.replace('"{DATASET}-', '"../{DATASET}-')),
        "a device": (info, lambda text: text.replace('"{DATASET}-', '"/dev/zero{DATASET}-')),
        "no JSON": (info, lambda text: "{"),
        "no records": (records.name, lambda text: "no records" * 1000),
    }
    for name, (file, change) in changes.items():
        shutil.copytree(tmp_path / "sound", tmp_path / name)
        (changed,) = (tmp_path / name).rglob(file)
        changed.write_text(change(changed.read_text(errors="replace")))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    cases = [["check", f"tfds:{tmp_path / name}"] for name in [*changes, "sound"]]
    *found, sound = outcomes(cases, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert sound["code"] == 0 and "images: 2" in sound["out"], sound
    assert not (tmp_path / "ran").exists()
    for name, each in zip(changes, found, strict=True):
        assert_refused(
            each | {"seconds": each["seconds"] - sound["seconds"]}, name, most=2
        )  # importing tfds takes some


OTHER = '"python_class_name": "evil.Feature"'
ESCAPED = '"python\\u0043lassName": "evil\\u002eFeature"'
