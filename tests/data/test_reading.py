"""Samples are measured two at a time, in order, and what cannot be read is left out by name."""

from __future__ import annotations

import threading

import pytest

from slimsam_jax.data.reading import map_readable
from slimsam_jax.errors import InputError, RunError


class Named(str):
    """A sample that is nothing but its name."""

    __slots__ = ()

    @property
    def name(self) -> str:
        return str(self)


def named(count: int) -> list[Named]:
    return [Named(i) for i in range(count)]


def test_the_first_goes_alone_and_then_two_go_together():
    together, running, alone = threading.Barrier(2, timeout=20), set(), []

    def work(sample):
        running.add(sample)
        if sample == "0":
            alone.append(len(running))
        else:
            together.wait()  # breaks if no other comes
        return int(sample) ** 2

    found, skipped = map_readable(work, iter(named(7)))
    assert list(found) == named(7) and list(found.values()) == [i * i for i in range(7)] and not skipped
    assert alone == [1]


def test_results_come_in_order_whoever_is_done_first():
    gate = threading.Event()

    def work(sample):
        if sample == "1":
            assert gate.wait(20)
        if sample == "2":
            gate.set()
        return sample

    assert list(map_readable(work, named(4))[0]) == named(4)


def test_what_cannot_be_read_is_named_and_too_much_of_it_stops():
    def work(sample):
        if int(sample) % 2:
            raise InputError(f"{sample} is torn")
        return sample

    assert map_readable(work, named(4)) == ({"0": "0", "2": "2"}, {"1": "1 is torn", "3": "3 is torn"})
    with pytest.raises(RunError, match="1 is torn"):
        map_readable(work, named(4), total=4, max_broken=0.2)


def test_a_fault_of_ours_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        map_readable(lambda sample: 1 / (2 - int(sample)), named(4))
