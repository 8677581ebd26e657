"""What `mkdocs build` adds to docs/: README.md as the front page, experiments/, and a page for every public module.

No path of a module is written by hand: the pages of the API follow the folders, and `::: name` in a page finds the one
module that has the name.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = ("slimsam_jax", "converters")
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=(?:#[^)]*)?\))")  # relative ones: no colon
NAMED = re.compile(r"(?m)^::: ([\w.]+)$")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module that is not private; a package before what is in it."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = path
    return dict(sorted(found.items()))


def on_config(config: Any) -> Any:
    """Adds the tables of experiments and the API, nested as the packages are, to the navigation."""
    tables = sorted((ROOT / "experiments" / "tables").glob("*.md"))
    experiments = next(section["Experiments"] for section in config.nav if "Experiments" in section)
    experiments.append({"Tables": [path.relative_to(ROOT).as_posix() for path in tables]})
    config.nav.append({"API": ["api/index.md", *(_nested(package, modules()) for package in PACKAGES)]})
    config.watch += [str(ROOT / name) for name in ("README.md", "experiments", *PACKAGES)]
    return config


def _nested(name: str, known: dict[str, Path]) -> dict[str, Any]:
    """{title: page} of a module, {title: [page, those in it]} of a package."""
    title, page = name.rpartition(".")[2], f"api/{name}.md"
    if known[name].name != "__init__.py" and not any(each.startswith(f"{name}.") for each in known):
        return {title: page}
    below = [each for each in known if each.rpartition(".")[0] == name]
    return {title: [page, *(_nested(each, known) for each in below)]}


def on_files(files: Files, config: Any) -> Files:
    """Adds what does not lie in docs/."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name in modules():
        files.append(File.generated(config, f"api/{name}.md", content=f"# {name}\n\n::: {name}\n"))
    files.append(File.generated(config, "api/index.md", content=_index()))
    return files


def _index() -> str:
    """Every module with the first sentence of its docstring."""
    rows = [f"| [{name}]({name}.md) | {_first_sentence(path)} |" for name, path in modules().items()]
    head = "# API\n\nMade from the docstrings. What a newcomer needs first is on the [front page](../index.md).\n\n"
    return head + "\n".join(["| module | what it is for |", "|---|---|", *rows, ""])


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(re.split(r"(?<=[.:])\s", text, maxsplit=1)[0].split()).rstrip(":").replace("|", r"\|")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between files of the repository into links between pages, and names into paths of modules."""
    uri = page.file.src_uri
    if not uri.startswith("api/"):
        markdown = LINK.sub(lambda link: _relative(link[1], uri), markdown)
        markdown = NAMED.sub(lambda named: f"::: {_path_of(named[1])}", markdown)
    return markdown


def _relative(link: str, uri: str) -> str:
    """A link as it stands in a file -> the link as it must stand in the page `uri`."""
    here = "README.md" if uri == "index.md" else uri if uri.startswith("experiments/") else f"docs/{uri}"
    there = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
    there = "index.md" if there == "README.md" else there.removeprefix("docs/")
    return os.path.relpath(there, posixpath.dirname(uri) or ".")


def _path_of(name: str) -> str:
    """The full path of a class or function by its name, or by the end of its path if the name is not unique."""
    member = name.rpartition(".")[2]
    found = [f"{module}.{member}" for module, path in modules().items() if member in _defined(path)]
    found = [path for path in found if f".{path}".endswith(f".{name}")]
    if len(found) != 1:
        raise PluginError(f"::: {name} names {len(found)} things: {', '.join(found)}")
    return found[0]


def _defined(path: Path) -> set[str]:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}
