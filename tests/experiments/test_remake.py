"""What is made anew: what other code measured leaves, what this code measured stays, and a part is done once."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import imports, remake, results
from experiments.parts import ARCHIVE, PARTS, Part
from experiments.spot_checks import SPOTS
from slimsam_jax import cli, data
from slimsam_jax.errors import InputError, RunError

EXPERIMENTS = Path(results.__file__).parent
ROOT = EXPERIMENTS.parent


@pytest.fixture()
def checkout(tmp_path, monkeypatch):
    """A repository of a part `one`; `commit(text)` changes what its program imports and returns the commit."""
    folder = tmp_path / "experiments" / "results"
    folder.mkdir(parents=True)
    (folder.parent / "x.py").write_text("def run():\n    from slimsam_jax import a, b")
    (tmp_path / "slimsam_jax").mkdir()
    (tmp_path / "slimsam_jax" / "__init__.py").touch()
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=tmp_path, check=True, capture_output=True
    )
    git("init", "-q")

    def commit(text):
        (tmp_path / "slimsam_jax" / "a.py").write_text(text)
        git("add", "-A")
        git("commit", "-q", "-m", "x")
        for cached in (remake.code_of, remake.code_of_blob, remake.blobs, imports.imported):
            cached.cache_clear()
        return remake.git("rev-parse", "--short", "HEAD").stdout.strip()

    monkeypatch.setitem(PARTS, "one", Part(1, "x.jsonl", ("experiments.x run",)))
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    monkeypatch.setattr(results, "FOLDER", folder)
    monkeypatch.setattr(remake, "LEDGER", folder / "remade.jsonl")
    monkeypatch.setattr(results, "machine", lambda: {"commit": remake.git("rev-parse", "HEAD").stdout.strip()})
    monkeypatch.setattr(results, "check_committed", lambda: None)
    return commit


def row(commit, number):
    return {"row": number, "machine": {"commit": commit}}


def write(name, *rows):
    path = results.FOLDER / name
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def of_this_code(entry):
    return remake.is_of(entry, "one", remake.code_of("one", remake.head()))


def test_rows_are_of_this_code_until_a_program_changes(checkout):
    first = checkout("1")
    entry = row(first, 1)
    assert of_this_code(entry)
    (results.FOLDER / "note.md").write_text("no program")
    (results.FOLDER.parents[1] / "slimsam_jax" / "c.py").write_text("c = 1  # no program of the part imports it")
    checkout("1")
    assert of_this_code(entry)
    checkout('"""What it is for."""\n1  # a comment')
    assert of_this_code(entry)
    checkout("2")
    assert not of_this_code(entry)
    assert not of_this_code(row(first + "-dirty", 1)) and not of_this_code(row("0000000", 1))
    checkout("1")  # again
    assert of_this_code(entry)
    (results.FOLDER.parents[1] / "slimsam_jax" / "b.py").write_text("b = 1  # there was none")
    checkout("1")
    assert not of_this_code(entry)


def test_git_is_asked_once_a_commit(checkout, monkeypatch):
    commit = checkout("1")
    asked, git = [], remake.git
    monkeypatch.setattr(remake, "git", lambda *words: asked.append(words[0]) or git(*words))
    code = remake.code_of("one", remake.head())
    assert all(remake.is_of(row(commit, number), "one", code) for number in range(20))
    assert asked.count("ls-tree") == 2  # by its long name, and by the short one of rows


def test_rows_of_other_code_leave_once_git_has_them(checkout):
    old = checkout("1")
    file = write("x.jsonl", row(old, 1))
    new = checkout("2")
    write("x.jsonl", row(old, 1), row(new, 2))
    with pytest.raises(InputError, match=r"x\.jsonl: 1 rows of other code would go"):
        remake.drop_stale("one", PARTS["one"])
    assert len(results.read(file)) == 2
    checkout("2")
    remake.drop_stale("one", PARTS["one"])
    assert [entry["row"] for entry in results.read(file)] == [2]
    remake.drop_stale("one", PARTS["one"])  # is changed, and has nothing to lose


def test_rows_that_no_command_makes_again_stay(checkout, capfd):
    old = checkout("1")
    file = write("x.jsonl", row(old, 1), row(old, 2) | {"steps": 40}, row(old, 3) | {"steps": 80})
    checkout("2")
    remake.drop_stale("one", PARTS["one"]._replace(rows=({"row": 1}, {"steps": 80})))
    assert [entry["row"] for entry in results.read(file)] == [2]
    assert capfd.readouterr().out == "x.jsonl: 2 rows of other code go; 1 that no command makes again stay\n"


def test_the_rows_that_a_part_makes_are_those_of_its_commands():
    named = {"images": "limit", "row": "name", "recipe": "recipes"}  # options of another name than the field
    for name, part in PARTS.items():
        said = " ".join(part.commands)
        for field, value in ((field, value) for made in part.rows for field, value in made.items()):
            known = f"--{named.get(field, field)} {value}" in said or (field, value) in {
                ("data", remake.Options().val.name),
                ("distilled", True),
            }
            known |= field == "teacher" and f"{{work}}/{value} " in said
            known |= field in ("teacher", "model") and value == data.embedded_teacher().name and "{shipped}" in said
            assert known, f"{name}: {field} {value}"
    assert "experiments.quantization slim" in " ".join(PARTS["quantization"].commands)  # makes what is distilled


def test_a_card_is_made_again_of_as_many_images_as_the_others():
    """Else the table has a row of other images."""
    (made,) = PARTS["teacher_card"].rows
    assert {entry["images"] for entry in results.read(results.FOLDER / "teacher_card.jsonl")} == {made["images"]}


def test_a_model_is_made_unless_it_is_there(tmp_path):
    (command,) = (each for each in PARTS["teachers"].commands if "--out" in each)
    paths = {"work": tmp_path, "images": "train", "shipped": "a b.pth"}
    assert "a b.pth" in remake.arguments_of(command, paths)
    (tmp_path / "isotropic").mkdir()
    assert remake.arguments_of(command, paths) != []
    (tmp_path / "isotropic" / "config.json").write_text("{}")
    assert remake.arguments_of(command, paths) == []


def test_what_a_part_reads_of_the_working_folder_it_makes_first():
    for name, part in PARTS.items():
        words = [word for command in part.commands for word in command.split()]
        for command in part.commands:
            asked = command.partition("--teacher")[2].split("--")[0].split()
            for folder in (word for word in asked if word.startswith("{work}")):
                made = words.index(folder)
                assert words[made - 1] == "--out" and folder in words[made + 1 :], f"{name}: {folder}"


def test_a_part_is_made_once_and_what_fails_is_not_done(checkout, monkeypatch, tmp_path, capfd):
    checkout("1")
    options = remake.Options(only="one", work=tmp_path / "work", images=tmp_path)
    broken = Part(1, "", ("json.tool {images}",))
    monkeypatch.setattr(remake, "PARTS", {"one": broken})
    with pytest.raises(RunError, match=r"one: python -m json\.tool ended with"):
        remake.main(options)
    assert not remake.done("one")
    monkeypatch.setattr(remake, "PARTS", {"one": Part(1, "", ("this",))})
    remake.main(options)
    remake.main(options)
    assert "done by this code" in capfd.readouterr().out
    (entry,) = results.read(remake.LEDGER)
    assert "Beautiful is better" in entry["printed"]["this"]


def test_what_cannot_be_made_here_keeps_its_rows(checkout, monkeypatch, tmp_path, capfd):
    rows = write("some.jsonl", row(checkout("1"), 1))
    checkout("2")
    monkeypatch.setattr(remake, "PARTS", {"one": Part(1, "some.jsonl", ("this",), needs=("plan-x", "no_such_module"))})
    remake.main(remake.Options(work=tmp_path / "work"))
    assert capfd.readouterr().out == "one: left out, it needs pip install -e '.[plan-x]'\n"
    assert results.read(rows) and not remake.done("one")
    remake.main(remake.Options(list=True))
    assert capfd.readouterr().out.endswith("to be run, needs .[plan-x]\n")


def test_what_is_asked_for_must_be_there(checkout, tmp_path):
    with pytest.raises(InputError, match="--only x is no part; there are teacher_cache"):
        remake.main(remake.Options(only="x"))
    with pytest.raises(InputError, match=r"no --images \S+none and no --val \S+none"):
        none = {"images": tmp_path / "none", "val": tmp_path / "none"}
        remake.main(remake.Options(only="pruning", **none))


def test_the_list_is_in_the_order_of_hours(checkout, capfd):
    remake.main(remake.Options(list=True))
    lines = capfd.readouterr().out.splitlines()[1:]
    hours = [float(line.split()[1]) for line in lines]
    assert len(lines) == len(remake.PARTS) and hours == sorted(hours)


def test_the_list_says_what_was_checked_again_by_this_code(checkout, monkeypatch):
    monkeypatch.setattr(remake, "CHECKS", results.FOLDER / "spot_checks.jsonl")
    old, new = checkout("1"), checkout("2")
    check = lambda commit, **holds: {"part": "one: a", "holds": holds, "machine": {"commit": commit}}
    write("spot_checks.jsonl", check(old, error=False), check(new, error=True, point=True), check(new, error=False))
    assert remake.line_of("one").endswith("to be run; checked again, 1 of 2 rows hold")
    write("spot_checks.jsonl", check(old, error=True))
    assert remake.line_of("one").endswith("to be run")


def test_every_file_of_results_is_made_by_a_part():
    files = {part.file for part in PARTS.values()} | {remake.LEDGER.name}
    files |= set(ARCHIVE)
    assert {path.name for path in results.FOLDER.glob("*.jsonl")} <= files


EACH = {command: name for name, part in PARTS.items() for command in part.commands}
EACH |= {spot.command: name for name, spot in SPOTS.items()}


@pytest.mark.parametrize("command", EACH, ids=lambda command: command.removeprefix("experiments."))
def test_a_program_takes_what_a_part_gives_it(command, tmp_path, monkeypatch):
    paths = {name: tmp_path / name for name in ("images", "val", "photos", "work", "shipped")}
    program, *given = remake.arguments_of(command, paths)
    monkeypatch.setattr(sys, "argv", [program, *given])
    arguments = arguments_of_program(program)
    cli.check_no_repetition(given)
    options = cli.parse(arguments)
    if hasattr(options, "check"):
        options.check()  # of a folder that is not there yet


def arguments_of_program(name):
    """What a program parses its command line into, by its last lines; its functions do nothing."""
    if importlib.util.find_spec(name).submodule_search_locations:
        name += ".__main__"
    module = importlib.import_module(name)
    last = ast.parse(Path(module.__file__).read_text()).body[-1]
    (call,) = (
        node
        for node in ast.walk(last)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("cli.run", "tyro.cli")
    )
    arguments = eval(ast.unparse(call.args[0]), vars(module))
    if isinstance(arguments, dict):
        return {each: idle(function) for each, function in arguments.items()}
    return arguments if isinstance(arguments, type) else idle(arguments)


def idle(function):
    """A function with the same arguments that does nothing."""
    return functools.wraps(function)(lambda *_, **__: None)


def test_the_code_of_a_part_is_what_its_programs_load():
    """Of two: what is loaded by an import, and by a lazy name of the package, is known by reading."""
    loads = "import experiments.hierarchical, slimsam_jax, sys; slimsam_jax.compress; [print(getattr(m, '__file__', "
    loads += "None)) for m in list(sys.modules.values())]"
    said = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    rooms = tuple(str(ROOT / room) for room in ("slimsam_jax", "converters", "experiments"))
    loaded = {Path(line).relative_to(ROOT).as_posix() for line in said.splitlines() if line.startswith(rooms)}
    known = imports.sources("experiments.hierarchical")
    assert loaded - known == {imports.KEEPS} and {"slimsam_jax/api.py", "experiments/hierarchical.py"} <= loaded
    assert not {"experiments/release.py", "experiments/fair.py", "slimsam_jax/demo/server.py"} & known
    assert "experiments/bench/__main__.py" in imports.sources("experiments.bench")


def test_whoever_keeps_results_refuses_code_that_no_commit_holds():
    """By reading: a module that appends rows calls `results.check_committed` in the function that its program runs."""
    for path in EXPERIMENTS.glob("*.py"):
        text = path.read_text()
        if "results.append(" not in text or path.stem == "results":
            continue
        first = [n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and calls_check(n)]
        assert set(first) & {"run", "record", "main"}, f"{path.name} measures whatever lies there"


def calls_check(function):
    return any(isinstance(n, ast.Attribute) and n.attr == "check_committed" for n in ast.walk(function))
