"""How much autograd holds, and how much tensors hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held:
    """Bytes that autograd graphs keep for their backward passes: now, and at most so far."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0


class _Packed:
    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.held, self.tensor, self.size = held, tensor, tensor.numel() * tensor.element_size()
        held.now += self.size
        held.peak = max(held.peak, held.now)

    def __del__(self) -> None:
        self.held.now -= self.size


@contextmanager
def watching() -> Iterator[Held]:
    """Counts every tensor saved for backward while it is alive (saved-tensor hooks)."""
    held = Held()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Packed(held, t), lambda p: p.tensor):
        yield held


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made under this mode that are alive: now, and at most so far. Kernels' own scratch is not
    seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._older: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._storages:
                self._older[value.untyped_storage()._cdata] = StorageWeakRef(value.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and not value.is_meta:
                storage = value.untyped_storage()
                if storage._cdata in self._older and not self._older[storage._cdata].expired():
                    continue
                self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        for key, (reference, _) in list(self._storages.items()):
            if reference.expired():
                del self._storages[key]
        self.peak = max(self.peak, self.now)
        return out

    @property
    def now(self) -> int:
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
