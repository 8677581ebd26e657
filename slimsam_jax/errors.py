"""What a user can put right is an `InputError`: one line saying what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input. The command line prints the message alone and exits with 2."""


class RunError(RuntimeError):
    """A fault while running (disk full, loss not finite). The command line prints the message and exits with 1."""


class Stopped(Exception):
    """The run was asked to stop and has saved its state. The command line prints the message and exits with 143."""


def shown(text: object, most: int = 200) -> str:
    """Foreign text for one line of a terminal: control characters escaped, cut after `most` characters."""
    text = str(text)
    text = text[:most] + ("…" if len(text) > most else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def blaming(what: object) -> Iterator[None]:
    """Turns whatever goes wrong while foreign data is read into an InputError that names the data.

    Damaged files fail in ways nobody can list (a header that asks for 900 PiB, a list where
    a number should be), and each library has errors of its own.
    """
    try:
        yield
    except InputError:
        raise
    except (Exception, RecursionError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise InputError(f"{what} cannot be read ({type(error).__name__}: {shown(reason)})") from None


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
