"""Progress with rates: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def track(
    items: Iterable[T], name: str, total: int | None = None, unit: str = "images", per_item: int = 1
) -> Iterator[T]:
    """Yields the items and shows how it goes, on standard error.

    Args:
      total: number of items, if `items` does not know it.
      unit, per_item: what the rate counts, and how many an item is.
    """
    total = len(items) if total is None and isinstance(items, Sized) else total
    console = Console(file=sys.stderr)
    return (_bar if console.is_terminal else _lines)(items, name, total, unit, per_item, console)


def _bar(items, name, total, unit, per_item, console):
    columns = (
        TextColumn("{task.description:>18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, rate="")
        start = time.perf_counter()
        for done, item in enumerate(items, 1):
            yield item
            progress.update(task, advance=1, rate=_rate(done * per_item, time.perf_counter() - start, unit))


def _lines(items, name, total, unit, per_item, console):
    start = last = time.perf_counter()
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - last > SECONDS_BETWEEN_LINES:
            last = now
            console.print(f"{name} {done}/{total or '?'}  {_rate(done * per_item, now - start, unit)}", highlight=False)
    seconds = time.perf_counter() - start
    console.print(f"{name} {done} done, {_rate(done * per_item, seconds, unit)}", highlight=False)


def _rate(count: int, seconds: float, unit: str) -> str:
    rate = count / max(seconds, 1e-9)
    return f"{rate:.1f} {unit}/s" if rate >= 1 or not count else f"{1 / rate:.1f} s per {unit.removesuffix('s')}"
