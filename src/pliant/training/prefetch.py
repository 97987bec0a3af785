"""Preparing the next batch while the accelerator works on this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from pliant.training.objectives import Batch, SizedBatch

AnyBatch: TypeAlias = Batch | SizedBatch


class Prefetch:
    """Serves `fetch(k)` for k = start, start+1, ..., end-1 in order, one ahead in a thread if `threaded`."""

    def __init__(self, fetch: Callable[[int], AnyBatch], start: int, end: int, threaded: bool) -> None:
        self._fetch, self._end = fetch, end
        self._pool = ThreadPoolExecutor(1) if threaded else None
        self._ahead: Future[AnyBatch] | None = self._schedule(start)

    def get(self, k: int) -> AnyBatch:
        """Batch k. Exceptions of `fetch` come out here."""
        if self._ahead is None:
            return self._fetch(k)
        batch = self._ahead.result()
        self._ahead = self._schedule(k + 1)
        return batch

    def _schedule(self, k: int) -> Future[AnyBatch] | None:
        return self._pool.submit(self._fetch, k) if self._pool is not None and k < self._end else None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def pinned(batch: AnyBatch) -> AnyBatch:
    """The batch in page-locked memory, from which copies to a GPU run in the background."""
    return _map(batch, Tensor.pin_memory)


def moved(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """The batch on a device."""
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _map(batch: AnyBatch, function: Callable[[Tensor], Tensor]) -> AnyBatch:
    if isinstance(batch, SizedBatch):
        return replace(batch, groups=tuple(map(function, batch.groups)), labels=function(batch.labels))
    partners, sources = (None if v is None else function(v) for v in (batch.partners, batch.sources))
    return replace(
        batch, images=function(batch.images), labels=function(batch.labels), partners=partners, sources=sources
    )
