"""What `mkdocs build` adds to docs/: README.md as the front page, experiments/, and a page for every public module.

No path of a module is written by hand: the pages of the API follow the folders, and `<!-- options: NAME -->` in a page
finds the one class that has the name.
"""

from __future__ import annotations

import ast
import itertools
import os
import posixpath
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = ("slimsam_jax", "converters")
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=(?:#[^)]*)?\))")  # relative ones: no colon
TABLE = re.compile(r"<!-- (options|choices): ([\w.*]+) -->")  # fields of a class as a table


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module that is not private; a package before what is in it."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = path
    return dict(sorted(found.items()))


def page_of(name: str) -> str:
    """Of a module; that of a package is the index of what is in it."""
    return f"api/{name}/index.md" if modules()[name].name == "__init__.py" else f"api/{name}.md"


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
    title, page = name.rpartition(".")[2], page_of(name)
    if known[name].name != "__init__.py":
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
        below = [each for each in modules() if each.rpartition(".")[0] == name]
        content = f"# {name}\n\n::: {name}\n\n" + (_listing(below, posixpath.dirname(page_of(name))) if below else "")
        files.append(File.generated(config, page_of(name), content=content))
    head = "# API\n\nMade from the docstrings. What a newcomer needs first is on the [front page](../index.md).\n\n"
    files.append(File.generated(config, "api/index.md", content=head + _listing(list(modules()), "api")))
    return files


def _listing(names: list[str], folder: str) -> str:
    """Modules with the first sentences of their docstrings, as links from a page in `folder`."""
    link = lambda name: f"[{name}]({os.path.relpath(page_of(name), folder)})"
    rows = [f"| {link(name)} | {_first_sentence(modules()[name])} |" for name in names]
    return "\n".join(["| module | what it is for |", "|---|---|", *rows, ""])


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return _cell(re.split(r"(?<=\.)\s|\n\n", text, maxsplit=1)[0])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between files of the repository into links between pages, and names into paths of modules."""
    uri = page.file.src_uri
    if not uri.startswith("api/"):
        markdown = LINK.sub(lambda link: _relative(link[1], uri), markdown)
        markdown = TABLE.sub(lambda found: fields_of(*found.groups()), markdown)
    return markdown


def _relative(link: str, uri: str) -> str:
    """A link as it stands in a file -> the link as it must stand in the page `uri`."""
    here = "README.md" if uri == "index.md" else uri if uri.startswith("experiments/") else f"docs/{uri}"
    there = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
    there = "index.md" if there == "README.md" else there.removeprefix("docs/")
    return os.path.relpath(there, posixpath.dirname(uri) or ".")


def fields_of(kind: str, name: str) -> str:
    """The fields of a dataclass as tables: "options" as one types them, "choices" as NAME=VALUE takes them.

    What a field is for stands below it, or in the docstring of the class as `name: text`, in sections.
    """
    node = _class(name)
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    fields = [field for field in fields if "ClassVar" not in ast.unparse(field.annotation)]
    defaults = {field.target.id: ast.unparse(field.value) if field.value else "" for field in fields}
    told = _below(node) or _sections(ast.get_docstring(node) or "", defaults)
    missing = set(defaults) - {field for section in told.values() for field in section}
    if missing:
        raise PluginError(f"{name}: nothing says what {', '.join(sorted(missing))} is for")
    tables = []
    for title, section in told.items():
        show = (lambda field: f"--{field.replace('_', '-')}") if kind == "options" else str
        rows = [f"| `{show(field)}` | `{defaults[field]}` | {_cell(text)} |" for field, text in section.items()]
        tables.append("\n".join([*([f"### {title}", ""] if title else []), "| | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(tables)


def _class(name: str) -> ast.ClassDef:
    """A class by its name, or by the end of its path, with wildcards, if the name is not unique."""
    found = {}
    for module, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and fnmatchcase(f".{module}.{node.name}", f"*.{name}"):
                found[f"{module}.{node.name}"] = node
    if len(found) != 1:
        raise PluginError(f"{name} names {len(found)} classes: {', '.join(found)}")
    return next(iter(found.values()))


def _below(node: ast.ClassDef) -> dict[str, dict[str, str]]:
    """Of fields that a text follows."""
    told = {}
    for field, text in itertools.pairwise(node.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            told[field.target.id] = text.value.value
    return {"": told} if told else {}


def _sections(docstring: str, fields: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Of a docstring: {title: {field: text}}."""
    told: dict[str, dict[str, str]] = {}
    title = field = ""
    for line in docstring.splitlines():
        entry = re.match(r" +(\w+): (.*)", line)
        if re.match(r"\S.*:$", line):
            title = line.rstrip(":").removeprefix("Attributes")
        elif entry and entry[1] in fields:
            field = entry[1]
            told.setdefault(title, {})[field] = entry[2]
        elif field and line.startswith("  "):
            told[title][field] += f" {line}"
        else:
            field = ""
    return told


def _cell(text: str) -> str:
    """Of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|")
