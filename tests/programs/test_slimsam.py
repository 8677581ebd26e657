"""The command `slimsam`: every program under one name, quickly."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from slimsam_jax import __main__ as command
from slimsam_jax import __version__, checkpoint, cli
from slimsam_jax.compression.budget import even_cut
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.steps import Distill
from slimsam_jax.data import embedded_teacher
from slimsam_jax.models.config import preset
from slimsam_jax.profiling import sam_costs

ROOT = Path(__file__).parents[2]
WITHOUT_HEAVY = """
import sys
from slimsam_jax.__main__ import main
try:
    main()
finally:
    print({"jax", "numpy", "tyro", "rich"} & {*sys.modules}, file=sys.stderr)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "slimsam_jax", *arguments], capture_output=True, text=True)


@pytest.fixture
def here(monkeypatch):
    """Forgets the program's name afterwards."""
    monkeypatch.setattr(cli, "program", None)
    return lambda *arguments: monkeypatch.setattr(sys, "argv", ["slimsam", *arguments])


def test_help_is_quick_and_loads_nothing():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", WITHOUT_HEAVY, "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith("usage: slimsam PROGRAM") and done.stderr == "set()\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # of processor time
    assert all(f"\n  {name} " in done.stdout for name in command.PROGRAMS)


@pytest.mark.parametrize("name", command.PROGRAMS)
def test_every_program_answers_under_its_name(here, capsys, name):
    here(name, "--help")
    with pytest.raises(SystemExit) as end:
        command.main()
    assert not end.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: slimsam {name} ") and "default: None" not in text and "{None}" not in text


def test_help_says_what_the_default_recipe_does(here, capsys):
    here("compress", "--help")
    with pytest.raises(SystemExit):
        command.main()
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "distils once" in text and [type(step) for step in RECIPES["default"]].count(Distill) == 1
    leaves = r"Default: 0.5, which leaves (\d+) % .* about (\d+) % of .*; 0.77 leaves (\d+) % and about (\d+) %"
    said = re.search(leaves, text)
    small, big = checkpoint.load(embedded_teacher()).config, preset("vit_b")
    count = sam_costs.encoder_parameters
    left = [100 * count(even_cut(c, r)) / count(c) for r in (0.5, 0.77) for c in (small, big)]
    np.testing.assert_allclose([float(number) for number in said.groups()], left, atol=3)  # uneven cuts leave less


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "error: name a program, one of compress, evaluate, "),
        (("comprss",), "error: 'comprss' is no program of slimsam; perhaps compress; --help lists what there is"),
        (("compress", "--ratio", "2"), "error: --ratio 2 is not the share of channels to remove"),
        (("evaluate", "--nonsense"), "error: "),
        (("data", "nonsense"), "error: "),
    ],
)
def test_bad_input_gets_one_line_and_code_2(arguments, line):
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_a_program_runs_and_its_code_is_the_command_s(here, material, capsys, monkeypatch, tmp_path):
    here("data", "check", str(material / "val"))
    command.main()
    assert "2 images" in capsys.readouterr().out
    here("from-torch", str(material / "teacher"), str(tmp_path / "copy"))
    command.main()
    assert (tmp_path / "copy" / "model.safetensors").is_file()


def test_version(here, capsys):
    here("--version")
    command.main()
    assert capsys.readouterr().out == f"slimsam_jax {__version__}\n"


def test_the_wheel_installs_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"slimsam": f"{command.__name__}:{command.main.__name__}"}
