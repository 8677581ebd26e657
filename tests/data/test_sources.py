"""The same images from a folder, a tar, COCO and TFDS; and what is wrong with such things."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as pycoco

from helpers.images import samples, save_image, truncated, write_annotation
from helpers.models import SQUARE, random_sam
from slimsam_jax import data
from slimsam_jax.data import tfds_writer
from slimsam_jax.data.batches import Batches
from slimsam_jax.errors import InputError
from slimsam_jax.evaluation.compare import measure_models
from slimsam_jax.evaluation.scores import Protocols
from slimsam_jax.imaging import geometry


@pytest.fixture(scope="module")
def sa1b(tmp_path_factory):
    """Five images in SA-1B's layout, the last of them not annotated."""
    root = tmp_path_factory.mktemp("sources") / "sa1b"
    for i in range(5):
        path = save_image(root / f"sa_{i + 10}.jpg", 20, 30, seed=i)
        if i < 4:
            write_annotation(path, bbox=[4, 5, 16, 5 - i / 4], point_coords=[[6.25 + i, 7.5]], id=100 + i)
    return root


def make_tar(folder: Path, out: Path, mode: str = "w") -> Path:
    with tarfile.open(out, mode) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"./{path.name}")
    return out


def make_coco(folder: Path, out: Path) -> Path:
    images, annotations = [], []
    for number, path in enumerate(sorted(folder.glob("*.jpg"))):
        images.append({"id": number, "file_name": path.name, "width": 30, "height": 20})
        beside = path.with_suffix(".json")
        rows = json.loads(beside.read_text())["annotations"] if beside.exists() else []
        annotations += [{**row, "image_id": number, "category_id": 1, "iscrowd": 0} for row in rows]
    out.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1}]}))
    return out


@pytest.fixture(scope="module")
def everywhere(sa1b):
    """{kind: location} of the same five images."""
    root = sa1b.parent
    coco = make_coco(sa1b, root / "instances_sa1b.json")
    assert not tfds_writer.prepare(data.find([sa1b]), root / "prepared")
    return {
        "folder": sa1b,
        "tar": make_tar(sa1b, root / "sa_000000.tar"),
        "coco": coco,
        "tfds": f"tfds:{root / 'prepared'}",
    }


@pytest.mark.parametrize("kind", ["tar", "coco", "tfds"])
def test_every_source_gives_the_same(everywhere, kind):
    expected, found = data.find([everywhere["folder"]]), data.find([everywhere[kind]])
    assert len(found) == 5 and len({sample.name for sample in found}) == 5
    for sample, other in zip(expected, found, strict=True):
        assert sample.read() == other.read()
        np.testing.assert_array_equal(sample.image(), other.image())
        for one, two in zip(sample.annotations(), other.annotations(), strict=True):
            assert one.id == two.id
            for field in ("mask", "box", "point", "crop_box"):
                np.testing.assert_array_equal(getattr(one, field), getattr(two, field), err_msg=field)
    for batch, other in zip(Batches(expected, (64, 48), 2, 0), Batches(found, (64, 48), 2, 0), strict=False):
        np.testing.assert_array_equal(batch["image"], other["image"])
        break


def test_every_source_gives_the_same_numbers(everywhere):
    sam, protocols = random_sam(SQUARE), Protocols(("point", "box", "point-center", "box-noisy"))
    measured = {kind: measure_models([sam], data.find([place]), protocols) for kind, place in everywhere.items()}
    assert len({each.digest for each in measured.values()}) == 1
    scores = {kind: each.scores for kind, each in measured.items()}
    expected = list(scores.pop("folder").values())
    assert len(expected) == 4 and all(0 < image[0]["point/iou"] < 1 for image in expected)
    for kind, found in scores.items():
        assert list(found.values()) == expected, kind


def test_preparing_needs_no_tensorflow(everywhere):
    code = f"from slimsam_jax.data import find; import sys; print(len(find(['{everywhere['tfds']}'])))"
    code += "; assert 'tensorflow' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"5"


def test_prepared_data_has_the_features_of_segment_anything(everywhere):
    import tensorflow_datasets as tfds

    stock = tfds.builder("segment_anything", file_format="array_record", data_dir=everywhere["folder"]).info.features
    ours = tfds_writer.Sa1b(data_dir=everywhere["folder"], file_format="array_record").info.features
    without_words = lambda features: re.sub(r", description=.*(?=\),$)", "", repr(features), flags=re.MULTILINE)
    assert without_words(ours) == without_words(stock)


def test_what_cannot_be_prepared_is_named(sa1b, tmp_path):
    bad = truncated(tmp_path / "sa_9.jpg")
    skipped = tfds_writer.prepare(data.find([sa1b]) + samples([bad]), tmp_path / "out")
    assert list(skipped) == [str(bad)] and len(data.find([f"tfds:{tmp_path / 'out'}"])) == 5
    with pytest.raises(InputError, match="no image can be used"):
        tfds_writer.prepare(samples([bad]), tmp_path / "none")
    assert not (tmp_path / "none").exists() and {p.name for p in tmp_path.iterdir()} == {"sa_9.jpg", "out"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sa1b"]


def test_odd_names_and_annotations_without_ids_can_be_prepared(tmp_path):
    path = save_image(tmp_path / "in" / "20231122185736123456.jpg")
    write_annotation(path)
    fields = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({"annotations": fields["annotations"] * 2}))
    assert not tfds_writer.prepare(data.find([tmp_path / "in"]), tmp_path / "out")
    (sample,) = data.find([f"tfds:{tmp_path / 'out'}"])
    assert [annotation.id for annotation in sample.annotations()] == [0, 1]


def test_folders_may_hold_shards_and_coco(everywhere, tmp_path):
    """Images first; annotations.json makes a folder COCO, whose images lie beside it or in images/."""
    make_tar(everywhere["folder"], tmp_path / "b.tar")
    save_image(tmp_path / "a.png")
    assert [Path(s.name).name for s in data.find([tmp_path])][:2] == ["a.png", "sa_10.jpg"]
    (tmp_path / "coco" / "images").mkdir(parents=True)
    make_coco(everywhere["folder"], tmp_path / "coco" / "annotations.json")
    for path in everywhere["folder"].glob("*.jpg"):
        (tmp_path / "coco" / "images" / path.name).write_bytes(path.read_bytes())
    found = data.find([tmp_path / "coco"])
    assert [sample.image_id for sample in found] == list(range(5)) and len(found[0].annotations()) == 1


def test_what_is_hidden_in_a_tar_is_left_out(tmp_path):
    """Files and folders, at any depth; a name that leads upwards is no hidden one."""
    image = save_image(tmp_path / "x.png", 20, 30)
    names = ("./a.png", "b/c.png", "../../d.png", "./.thumbs/a.png", "b/.t/u/c.png", "b/._c.png", ".e.png")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in names:
            tar.add(image, name)
    found = [sample.name.removeprefix(f"{tmp_path / 't.tar'}/") for sample in data.find([tmp_path / "t.tar"])]
    assert found == ["../../d.png", "a.png", "b/c.png"]


def test_the_layout_of_coco_itself(everywhere, tmp_path):
    (tmp_path / "annotations").mkdir()
    path = make_coco(everywhere["folder"], tmp_path / "annotations" / "instances_val2017.json")
    with pytest.raises(InputError, match=r"sa_10.jpg, listed by .*instances_val2017.json, is in none of .*val2017"):
        data.find([path])
    save_image(tmp_path / "val2017" / "sa_10.jpg")
    assert data.find([path])[0].name == str(tmp_path / "val2017" / "sa_10.jpg")


def test_polygons_and_crowds_of_coco(tmp_path):
    save_image(tmp_path / "x.jpg", 20, 30)
    polygon = [[2, 2, 25, 3, 12.5, 17.25]]
    degenerate = [[1, 1, 28, 18], *polygon, [5, 5], []]  # what tools write beside polygons, and encloses nothing
    rows = [
        {"id": 1, "image_id": 7, "bbox": [2, 2, 23, 15], "segmentation": degenerate, "iscrowd": 0},
        {"id": 2, "image_id": 7, "bbox": [0, 0, 30, 20], "segmentation": {"size": [20, 30], "counts": [0, 600]}},
        {"id": 3, "image_id": 7, "bbox": [0, 0, 1, 1], "segmentation": {"size": [1, 1], "counts": [1]}, "iscrowd": 1},
    ]
    images = [{"id": 7, "file_name": "x.jpg", "width": 30, "height": 20}]
    (tmp_path / "annotations.json").write_text(json.dumps({"images": images, "annotations": rows}))
    (sample,) = data.find([tmp_path])
    first, second = sample.annotations()
    expected = pycoco.decode(pycoco.merge(pycoco.frPyObjects(polygon, 20, 30)))
    np.testing.assert_array_equal(first.mask, expected)
    assert second.mask.all() and first.mask[int(first.point[1]), int(first.point[0])]
    np.testing.assert_array_equal(second.point, [9.5, 9.5])  # the first of the equals


def test_a_truncated_tar_gives_what_is_whole(everywhere, tmp_path):
    """Cut within the image sa_12: the two before it are whole, it is named when it is read, the rest is not there."""
    whole = everywhere["tar"].read_bytes()
    with tarfile.open(everywhere["tar"]) as tar:
        cut = next(m for m in tar if m.name.endswith("sa_12.jpg"))
    (tmp_path / "cut.tar").write_bytes(whole[: cut.offset_data + 100])
    found = data.find([tmp_path / "cut.tar"])
    assert [Path(s.name).name for s in found[:3]] == ["sa_10.jpg", "sa_11.jpg", "sa_12.jpg"] and len(found) == 4
    found[1].image(), found[1].annotations()
    with pytest.raises(InputError, match=r"cut.tar/sa_12.jpg cannot be read .*the tar ends \d+ bytes before it"):
        found[2].image()


@pytest.mark.parametrize("where", ["between files", "in a header", "checksum"])
def test_a_damaged_tar_says_that_something_is_lost(everywhere, tmp_path, where):
    whole = bytearray(everywhere["tar"].read_bytes())
    with tarfile.open(everywhere["tar"]) as tar:
        header = next(m for m in tar if m.name.endswith("sa_11.json")).offset
    if where == "checksum":
        whole[header + 148 : header + 156] = b"damaged!"
    end = {"between files": header, "in a header": header + 100, "checksum": len(whole)}[where]
    (tmp_path / "cut.tar").write_bytes(whole[:end])
    *found, rest = data.find([tmp_path / "cut.tar"])
    assert [Path(s.name).name for s in found] == ["sa_10.jpg", "sa_11.jpg"]
    with pytest.raises(InputError, match=rf"from byte {header} on cannot be read .*whatever follows is lost"):
        rest.image()


def test_other_things_are_refused(everywhere, tmp_path):
    packed = tmp_path / "x.tar"
    packed.write_bytes(gzip.compress(everywhere["tar"].read_bytes()))
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "empty.json").write_text('{"images": []}')
    for location, reason in (
        (packed, "not an uncompressed tar .*gunzip"),
        (tmp_path / "nothing", "does not exist; give a folder of images, a .tar of them, a COCO .json or tfds:DIR"),
        (tmp_path / "no.json", "COCO file .*no.json cannot be read"),
        (tmp_path / "empty.json", "lists no images"),
        (f"tfds:{tmp_path}", "holds no prepared data sets .*prepare makes one"),
        (f"tfds:{tmp_path / 'nothing'}", "holds no prepared data sets"),
    ):
        with pytest.raises(InputError, match=reason):
            data.find([location])


def test_deepest_point_by_hand():
    mask = np.zeros((9, 12), bool)
    mask[:5, 2:7] = True  # 5 x 5 at the upper border, which counts as outside
    np.testing.assert_array_equal(geometry.interior_point(mask)[0], [4.5, 2.5])
    mask[7, 11] = True
    np.testing.assert_array_equal(geometry.interior_point(mask)[0], [4.5, 2.5])
    np.testing.assert_array_equal(geometry.interior_point(np.zeros((4, 6), bool))[0], [3, 2])
