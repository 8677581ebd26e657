"""What `mkdocs build` adds to docs/: README.md as the front page, notebooks, experiments/, and pages of the API.

No path of a module is written by hand: the pages of the API follow the folders, and `<!-- options: NAME -->` in a page
finds the one class that has the name.
"""

from __future__ import annotations

import ast
import base64
import itertools
import json
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
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page, images = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, content in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for name in modules():
        below = [each for each in modules() if each.rpartition(".")[0] == name]
        content = f"# {name}\n\n::: {name}\n\n" + (_listing(below, posixpath.dirname(page_of(name))) if below else "")
        files.append(File.generated(config, page_of(name), content=content))
    head = "# API\n\nMade from the docstrings. What a newcomer needs first is on the [front page](../index.md).\n\n"
    files.append(File.generated(config, "api/index.md", content=head + _listing(list(modules()), "api")))
    return files


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, with what its cells have shown; and {name: PNG} of the images among that."""
    parts, images = [], {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", ())})
            if "image/png" in data:
                images[name := f"{path.stem}_{len(images)}.png"] = base64.b64decode(data["image/png"])
                parts.append(f"![what the cell shows]({name})")
            else:
                parts.append("```text\n" + "".join(data["text/plain"]).rstrip() + "\n```")
    title, _, rest = "\n\n".join(parts).partition("\n")
    note = f"[This page as a notebook]({path.name}). `python -m experiments.notebooks {path.stem}` runs it."
    return f"{title}\n\n{note}\n{rest}\n", images


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
    if there.endswith(".ipynb") and not uri.startswith("notebooks/"):  # those name the file itself
        there = there.removesuffix(".ipynb") + ".md"
    return os.path.relpath(there, posixpath.dirname(uri) or ".")


def fields_of(kind: str, name: str) -> str:
    """The fields of a dataclass as a table: "options" as one types them, "choices" as NAME=VALUE takes them.

    What a field is for stands below it, or in the docstring of the class as `name: text`. A field that is a record by
    itself, as `losses: Losses = Losses()`, is left to that record's table.
    """
    node = _class(name)
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign) and not _is_record(field)]
    defaults = {field.target.id: _default(field.value) for field in fields}
    texts = _below(node) or _entries(ast.get_docstring(node) or "", defaults)
    if missing := set(defaults) - set(texts):
        raise PluginError(f"{name}: nothing says what {', '.join(sorted(missing))} is for")
    show = (lambda field: f"--{field.replace('_', '-')}") if kind == "options" else str
    cell = lambda field: f"`{defaults[field]}`" if defaults[field] else ""
    rows = [f"| `{show(field)}` | {cell(field)} | {_cell(texts[field])} |" for field in defaults]
    return "\n".join(["| | default | |", "|---|---|---|", *rows])


def _is_record(field: ast.AnnAssign) -> bool:
    """Whether a field of a dataclass is no choice: another record, or of the class alone."""
    record = isinstance(field.value, ast.Call) and not _is_path(field.value)
    return record or "ClassVar" in ast.unparse(field.annotation)


def _default(value: ast.expr | None) -> str:
    """What a reader types for it: of `Path("slim")` the text."""
    if value is None:
        return ""
    return value.args[0].value if _is_path(value) else ast.unparse(value)


def _is_path(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "Path"


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


def _below(node: ast.ClassDef) -> dict[str, str]:
    """{field: the text that follows it}."""
    texts = {}
    for field, text in itertools.pairwise(node.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = text.value.value
    return texts


def _entries(docstring: str, fields: Mapping[str, str]) -> dict[str, str]:
    """{field: text} of a docstring's entries, each with the lines that are further in."""
    texts: dict[str, str] = {}
    field = ""
    for line in docstring.splitlines():
        entry = re.match(r"  (\w+): (.*)", line)
        if entry and entry[1] in fields:
            field = entry[1]
            texts[field] = entry[2]
        elif field and line.startswith("    "):
            texts[field] += f" {line}"
        else:
            field = ""
    return texts


def _cell(text: str) -> str:
    """Of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|")
