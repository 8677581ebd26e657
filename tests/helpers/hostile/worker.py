"""Runs readers on hostile files, each in a process of its own that forks from one in which all is imported.

Takes lines of standard input, each a JSON list of [what, argument, ...], and answers each by a list of outcomes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import pycocotools.cocoeval  # noqa: F401 (here, so that no child pays for it)
import scipy.ndimage  # noqa: F401
from PIL import Image

import slimsam_jax.data.check  # noqa: F401
from slimsam_jax import checkpoint, cli  # noqa: F401 (the command imports the one, and JAX with it)
from slimsam_jax.data import __main__ as commands
from slimsam_jax.data import find
from slimsam_jax.data.reading import map_readable, read_annotated
from slimsam_jax.evaluation import detections

PATIENCE = 60  # wall seconds; the machine may be busy


def check(*arguments: str) -> None:
    """The command."""
    sys.argv = ["data", "check", *arguments]
    cli.run({"check": commands.check, "prepare": commands.prepare})


def read(*locations: str) -> None:
    """The Python reader, as training and evaluation call it."""

    def every(_: object) -> None:
        for reason in map_readable(read_annotated, find(locations))[1].values():
            print(f"refused: {reason}")

    cli.run(lambda: None, every)


def truth(path: str) -> None:
    cli.run(lambda: None, lambda _: detections.read_truth(Path(path), {7: []}))


def boxes(path: str) -> None:
    cli.run(lambda: None, lambda _: detections.read_boxes(Path(path)))


COMMANDS = {"check": check, "read": read, "truth": truth, "boxes": boxes}


def outcome(what: str, *arguments: str) -> dict[str, object]:
    """Runs one in a child."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        child = os.fork()
        if not child:
            _be_child(out.fileno(), error.fileno(), what, arguments)
        _, status, usage = os.wait4(child, 0)
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read().decode(errors="surrogateescape"))
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": texts[0],
        "error": texts[1],
        "seconds": usage.ru_utime + usage.ru_stime,
        "megabytes": usage.ru_maxrss / 1e3,
    }


def _be_child(out: int, error: int, what: str, arguments: tuple[str, ...]) -> None:
    os.dup2(out, 1)
    os.dup2(error, 2)
    signal.alarm(PATIENCE)
    code = 0
    try:
        COMMANDS[what](*arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    Image.init()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        check("--help")  # imports the parser of command lines, two thirds of a child's time
    sys.argv = sys.argv[:1]
    for line in sys.stdin:
        print(json.dumps([outcome(*case) for case in json.loads(line)]), flush=True)
