"""Shows progress with rates: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slimsam_jax.errors import MESSAGE, printable

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def track(
    items: Iterable[T], name: str, total: int | None = None, unit: str = "images", per_item: int = 1, compiles=False
) -> Iterator[T]:
    """Yields the items and shows how it goes, on standard error.

    Args:
      total: number of items, if `items` does not know it.
      unit, per_item: what is counted, and how many an item is.
      compiles: whether the first item's time is that of compiling for all; it is called so, and left out of the rate.
    """
    total = len(items) if total is None and isinstance(items, Sized) else total
    console = Console(file=sys.stderr)
    units = None if total is None else total * per_item
    return (_bar if console.is_terminal else _lines)(items, name, units, unit, per_item, compiles, console)


def say(name: str, text: str) -> None:
    """Prints a line of what a command is about to do, or has done, on standard output."""
    print(f"{name:>10}  {printable(text, MESSAGE)}", flush=True)


def _bar(items, name, total, unit, per_item, compiles, console):
    columns = (
        TextColumn("{task.description:>28}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        count = lambda done: f"{done}/{total or '?'} {unit}"
        task = progress.add_task(name, total=total, count=count(0), rate="compiling" if compiles else "")
        rate = Rate(unit, compiles)
        for index, item in enumerate(items, 1):
            yield item
            done = index * per_item
            progress.update(task, completed=done, count=count(done), rate=rate(done))


def _lines(items, name, total, unit, per_item, compiles, console):
    write = lambda text: console.print(f"{name}: {text}", highlight=False, soft_wrap=True)
    if compiles:
        write("compiling")
    rate, last, done = Rate(unit, compiles), time.perf_counter(), 0
    for index, item in enumerate(items, 1):
        yield item
        done, now = index * per_item, time.perf_counter()
        speed = rate(done)
        if now - last > SECONDS_BETWEEN_LINES:
            last = now
            write(f"{done}/{total or '?'} {unit}  {speed}".rstrip())
    write(f"{done} {unit} done {rate.summary()}".rstrip())


class Rate:
    """The rate until now, as text, without the first item if that compiled."""

    def __init__(self, unit: str, compiles: bool = False):
        self.unit, self.start, self.skip = unit, time.perf_counter(), 0
        self.compiled = None if compiles else 0.0
        self.text = ""

    def __call__(self, done: int) -> str:
        now = time.perf_counter()
        if self.compiled is None:
            self.compiled, self.start, self.skip = now - self.start, now, done
        elif done > self.skip:
            self.text = _rate(done - self.skip, now - self.start, self.unit)
        return self.text

    def summary(self) -> str:
        compiled = f"{self.compiled:.1f} s until the first" if self.compiled else ""
        text = ", ".join(part for part in (compiled, self.text) if part)
        return f"({text})" if text else ""


def _rate(count: int, seconds: float, unit: str) -> str:
    rate = count / max(seconds, 1e-9)
    return f"{rate:.1f} {unit}/s" if rate >= 1 or not count else f"{1 / rate:.1f} s per {unit.removesuffix('s')}"
