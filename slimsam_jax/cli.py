"""What every command shares: arguments from a signature, one line for an error, an exit code that means something."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from slimsam_jax import compilation
from slimsam_jax.errors import InputError, RunError, Stopped

Arguments = Callable[..., Any] | dict[str, Callable[..., Any]]


def run(arguments: Arguments, command: Callable[[Any], Any] | None = None) -> None:
    """Parses the command line into `arguments`, a function or dataclass, and calls it.

    `command` is then called with the result, if given.

    Args:
      arguments: or {name: function}, for a command with subcommands.

    Exit codes: 0 done, 1 a fault while running, 2 bad input (as argparse has it), 130 interrupted, 143
    stopped by SIGTERM.
    Anything unforeseen keeps its traceback: it is our bug, and hiding it helps nobody.
    """
    # Writers that fail in orbax's threads report there once more, in tracebacks around our one line.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        compilation.prepare()
        check_no_repetition(sys.argv[1:])
        parse = tyro.extras.subcommand_cli_from_dict if isinstance(arguments, dict) else tyro.cli
        parsed = parse(arguments, prog=_name())
        if command:
            command(parsed)
    except InputError as error:
        fail(str(error), 2)
    except RunError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(143)  # as the shell names an end by SIGTERM


def _name() -> str | None:
    """How this program is called, if by `python -m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None


def check_no_repetition(arguments: list[str]) -> None:
    """Raises InputError for an option given twice, of which tyro would silently take the last."""
    names = [argument.partition("=")[0] for argument in arguments if argument.startswith("--") and argument != "--"]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise InputError(f"{repeated} is given twice; several values go behind one another: {repeated} A B")


def fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def join_processes(how: str) -> None:
    """Makes this process one of several that JAX runs as one: "auto", or HOST:PORT,PROCESSES,INDEX.

    Raises:
      InputError: neither; or no cluster was found, or its other processes were not.
    """
    import jax

    # When one stops by a fault of its own, the others wait for it in vain; so long, instead of five minutes.
    patience = {"shutdown_timeout_seconds": 30}
    try:
        if how == "auto":
            jax.distributed.initialize(**patience)
            return
        address, processes, index = how.split(",")
        if ":" not in address or not 0 <= int(index) < int(processes):
            raise ValueError("not HOST:PORT,PROCESSES,INDEX")
        jax.distributed.initialize(address, int(processes), int(index), **patience)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no cluster found"])[0]
        raise InputError(f"--distributed {how}: {reason}; give auto, or HOST:PORT,PROCESSES,INDEX") from None


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise InputError(f"--seed {seed} must be between 0 and {2**31 - 1}")


def check_share(max_broken: float) -> None:
    if not 0 <= max_broken <= 1:
        raise InputError(f"--max-broken {max_broken:g} is not a share of the images: between 0 and 1")


def check_empty(folder: Path) -> None:
    """Raises InputError unless `folder` can become an output folder: absent, or an empty folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, and an output folder is needed")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose another folder, or remove it first")
    _check_writable(folder)


def check_file(path: Path) -> None:
    """Raises InputError unless `path` can become an output file; an existing file will be replaced."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, and an output file is needed")
    _check_writable(path.parent)


def _check_writable(folder: Path) -> None:
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{folder} cannot be written: {nearest} is no folder, or one without the permission")
