"""The runs on SA-1B: scripts that the command accepts, and hours that follow from one measured time."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import tyro

from experiments.sa1b import dry_run, hours
from slimsam_jax.compression.budget import even_cut
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.models.config import preset
from slimsam_jax.profiling import sam_costs


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
    first, second = hours.work_of(teacher, 0.5).values()
    full, half = (sam_costs.encoder_macs(config).total for config in (teacher, slim))
    assert full + 4 * half < first.macs < 5 * full  # stage 1's student lies between both
    assert second.macs - (first.macs - full) / 4 == full + 4 * half
    assert second.state < first.state and first.state > 4 * sam_costs.encoder_parameters(teacher)


@pytest.mark.parametrize("recipe", ["default", "slimsam"])
def test_hours_are_proportional_to_the_measured_seconds(capsys, recipe):
    found = []
    for seconds in (1.0, 2.0):
        hours.main(seconds=seconds, factor=1.0, recipe=recipe)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "sam_b_50" in line]
        found.append([float(cell) for cell in line.replace("│", " ").split()[1:-2]])
    *rates, hours_ = np.array(found).T
    np.testing.assert_allclose([rate[1] / rate[0] for rate in rates], 0.5, rtol=0.02)
    assert len(rates) == (2 if recipe == "slimsam" else 1)
    passes = RECIPES[recipe][-1].optimizer.epochs
    np.testing.assert_allclose(hours_, hours.IMAGES * passes * sum(1 / rate for rate in rates) / 3600, rtol=0.02)
