"""Several processes that measure one set of samples, started by `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

from pliant.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one that reports."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The GPU of this process where several share a machine with GPUs; None where there is no choice to make."""
        import torch

        local = os.environ.get("LOCAL_RANK")
        return f"cuda:{local}" if self.size > 1 and local is not None and torch.cuda.is_available() else None

    def gather(self, value: Any) -> list[Any] | None:
        """Every process's value in order of rank, in the main one; None in the others. All must call it."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, found)
        return found

    def share(self, value: T | None) -> T:
        """The main process's value, in every one. All must call it."""
        if self.size > 1:
            import torch.distributed as dist

            holder = [value]
            dist.broadcast_object_list(holder)
            value = holder[0]
        assert value is not None  # the main process has one
        return value


ALONE = Processes()


def started() -> Processes:
    """What the launcher's environment says; joins the others (gloo) if there are any.

    Raises ConfigError if they cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        try:
            dist.init_process_group("gloo")
        except (RuntimeError, ValueError) as e:
            raise ConfigError(
                f"cannot join the other {size - 1} processes ({e}); start with 'accelerate launch'"
            ) from e
    return Processes(dist.get_rank(), dist.get_world_size())
