"""Time in a live stream: sources that tick like a camera, and rest where nothing is to be computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """An exponential mean of how long a frame takes: 0.9 of the old value, 0.1 of the new one."""

    seconds: float | None = None

    def after(self, seconds: float) -> Pace:
        """With one more processed frame."""
        mean = seconds if self.seconds is None else 0.9 * self.seconds + 0.1 * seconds
        return replace(self, seconds=mean)


def paced(
    items: Iterable[T],
    per_second: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[T]:
    """The items, none earlier than a camera of this rate would give it. Late ones are given at once."""
    begun = clock()
    for k, item in enumerate(items):
        early = begun + k / per_second - clock()
        if early > 0:
            sleep(early)
        yield item
