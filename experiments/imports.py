"""Lists the files of the checkout that a program imports, by reading them: which edits can change what it measures."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from experiments import results

ROOMS = ("slimsam_jax", "converters", "experiments")
KEEPS = "experiments/results.py"  # what others have measured: its edits change no number


def sources(program: str) -> frozenset[str]:
    """Returns paths, relative to the checkout, of all that `python -m program` can import of it.

    Imports within functions count, and those for type checkers: by them the package's lazy names are found.
    """
    found: set[Path] = set()
    known = {program, f"{program}.__main__"}
    names = list(known)
    while names:
        if path := file_of(names.pop()):
            found.add(path)
            names += (new := imported(path) - known)
            known |= new
    return frozenset(path.relative_to(results.CHECKOUT).as_posix() for path in found) - {KEEPS}


def without_words(source: str) -> str:
    """Returns what Python makes of a file: comments, docstrings and line breaks are no code."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and _is_text(body[0].value):
            del body[0]
    return ast.dump(tree)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def file_of(name: str) -> Path | None:
    """The file of a module or package; None if the checkout has none, as of another package or a function."""
    path = results.CHECKOUT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Names that a file imports, with the packages that they lie in, and what may be a module of one."""
    return frozenset(_with_packages(ast.parse(path.read_text())))


def _with_packages(tree: ast.Module) -> Iterator[str]:
    """The names, those outside the repository left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        else:
            continue
        for name in (name for name in names if name.startswith(ROOMS)):
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))
