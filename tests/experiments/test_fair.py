"""Rates are climbed to by one rule, on photographs that no table shows; lines of error against steps meet."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from experiments import crossing, distillers, fair
from helpers.images import write_annotation
from slimsam_jax import data


@pytest.mark.parametrize("best, tried", [(1.0, 3), (3.0, 3), (9.0, 4), (1 / 3, 4), (3.0**9, fair.TURNS + 1)])
def test_the_rate_is_climbed_to(best, tried):
    asked = {}

    def score(rate):
        asked[rate] = -abs(np.log(rate / best))
        return asked[rate]

    assert fair.climbed(score) == pytest.approx(min(best, 3.0**fair.TURNS))
    assert len(asked) == tried


def test_every_fifth_photograph_chooses_and_is_not_learned_from(tmp_path):
    for part in ("all", "out"):
        (tmp_path / part).mkdir()
    for index in range(10):
        Image.new("RGB", (30, 20)).save(tmp_path / "all" / f"sa_{index}.jpg")
        write_annotation(tmp_path / "all" / f"sa_{index}.jpg")
    found = fair.divided(data.find([str(tmp_path / "all")]), tmp_path / "out")
    learned, chosen = ({sample.name.split("/")[-1] for sample in data.find([folder])} for folder in found)
    assert len(chosen) == 2 and len(learned) == 8 and not learned & chosen


def entries_of(recipe: str, scores: dict[float, float], seeds: int = 2) -> list[dict]:
    """The best rate with all seeds, the paper's too if the recipe is its."""
    method, plan = distillers.Method(recipe, ratio=0.5), distillers.Plan(steps=200, chosen_on=2, measured_on=3)
    best = max(scores, key=scores.get)
    runs = [(rate, 0) for rate in scores] + [(rate, seed) for rate in (best, 1.0) for seed in range(1, seeds)]
    found = []
    for rate, seed in dict.fromkeys(runs):
        key = distillers.key_of(fair.label_of(method), method, 8, plan, rate, seed)
        names = ("photos agreement", "val agreement", "val point", "val box", "photos error")
        of = {"teacher": "t", "sha256": "a", "data": ["b"], **key, "chosen_by": scores[rate]}
        found.append({**of, **dict.fromkeys(names, rate / 10 + seed / 100)})
    return found


def test_the_papers_rate_stands_beside_the_chosen_one():
    lines = fair.lines_of([*entries_of("slimsam", {1.0: 0.5, 3.0: 0.7, 9.0: 0.6}), *entries_of("default", {1.0: 0.9})])
    rows = [line.split(" | ")[3:6] + line.split(" | ")[-2:] for line in lines[2:]]
    assert rows == [
        ["default", "10.50 ± 0.71", "10.50 ± 0.71", "1 of 1", "2 |"],
        ["slimsam", "30.50 ± 0.71", "30.50 ± 0.71", "3 of 3", "2 |"],
        ["slimsam, the paper's rate", "10.50 ± 0.71", "10.50 ± 0.71", "1 of 3", "2 |"],
    ]


def test_seeds_that_failed_are_counted_and_other_data_is_another_row():
    runs = entries_of("default", {1.0: 0.9}, seeds=3)
    runs[1]["failed"] = "not finite"
    others = [{**run, "photographs": [2, 4]} for run in entries_of("default", {1.0: 0.9}, seeds=1)]
    ends = [line.split(" | ")[-1] for line in fair.lines_of([*runs, *others])[2:]]
    assert ends == ["3 (1 not finite) |", "1 |"]


def test_lines_meet_where_powers_are_equal():
    a, b = ({s: [start * s**slope] for s in (25, 100, 400)} for start, slope in ((1e-3, -0.25), (1e-1, -0.75)))
    slopes, met = crossing.meetings(a, b, draws=3)
    np.testing.assert_allclose(slopes, [[-0.25, -0.75]] * 3)
    np.testing.assert_allclose(met, 1e4)
    assert np.isinf(crossing.meetings(b, {s: [2 * e[0]] for s, e in b.items()}, draws=3)[1]).all()  # side by side
    slower = {s: [1e-1 * s**-0.1] for s in a}
    assert np.isinf(crossing.meetings(a, slower, draws=3)[1]).all()  # they met before the first length


def test_only_lengths_that_both_have_are_compared():
    of = lambda recipe, steps, error: {**entries_of(recipe, {1.0: 0.5}, 1)[0], "steps": steps, "photos error": error}
    found = [of("default", s, s**-0.5 / 100) for s in (25, 100)] + [of("taylor", s, s**-1.0) for s in (25, 100, 400)]
    others = [{**entry, "photographs": [2, 4], "photos error": 1.0} for entry in found]  # another --limit's
    (line, _) = crossing.lines_of([*found, *others])[2:]
    assert line == "| t | 0.5 | default, taylor | 25, 100 | -0.50, -1.00 | 1e+04 (1e+04 to 1e+04) | 100 % of draws |"


@pytest.mark.parametrize(("lengths", "tables"), [((200,), {"fair"}), ((100, 200), {"fair", "crossing"})])
def test_one_length_crosses_nothing(lengths, tables, monkeypatch):
    runs = [{**e, "steps": s} for s in lengths for r in ("default", "taylor") for e in entries_of(r, {1.0: 0.5})]
    written = []
    monkeypatch.setattr(fair.results, "read", lambda _: runs)
    monkeypatch.setattr(fair.results, "write_table", lambda name, *_: written.append(name))
    fair.table()
    assert set(written) == tables
