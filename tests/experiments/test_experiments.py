"""The rows of the experiments are commands that exist, and tables say what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tyro

from converters import from_torch
from experiments import figures, pruning, results, rows, slimming, tables
from experiments.rows import TABLES, Row
from experiments.sa1b import hours
from slimsam_jax import data
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.errors import InputError

COMMON = "--teacher t.pth --images train --val val --cache cache --importance-images 50 --steps 100"


@pytest.mark.parametrize("label", rows.rows().values())
def test_the_command_beside_a_row_is_what_is_run(label):
    (row,) = slimming.chosen_rows([label])
    row.steps_of()  # the choices exist and go together
    if row.recipe not in RECIPES:  # a list of steps of ours, which nobody types
        return
    command = f"{COMMON} --ratio 0.77 --seed 2 --out out {row.arguments()}"
    typed = tyro.cli(Options, args=command.split())
    assert typed == slimming.options_of(row, 2, *map(Path, ("t.pth", "train", "val", "cache", "out")))


def test_every_row_is_run_once_and_the_paper_has_numbers_of_rows():
    chosen = slimming.chosen_rows([])
    assert len(chosen) == len(set(chosen)) < sum(len(table.rows) for table in TABLES.values())
    assert {row for table in TABLES.values() for row in table.rows.values()} == set(chosen)
    assert all(table.paper.keys() <= table.rows.keys() for table in TABLES.values())
    assert slimming.chosen_rows(["taylor", "Disturbed Taylor (taylor)"]) == [TABLES["quirks"].rows["taylor"]]


@pytest.mark.parametrize("program", [slimming, pruning])
def test_a_row_that_there_is_not(program):
    with pytest.raises(InputError, match=r"--only 'tables' is no row; there are .*default"):
        program.run(Path("t"), Path("i"), Path("v"), only=("tables",))


def test_what_has_been_pruned_is_known_again(tmp_path, monkeypatch):
    """Whatever JSON makes of its choices."""
    monkeypatch.setattr(pruning, "FILE", tmp_path / "pruning.jsonl")
    choices = pruning.prune_choices(RECIPES["slimsam"][0])
    results.append(pruning.FILE, {"recipe": choices})
    assert results.find(pruning.FILE, {"recipe": choices})


def entry(row: Row, seed: int, agreement: float) -> dict:
    numbers = {"error": 0.1, "point": 0.4, "box": 0.5, "encoder_parameters": 1e6, "macs_total": 1e9}
    return {"teacher": "sam_small_v2", **slimming.key_of(row, seed), **numbers, "agreement": agreement}


def test_tables_give_mean_and_deviation_over_seeds_of_what_there_is():
    row, other = (TABLES["quirks"].rows[label] for label in ("gradients summed", "plain MSE"))
    found = [entry(row, seed, agreement) for seed, agreement in ((0, 0.8), (1, 0.9))]
    head, line, shown = slimming.lines_of("quirks", found)
    assert head.count("|") == line.count("|") == shown.count("|")
    assert "| small v2 | gradients summed | 1.00 M | 1.000 G | 0.1 (0.1 to 0.1) | 40.00 ± 0.00 | " in shown
    assert f"85.00 ± {100 * np.std([0.8, 0.9], ddof=1):.2f} | 2 |" in shown and row.arguments() in shown
    assert len(slimming.lines_of("quirks", [*found, entry(other, 0, 0.1)])) == 4
    assert "| 62.31 |" in slimming.lines_of("ablations", [entry(TABLES["ablations"].rows["one-shot"], 0, 0.5)])[2]


def test_what_is_measured_of_a_slim_model(material):
    """Of the teacher itself: nothing is lost."""
    teacher = from_torch.load(material / "teacher")
    bench = slimming.Bench(teacher, data.find([material / "val"]))
    annotated = [bool(each[1]) for each in bench.val]
    bench.val, bench.encoded = (
        [each for each, whole in zip(some, annotated, strict=True) if whole] for some in (bench.val, bench.encoded)
    )
    found = bench.measure(teacher)
    assert found["error"] == 0 and found["agreement"] == 1 and 0 <= found["point"] <= 1


def test_the_folder_of_tables_is_what_the_results_give(tmp_path, monkeypatch):
    """But for hours of distillers, which half a minute of tracing counts."""
    kept = {path.name: path.read_text() for path in results.TABLE_FOLDER.iterdir()}
    del kept["distillers_hours.md"]
    monkeypatch.setattr(tables, "COUNTED", (hours,))
    monkeypatch.setattr(results, "TABLE_FOLDER", tmp_path / "tables")
    monkeypatch.setattr(results, "FIGURE_FOLDER", tmp_path / "figures")
    tables.main()
    assert {path.name: path.read_text() for path in results.TABLE_FOLDER.iterdir()} == kept


def test_figures_are_drawn_from_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FIGURE_FOLDER", tmp_path / "figures")
    monkeypatch.setattr(slimming, "FILE", tmp_path / "slimming.jsonl")
    results.append(slimming.FILE, entry(TABLES["criteria"].rows["random"], 0, 0.9))
    figures.draw()
    for name in ("criteria.png", "steps.png"):
        assert (results.FIGURE_FOLDER / name).read_bytes().startswith(b"\x89PNG")
