"""What a user can put right is an `InputError`: one line saying what is wrong and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The command line prints the message alone and exits with 2."""


class RunError(RuntimeError):
    """A fault while running (disk full, loss not finite). The command line prints the message and exits with 1."""
