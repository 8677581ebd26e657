"""A plan beside what was measured: its programs are made again, and numbers that nobody knows stay unknown."""

from __future__ import annotations

import json

import pytest

from experiments.bench import planned
from helpers.models import SQUARE
from slimsam_jax.errors import InputError

ENTRY = {"teacher": "small", "on": "cpu", "devices": 1, "recipe": "default", "set": [], "ratio": 0.5, "batch": 2}
ENTRY |= {"accumulate": 1, "fsdp": 1, "attention": "auto", "dtype": "float32"}
PROGRAM = {"name": "encode: the teacher", "kind": "encode", "peak": 2**20, "seconds": 0.01}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a plan of the small SAM's shapes, and gives its path."""
    monkeypatch.setattr(planned, "architecture", lambda name: SQUARE)
    path = tmp_path / "plan.json"
    return lambda **changed: (path.write_text(json.dumps([ENTRY | {"programs": [PROGRAM]} | changed])), path)[1]


def test_only_what_was_planned_is_run(written, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(planned, "measured", lambda program, runs: ran.append(program) or (3 * 2**20, 0.02))
    planned.main(planned.Options(written()))
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(program.name, program.images) for program in ran] == [("encode: the teacher", 1)]
    assert (line["planned_mib"], line["real_mib"], line["memory_times"]) == (1, 3, 3)
    assert (line["planned_ms"], line["real_ms"], line["time_times"]) == (10, 20, 2)


def test_the_programs_of_a_plan_are_made_again(written):
    written()
    made = planned.programs_of(ENTRY)
    assert [each.name for each in made] == ["distill", "encode: the teacher", "encode: the slim model"]
    assert made[0].images == 2


def test_what_nobody_knows_stays_unknown():
    line = planned.compared({"peak": None, "seconds": None}, None, 0.02)
    assert line.pop("real_ms") == 20 and set(line.values()) == {None}


def test_a_plan_for_other_devices_is_refused(written):
    with pytest.raises(InputError, match="is for 8 devices; here are 1"):
        planned.main(planned.Options(written(devices=8)))
