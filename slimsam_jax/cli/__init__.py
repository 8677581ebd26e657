"""Runs commands: arguments from a signature, one line for an error, an exit code that means something."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import typing
import warnings
from collections.abc import Callable
from typing import Any

import tyro

from slimsam_jax.cli import arguments as seen
from slimsam_jax.cli import compilation
from slimsam_jax.errors import InputError, RunError, Stopped, printable

Arguments = Callable[..., Any] | dict[str, Callable[..., Any]]
NUMBERS = {"FLOAT": "number", "INT": "whole number"}  # as the parser calls them, and as we do
NO_NUMBER = r"Error parsing (--[\w-]+): no type matching (FLOAT|INT) could be instantiated from \['?(.*?)'?\]\.?"
program: str | None = None  # "slimsam compress", set by `slimsam_jax.__main__`


def run(
    arguments: Arguments,
    command: Callable[[Any], Any] | None = None,
    explain: Callable[[str], str | None] = lambda option: None,
) -> None:
    """Parses the command line into `arguments`, a function or dataclass, and calls it.

    `command` is then called with the result, if given.

    Args:
      arguments: or {name: function}, for a command with subcommands.
      explain: what is said of an option that there is not, "--name=value" or "--name"; None where that is nothing.

    Exit codes: 0 done, 1 a fault while running, 2 bad input (as argparse has it), 130 interrupted, 143
    stopped by SIGTERM.
    Anything unforeseen keeps its traceback: it is our bug, and hiding it helps nobody.
    """
    # Writers that fail in orbax's threads report there once more, in tracebacks around our one line.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").setLevel(logging.ERROR)
    # What is odd in an image; what cannot be read is an error.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):  # file names need not be what the terminal can show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        compilation.prepare()
        check_no_repetition(sys.argv[1:])
        check_values(sys.argv[1:], arguments)
        parsed = parse(arguments, explain)
        if command:
            command(parsed)
    except InputError as error:
        fail(str(error), 2)
    except RunError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(f"{error.strerror or error}{f': {printable(error.filename)}' if error.filename else ''}", 1)
    except KeyboardInterrupt as stop:
        fail(f"interrupted; {stop}" if str(stop) else "interrupted", 130)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(143)  # as the shell names an end by SIGTERM


def parse(arguments: Arguments, explain: Callable[[str], str | None] = lambda option: None) -> Any:
    """Parses the command line for a function (which is called), a dataclass, or the function of several that it names.

    Raises:
      InputError: it makes nothing of it.
    """
    several = isinstance(arguments, dict)
    one = tyro.extras.subcommand_cli_from_dict if several else tyro.cli
    postponed = {k: seen.postponed(f) for k, f in arguments.items()} if several else seen.postponed(arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # of the parser alone, which says what is wrong in a frame of many lines
            parsed = one(postponed, prog=_name(), config=(tyro.conf.DisallowNone,))
    except SystemExit as stop:
        if stop.code:
            line = _in_a_line(said.getvalue())
            raise InputError(_explained(line, explain) or line) from None
        raise
    return seen.finished(parsed, arguments)


def _explained(line: str, explain: Callable[[str], str | None]) -> str | None:
    """Returns a better line than "Unrecognized options: ...", where `explain` knows one of them."""
    unknown = line.startswith("Unrecognized options:")
    for option in sys.argv[1:] if unknown else ():
        if option.startswith("--") and option.partition("=")[0] in line and (answer := explain(option)):
            return f"{printable(option.partition('=')[0], 60)}: {printable(answer, 300)}"
    return None


def _in_a_line(frame: str) -> str:
    """Shortens tyro's frame: the part above the first rule, and of those below it unknown options and its proposal."""
    rows = [line[2:].strip("│╮╯") for line in frame.splitlines()[1:]]  # the first is a title
    parts: list[list[str]] = [[]]
    for row in rows:
        if row.strip() and not row.strip(" ─-╰"):
            parts.append([])
        elif not row.startswith(" " * 8):  # help texts
            parts[-1].append(row.strip())
    said = [text for part in parts if (text := " ".join(part).strip())]
    problem = re.sub(r"\s+Got errors:.*", "", said[0]) if said else "the arguments are not understood"
    problem = re.sub(NO_NUMBER, lambda no: f"{no[1]} {no[3]} is not a {NUMBERS[no[2]]}", problem)
    nearest = re.search(r"Perhaps you meant:.*?(--[\w-]+)", " ".join(said[1:]))
    line = printable(problem.rstrip("."), 400)
    unknown = next((text.partition(":")[2] for text in said[1:] if text.startswith("Unrecognized options:")), "")
    line += f"; unrecognized: {printable(unknown.strip(), 200)}" if unknown else ""
    return f"{line}{f'; perhaps {nearest[1]}' if nearest else ''}; --help lists what there is"


def _name() -> str | None:
    """How this program is called, if by `slimsam` or `python -m`."""
    if program:
        return program
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None


def called(name: str) -> str:
    """How another program is called by who called this one: "slimsam predict", or by `python -m`."""
    return f"slimsam {name}" if program else f"python -m slimsam_jax.{name}"


def check_no_repetition(arguments: list[str]) -> None:
    """Raises InputError for an option given twice, of which tyro would silently take the last."""
    names = [_option(argument) for argument in arguments if argument.startswith("--") and argument != "--"]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise InputError(f"{repeated} is given twice; several values go behind one another: {repeated} A B")


def _option(argument: str) -> str:
    """Returns the name in "--name=value"; the parser takes _ for -, too."""
    return argument.partition("=")[0].replace("_", "-")


def check_values(given: list[str], arguments: Arguments) -> None:
    """Raises InputError for a value that is nothing, and for no value where there may be several.

    Both come of shell variables that are not set. To the parser the first is the folder we are in, if it is a
    path, and the second the default.
    """
    functions = arguments.values() if isinstance(arguments, dict) else [arguments]
    hints = {name: hint for function in functions for name, hint in typing.get_type_hints(function).items()}
    several = {f"--{name.replace('_', '-')}" for name, hint in hints.items() if typing.get_origin(hint) is tuple}
    for before, argument, after in zip(["", *given], given, [*given[1:], "--"], strict=False):
        if not argument.strip():
            raise InputError(f"{_option(before) if before.startswith('-') else 'an argument'} is given an empty value")
        if re.fullmatch(r"--[\w-]+=\s*", argument):
            raise InputError(f"{_option(argument)} is given an empty value")
        if argument in several and after.startswith("--"):
            raise InputError(f"{argument} needs at least one value")


def fail(message: str, code: int) -> None:
    print(f"error: {printable(' '.join(message.split()), 2000)}", file=sys.stderr)
    sys.exit(code)
