"""Timing that other load on the machine disturbs little: CPU seconds of runs that alternate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Timed(NamedTuple, Generic[T]):
    """Seconds of a run, and what it returned; `cpu` counts all threads of this process."""

    wall: float
    cpu: float
    result: T


def timed(run: Callable[[], T]) -> Timed[T]:
    """Run once."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, result)


class Spread(NamedTuple):
    """Smallest, median and largest of some values."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min(values), median(values), max(values))

    def __str__(self) -> str:
        return " / ".join(f"{value:.2f}" for value in self)
