"""Input and output on threads of their own, so that neither a slow source nor a slow consumer stalls the network."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from pliant.errors import ConfigError

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


class Closed(Exception):
    """Nothing more comes out of this mailbox, or may go in."""


class Mailbox(Generic[T]):
    """A queue between two threads. This one waits while it is full: nothing is lost."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(f"a queue holds at least one item, got {capacity}")
        self.capacity = capacity
        self.dropped = 0
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T) -> None:
        """Raises Closed once nobody listens any more."""
        with self._changed:
            self._make_room()
            if self._closed:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """The oldest item; waits for one. Raises Closed when the mailbox is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            if not self._items:
                raise Closed
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """No more items; those inside can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _make_room(self) -> None:
        """Called with the lock held, before an item goes in."""
        self._changed.wait_for(lambda: len(self._items) < self.capacity or self._closed)


class DroppingMailbox(Mailbox[T]):
    """Never waits: when it is full the oldest item is dropped, so what comes out is recent."""

    def _make_room(self) -> None:
        while len(self._items) >= self.capacity and not self._closed:
            self._items.popleft()
            self.dropped += 1


def run_threads(
    source: Iterable[A],
    work: Callable[[A], Iterable[B]],
    finish: Callable[[], Iterable[B]],
    show: Callable[[B], None],
    inbox: Mailbox[A],
    outbox: Mailbox[B],
) -> None:
    """Read `source` on one thread, `work` here, `show` the results on a third, with mailboxes between them.

    finish: results that are left after the last item. An exception in any of the three ends all of them and is raised
    here; so does an interruption.
    """
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for item in source:
                inbox.put(item)
        except Closed:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            inbox.close()

    def write() -> None:
        try:
            while True:
                show(outbox.get())
        except Closed:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            outbox.close()
            inbox.close()  # nobody listens: the reader and the network may stop

    threads = [threading.Thread(target=f, name=f"pliant-stream-{f.__name__}", daemon=True) for f in (read, write)]
    for thread in threads:
        thread.start()
    try:
        _work(work, finish, inbox, outbox, failures)
    finally:
        inbox.close()
        outbox.close()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _work(
    work: Callable[[A], Iterable[B]],
    finish: Callable[[], Iterable[B]],
    inbox: Mailbox[A],
    outbox: Mailbox[B],
    failures: list[BaseException],
) -> None:
    try:
        while True:
            try:
                item = inbox.get()
            except Closed:
                break
            for result in work(item):
                outbox.put(result)
            if failures:
                return
        if not failures:
            for result in finish():
                outbox.put(result)
    except Closed:  # the consumer failed; its exception is raised by the caller
        if not failures:
            raise
