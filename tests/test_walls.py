"""The walls between rooms: who may import whom, no circles, nothing that has outgrown a reader, the field's words."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A room imports what stands below its own line; rooms of one line do not import each other. A
# module at the top of `slimsam_jax/` is a room of its own. A program in a package (`data/__main__.py`) is a program.
LEVELS = (
    ("slimsam_jax", "errors"),  # the package itself: its version, and what it gives when asked
    ("limits", "files", "progress", "sharding"),
    ("cli", "safetensors_file", "tracing"),
    ("imaging",),
    ("pruning", "distillation", "quantization"),
    ("models",),
    ("profiling", "checkpoint", "data"),
    ("inference",),
    ("evaluation",),
    ("training",),
    ("compression",),
    ("converters",),
    ("api", "plan"),
    ("calibrate", "compress", "demo", "evaluate", "everything", "inspect", "predict", "programs", "quantize"),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Rooms that could be lifted out for other models: of ours they know no more than this.
ALONE = {
    "pruning": {"errors", "sharding", "files", "safetensors_file", "tracing"},
    "distillation": {"errors", "sharding"},
    "quantization": {"errors", "limits", "tracing"},
    "tracing": set(),
}
FOREIGN = {
    "flax": {"imaging", "pruning", "distillation", "quantization", "tracing"},
    "jax": {"imaging"},
    "torch": set(LEVEL) - {"converters"},
}
MOST_FILES, MOST_LINES, MOST_OF_A_FUNCTION, MOST_FIELDS = 16, 300, 60, 12
# Words that the field does not use: an image, what is given or reported, a gain; a first line names the result itself.
GONE, GONE_FROM_FIRST_LINES = re.compile(r"\b(pictures?|told|worth)\b", re.I), re.compile(r"\bfound\b", re.I)

Graph = dict[str, set[str]]


def sources() -> dict[str, str]:
    """{module: its text} of `slimsam_jax` and `converters`."""
    paths = (path for package in ("slimsam_jax", "converters") for path in (ROOT / package).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for path in paths
    }


def imported(text: str, for_types: bool = True) -> set[str]:
    """Full names, wherever in a module they are imported: of `from a import b` it is `a.b`.

    Args:
      for_types: those under `if TYPE_CHECKING`, too.
    """
    found = set()
    tree = ast.parse(text)
    if not for_types:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def graph_of(modules: Mapping[str, str]) -> Graph:
    """{module: those of the modules that it imports, or imports something from}."""
    graph = {}
    for module, text in modules.items():
        # The package shows type checkers what it gives when asked.
        either = ((name, name.rpartition(".")[0]) for name in imported(text, for_types=module != "slimsam_jax"))
        graph[module] = {next((name for name in names if name in modules), module) for names in either} - {module}
    return graph


def room_of(module: str) -> str:
    package, *rest = module.split(".")
    if rest[-1:] == ["__main__"] and rest[0] != "demo":
        return "programs"
    return rest[0] if package == "slimsam_jax" and rest else package


def rooms_of(graph: Graph) -> Graph:
    rooms: Graph = {}
    for module, others in graph.items():
        room = room_of(module)
        rooms.setdefault(room, set()).update(set(map(room_of, others)) - {room})
    return rooms


def circle(graph: Graph) -> list[str]:
    """Nodes of circles and between them: what is left when nothing can go that has no arrow in or none out."""
    left, before = set(graph), None
    while left != before:
        before, left = left, {n for n in left if graph[n] & left and any(n in graph[other] for other in left)}
    return sorted(left)


def upwards(graph: Graph) -> list[str]:
    """Imports that the table does not allow."""
    found = []
    for module, others in graph.items():
        room = room_of(module)
        for other in sorted(others):
            there = room_of(other)
            allowed = LEVEL[there] < LEVEL[room] and there in ALONE.get(room, LEVEL)
            found += [] if allowed or there == room else [f"{module} imports {other}"]
    return found


def too_long(modules: Mapping[str, str]) -> list[str]:
    """Files by all their lines, functions without their docstrings, which of a program are its `--help`."""
    found = [f"{name}: {text.count(chr(10))} lines" for name, text in modules.items() if text.count("\n") > MOST_LINES]
    for name, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := length(node)) > MOST_OF_A_FUNCTION:
                found.append(f"{name}.{node.name}: {lines} lines")
    return found


def length(function: ast.FunctionDef) -> int:
    first = function.body[0]
    told = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - told * (first.end_lineno - first.lineno + 1)


def docstrings(text: str) -> list[str]:
    """Those of modules, classes and functions, and the texts below the fields of a record."""
    alone = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
    return [value.value for value in alone if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def foreign_words(modules: Mapping[str, str]) -> list[str]:
    found = []
    for name, text in modules.items():
        for docstring in docstrings(text):
            words = GONE.findall(docstring) + GONE_FROM_FIRST_LINES.findall(docstring.partition("\n")[0])
            found += [f"{name}: {word!r} in {docstring[:60]!r}" for word in words]
    return found


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    found = sources()
    assert len(found) > 100
    return found


def test_every_room_has_its_place(modules):
    unknown = set(map(room_of, modules)) - set(LEVEL)
    assert not unknown, f"give {sorted(unknown)} a line in LEVELS"


def test_nobody_imports_upwards(modules):
    found = upwards(graph_of(modules))
    assert not found


def test_there_is_no_circle(modules):
    files, rooms = circle(graph := graph_of(modules)), circle(rooms_of(graph))
    assert not files and not rooms


@pytest.mark.parametrize("package", FOREIGN)
def test_rooms_that_do_without_a_package(modules, package):
    tops = lambda text: {name.split(".")[0] for name in imported(text)}
    assert not [name for name, text in modules.items() if room_of(name) in FOREIGN[package] and package in tops(text)]


def test_nothing_has_outgrown_a_reader(modules):
    assert len(list((ROOT / "slimsam_jax").glob("*.py"))) <= MOST_FILES
    assert not too_long(modules)


def test_docstrings_have_the_words_of_the_field(modules):
    assert not foreign_words(modules)


def test_what_the_package_never_needs(modules):
    others = {"experiments", "tests", "helpers"}
    assert not [name for name, text in modules.items() if others & {n.split(".")[0] for n in imported(text)}]


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("slimsam_jax.models.sam", "from slimsam_jax.data import x", "models.sam imports slimsam_jax.data"),
        (
            "slimsam_jax.data.check",
            "def f():\n    import slimsam_jax.checkpoint",
            "check imports slimsam_jax.checkpoint",
        ),
        ("slimsam_jax.pruning.bases", "from slimsam_jax import limits", "bases imports slimsam_jax.limits"),
        ("slimsam_jax.training.loop", "from slimsam_jax.data import __main__", "imports slimsam_jax.data.__main__"),
        ("slimsam_jax", "from slimsam_jax import files", "slimsam_jax imports slimsam_jax.files"),
    ],
)
def test_a_hole_in_a_wall_is_seen(module, text, message):
    rest = (
        "slimsam_jax",
        "slimsam_jax.data",
        "slimsam_jax.data.__main__",
        "slimsam_jax.checkpoint",
        "slimsam_jax.files",
        "slimsam_jax.limits",
    )
    (said,) = upwards(graph_of({**dict.fromkeys(rest, ""), module: text}))
    assert said.endswith(message)


def is_option(node: ast.stmt) -> bool:
    """Whether it is a field, but for another record and what is of the class alone."""
    if not isinstance(node, ast.AnnAssign) or isinstance(node.value, ast.Call):
        return False
    return "ClassVar" not in ast.unparse(node.annotation)


def test_a_record_of_options_is_looked_through_at_a_glance():
    texts, fields = sources(), {}
    rooms = ("compression.steps", "compression.mask_steps", "compression.choices", "compression.options")
    for name in (*(f"slimsam_jax.{room}" for room in rooms), "slimsam_jax.training.options"):
        records = [node for node in ast.parse(texts[name]).body if isinstance(node, ast.ClassDef)]
        fields |= {each.name: sum(map(is_option, each.body)) for each in records}
    assert fields["Prune"] and fields["ImageOptions"] and max(fields.values()) <= MOST_FIELDS, fields


def test_circles_and_lengths_are_seen():
    texts = {"a": "import b", "b": "from c import x, y", "c": "def f():\n    import a", "d": "import a", "e": ""}
    assert circle(graph_of(texts)) == ["a", "b", "c"]
    assert not circle(graph_of({**texts, "c": ""}))
    long = "def f():\n" + "    x = 1\n" * MOST_OF_A_FUNCTION
    assert too_long({"m": long, "n": "\n" * (MOST_LINES + 1)}) == ["n: 301 lines", "m.f: 61 lines"]
    assert not too_long({"m": 'def f():\n    """\n' + "x\n" * 90 + '    """\n' + "    x = 1\n" * 50})


def test_a_foreign_word_is_seen():
    texts = ("Draws a picture.", "What is found.", "A list.\n\nWhat a channel is worth.")
    modules = {str(i): f'class A:\n    x: int = 0\n    """{text}"""\n' for i, text in enumerate(texts)}
    assert [line.split(" in ")[0] for line in foreign_words(modules)] == ["0: 'picture'", "1: 'found'", "2: 'worth'"]
    assert not foreign_words({"m": '"""A line.\n\nImages that are found."""\nfound = "a picture"'})
