"""The commands that share their images among processes: two give what one gives, to the last digit."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from helpers.images import truncated
from helpers.processes import free_address, start, wait_for
from helpers.together import work
from slimsam_jax import sharding
from slimsam_jax.data import __main__ as data_program
from slimsam_jax.data import find, tfds_writer
from slimsam_jax.data.tfds_parts import join
from slimsam_jax.errors import InputError
from slimsam_jax.evaluate import main as evaluate
from slimsam_jax.everything import Options, everything
from slimsam_jax.sharding import join_processes


def without_places(text: str, out) -> str:
    return text.replace(str(out), "OUT")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(material, tmp_path, monkeypatch):
    """`evaluate`, `everything`, `data check`, `data prepare` and the teacher's cache; one of the images is broken."""
    truncated(tmp_path / "broken" / "a.jpg")
    model, folders = material / "teacher", (material / "val", tmp_path / "broken", material / "images")
    images = tuple(map(str, folders))
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr("slimsam_jax.sharding.join_processes", join_processes)  # `work` puts another there
    work(model, images, one)
    address = free_address()
    arguments = [str(model), str(two)]
    wait_for(*(start(["-m", "helpers.together", *arguments, f"{address},2,{i}", *images]) for i in range(2)))
    said = [without_places((out / "said.txt").read_text(), out).splitlines() for out in (one, two)]
    assert [line for line in said[1] if "GB in" not in line] == [line for line in said[0] if "GB in" not in line]
    assert sum("a.jpg" in line for line in said[0]) == 5 and "exit code 1" in said[0]
    assert "1 of 9 images cannot be used" in said[0][-1]
    assert "wrote" not in (two / "not said.txt").read_text()
    scores, masks = ([json.loads((out / name).read_text()) for out in (one, two)] for name in ("s.json", "masks.json"))
    assert scores[0] == scores[1] and len(scores[0]["per_image"]) == 2
    assert masks[0] == masks[1] and len(masks[0]["images"]) == 8 and len(masks[0]["annotations"]) >= 8
    records = [find([f"tfds:{out / 'prepared'}"]) for out in (one, two)]
    assert len(records[0]) == len(records[1]) == 8
    for mine, other in zip(*records, strict=True):
        assert mine.read() == other.read() and len(mine.annotations()) == len(other.annotations())
    assert [path.name for path in (two / "prepared").iterdir()] == ["sa1b"]
    cached = [{path.name: np.load(path) for path in (out / "cache").rglob("*.npy")} for out in (one, two)]
    assert set(cached[0]) == set(cached[1]) and len(cached[0]) >= 6
    assert all((cached[0][name] == cached[1][name]).all() for name in cached[0])


def test_parts_of_a_data_set_are_joined_in_their_order(material, tmp_path):
    """One is of no usable image, and empty."""
    samples = find([material / "images"])
    tfds_writer.write(samples[:4], tmp_path / "part-0")
    tfds_writer.write(samples[4:], tmp_path / "part-2", 4)
    (tmp_path / "part-1").mkdir()
    join([tmp_path / f"part-{i}" for i in range(3)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sa1b"]
    assert [sample.read() for sample in find([f"tfds:{tmp_path}"])] == [sample.read() for sample in samples]


def test_processes_that_cannot_meet(material):
    with pytest.raises(InputError, match="give auto, or HOST:PORT,PROCESSES,INDEX"):
        evaluate((material / "teacher",), (str(material / "val"),), costs=False, distributed="here")


def test_processes_that_see_other_images_say_so_and_end(material, tmp_path):
    """Two that share a list by their own counts would lose or double images, and learn in two orders."""
    program = """
import json, os, sys
from pathlib import Path
from slimsam_jax import sharding
from slimsam_jax.compression.options import Options
from slimsam_jax.data import check, find, tfds_parts, together
from slimsam_jax.errors import InputError
from slimsam_jax.training.setup import split_images
sharding.join_processes(sys.argv[2])
os.chdir(sys.argv[1])
works = {
    "evaluate and everything": lambda samples: together.map_together(lambda sample: sample.name, samples, "work"),
    "data check": check.check_together,
    "data prepare": lambda samples: tfds_parts.prepare_together(samples, Path("prepared")),
    "compress": lambda samples: split_images(Options(images=("in",))),
    "compress --val": lambda samples: split_images(Options(images=("same",), val=("in",))),
}
said = {}
for name, work in works.items():
    try:
        work(find(["in"]))
    except InputError as error:
        said[name] = str(error)
Path("said.json").write_text(json.dumps([list(works), said]))
"""
    places, address = [tmp_path / str(i) for i in range(2)], free_address()
    for place, images in zip(places, ("images", "val"), strict=True):
        place.mkdir()
        (place / "in").symlink_to(material / images)
        (place / "same").symlink_to(material / "val")
    wait_for(*(start(["-c", program, str(place), f"{address},2,{i}"]) for i, place in enumerate(places)))
    names, said = json.loads((places[0] / "said.json").read_text())
    assert json.loads((places[1] / "said.json").read_text())[1] == said and list(said) == names
    line = "the processes do not see the same images: process 0 has 6, and process 1 2; all of them need the same files"
    assert all(each.startswith(line) for each in said.values())
    assert not list(tmp_path.rglob("prepared"))


def test_a_command_that_trains_nothing_ends_by_sigterm(tmp_path):
    """Of several processes, too, where JAX would take it for a training to ask."""
    program = """
import os, signal, sys
from slimsam_jax import data
from slimsam_jax.data import __main__ as commands
data.look = lambda locations: os.kill(os.getpid(), signal.SIGTERM) or sys.exit("it goes on")
commands.check(("images",), distributed=sys.argv[1])
"""
    process = start(["-c", program, f"{free_address()},1,0"])
    _, error = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGTERM, error.decode()


COMMANDS = {
    "evaluate": lambda out: evaluate((out,), ("images",), costs=False, distributed="auto"),
    "everything": lambda out: everything(Options(out, ("images",), out / "masks.json", distributed="auto")),
    "data check": lambda out: data_program.check(("images",), distributed="auto"),
    "data prepare": lambda out: data_program.prepare(("images",), out / "prepared", distributed="auto"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_such_command_gives_sigterm_away(tmp_path, monkeypatch, command):
    def joined(how: str, preemption: bool = True) -> None:
        raise InputError(f"asks {preemption}")

    monkeypatch.setattr(sharding, "join_processes", joined)
    with pytest.raises(InputError, match="asks False"):
        COMMANDS[command](tmp_path)
