"""Programs as modules: `slimsam_jax.predict` itself is the function of that name. And their command lines."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from slimsam_jax import cli
from slimsam_jax.api import compress_with
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.set_option import explain


def program(name: str) -> ModuleType:
    """The module of `python -m slimsam_jax.NAME`."""
    return importlib.import_module(f"slimsam_jax.{name}")


def run_program(monkeypatch: Any, capsys: Any, name: str, *arguments: Any) -> tuple[int, str, str]:
    """Runs a command line in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    code = 0
    try:
        cli.run(Options, compress_with, explain) if name == "compress" else cli.run(program(name).main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()
