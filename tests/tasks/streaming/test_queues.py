"""Threads: nobody waits for a slow consumer, nothing is lost where nothing may be, errors reach the caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pliant.errors import ConfigError
from pliant.tasks.streaming import DroppingMailbox, Mailbox, Pace, paced, run_threads

PATIENCE = 20.0


def nothing() -> list[int]:
    return []


def test_a_slow_consumer_drops_frames_and_never_stalls_the_network() -> None:
    """The consumer hangs on its first item until the network has worked on everything."""
    all_done, shown = threading.Event(), list[int]()

    def show(item: int) -> None:
        assert all_done.wait(PATIENCE)
        shown.append(item)

    def finish() -> list[int]:
        all_done.set()
        return []

    outbox = DroppingMailbox[int](2)
    run_threads(range(50), lambda k: [k], finish, show, Mailbox(1), outbox)
    assert outbox.dropped >= 47  # one in the consumer's hands, two in the mailbox
    assert len(shown) + outbox.dropped == 50
    assert shown[-2:] == [48, 49]
    assert shown == sorted(shown)


def test_a_slow_network_drops_old_frames() -> None:
    """The network hangs on its first frame until the source has given all; then it sees the newest."""
    given, seen = threading.Event(), list[int]()

    def source() -> Iterator[int]:
        yield from range(30)
        given.set()

    def work(item: int) -> list[int]:
        assert given.wait(PATIENCE)
        seen.append(item)
        return []

    inbox = DroppingMailbox[int](1)
    run_threads(source(), work, nothing, lambda item: None, inbox, Mailbox(1))
    assert len(seen) + inbox.dropped == 30
    assert seen[-1] == 29
    assert len(seen) <= 2


def test_files_lose_nothing() -> None:
    shown: list[int] = []

    def show(item: int) -> None:
        time.sleep(0.0005)
        shown.append(item)

    run_threads(range(40), lambda k: [k] * (k % 3), lambda: [99], show, Mailbox(2), Mailbox(2))
    assert shown == [k for k in range(40) for _ in range(k % 3)] + [99]


@pytest.mark.parametrize("where", ["source", "work", "finish", "show"])
def test_errors_end_all_threads_and_are_raised_here(where: str) -> None:
    def fail_at(place: str, k: int) -> None:
        if place == where and k == 5:
            raise ZeroDivisionError(where)

    def source() -> Iterator[int]:
        for k in range(100_000):  # far more than fits: the reader must be stopped, not exhausted
            fail_at("source", k)
            if where == "finish" and k == 10:
                return
            yield k

    def work(k: int) -> list[int]:
        fail_at("work", k)
        return [k]

    def finish() -> list[int]:
        fail_at("finish", 5)
        return []

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match=where):
        run_threads(source(), work, finish, lambda k: fail_at("show", k), Mailbox(2), Mailbox(2))
    assert threading.active_count() == before


def test_interruptions_pass_through() -> None:
    def work(k: int) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_threads(range(10**6), work, nothing, lambda item: None, Mailbox(2), Mailbox(2))


def test_a_queue_holds_something() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Mailbox(0)


def test_a_camera_is_never_early_and_catches_up() -> None:
    now, slept = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    times = []
    for k, _ in enumerate(paced(range(6), 10.0, lambda: now[0], sleep)):
        times.append(now[0])
        now[0] += 0.25 if k == 1 else 0.01  # one slow frame
    assert times == pytest.approx([0.0, 0.1, 0.35, 0.36, 0.4, 0.5])


def test_pace_is_a_slow_mean() -> None:
    pace = Pace().after(1.0).after(2.0)
    assert pace.seconds == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    assert pace.after(0.1).seconds == pytest.approx(0.9 * 1.1 + 0.1 * 0.1)
