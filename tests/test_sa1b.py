"""The runs on SA-1B: scripts that the command accepts, and hours that follow from one measured time."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import tyro

from experiments.sa1b import dry_run, hours
from slimsam_jax import metrics
from slimsam_jax.compress import Options
from slimsam_jax.models.config import preset
from slimsam_jax.recipes import RECIPES
from slimsam_jax.widths import even_cut


@pytest.mark.parametrize("script", dry_run.ALL)
def test_each_script_is_a_command_of_its_ratio(script, tmp_path):
    _, name, ratio = script.removesuffix(".sh").split("_")
    text = (dry_run.FOLDER / script).read_text().replace("\\\n", " ")
    (command,) = [line for line in text.splitlines() if "slimsam_jax.compress" in line]
    words = shlex.split(command.split("slimsam_jax.compress")[1].replace('"$@"', ""))
    options = tyro.cli(Options, args=words)
    assert options.ratio == int(ratio) / 100 and f"vit_{name}" in str(options.teacher)
    assert f"slim_{name}_{ratio}" in str(options.out)


def test_the_scripts_are_those_that_hours_are_given_for(capsys):
    hours.main(seconds=1.0)
    printed = capsys.readouterr().out
    assert all(script in printed for script in dry_run.ALL) and len(dry_run.ALL) == 6


def test_work_is_that_of_the_models_that_run():
    teacher = preset("vit_b")
    slim = even_cut(teacher, 0.5)
    work = hours.work_of(teacher, 0.5)
    full, half = (metrics.encoder_macs(config).total for config in (teacher, slim))
    assert full + 4 * half < work.embedding < 5 * full  # stage 1's student lies between both
    assert work.bottleneck - (work.embedding - full) / 4 == full + 4 * half
    assert work.state > 4 * metrics.encoder_parameters(teacher)


def test_hours_are_proportional_to_the_measured_seconds(capsys):
    found = []
    for seconds in (1.0, 2.0):
        hours.main(seconds=seconds, factor=1.0)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "sam_b_50" in line]
        found.append([float(cell) for cell in line.replace("│", " ").split()[1:4]])
    np.testing.assert_allclose(np.array(found[1]) / found[0], [0.5, 0.5, 2.0], rtol=0.02)
    first, second, total = found[0]
    expected = hours.IMAGES * RECIPES["default"].passes * (1 / first + 1 / second) / 3600
    np.testing.assert_allclose(total, expected, rtol=0.02)
