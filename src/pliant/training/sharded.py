"""Tensors that may be sharded over the processes of a run (`pliant.training.sharding`), or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This process's slice, sharing memory; a tensor that is not sharded is its own slice."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of a sharded one all processes have to ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole value, equal on all processes, sharded as another tensor is, on its device."""
    if not isinstance(like, DTensor):
        return value
    here = value.to(like.to_local().device)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def gathered(value: Any, keep: bool) -> Any:
    """Nested dicts and lists (an optimizer's state) with all sharded tensors whole, on the CPU; None unless kept."""
    if isinstance(value, DTensor):
        full = whole(value)
        return full.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gathered(item, keep) for key, item in value.items()}
    return [gathered(item, keep) for item in value] if isinstance(value, list) else value


def everywhere(true: bool, like: Tensor) -> bool:
    """Whether something is true on all processes, if the tensor is sharded over them; else here."""
    if not isinstance(like, DTensor):
        return true
    flag = torch.tensor(float(true), device=like.to_local().device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)
