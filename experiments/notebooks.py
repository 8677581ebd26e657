"""Runs the notebooks of docs/notebooks/, and keeps what they show: text, and images with few colours.

    python -m experiments.notebooks                       # all of them
    python -m experiments.notebooks prune_your_own        # one

A kernel of Jupyter is not needed: cells are Python alone, run one after the other in an empty folder. The last line of
a cell is shown if it is an expression, as Jupyter does. What this writes is a notebook that Jupyter opens.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tyro.conf import Positional

from slimsam_jax import cli
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.files import replacing

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
DROPPED = "remove_output"  # Jupyter's tag of a cell whose output is not kept, as it is this machine's times and paths
WIDEST, COLOURS = 820, 96  # of an image that is kept: pixels, and colours


def main(names: Positional[tuple[str, ...]] = ()) -> None:
    """Run notebooks and write their outputs into them.

    Args:
      names: without their suffix; all of docs/notebooks if none.
    """
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    if unknown := set(names) - set(known):
        raise InputError(f"no such notebook: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in names or known:
        notebook = json.loads(known[name].read_text())
        with tempfile.TemporaryDirectory() as folder, inside(Path(folder)):
            run(notebook, name)
        with replacing(known[name]) as temporary:
            temporary.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(f"{known[name].name}: {known[name].stat().st_size / 1e3:.0f} kB", flush=True)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """Runs all cells, puts what they show into `outputs`, and returns the names that they have defined.

    Raises:
      RunError: a cell failed, or has something that is not Python ("%matplotlib", "!ls").
    """
    names: dict[str, Any] = {"__name__": name}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                shown = executed("".join(cell["source"]), f"{name}, cell {number}", names)
        except Exception as error:
            raise RunError(f"{name}, cell {number}: {type(error).__name__}: {error}") from error
        text = [{"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())}]
        cell["outputs"] = (text if printed.getvalue() else []) + ([output_of(shown)] if shown is not None else [])
        if DROPPED in cell["metadata"].get("tags", ()):
            cell["outputs"] = []
        cell["execution_count"] = number
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
    return names


def executed(source: str, place: str, names: dict[str, Any]) -> Any:
    """Runs a cell; returns the value of its last line if that is an expression."""
    tree = ast.parse(source, place)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, place, "exec", dont_inherit=True), names)
    return eval(compile(ast.Expression(last.value), place, "eval", dont_inherit=True), names) if last else None


def output_of(shown: Any) -> dict[str, Any]:
    """What a notebook's file holds of a value: an image, or its text."""
    data: dict[str, Any] = {"text/plain": lines(repr(shown))}
    if isinstance(shown, Image.Image):
        data = {"image/png": png(shown), "text/plain": ["<image>"]}
    elif hasattr(shown, "savefig"):
        file = io.BytesIO()
        shown.savefig(file, format="png", dpi=80)
        with Image.open(file) as drawn:
            data = {"image/png": png(drawn), "text/plain": ["<figure>"]}
    return {"output_type": "execute_result", "data": data, "metadata": {}}


def png(image: Image.Image) -> str:
    """Encodes it in base64, small: few colours, and no wider than a page."""
    image = image.convert("RGB")
    image.thumbnail((WIDEST, WIDEST))
    file = io.BytesIO()
    image.quantize(COLOURS).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    cli.run(main)
