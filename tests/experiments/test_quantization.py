"""Slim models that `experiments.quantization` makes: none is taken for one of another teacher or of other steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import quantization, results

NUMBERS = {"agreement": 0.9, "embedding_error": 1e-6, "megabytes": 4.0, "share": 0.2}


@pytest.fixture()
def made(monkeypatch, tmp_path):
    """Folders of the models that were compressed; nothing is computed."""
    made = []

    def compress(options):
        options.out.mkdir(parents=True)
        (options.out / "report.json").write_text("{}")
        made.append(options.out.name)

    def measure(path, key, calibration, images, rows):
        for row in rows:
            if not results.find(quantization.FILE, {**key, "row": row}):
                results.append(quantization.FILE, {**key, "row": row, "of": path.name, **NUMBERS})

    monkeypatch.setattr(results, "check_committed", lambda: None)
    monkeypatch.setattr(results, "machine", dict)
    monkeypatch.setattr(results, "TABLE_FOLDER", tmp_path / "tables")
    monkeypatch.setattr(quantization, "FILE", tmp_path / "quantization.jsonl")
    monkeypatch.setattr(quantization, "compress_with", compress)
    monkeypatch.setattr(quantization, "measure_rows", measure)
    return made


def test_slim_models_are_told_apart_by_teacher_and_steps(made, tmp_path):
    for _ in range(2):  # the second time all are there
        for teacher, steps in (("sam_small_256.pth", 50), ("sam_small_256.pth", None), ("sam_small_v2", 50)):
            where = {"calibration": "x", "images": "y", "folder": tmp_path / "slim_models"}
            quantization.slim(Path(teacher), ratios=(0.77,), steps=steps, rows=("W8",), **where)
    assert made == ["sam_small_256-0.77-0-50", "sam_small_256-0.77-0-None", "sam_small_v2-0.77-0-50"]
    assert [entry["of"] for entry in results.read(quantization.FILE)] == made
    quantization.table()
    lines = (results.TABLE_FOLDER / "quantization.md").read_text().splitlines()[-3:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| slim77 of small v1, distilled by `--steps 50`",
        "| slim77 of small v1, distilled",
        "| slim77 of small v2, distilled by `--steps 50`",
    ]


def test_rows_of_other_images_are_no_other_seeds(made):
    """Nor are those that were calibrated with more."""
    for images, calibration, seed in ((20, 16, 0), (20, 16, 1), (12, 16, 0), (20, 32, 0)):
        key = {"model": "sam_small_v2", "seed": seed, "images": images, "calibration_images": calibration}
        results.append(quantization.FILE, {**key, "row": "W8", **NUMBERS})
    quantization.table()
    lines = (results.TABLE_FOLDER / "quantization.md").read_text().splitlines()[-3:]
    assert [line.split(" | ")[-1] for line in lines] == ["2, 20 |", "1, 12 |", "1, 20, calibrated with 32 |"]
