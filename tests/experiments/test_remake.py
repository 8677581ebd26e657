"""What is made anew: what other code measured leaves, what this code measured stays, and a part is done once."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from experiments import remake, results
from slimsam_jax.errors import InputError, RunError

EXPERIMENTS = Path(results.__file__).parent


@pytest.fixture()
def checkout(tmp_path, monkeypatch):
    """A repository of one program; `commit(text)` changes it and returns the commit."""
    folder = tmp_path / "experiments" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "slimsam_jax").mkdir()
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=tmp_path, check=True, capture_output=True
    )
    git("init", "-q")

    def commit(text):
        (tmp_path / "slimsam_jax" / "a.py").write_text(text)
        git("add", "-A")
        git("commit", "-q", "-m", "x")
        return remake.git("rev-parse", "--short", "HEAD").stdout.strip()

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


def test_rows_are_of_this_code_until_a_program_changes(checkout):
    first = checkout("1")
    entry = row(first, 1)
    assert remake.of_this_code(entry)
    (results.FOLDER / "note.md").write_text("no program")
    checkout("1")
    assert remake.of_this_code(entry)
    checkout("2")
    assert not remake.of_this_code(entry)
    assert not remake.of_this_code(row(first + "-dirty", 1)) and not remake.of_this_code(row("0000000", 1))


def test_rows_of_other_code_leave_once_git_has_them(checkout):
    old = checkout("1")
    file = write("x.jsonl", row(old, 1))
    new = checkout("2")
    write("x.jsonl", row(old, 1), row(new, 2))
    with pytest.raises(InputError, match=r"x\.jsonl: 1 rows of other code would go"):
        remake.drop_stale(file)
    assert len(results.read(file)) == 2
    checkout("2")
    remake.drop_stale(file)
    assert [entry["row"] for entry in results.read(file)] == [2]
    remake.drop_stale(file)  # is changed, and has nothing to lose


def test_a_part_is_made_once_and_what_fails_is_not_done(checkout, monkeypatch, tmp_path, capfd):
    checkout("1")
    options = remake.Options(only="one", work=tmp_path / "work", teacher=tmp_path)
    broken = remake.Part(1, "", ("json.tool {teacher}",))
    monkeypatch.setattr(remake, "PARTS", {"one": broken})
    with pytest.raises(RunError, match=r"one: python -m json\.tool ended with"):
        remake.main(options)
    assert not remake.done("one")
    monkeypatch.setattr(remake, "PARTS", {"one": remake.Part(1, "", ("this",))})
    remake.main(options)
    remake.main(options)
    assert "done by this code" in capfd.readouterr().out
    (entry,) = results.read(remake.LEDGER)
    assert "Beautiful is better" in entry["printed"]["this"]


def test_what_is_asked_for_must_be_there(checkout, tmp_path):
    with pytest.raises(InputError, match="--only x is no part; there are teacher_cache"):
        remake.main(remake.Options(only="x"))
    with pytest.raises(InputError, match=r"no --teacher \S+none and no --val \S+none"):
        none = {"teacher": tmp_path / "none", "val": tmp_path / "none"}
        remake.main(remake.Options(only="teacher_cache", **none))


def test_the_list_is_in_the_order_of_hours(checkout, capfd):
    remake.main(remake.Options(list=True))
    lines = capfd.readouterr().out.splitlines()[1:]
    hours = [float(line.split()[1]) for line in lines]
    assert len(lines) == len(remake.PARTS) and hours == sorted(hours)


def test_every_file_of_results_is_made_by_a_part_whose_programs_exist():
    files = {part.file for part in remake.PARTS.values()} | {remake.LEDGER.name}
    assert {path.name for path in results.FOLDER.glob("*.jsonl")} <= files
    for name, part in remake.PARTS.items():
        for command in part.commands:
            module, *words = command.split()
            assert importlib.util.find_spec(module), f"{name}: {module}"
            assert {word.partition("}")[0] for word in words if word.startswith("{")} <= {
                "{teacher", "{images", "{val", "{photos", "{work"
            }  # fmt: skip


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
