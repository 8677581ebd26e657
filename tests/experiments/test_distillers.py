"""The rows of distilled and slimmed students: equal steps, tuned alike, of code that a commit holds."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import distillers, results
from experiments.distillers import METHODS, Plan
from slimsam_jax.compression.plan import optimizer_steps
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.errors import InputError


def bench_in(folder: Path) -> SimpleNamespace:
    """What of a `Bench` is asked for where nothing is run."""
    return SimpleNamespace(methods=METHODS, file=folder / "rows.jsonl")


@pytest.mark.parametrize("label", METHODS)
def test_a_row_is_its_recipe_at_another_pace(label):
    method = METHODS[label]
    recipe, own = method.steps_of(3.0), RECIPES[method.recipe]
    assert sum(optimizer_steps(recipe, 30, distillers.BATCH, Plan().steps // 2)) == Plan().steps
    for step, before in zip(recipe, own, strict=True):
        if not hasattr(step, "optimizer"):
            continue
        name = "auto_lr" if before.optimizer.lr == "auto" else "lr"
        assert getattr(step.optimizer, name) == pytest.approx(3 * getattr(before.optimizer, name))
        assert step.validation.keep_checkpoint == "last"
    for term, weight in method.weights:
        assert getattr(recipe[-1].losses, term) == weight != getattr(own[-1].losses, term)


def test_what_is_run_unasked_has_each_recipe_and_student():
    assert set(distillers.CHOSEN) <= set(distillers.TABLES["methods"])
    chosen = [METHODS[label] for label in distillers.CHOSEN]
    assert {each.recipe for each in chosen} == {each.recipe for each in distillers.TABLES["methods"].values()}
    assert {each.student for each in chosen} == {None, *distillers.STUDENTS}


def test_the_rate_is_chosen_by_other_photographs_than_it_is_measured_on(tmp_path, monkeypatch):
    asked, bench = [], bench_in(tmp_path)

    def one(bench, key, where):
        asked.append((key["rate"], key["seed"]))
        chosen_by = {0.3333: 0.5, 1.0: 0.7, 3.0: 0.6}[key["rate"]]
        sizes = {"encoder_parameters": 8e5, "encoder_macs": 1e9}
        scores = {"chosen_by": chosen_by, "agreement": key["rate"] / 10 + key["seed"] / 100, "point": 0.4, "error": 0.2}
        results.append(bench.file, {**key, **sizes, **scores})
        return {**key, **scores}

    monkeypatch.setattr(distillers, "one", one)
    distillers.measure(bench, "edge_sam, vit_small", 30, Plan(), {"teacher": Path("small.pth")})
    assert asked == [(0.3333, 0), (1.0, 0), (3.0, 0), (1.0, 1), (1.0, 2)]
    line = distillers.line_of("edge_sam, vit_small", results.read(bench.file))
    cells = "edge_sam, vit_small | 30 | 300 | 0.80 M | 1.00 G | 11.00 ± 1.00 | 40.00 ± 0.00 | 0.2 | 1 of 3 | 3, 80"
    assert line == f"| {cells} |"


def test_a_seed_that_failed_is_counted_and_left_out_of_means():
    scores = {"chosen_by": 0.5, "agreement": 0.4, "point": 0.3, "error": 0.2}
    failed = {"chosen_by": 0.0, "agreement": 0.0, "point": 0.0, "failed": "the loss is not finite"}
    sizes = {"encoder_parameters": 8e5, "encoder_macs": 1e9}
    row = "edge_sam, vit_small"
    keys = [distillers.key_of(row, METHODS[row], 30, Plan(), 1.0, seed) for seed in (0, 1)]
    found = [{**keys[0], **sizes, **scores}, {**keys[1], **failed}]
    line = distillers.line_of("edge_sam, vit_small", found)
    assert "| 40.00 | 30.00 | 0.2 | 1 of 1 | 2 (1 not finite), 80 |" in line
    nothing = distillers.line_of("edge_sam, vit_small", [{**key, **failed} for key in keys])
    assert "|  |  | not finite |  |  | 1 of 1 | 2 (2 not finite), 80 |" in nothing


def test_what_is_there_is_not_run_again(tmp_path):
    bench = bench_in(tmp_path)
    key = distillers.key_of("tiny_sam, tokens 0", METHODS["tiny_sam, tokens 0"], 30, Plan(), 1 / 3, 0)
    results.append(bench.file, {**key, "agreement": 0.25})
    assert distillers.one(bench, key, {})["agreement"] == 0.25


def test_code_that_no_commit_holds_is_refused(tmp_path, monkeypatch):
    """A new file, a changed one; not results."""
    git = lambda *arguments: subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
    git("init")
    (tmp_path / "results").mkdir()
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    monkeypatch.setattr(results, "machine", functools.cache(results.machine.__wrapped__))  # others' commit stays known
    (tmp_path / "results" / "rows.jsonl").write_text("{}")
    results.check_committed()
    (tmp_path / "new.py").write_text("2")
    with pytest.raises(InputError, match="-dirty"):
        distillers.run(Path("t"), "images", "val")
    with pytest.raises(InputError, match="no such row: best"):
        distillers.run(Path("t"), "images", "val", only=("best",))
