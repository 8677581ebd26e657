"""Rows that are measured again stand beside the kept ones of the same keys; nothing else changes."""

from __future__ import annotations

import json
import sys

import pytest

from experiments import results, spot_checks
from experiments.parts import PARTS
from slimsam_jax.errors import InputError, RunError

SPOT = spot_checks.Spot("rows.jsonl", "helper --out {work}", ("row", "rate"), ("agreement",))


def entry(row: str, seed: int, agreement: float, commit: str = "old") -> dict:
    return {"row": row, "rate": 0.3333, "seed": seed, "agreement": agreement, "machine": {"commit": commit}}


KEPT = [entry("a", 0, 0.5), entry("a", 1, 0.7), entry("a", 2, 0.6), entry("b", 0, 0.1)]


@pytest.fixture()
def program(tmp_path, monkeypatch):
    """A program that keeps one row of `a`, seed 0, wherever `results` says."""
    (tmp_path / "measures.py").write_text(
        "from experiments import results\n"
        "assert not list(results.FOLDER.glob('*.jsonl'))\n"
        f"results.append(results.FOLDER / 'rows.jsonl', {entry('a', 0, 0.52)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(results, "TABLE_FOLDER", tmp_path / "tables")
    monkeypatch.setattr(results, "check_committed", lambda: None)
    monkeypatch.setattr(results, "machine", lambda: {"commit": "new"})
    monkeypatch.setattr(spot_checks, "FILE", tmp_path / "kept" / "spot_checks.jsonl")
    monkeypatch.setattr(spot_checks, "SPOTS", {"of a": SPOT._replace(command="measures")})
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in KEPT))
    return tmp_path


def test_a_row_is_measured_elsewhere_and_set_beside_the_kept_one(program):
    before = (program / "kept" / "rows.jsonl").read_bytes()
    spot_checks.run(program, program, program)
    assert (program / "kept" / "rows.jsonl").read_bytes() == before
    (found,) = results.read(spot_checks.FILE)
    assert found["of"] == {"row": "a", "rate": 0.3333} and found["kept_commit"] == "old"
    assert found["kept"] == {"agreement": 0.5} and found["again"] == {"agreement": 0.52}
    assert found["spread"] == {"agreement": pytest.approx(0.1)}  # of 0.5, 0.7 and 0.6
    assert found["machine"]["commit"] == "new" and found["holds"] == {"agreement": True}
    spot_checks.table()
    (line,) = (program / "tables" / "spot_checks.md").read_text().splitlines()[6:]
    assert line.startswith("| of a | a, rate 0.3333 | agreement | 0.5 | old | 0.52 | ") and line.endswith(
        "| +0.02 | 0.1 | yes |"
    )


def test_what_is_further_off_than_seeds_does_not_hold():
    assert spot_checks.holds(0.5, 0.69, spread=0.1) and not spot_checks.holds(0.5, 0.71, spread=0.1)
    assert spot_checks.holds(1.0, 0.981, spread=None) and not spot_checks.holds(1.0, 1.021, spread=None)
    assert spot_checks.holds(0.0, 0.0, spread=0.0)


def test_what_has_no_kept_row_and_what_fails_is_said(program):
    with pytest.raises(RunError, match=r"rows\.jsonl has no row of"):
        spot_checks.compared(SPOT, [entry("b", 3, 0.1)], KEPT)
    (alone,) = spot_checks.compared(SPOT, [entry("b", 0, 0.2)], KEPT)
    assert alone["spread"] == {}
    with pytest.raises(InputError, match="--only x: there are of a"):
        spot_checks.run(program, program, program, only=("x",))
    (program / "measures.py").write_text("raise SystemExit(3)")
    with pytest.raises(RunError, match="of a: python -m measures ended with 3"):
        spot_checks.run(program, program, program)
    assert not spot_checks.FILE.exists()


def test_spots_name_parts_and_fields_that_rows_have():
    for name, spot in spot_checks.SPOTS.items():
        assert PARTS[name.partition(":")[0]].file == spot.file
        if not (rows := results.read(results.FOLDER / spot.file)):
            continue  # to be run
        assert any({*spot.keys, *spot.values} <= row.keys() for row in rows), name
