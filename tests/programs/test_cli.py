"""What every command shares: exit codes, one line for an error, options given once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import pytest

from slimsam_jax import cli
from slimsam_jax.cli.checks import check_spared
from slimsam_jax.errors import InputError, RunError, Stopped


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no such\n  thing"), 2, "error: no such thing"),
        (RunError("the disk is full"), 1, "error: the disk is full"),
        (OSError(28, "No space left on device", "x.png"), 1, "error: No space left on device: x.png"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (KeyboardInterrupt("steps are kept"), 130, "error: interrupted; steps are kept"),
        (Stopped("stopped after step 3"), 143, "stopped after step 3"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_end_has_its_code_and_line(monkeypatch, capsys, error, code, line):
    def command() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as end:
        cli.run(command)
    assert end.value.code == code and capsys.readouterr().err == f"{line}\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(ZeroDivisionError):
        cli.run(command)


@pytest.mark.parametrize(
    "arguments", [["--seed=1", "--seed=2"], ["--seed", "1", "--seed=2"], ["--set", "a=1", "--set", "b"]]
)
def test_an_option_given_twice_is_refused(arguments):
    with pytest.raises(InputError, match="is given twice"):
        cli.check_no_repetition(arguments)
    cli.check_no_repetition(["--seed=1", "--set", "seed=2", "seed=2", "--", "--"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--kind=c"], r"invalid choice 'c' for argument '--kind'\. Expected one of \('a', 'b'\); --help lists what"),
        (["--kind"], r"Missing value for argument '--kind'\. Expected 1 values; --help"),
        (["--modle", "slim"], r"Missing from prog: --model PATH; unrecognized: --modle slim; --help lists what"),
        (
            ["--model", "slim", "--kidn", "a"],
            r"Unrecognized options: --kidn, a; perhaps --kind; --help lists",
        ),
    ],
)
def test_a_wrong_command_line_is_a_sentence_that_names_what_is_wrong(monkeypatch, arguments, line):
    def command(model: Path, kind: Literal["a", "b"] = "a") -> None:
        raise AssertionError("it is called")

    monkeypatch.setattr(cli, "program", "prog")
    monkeypatch.setattr(sys, "argv", ["prog", *arguments])
    with pytest.raises(InputError, match=f"^{line}"):
        cli.parse(command)


def test_outputs_spare_what_is_read(tmp_path):
    """An image, its annotation, a shard, a model's files; results of before may be replaced."""
    data, model = ["a.jpg", "a.json", "old.json", "deep/b.PNG", "s.tar", "n.md"], ["config.json", "x.png"]
    for name in [*(f"in/{name}" for name in data), *(f"m/{name}" for name in model)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    boxes = [None, tmp_path / "in" / "n.md"]
    inputs = {"--images": [str(tmp_path / "in")], "--boxes": boxes, "--model": [tmp_path / "m"]}
    for name, message in (
        ("in/a.jpg", "--out .*a.jpg would replace a file of --images "),
        ("in/a.json", "would replace a file of --images "),
        ("link/deep/b.PNG", "would replace a file of --images "),
        ("in/s.tar", "would replace a file of --images "),
        ("in/n.md", "would replace --boxes; choose another name"),
        ("m/config.json", "would replace a file of --model "),
    ):
        with pytest.raises(InputError, match=message):
            check_spared({"--sheet": None, "--out": tmp_path / name}, inputs)
    for name in ("in/old.json", "in/new.jpg", "m/x.png", "in-beside.png"):
        check_spared({"--out": tmp_path / name}, inputs)
