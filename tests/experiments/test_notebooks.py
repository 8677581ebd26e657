"""The notebooks of docs/ run as they stand, and show what the site shows."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from experiments import notebooks
from slimsam_jax.errors import InputError, RunError

PATHS = sorted(notebooks.FOLDER.glob("*.ipynb"))
MOST_BYTES = 200_000  # of a notebook with what it shows


def notebook(*sources):
    return {"cells": [{"cell_type": "code", "source": [source], "metadata": {}, "outputs": []} for source in sources]}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = json.loads(path.read_text())
    kept = [cell.get("outputs") for cell in found["cells"]]
    names = notebooks.run(found, path.stem)
    assert [[o["output_type"] for o in outputs or ()] for outputs in kept] == [
        [o["output_type"] for o in cell.get("outputs") or ()] for cell in found["cells"]
    ], f"{path.stem} shows something else than what is kept: python -m experiments.notebooks {path.stem}"
    CHECKS[path.stem](names)


def compressed(names):
    assert names["report"]["agreement"] > 0.9 and names["slim"].config.embed_dim < names["teacher"].config.embed_dim


def pruned(names):
    assert all(basis > magnitude for _, magnitude, basis in names["rows"])


def compared(names):
    assert names["costs"]["EdgeSAM"][1].linear == names["costs"]["EdgeSAM"][1].total


CHECKS = {"compress_and_look": compressed, "prune_your_own": pruned, "compare_families": compared}


def test_each_is_checked_small_and_has_run_whole():
    assert {path.stem for path in PATHS} == set(CHECKS)
    for path in PATHS:
        assert path.stat().st_size < MOST_BYTES
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), f"run {path.stem}"


def test_what_a_cell_shows():
    found = notebook("x = 2\nprint('a')\nx + 1", "from PIL import Image\nImage.new('RGB', (2000, 10))", "y = x")
    names = notebooks.run(found, "name")
    assert names["y"] == 2
    (printed, value), (image,), nothing = [cell["outputs"] for cell in found["cells"]]
    assert printed["text"] == ["a\n"] and value["data"] == {"text/plain": ["3"]} and nothing == []
    with Image.open(io.BytesIO(base64.b64decode(image["data"]["image/png"]))) as drawn:
        assert drawn.size == (notebooks.WIDEST, 4)


def test_what_a_machine_says_of_itself_is_not_kept():
    found = notebook("print('12 ms')")
    found["cells"][0]["metadata"] = {"tags": [notebooks.DROPPED]}
    notebooks.run(found, "name")
    assert found["cells"][0]["outputs"] == []
    for path in PATHS:
        assert str(notebooks.FOLDER.parents[1]) not in path.read_text()


def test_a_cell_that_fails_is_named():
    with pytest.raises(RunError, match=r"name, cell 2: ZeroDivisionError: division by zero"):
        notebooks.run(notebook("1", "1 / 0"), "name")
    with pytest.raises(RunError, match=r"cell 1: SyntaxError"):
        notebooks.run(notebook("%matplotlib inline"), "name")
    with pytest.raises(InputError, match="no such notebook: x; there are compare_families"):
        notebooks.main(("x",))


def test_a_run_leaves_where_it_was(tmp_path):
    before = Path.cwd()
    with contextlib.suppress(ZeroDivisionError), notebooks.inside(tmp_path):
        assert Path.cwd() == tmp_path
        raise ZeroDivisionError
    assert Path.cwd() == before
