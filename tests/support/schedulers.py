"""Normal forms of diffusers' schedulers, by running them on basis vectors in float64 (sheet D, 14.5)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class Float64Torch:
    """`torch` as a scheduler module sees it, with float32 meaning float64: schedulers cast states down
    otherwise.
    """

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def widen(module: ModuleType, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "torch", Float64Torch())


def scheduler_rows(scheduler: Any, noises: int = 0, **step_options: Any) -> Tensor:
    """(evaluations + 1, 1 + evaluations + noises): what each network call sees, then the sample.

    Columns: start, outputs, noises. With noises > 0, noise k enters step k through `variance_noise` (DDIM).
    """
    count = len(scheduler.timesteps)
    basis = torch.eye(1 + count + noises, dtype=torch.float64)
    x, rows = basis[0], []
    for k, t in enumerate(scheduler.timesteps):
        rows.append(x)
        options = dict(step_options)
        if noises:
            options["variance_noise"] = basis[1 + count + k] if k < noises else torch.zeros_like(x)
        x = scheduler.step(basis[1 + k], t, x, **options).prev_sample
    return torch.stack([*rows, x])
