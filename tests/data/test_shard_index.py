"""What shards hold is kept from one start to the next, and not believed; samples are made when they are asked for."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import tarfile
import zlib

import numpy as np
import pytest

from helpers.images import save_image, write_annotation
from slimsam_jax import data
from slimsam_jax.data import samples as listed
from slimsam_jax.data.sources import shard_index, tar_index
from slimsam_jax.data.sources.shard_index import MAGIC, ROW
from slimsam_jax.errors import InputError
from slimsam_jax.files import open_regular
from slimsam_jax.training import setup

ODD = ("b\nc.png", os.fsdecode(b"\xff.png"), "ü.png")  # names of two lines, and of no UTF-8


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder where indices are kept, of small tars, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index, "KEPT_FROM", 3)
    return tmp_path / "cache" / "slimsam_jax" / "shards"


@pytest.fixture
def tars(tmp_path):
    """A folder with two shards of three images each, two of them annotated, one .json alone, and one of odd names."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(3):
                path = save_image(tmp_path / f"sa_{shard}{i}.png", seed=i)
                write_annotation(path)
                tar.add(path, f"./{path.name}")
                if i != 1:
                    tar.add(path.with_suffix(".json"), f"./{path.stem}.json")
            tar.add(path.with_suffix(".json"), "./alone.json")
    with tarfile.open(folder / "odd.tar", "w") as tar:
        for name in ODD:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    for path in folder.iterdir():
        os.utime(path, (1, 1))  # what has changed in this moment is not kept
    return folder


@pytest.fixture
def walks(monkeypatch):
    """The names of the tars that are walked over."""
    names = []
    monkeypatch.setattr(shard_index, "open_regular", lambda path: names.append(path.name) or open_regular(path))
    return names


def everything_of(samples) -> list:
    return [(s.name, s.load_annotations and s.annotations(), s.load_annotations is None or s.read()) for s in samples]


def test_a_second_start_walks_over_nothing(tars, kept, walks):
    first = everything_of(data.find([tars]))
    assert sorted(walks) == ["0.tar", "1.tar", "odd.tar"] and len(first) == 9 and len(list(kept.iterdir())) == 3
    walks.clear()
    assert str(everything_of(data.find([tars]))) == str(first) and not walks
    assert data.look([tars]).without_image() == [f"{tars}/{i}.tar/alone.json" for i in range(2)] and not walks
    os.utime(tars / "1.tar", (2, 2))
    with (tars / "0.tar").open("ab") as file:
        file.write(bytes(512))
    os.utime(tars / "0.tar", (1, 1))
    assert str(everything_of(data.find([tars]))) == str(first) and sorted(walks) == ["0.tar", "1.tar"]


def test_what_is_small_or_still_changing_is_not_kept(tars, kept, walks, monkeypatch):
    os.utime(tars / "0.tar")
    data.find([tars])
    assert len(list(kept.iterdir())) == 2
    monkeypatch.setattr(shard_index, "ROOM", 1)
    data.find([tars / "0.tar"])
    assert not list(kept.iterdir())  # beyond the room, the oldest first


def rewritten(content: bytes, line=None, rows=None, names=None) -> bytes:
    """An index that says something else, with the right checksum."""
    rest = content[len(MAGIC) + 9 :]
    first, _, payload = rest.partition(b"\n")
    fields = json.loads(first)
    size = fields["rows"] * ROW.itemsize
    own = np.frombuffer(payload[:size], ROW).copy()
    for name, value in (rows or {}).items():
        own[name][-1] = value
    payload = own.tobytes() + (payload[size:] if names is None else names)
    rest = (json.dumps(fields | line).encode() if line else first) + b"\n" + payload
    return MAGIC + b"%08x\n" % zlib.crc32(rest) + rest


def deep() -> bytes:
    rest = b"[" * 3000 + b"\n"
    return MAGIC + b"%08x\n" % zlib.crc32(rest) + rest


HOSTILE = {
    "nothing": lambda content: b"",
    "cut": lambda content: content[:-1],
    "a bit": lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "another magic": lambda content: b"x" + content[1:],
    "too large": lambda content: content + bytes(2**20),
    "many rows": lambda content: rewritten(content, {"rows": 2**62, "entries": 2**62}),
    "a negative count": lambda content: rewritten(content, {"images": -1}),
    "more images than rows": lambda content: rewritten(content, {"images": 5}),
    "a count that is none": lambda content: rewritten(content, {"end": "1"}),
    "a fault that is none": lambda content: rewritten(content, {"fault": ["x"]}),
    "of another time": lambda content: rewritten(content, {"time": 0}),
    "lists in lists": lambda content: deep(),
    "a negative size": lambda content: rewritten(content, rows={"beside": 0, "beside_size": -1}),
    "a negative offset": lambda content: rewritten(content, rows={"offset": -1}),
    "a name beyond the end": lambda content: rewritten(content, rows={"end": 2**31}),
    "names backwards": lambda content: rewritten(content, rows={"end": 0}),
    "longer names": lambda content: rewritten(content, names=b"x" * 1000),
}


@pytest.mark.parametrize("wrong", HOSTILE)
def test_an_index_that_is_wrong_is_made_again(tars, kept, walks, wrong):
    expected = everything_of(data.find([tars / "0.tar"]))
    (file,) = kept.iterdir()
    sound = file.read_bytes()
    file.write_bytes(HOSTILE[wrong](sound))
    assert file.read_bytes() != sound
    walks.clear()
    assert str(everything_of(data.find([tars / "0.tar"]))) == str(expected)
    assert walks == ["0.tar"] and file.read_bytes() == sound


def test_no_index_is_read_where_others_could_write_it(tars, kept, walks, capsys):
    data.find([tars / "0.tar"])
    kept.chmod(0o777)
    data.find([tars / "0.tar"])
    assert walks == ["0.tar"] * 2 and "others could change it" in capsys.readouterr().err


def test_processes_pass_by_what_another_has_walked_over(tars, kept, walks):
    path = tars / "0.tar"
    walk = lambda file: pytest.fail("walked")
    data.find([path])
    assert len(shard_index._known_or_walked(kept, path, walk).rows) == 4


def test_a_long_list_is_the_list(tars, tmp_path, kept):
    save_image(tmp_path / "more" / "a.png")
    found = data.find([tars, tmp_path / "more", tars / "0.tar", tmp_path / "more"])
    every = list(found)
    assert isinstance(found, listed.Samples) and len(found) == len(every) == len(set(every)) == 10
    places = np.array([9, 0, 3])
    for some, expected in (
        (found, every),
        (found[2:9:3], every[2:9:3]),
        (found[::-2], every[::-2]),
        (found[1:][::3], every[1:][::3]),
        (listed.take(found, places), listed.take(every, places)),
        (listed.annotated(found[1:]), listed.annotated(every[1:])),
        (listed.joined(found, every[:1]), every + every[:1]),
        (pickle.loads(pickle.dumps(found[2:])), every[2:]),
    ):
        assert [sample.name for sample in some] == [sample.name for sample in expected] and len(some) == len(expected)
        names = "\n".join(sample.name for sample in expected).encode(errors="surrogatepass")
        assert listed.digest_of_names(some) == listed.digest_of_names(expected) == hashlib.sha256(names).hexdigest()
    assert found[-1] == every[-1] and len(listed.annotated(found)) == 4
    for wrong in (10, -11):
        with pytest.raises(IndexError):
            found[wrong]


def test_held_out_images_stay_long_lists(tars, kept):
    class Options:
        images, val = (str(tars),), ()

    images, val = setup.split_images(Options)
    every = list(data.find([tars]))
    assert list(val) == every[::8] and list(images) == [sample for sample in every if sample not in val]
    assert isinstance(images, listed.Samples) and list(setup.some_of(images, 3, 0)) == setup.some_of(list(images), 3, 0)


def test_a_sample_takes_less_than_100_bytes():
    names = [f"sa_{i}.jpg" for i in range(11_000_000, 11_010_000)]
    members = {name: (i, 5) for i, name in enumerate([*names, *map(shard_index.json_beside, names)])}
    index = tar_index.Index([tar_index.Entry(name, *where) for name, where in members.items()], 0, "")
    table = shard_index.table(index, members, names, [])
    assert (table.rows.nbytes + len(table.names) + np.uint32().nbytes) / len(names) < 60  # and its place in a split
    assert table.name(9_999) == names[-1] and table.rows["beside"][7] == 10_007


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), OSError(errno.ESTALE, "Stale handle")])
def test_a_shard_whose_disk_fails_within_is_lost_alone(tars, kept, monkeypatch, error):
    walk = tar_index.index

    def failing(file):
        if os.path.sameopenfile(file.fileno(), broken.fileno()):
            raise error
        return walk(file)

    monkeypatch.setattr(tar_index, "index", failing)
    with (tars / "0.tar").open("rb") as broken:
        found = data.find([tars])
    assert [sample.name for sample in found if sample.lost] == [str(tars / "0.tar")] and len(found) == 7
    with pytest.raises(InputError, match=rf"0.tar cannot be read: {error.strerror}$"):
        next(sample for sample in found if sample.lost).read()
    assert len(list(kept.iterdir())) == 2
