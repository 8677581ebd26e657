"""A plan beside what was measured: its programs are made again, and numbers that nobody knows stay unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.bench import planned
from helpers.models import SQUARE
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import preset
from slimsam_jax.plan import options as planning
from slimsam_jax.plan import run
from slimsam_jax.plan.hardware import named
from slimsam_jax.plan.programs import abstract, size

ENTRY = {"teacher": "small", "on": "cpu", "devices": 1, "recipe": "default", "set": [], "ratio": 0.5, "batch": 2}
ENTRY |= {"accumulate": 1, "fsdp": 1, "attention": "auto", "dtype": "float32", "budget": None, "student": None}
ENTRY |= {"uniform": False, "cache": False, "steps": None, "images": 10000}
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
    assert line["device"] == "cpu" and line["planned_for"] == "cpu"
    assert [(program.name, program.images) for program in ran] == [("encode: the teacher", 1)]
    assert (line["planned_mib"], line["real_mib"], line["memory_times"]) == (1, 3, 3)
    assert (line["planned_ms"], line["real_ms"], line["time_times"]) == (10, 20, 2)


def test_the_programs_of_a_plan_are_made_again(written):
    budget = f"params={0.7 * size(abstract(SQUARE).params) / 4}"
    ((entry, options, _),) = planned.read(written(ratio=None, budget=budget, cache=True, uniform=True))
    made = planned.programs_of(entry["teacher"], options)
    assert [each.name for each in made] == ["distill", "encode: the teacher", "encode: the slim model"]
    assert made[0].images == 2 and "embedding" in made[0].args[2]


def test_a_plan_says_all_that_its_programs_depend_on():
    own = {"recipe": "mobile_sam", "student": Path("tiny_vit_small"), "set": ("distill.epochs=2",), "cache": True}
    own |= {"uniform": True, "steps": 3, "limit": 20, "batch": 6, "accumulate": 2, "dtype": "bfloat16", "ratio": 0.7}
    options = planning.Options(**own, only=planned.KINDS)
    how = run.of_options(options, preset("small"))[2]
    assert planned.options_of(run.beginning(options, named("cpu"), "small", how)) == options


def test_what_nobody_knows_stays_unknown():
    line = planned.compared({"peak": None, "seconds": None}, None, 0.02)
    assert line.pop("real_ms") == 20 and set(line.values()) == {None}


def test_a_plan_for_other_devices_is_refused(written):
    with pytest.raises(InputError, match="is for 8 devices; here are 1"):
        planned.main(planned.Options(written(devices=8)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "plan.json cannot be read"),
        ("[3]", "plan.json cannot be read"),
        (json.dumps([{name: ENTRY[name] for name in ENTRY if name != "cache"}]), "does not say its cache: write it"),
        (json.dumps([ENTRY]), r"plan.json cannot be read \(KeyError: 'programs'"),
        (json.dumps([ENTRY | {"recipe": "none"}]), r"plan.json cannot be read \(KeyError: 'none'"),
        (json.dumps([ENTRY | {"budget": "params=9M"}]), "--ratio and --budget both"),
    ],
)
def test_what_is_no_plan_is_refused_in_a_line(text, message, tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(InputError, match=r"plan.json cannot be read \(FileNotFoundError"):
        planned.main(planned.Options(path))
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        planned.main(planned.Options(path))
