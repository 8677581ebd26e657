"""Images, annotations and their run-length codes; broken ones among good ones."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps
from pycocotools import mask as coco

from helpers.images import samples, save_image, truncated, write_annotation
from slimsam_jax import data
from slimsam_jax.data import batches
from slimsam_jax.data.augment import flip_and_crop
from slimsam_jax.data.sample import eight_bits
from slimsam_jax.data.sources import folder
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.imaging import rle
from slimsam_jax.imaging.transforms import resize_and_pad, resized_shape, to_model_frame


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40), elements=st.integers(0, 1))
)
def test_rle_equals_pycocotools(mask):
    encoded = coco.encode(np.asfortranarray(mask))
    np.testing.assert_array_equal(rle.decode(encoded), mask.astype(bool))
    text = {**encoded, "counts": encoded["counts"].decode()}
    np.testing.assert_array_equal(rle.decode(text), mask.astype(bool))
    assert rle.encode(mask) == text


def test_rle_of_large_masks_and_plain_runs():
    random = np.random.default_rng(0)
    mask = np.zeros((700, 900), np.uint8)
    mask[100:650, 200:880] = random.random((550, 680)) < 0.9
    encoded = coco.encode(np.asfortranarray(mask))
    np.testing.assert_array_equal(rle.decode(encoded), mask.astype(bool))
    assert rle.encode(mask)["counts"] == encoded["counts"].decode()
    np.testing.assert_array_equal(rle.decode({"size": [2, 2], "counts": [1, 2, 1]}), [[False, True], [True, False]])


@pytest.mark.parametrize("counts", ["", "0", "o", [1, 2], [-1, 5]])
def test_damaged_rle_is_refused(counts):
    with pytest.raises(ValueError):
        rle.decode({"size": [2, 2], "counts": counts})


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(1024, 1024), (256, 256), (512, 1024)]))
def test_coordinates_survive_the_model_frame(height, width, frame):
    size = resized_shape((height, width), frame)
    assert size[0] <= frame[0] and size[1] <= frame[1]
    corners = np.array([[0, 0], [width, height], [width / 3, height / 7]])
    there = to_model_frame(corners, size, (height, width))
    assert (there >= 0).all() and (there <= np.array(size[::-1]) + 1e-3).all()
    back = to_model_frame(there, (height, width), size)
    assert np.abs(back - corners).max() < 0.5


def test_images_are_found_at_any_depth(tmp_path):
    for name in (
        "b.png",
        "a.JPG",
        "deep/er/c.webp",
        "deep/d.bmp",
        "e.tiff",
        ".hidden.png",
        ".thumbs/f.png",
        "deep/.t/u/g.png",
    ):
        save_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = [str(Path(p.name).relative_to(tmp_path)) for p in data.find([tmp_path, tmp_path / "deep"])]
    assert sorted(found) == ["a.JPG", "b.png", "deep/d.bmp", "deep/er/c.webp", "e.tiff"]
    assert len(data.find([tmp_path / ".thumbs"])) == 1  # whoever names it means it


def test_endings_in_capitals_are_read(tmp_path):
    """As cameras and Windows write them; of two .json the usual one is taken."""
    for name in ("a.jpg", "b.JPG", "alone.jpg"):
        write_annotation(save_image(tmp_path / name), id=1)
        (tmp_path / name).with_suffix(".json").rename((tmp_path / name).with_suffix(".JSON"))
    (tmp_path / "alone.jpg").unlink()
    with tarfile.open(tmp_path / "X.TAR", "w") as tar:
        tar.add(tmp_path / "a.jpg", "in.jpg")
    contents = folder.contents(tmp_path)
    assert [len(sample.annotations()) for sample in contents.samples] == [1, 1] and not contents.others
    assert contents.alone == [tmp_path / "alone.JSON"]
    assert [Path(sample.name).name for sample in data.find([tmp_path])] == ["a.jpg", "b.JPG", "in.jpg"]
    (tmp_path / "a.json").write_text('{"annotations": []}')
    assert data.find([tmp_path])[0].annotations() == []


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        data.find([tmp_path / "nothing"])
    with pytest.raises(InputError, match="holds no images"):
        data.find([tmp_path])


@pytest.mark.parametrize("kind", ["PPM", "JPEG2000", "MPO"])
def test_less_usual_formats_are_read(tmp_path, kind):
    """A camera's MPO is a JPEG with a second image behind."""
    image = Image.new("RGB", (30, 20), (9, 99, 200))
    image.save(tmp_path / "x.jpg", kind)
    found = np.asarray(data.read_image(tmp_path / "x.jpg"), int)
    assert found.shape == (20, 30, 3) and np.abs(found - (9, 99, 200)).max() < 4


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    path = save_image(tmp_path / "x.jpg", 20, 30, exif=exif)
    assert data.read_image(path).size == (20, 30)


@pytest.mark.parametrize("exif", [b"Exif\0\0XXXXXXXX", b"Exif\0\0", b"junk"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_image_of_damaged_exif_is_read_as_it_lies(tmp_path, suffix, exif):
    """Some cameras and editors leave junk there, which the pixels do not need."""
    Image.new("RGB", (30, 20), (9, 99, 200)).save(tmp_path / f"x.{suffix}", dpi=(72, 72), exif=exif, lossless=True)
    found = np.asarray(data.read_image(tmp_path / f"x.{suffix}"), int)
    assert found.shape == (20, 30, 3) and np.abs(found - (9, 99, 200)).max() < 4
    content = (tmp_path / f"x.{suffix}").read_bytes()
    with pytest.raises(InputError, match="is not a readable image"):
        data.decode(content[: len(content) // 2], "x")


def test_grey_transparent_and_palette_images_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "I;16"):
        path = tmp_path / f"{mode[0]}{len(mode)}.{'tif' if mode in ('CMYK', 'I;16') else 'png'}"
        Image.new(mode, (5, 4)).save(path)
        assert data.read_image(path).mode == "RGB"


def test_sixteen_bits_become_eight(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(grey).save(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(data.read_image(tmp_path / "x.png"))[..., 0], grey >> 8)
    for of_32_bits, expected in ((grey.astype(np.int32), grey >> 8), (np.int32(grey >> 8), grey >> 8)):
        np.testing.assert_array_equal(np.asarray(eight_bits(Image.fromarray(of_32_bits))), expected)


def test_broken_images_are_skipped_and_named(tmp_path):
    good = [save_image(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    bad = [truncated(tmp_path / "cut.jpg"), tmp_path / "text.png"]
    bad[1].write_text("no image at all")
    stream = batches.Batches(samples([*good, *bad]), (32, 32), batch=2, seed=0)
    for _ in range(6):
        batch = next(stream)
        assert batch["image"].shape == (2, 32, 32, 3) and batch["image"].dtype == np.uint8
        np.testing.assert_array_equal(batch["size"], [[21, 32]] * 2)
    assert set(stream.skipped) == set(map(str, bad))


def test_nothing_but_broken_images_stops(tmp_path):
    broken = samples([truncated(tmp_path / "a.jpg"), truncated(tmp_path / "b.jpg")])
    with pytest.raises(RunError, match="none of the 2 images"):
        next(batches.Batches(broken, (32, 32), 1, 0))


@pytest.mark.parametrize(("limit", "advice"), [(0.3, "2 of 5 .* --max-broken 0.3"), (0, "[12] of 5 .*--strict")])
def test_too_many_broken_images_stop(tmp_path, limit, advice):
    good = [save_image(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    bad = [truncated(tmp_path / "a.jpg"), truncated(tmp_path / "b.jpg")]
    make = lambda limit: batches.Batches(samples([*good, *bad]), (32, 32), 1, 0, max_broken=limit)
    with pytest.raises(RunError, match=advice):
        for _ in zip(range(10), make(limit), strict=False):
            pass
    assert sum(1 for _ in zip(range(10), make(0.4), strict=False)) == 10


def test_batches_follow_from_seed_and_step(tmp_path):
    """Resumed at any step, on one process or on three, each with rows behind one another; one image is broken."""
    paths = [save_image(tmp_path / f"{i}.png", seed=i) for i in range(7)]
    truncated(tmp_path / "6.png")
    augment = flip_and_crop(flip=True, crop=0.5)
    make = lambda seed=0, **kw: batches.Batches(samples(paths), (32, 32), batch=6, seed=seed, augment=augment, **kw)
    first = [next(stream)["image"] for stream in [make()] for _ in range(8)]
    resumed = make(start=3)
    for expected in first[3:]:
        np.testing.assert_array_equal(next(resumed)["image"], expected)
    parts = [make(start=2, part=(i, 3)) for i in range(3)]
    for expected in first[2:5]:
        together = np.concatenate([next(part)["image"] for part in parts])
        np.testing.assert_array_equal(together, expected)
    assert any((next(b)["image"] != e).any() for b in [make(1)] for e in first)


def test_names_of_a_step(tmp_path):
    paths = [save_image(tmp_path / f"{i}.png", seed=i) for i in range(5)]
    number = lambda sample: int(Path(sample.name).stem)
    extra = lambda sample, size, random: {"number": np.array(number(sample))}
    stream = batches.Batches(samples(paths), (32, 32), batch=2, seed=0, extra=extra)
    for step in range(6):
        assert [number(sample) for sample in stream.samples_of(step)] == next(stream)["number"].tolist()


def test_what_was_broken_in_the_place_of_a_broken_one_is_met(tmp_path):
    """Threads have read on, and know of others that no step has asked for."""
    paths = [save_image(tmp_path / f"{i}.png", seed=i) for i in range(9)]
    stream = batches.Batches(samples(paths), (32, 32), batch=1, seed=0)
    first = [paths.index(Path(stream.samples_of(step)[0].name)) for step in range(9)]
    steps = first.index(2) + 1
    stream.skipped.update({str(paths[i]): "torn" for i in (2, 3, 5)})
    stream.passed.add(str(paths[4]))
    expected = {*first[:steps], 2, 3, 4, 5, 6}
    assert stream.met(steps) == {str(paths[i]) for i in expected} and stream.met(0) == set()
    stream.skipped.update({str(path): "torn" for path in paths})
    assert stream.met(1) == {*map(str, paths)}  # and ends


def test_an_image_that_is_given_up_after_drawing_changes_no_other(tmp_path):
    """Whether it was known before, as after a resumption, or not."""

    class Late(batches.Batches):
        def _read(self, sample, random):
            number = random.random()
            if Path(sample.name).stem == "2":
                raise InputError("nothing to see")
            return {"number": np.array(number)}

    paths = [save_image(tmp_path / f"{i}.png", seed=i) for i in range(5)]
    streams = [Late(samples(paths), (32, 32), batch=5, seed=0) for _ in range(2)]
    streams[1].skipped[str(paths[2])] = "known"
    for _ in range(3):
        np.testing.assert_array_equal(next(streams[0])["number"], next(streams[1])["number"])
    assert set(streams[0].skipped) == set(streams[1].skipped)


def test_flips_and_crops():
    random = np.random.default_rng(0)
    image = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8))
    assert flip_and_crop(False, 1.0) is None
    flip = flip_and_crop(True, 1.0)
    found = {flip(image, random).tobytes() for _ in range(20)}
    assert found == {image.tobytes(), ImageOps.mirror(image).tobytes()}
    crop = flip_and_crop(False, 0.5)
    for _ in range(20):
        width, height = crop(image, random).size
        assert 30 <= width <= 60 and 20 <= height <= 40


def test_annotations_of_sa1b(tmp_path):
    path = save_image(tmp_path / "sa_1.jpg")
    (bare,) = samples([path])
    assert bare.annotations() == []
    mask = write_annotation(path)
    (annotation,) = samples([path])[0].annotations()
    np.testing.assert_array_equal(annotation.mask, mask)
    np.testing.assert_array_equal(annotation.point, [6.5, 7.5])
    np.testing.assert_array_equal(annotation.box, [4, 5, 20, 10])


@pytest.mark.parametrize(
    "changes",
    [
        {"bbox": [1, 2]},
        {"point_coords": []},
        {"segmentation": {"size": [20, 30], "counts": "1"}},
        {"segmentation": 3},
        {"bbox": [4, 5, -1, 5]},
        {"segmentation": {"size": [10**9, 10**9], "counts": [10**18]}},
    ],
)
def test_damaged_annotations_are_refused(tmp_path, changes):
    path = save_image(tmp_path / "sa_1.jpg")
    write_annotation(path, **changes)
    with pytest.raises(InputError, match=r"the annotation of .*sa_1.jpg cannot be read"):
        samples([path])[0].annotations()


def test_embedded_assets_are_whole():
    from converters.from_torch import load

    photos = data.find([data.embedded_images()])
    sources = (data.embedded_images() / "SOURCES.md").read_text()
    assert len(photos) >= 20
    for photo in photos:
        assert f"| {Path(photo.name).name} " in sources, f"{photo.name} has no source"
        photo.image()
    assert load(data.embedded_teacher()).config.embed_dim == 192


def test_resize_never_changes_a_fitting_image():
    image = np.random.default_rng(0).integers(0, 256, (32, 16, 3), np.uint8)
    frame, size = resize_and_pad(image, (32, 32))
    np.testing.assert_array_equal(frame[:, :16], image)
    np.testing.assert_array_equal(size, [32, 16])
