"""Checkpoints and model folders by somebody who means harm: one line, exit code 2, within a second and 500 MB."""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters import from_torch, to_torch, torch_file, torch_pickle
from helpers.hostile import archives as hostile_archives
from helpers.hostile import models as hostile_models
from helpers.hostile import pickles as hostile_pickles
from helpers.hostile.archives import of_state, pth, sparse
from helpers.hostile.pickles import dump, tensor
from helpers.models import random_sam, tiny_config
from helpers.peers import stock_sam
from slimsam_jax import checkpoint, safetensors_file
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import Config

SQUARE = tiny_config(image_size=(64, 64))
LEAST = {"archive": 30, "pickle": 60, "tensor": 60, "module": 10, "model": 30, "file": 10, "ours": 200, "theirs": 90}
SECONDS, MEGABYTES = 1, 500
pytestmark = pytest.mark.xdist_group("hostile checkpoints")  # so that they are made once

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound model: its state dict, and the files of both kinds of folder."""
    root, sam = tmp_path_factory.mktemp("good"), random_sam(SQUARE)
    checkpoint.save(sam, root / "ours")
    to_torch.save_huggingface(sam, root / "theirs")
    read = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
    return to_torch.to_state_dict(sam), read(root / "ours"), read(root / "theirs")


def write_all(root: Path, good) -> dict[tuple[str, str], Path]:
    """{(class, what is wrong): path}; those of the class "good" are sound."""
    state, ours, theirs = good
    found = {}
    files = {
        "archive": hostile_archives.archives(),
        "pickle": {what: pth(body) for what, body in hostile_pickles.PICKLES.items()},
        "tensor": {what: pth(hostile_pickles.table(w=value)) for what, value in hostile_pickles.TENSORS.items()},
        "module": {what: pth(body) for what, body in hostile_pickles.MODULES.items()},
        "model": hostile_models.states(state) | {"one storage": hostile_models.repeated(state)},
        "good": {"state dict": of_state(state)},
    }
    folders = {
        "ours": hostile_models.folders(ours, SQUARE.to_json()),
        "theirs": hostile_models.huggingface(theirs),
        "good": {"ours": ours, "theirs": theirs},
    }
    for kind, table in files.items():
        for i, (what, content) in enumerate(table.items()):
            found[kind, what] = root / f"{kind}{i}.pth"
            found[kind, what].write_bytes(content)
    for kind, table in folders.items():
        found |= {
            (kind, what): hostile_models.write(root / f"{kind}{i}", c) for i, (what, c) in enumerate(table.items())
        }
    for i, (what, make) in enumerate(hostile_models.KINDS.items()):
        found["file", what] = root / f"file{i}.pth"
        make(found["file", what])
    return found | write_sparse(root, state, ours)


def write_sparse(root: Path, state, ours) -> dict[tuple[str, str], Path]:
    """Files of 40 GB that take no place on the disk."""
    found = {("file", what): root / f"sparse_{what}" for what in ("one tensor", "all tensors", "folder")}
    sparse(found["file", "one tensor"], hostile_pickles.table(w=tensor(size=(10**10,))), 4 * 10**10)
    strides = lambda array: [step // 4 for step in array.strides]
    tensors = {name: tensor(0, array.shape, tuple(strides(array))) for name, array in state.items()}
    sparse(found["file", "all tensors"], hostile_pickles.table(**tensors), 4 * 10**10)
    header = hostile_models.safetensors({"w": hostile_models.array((10**10,), (0, 4 * 10**10))})
    hostile_models.write(found["file", "folder"], ours | {"model.safetensors": header})
    os.truncate(found["file", "folder"] / "model.safetensors", len(header) + 4 * 10**10)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory, good):
    """{class: {what is wrong: what the command said and took}}, all by one process with little memory."""
    root = tmp_path_factory.mktemp("hostile")
    paths = write_all(root, good)
    sound_first = sorted(paths, key=lambda key: key[0] != "good")  # they pay for imports, and for JAX's first use
    given = json.dumps([str(paths[key]) for key in sound_first])
    done = subprocess.run(
        [sys.executable, "-m", "helpers.hostile.models_worker"], input=given, cwd=root, capture_output=True, text=True
    )
    lines = {found["path"]: found for found in map(json.loads, done.stdout.splitlines())}
    first = next((key for key in sound_first if str(paths[key]) not in lines), None)
    assert first is None, f"{first} ended the process with {done.returncode}: {done.stderr[-500:]}"
    assert not list(root.rglob("PWNED"))
    found = {kind: {} for kind, _ in paths}
    for (kind, what), path in paths.items():
        found[kind][what] = lines[str(path)]
    return found


def test_sound_ones_are_read_with_as_little_memory(results):
    assert [found["code"] for found in results["good"].values()] == [0, 0, 0], results["good"]


@pytest.mark.parametrize("kind", LEAST)
def test_each_is_refused_in_one_line(kind, results):
    assert len(results[kind]) >= LEAST[kind]
    for what, found in results[kind].items():
        said = found["printed"]
        assert found["code"] == 2 and said.startswith("error: ") and "MemoryError" not in said, (what, found)
        assert said[:-1].isprintable() and len(said) < 1500, (what, found)


@pytest.mark.parametrize("kind", LEAST)
def test_each_is_refused_in_time_and_memory(kind, results):
    assert max(found["seconds"] for found in results[kind].values()) < SECONDS, worst(results[kind], "seconds")
    assert max(found["peak"] for found in results[kind].values()) < MEGABYTES, worst(results[kind], "peak")


def worst(found, measure: str):
    return sorted(((each[measure], what) for what, each in found.items()), reverse=True)[:5]


def test_they_are_refused_for_what_is_wrong(results):
    """Not because the rest of the file is no SAM."""
    for what, found in results["tensor"].items():
        assert what == "version 3" or "UnpicklingError" in found["printed"] or "BadZip" in found["printed"], found
    for what, word in (("complex weights", "complex64"), ("another check sum", "check sum"), ("10^9 masks", "reaches")):
        assert word in results["model"][what]["printed"], results["model"][what]
    for what in ("pickle by 8", "pickle a bomb", "storage a bomb"):
        assert "packed" in results["archive"][what]["printed"], results["archive"][what]
    assert "mostly something else" in results["file"]["all tensors"]["printed"]
    assert "provenance" in results["ours"]["provenance 300 levels deep"]["printed"]


@pytest.mark.parametrize("what", hostile_models.WEIGHTS)
def test_safetensors_are_refused_by_themselves(what, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(hostile_models.WEIGHTS[what])
    with pytest.raises(InputError):
        safetensors_file.read(tmp_path / "x.safetensors")


def test_shared_modules_are_visited_once(tmp_path):
    (tmp_path / "x.pth").write_bytes(hostile_archives.pth(hostile_pickles.nested(28)))
    assert len(torch_file.read(tmp_path / "x.pth")) == 1


def test_nothing_irregular_is_opened_to_be_hashed(good, tmp_path):
    """What lies beside the weights is not read at all."""
    _, ours, _ = good
    folder = hostile_models.write(tmp_path / "model", ours)
    before = checkpoint.sha256(folder)
    for name, make in (("x.safetensors", os.mkfifo), ("y.bin", os.mkdir), ("z.bin", hostile_models.KINDS["zeros"])):
        make(folder / name)
    assert checkpoint.sha256(folder) == before
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(InputError, match="FIFO"):
        checkpoint.sha256(folder)


@pytest.mark.parametrize("source", [None, "", 5, b"x.pth", ["x"], "~nobody_here/x", "nul\0", "x" * 300, "/dev/zero"])
def test_load_wants_a_path(source):
    with pytest.raises(InputError) as error:
        from_torch.load(source)
    assert len(str(error.value).splitlines()) == 1


small = st.one_of(st.integers(-3, 12), st.sampled_from([1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, True, np.int8(3)]))


@fuzz
@given(st.integers(0, 12), small, st.lists(st.tuples(small, small), max_size=4))
def test_a_view_has_the_values_of_its_storage_or_there_is_none(length, offset, axes):
    storage = np.arange(length, dtype=np.float32)
    size, stride = tuple(n for n, _ in axes), tuple(s for _, s in axes)
    try:
        found = torch_file.rebuild_tensor(storage, offset, size, stride)
    except torch_file.pickle.UnpicklingError:
        plain = all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *size, *stride))
        inside = plain and offset + sum((n - 1) * s for n, s in axes) < length and math.prod(size) <= length
        assert not inside or not math.prod(size)
        return
    assert found.shape == size
    for index in np.ndindex(size):
        assert found[index] == offset + sum(i * s for i, s in zip(index, stride, strict=True))


def read_or_refuse(read, path: Path) -> None:
    try:
        read(path)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500


edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 8), st.binary(max_size=9)), min_size=1, max_size=6)


def edited(content: bytes, changes) -> bytes:
    """With some bytes taken out, and others put in their place."""
    for at, length, new in changes:
        start = at % (len(content) + 1)
        content = content[:start] + new + content[start + length :]
    return content


@fuzz
@given(edits)
def test_edited_pickles(good, tmp_path, changes):
    state, _, _ = good
    few = dict(list(state.items())[:3])
    with zipfile.ZipFile(io.BytesIO(of_state(few))) as archive:
        body = archive.read("x/data.pkl")
    (tmp_path / "x.pth").write_bytes(pth(edited(body, changes)[2:-1]))
    read_or_refuse(torch_file.read, tmp_path / "x.pth")


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
words = st.sampled_from([*OPCODES, *hostile_pickles.EVIL.values(), tensor(), dump("w"), dump(3), struct.pack("<I", 1)])


@fuzz
@given(st.lists(words, max_size=30))
def test_pickles_of_random_words(tmp_path, words):
    (tmp_path / "x.pth").write_bytes(pth(b"".join(words)))
    read_or_refuse(torch_file.read, tmp_path / "x.pth")
    assert not Path("PWNED").exists()


@fuzz
@given(edits)
def test_edited_archives(good, tmp_path, changes):
    state, _, _ = good
    (tmp_path / "x.pth").write_bytes(edited(of_state(dict(list(state.items())[:3])), changes))
    read_or_refuse(torch_file.read, tmp_path / "x.pth")


@fuzz
@given(edits)
def test_edited_safetensors(good, tmp_path, changes):
    _, ours, _ = good
    (tmp_path / "x.safetensors").write_bytes(edited(ours["model.safetensors"][:3_000], changes))
    read_or_refuse(safetensors_file.read, tmp_path / "x.safetensors")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@fuzz
@given(st.data())
def test_any_value_in_a_header(tmp_path, data):
    array = {key: data.draw(st.just(value) | values) for key, value in hostile_models.array().items()}
    content = hostile_models.safetensors(
        {"v": hostile_models.array(), "w": data.draw(st.just(array) | values)}, bytes(8)
    )
    (tmp_path / "x.safetensors").write_bytes(content)
    read_or_refuse(safetensors_file.read, tmp_path / "x.safetensors")


@fuzz
@given(st.data())
def test_any_value_in_an_architecture(data):
    """Whatever is taken for one is kept as it was, and within bounds."""
    good = SQUARE.to_json()
    changed = data.draw(st.sets(st.sampled_from([*good, "block"]), min_size=1, max_size=3))
    block = good["blocks"][0] | {key: data.draw(values) for key in good["blocks"][0] if "block" in changed}
    found = good | {"blocks": [block]} | {key: data.draw(values) for key in changed - {"block"}}
    try:
        config = Config.from_json(json.loads(json.dumps(found)))
    except ValueError:
        return
    assert json.loads(json.dumps(config.to_json())) == json.loads(json.dumps(found))
    assert config.decoder_depth <= 32 and config.multimask_outputs <= 32 and math.prod(config.image_size) <= 1 << 26


def test_a_model_frame_has_no_more_pixels_than_can_be_computed():
    largest = SQUARE.to_json() | {"image_size": [1 << 13, 1 << 13]}
    assert Config.from_json(largest).image_size == (8192, 8192)
    with pytest.raises(ValueError, match="more than 67108864 pixels"):
        Config.from_json(largest | {"image_size": [1 << 13, 1 << 14]})


def test_a_long_list_of_losses_beside_the_weights_is_read(tmp_path):
    """150,000 numbers are more than a megabyte of pickle, and fewer steps than are taken."""
    state = stock_sam(SQUARE).state_dict()
    torch.save({"model": state, "losses": [0.1 * i for i in range(150_000)]}, tmp_path / "x.pth")
    assert set(torch_file.read(tmp_path / "x.pth")) == set(state)


def test_a_pickle_of_too_many_steps_says_what_to_save(tmp_path):
    torch.save({"model": {}, "losses": [None] * (torch_pickle.MOST_OPCODES + 1)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="save the state dict alone"):
        torch_file.read(tmp_path / "x.pth")
