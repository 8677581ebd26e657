"""Errors as one line: an `InputError` is what a user can put right, and says how."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

NAME, MESSAGE = 300, 4000  # characters of a name, and of a message, that are shown


def printable(name: object, most: int = NAME) -> str:
    """Makes a foreign name printable: cuts its middle to leave about `most` characters, and escapes the unprintable.

    So no name breaks a line, drives a terminal (ESC, reversed text) or cannot be encoded (bytes that are no UTF-8).
    """
    text = str(name)
    if len(text) > most:
        text = f"{text[: most // 2]} … {text[-(most // 2) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _message(text: object) -> str:
    return printable(re.sub(r"[\t-\r]", " ", str(text)), MESSAGE)


class InputError(ValueError):
    """Bad input. The command line prints the message alone and exits with 2. Whatever it quotes is printable."""

    def __init__(self, message: object = ""):
        super().__init__(_message(message))


class NothingOfUse(InputError):
    """Sound input that has nothing of what is asked for: images whose masks cannot be learned from, say."""


class RunError(RuntimeError):
    """A fault while running (disk full, loss not finite). The command line prints the message and exits with 1."""

    def __init__(self, message: object = ""):
        super().__init__(_message(message))


class Stopped(BaseException):
    """The run was asked to stop and has saved its state. The command line prints the message and exits with 143.

    No Exception, as KeyboardInterrupt is none: a signal comes anywhere, also while a foreign file is read, and whoever
    catches what is wrong with that would take it for a fault of the file, and go on.
    """


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turns whatever goes wrong while `what` is read, which is foreign, into an InputError that names it.

    Damaged files fail in ways nobody can list (a header that asks for 900 PiB, a list where
    a number should be), and each library has errors of its own.
    """
    try:
        yield
    except InputError:
        raise
    except (Exception, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error).strip() else "damaged"
        raise InputError(f"{printable(what)} cannot be read ({type(error).__name__}: {printable(reason)})") from None


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turns what goes wrong while `what` is written into a RunError; libraries have errors of their own for it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["unknown error"])[0]
        raise RunError(f"cannot write {what}: {reason}") from None
