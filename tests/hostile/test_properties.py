"""Whatever the numbers and bytes are, readers decode them or say what is wrong. Run apart: a crash must not be ours."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as pycoco

from helpers.hostile import files as hostile
from helpers.hostile.annotations import TRIANGLE, coco, row
from slimsam_jax import data
from slimsam_jax.data import Sample
from slimsam_jax.data.sources import folder, polygons, tar_index
from slimsam_jax.errors import InputError, printable
from slimsam_jax.imaging import rle

DAMAGED = (ValueError, KeyError, TypeError, OverflowError)  # of what `reading` makes an InputError
HUGE = st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30, -1, -(2**62), -(2**63)])
SIDES = st.integers(0, 12) | HUGE
WRAPPING = st.sampled_from([[2**62] * 4, [2**63 - 1, 1] * 2, [-5, 5], [2**32] * 2, [12.5, -0.5], [True]])
RUNS = st.lists(st.integers(0, 12).map(lambda run: [run]) | HUGE.map(lambda run: [run]) | WRAPPING, max_size=8).map(
    lambda blocks: [run for block in blocks for run in block]
)
PACKED = st.text(st.characters(min_codepoint=46, max_codepoint=113), max_size=30) | st.binary(max_size=30)
NUMBERS = st.integers(-40, 70) | st.floats(-40, 70) | st.floats() | HUGE
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
POLYGONS = st.lists(st.lists(NUMBERS, min_size=4, max_size=12), max_size=4) | ANYTHING
BYTES = st.lists(st.tuples(st.integers(0, 2**20), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)


def mutated(content: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    """With some bytes overwritten; the first change also cuts, if it is at the end of its range."""
    found = bytearray(content)
    for where, new in changes:
        found[where % len(found) : where % len(found) + len(new)] = new
    return bytes(found[: changes[0][0]] if changes[0][0] < len(found) // 4 else found)


@given(st.lists(SIDES, min_size=2, max_size=2) | ANYTHING, RUNS | PACKED | ANYTHING)
def masks(size: Any, counts: Any) -> None:
    """A mask is decoded as pycocotools would, if it may see it; and only if the runs cover the size."""
    decode_mask(size, counts)


@given(RUNS)
def wrapping_masks(runs: list[Any]) -> None:
    """The size is what a sum of 64 bits gives."""
    decode_mask([1, int(sum(runs)) % 2**64], runs)


def decode_mask(size: Any, counts: Any) -> None:
    try:
        mask = rle.decode({"size": size, "counts": counts})
    except DAMAGED:
        return
    assert mask.dtype == bool and mask.shape == tuple(size)
    if isinstance(counts, list):
        assert sum(counts) == math.prod(size) and min(counts, default=0) >= 0 and mask.sum() == sum(counts[1::2])
    elif mask.size:
        np.testing.assert_array_equal(mask, pycoco.decode({"size": list(size), "counts": counts}))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any))
def sound_masks(runs: list[int]) -> None:
    """Runs that cover their size, empty ones, too, are never refused; nor is what pycocotools makes of them."""
    plain = rle.decode({"size": [1, sum(runs)], "counts": runs})
    packed = pycoco.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, sum(runs))
    np.testing.assert_array_equal(rle.decode(packed), plain)
    np.testing.assert_array_equal(plain[0], np.repeat(np.arange(len(runs)) % 2 == 1, runs))


@given(POLYGONS, st.tuples(st.integers(1, 30), st.integers(1, 30)) | st.tuples(SIDES, SIDES))
def polygon_lists(given_: Any, size: tuple[int, int]) -> None:
    try:
        mask = rle.decode(polygons.to_rle(given_, size), size)
    except DAMAGED:
        return
    assert mask.shape == size and any(len(polygon) >= 6 for polygon in given_)


SA1B = json.dumps({"annotations": [row(), row(id=2, segmentation={"size": [20, 30], "counts": "0hb0"})]}).encode()


@given(BYTES)
def sa1b_files(changes: list[tuple[int, bytes]]) -> None:
    content = mutated(SA1B, changes)
    folder.is_annotation(content)
    read(Sample("x", lambda: hostile.GOOD, lambda: folder.rows(content)))


def read(sample: Sample) -> None:
    try:
        sample.image()
        assert all(a.mask.shape == (20, 30) for a in sample.annotations((20, 30)))
    except InputError as error:
        assert str(error).isprintable()


@given(BYTES, ANYTHING)
def coco_files(changes: list[tuple[int, bytes]], segmentation: Any) -> None:
    both = [row(segmentation=[TRIANGLE]), row(id=2, segmentation=segmentation)]
    contents = [coco(annotations=both), mutated(coco(annotations=[row(), both[0]]), changes)]
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "x.png").write_bytes(hostile.GOOD)
        for content in contents:
            (Path(place) / "annotations.json").write_bytes(content)
            read_all(place)


def read_all(place: str) -> None:
    try:
        found = data.find([place])
    except InputError as error:
        assert str(error).isprintable()
        return
    for sample in found:
        read(sample)


TAR = hostile.FIRST + hostile.member("a.json", SA1B) + hostile.pax(hostile.record(b"path", b"c.png"))
TAR += hostile.member("L", b"d.png\0", kind=b"L") + hostile.LAST + hostile.END


@given(BYTES, st.booleans())
def tars(changes: list[tuple[int, bytes]], mend: bool) -> None:
    """With the checksums of all headers put right, too, so that more than those is tried."""
    content = bytearray(mutated(TAR, changes))
    for start in range(0, len(content) - 511, 512) if mend else ():
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    found = tar_index.index(io.BytesIO(content))
    assert all(entry.size >= 0 and entry.offset % 512 == 0 for entry in found.entries) and found.end >= 0
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "x.tar").write_bytes(content)
        read_all(f"{place}/x.tar")


ENCODED = [hostile.image_bytes(kind=kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "PPM")]


@given(st.sampled_from(ENCODED), BYTES)
def images(content: bytes, changes: list[tuple[int, bytes]]) -> None:
    read(Sample("x", lambda: mutated(content, changes)))


@given(st.text() | st.binary().map(lambda name: name.decode(errors="surrogateescape")), st.integers(2, 50))
def names(name: str, most: int) -> None:
    said = printable(name, most)
    assert said.isprintable() and said.encode().decode() == said and len(said) <= 10 * (most + 4)
    assert said == name or not name.isprintable() or len(name) > most


EACH = (masks, wrapping_masks, sound_masks, polygon_lists, sa1b_files, coco_files, tars, images, names)
PROPERTIES: dict[str, Callable[[], None]] = {each.__name__: each for each in EACH}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with what each has said; those that came to their end also have an empty file NAME.held."""
    folder = tmp_path_factory.mktemp("properties")
    subprocess.run([sys.executable, "-W", "ignore", __file__, "200"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name, results):
    assert (results / f"{name}.held").exists(), (results / name).read_text(errors="replace")[-4000:]


def hold(name: str, examples: int) -> None:
    """In a child, which may crash."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 2)
    settings(max_examples=examples, deadline=None, database=None)(PROPERTIES[name])()
    Path(f"{name}.held").touch()
    os._exit(0)


if __name__ == "__main__":
    for each in PROPERTIES:
        hold(each, int(sys.argv[1]))
