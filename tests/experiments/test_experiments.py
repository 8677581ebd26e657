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
from slimsam_jax import checkpoint, data
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.errors import InputError
from slimsam_jax.inference.decode import encode_image

COMMON = "--teacher t.pth --images train --val val --cache cache --importance-images 50"


def every_row() -> dict[str, Row]:
    return {f"{name}: {label}": row for name, table in TABLES.items() for label, row in table.rows.items()}


@pytest.mark.parametrize("label", every_row())
def test_the_command_beside_a_row_is_what_was_run(label):
    row = every_row()[label]
    row.steps_of(0.77)  # the choices exist and go together
    if row.recipe not in RECIPES:  # a list of steps of ours, which nobody types
        return
    command = f"{COMMON} --ratio 0.77 --seed 2 --out out {row.arguments()}"
    if {"distill.flip=true", "distill.crop=0.5"} & set(row.set):
        command = command.replace("--cache cache ", "")  # which holds embeddings of images as they are
    typed = tyro.cli(Options, args=command.split())
    run = slimming.options_of(row, 0.77, 2, *map(Path, ("t.pth", "train", "val", "cache", "out")))
    assert typed == run


def test_the_plan_has_every_row_with_every_seed_once():
    planned = list(rows.plan())
    assert len(planned) == len(set(planned))
    wanted = {(row, ratio) for table in TABLES.values() for row in table.rows.values() for ratio in table.ratios}
    assert all(label in table.rows for table in TABLES.values() for label, _ in table.paper)
    assert set(planned) == {(*each, seed) for each in wanted for seed in rows.SEEDS}


def test_pruning_has_each_row_that_is_not_settled_with_every_seed_once():
    planned = pruning.plan()
    assert set(pruning.SETTLED) < set(pruning.ROWS) and set(pruning.MAIN) < set(pruning.GRID)
    assert sorted(planned) == sorted((row, pruning.RATIO, seed) for row in pruning.GRID for seed in pruning.SEEDS)


def test_a_table_says_which_rows_are_of_code_that_no_commit_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "TABLE_FOLDER", tmp_path)
    clean, dirty = ({"machine": {"commit": commit}} for commit in ("0a1b2c3", "0a1b2c3-dirty"))
    assert results.mark([clean]) == "" and results.mark([clean, dirty]) == " †"
    for name, run in (("clean", clean), ("dirty", dirty)):
        results.write_table(name, "x", [f"| {name}{results.mark([run])} |"], "x", "../x.md")
    assert "†" not in (tmp_path / "clean.md").read_text()
    assert "†: code that no commit holds" in (tmp_path / "dirty.md").read_text()


def entry(row: Row, ratio: float, seed: int, agreement: float) -> dict:
    numbers = {"error": 0.1, "point": 0.4, "box": 0.5, "encoder_parameters": 1e6, "macs_total": 1e9}
    return slimming.key_of(row, ratio, seed) | numbers | {"agreement": agreement}


def test_tables_give_mean_and_deviation_over_seeds_of_what_there_is():
    row = TABLES["quirks"].rows["gradients summed"]
    found = [entry(row, 0.77, seed, agreement) for seed, agreement in ((0, 0.8), (1, 0.9))]
    found.append(entry(row, 0.5, 0, 0.1))
    lines = slimming.lines_of("quirks", found)
    assert len(lines) == 3
    assert "| gradients summed | 0.77 | 1.00 M | 1.000 G | 0.1 (0.1 to 0.1) | 40.00 ± 0.00 | " in lines[2]
    assert f"85.00 ± {100 * np.std([0.8, 0.9], ddof=1):.2f} | 2 |" in lines[2] and row.arguments() in lines[2]


def test_compression_begins_with_the_teacher_and_has_what_not_every_run_measured():
    row = TABLES["compression"].rows["taylor"]
    numbers = entry(row, 0.5, 1, 0.9) | {"clicks": 0.5, "speedup": 2.0, "macs_linear": 5e8}
    old = {key: value for key, value in entry(row, 0.5, 0, 0.9).items()} | {"macs_linear": 5e8}
    teacher = {**numbers, **slimming.uncut("small"), "agreement": 1.0, "speedup": 1.0}
    lines = slimming.lines_of("compression", [old, numbers, teacher])
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == lines[3].count("|")
    assert lines[2].startswith("| the teacher | 0 | 1.00 M") and "100.00 | 0.500 G | 50.00 | 1.0 |" in lines[2]
    assert "90.00 ± 0.00 | 0.500 G | 50.00 | 2.0 | 2 |" in lines[3]
    (line,) = slimming.lines_of("compression", [old])[2:]
    assert "| 0.500 G |  |  | 1 |" in line


def test_what_is_measured_of_a_slim_model(material):
    """Of the teacher itself: nothing is lost."""
    teacher = from_torch.load(material / "teacher")
    bench = slimming.Bench(teacher, data.find([material / "val"]))
    bench.val = [each for each in bench.val if each[1]]
    bench.wanted = [encode_image(teacher, image) for image, _ in bench.val]
    found = bench.measure(teacher, more=True)
    assert found["error"] == 0 and found["agreement"] == 1 and 0 <= found["clicks"] <= 1 and found["speedup"] > 0
    assert "clicks" not in bench.measure(teacher)


def test_the_folder_of_tables_is_what_the_results_give(tmp_path, monkeypatch):
    """But for hours of distillers, which half a minute of tracing counts."""
    kept = {path.name: path.read_text() for path in results.TABLE_FOLDER.iterdir()}
    del kept["distillers_hours.md"]
    monkeypatch.setattr(tables, "COUNTED", (hours,))
    monkeypatch.setattr(results, "TABLE_FOLDER", tmp_path / "tables")
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    tables.main()
    assert {path.name: path.read_text() for path in results.TABLE_FOLDER.iterdir()} == kept


def test_a_table_that_there_is_not():
    with pytest.raises(InputError, match="--only tables is no table; there are compression, narrow"):
        slimming.run(Path("t"), Path("i"), Path("v"), only="tables")


def test_images_are_drawn_from_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    row = TABLES["compression"].rows["default"]
    found = [entry(row, 0.77, seed, 0.9) for seed in (0, 1)]
    drawn = {}
    monkeypatch.setattr(figures, "_curve", lambda axes, name, points: drawn.setdefault(name, points))
    figures.draw(lambda row, ratio: slimming.runs_of(row, ratio, found), 0.39)
    assert [point for point in drawn["default"] if np.isfinite(point[1])] == [(0.77, 40.0, 0.0)]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["criteria.png", "ratio.png", "steps.png"]


def test_results_of_a_name_are_of_one_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(slimming, "FILE", tmp_path / "slimming.jsonl")
    (tmp_path / "one.pth").write_bytes(b"1"), (tmp_path / "other.pth").write_bytes(b"2")
    slimming.check_teacher(tmp_path / "one.pth", "small")  # nothing is known yet
    results.append(slimming.FILE, slimming.uncut("small") | {"sha256": checkpoint.sha256(tmp_path / "one.pth")})
    slimming.check_teacher(tmp_path / "one.pth", "small")
    slimming.check_teacher(tmp_path / "other.pth", "narrow")
    with pytest.raises(InputError, match=r"other.pth is not the teacher that slimming.jsonl calls small"):
        slimming.run(tmp_path / "other.pth", tmp_path, tmp_path)
