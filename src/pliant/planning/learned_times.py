"""Times learned by gradient through the whole sampling run (LD3, arXiv 2405.15506; sheet D, 14.7 level B; H, 8).

The grid is start - (start - end) * cumsum(softmax(theta)): both ends fixed, always falling. The loss is the distance of
the final images to a teacher's from the same noises. Of LD3 two things are left out, since plans cannot say or need
them: network times of their own beside the solver's (a plan has one time per step), and the teacher's start moved
within a ball.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pliant.errors import PlanError
from pliant.paths import Path

Clean = Callable[[Tensor, Tensor], Tensor]
"""(states (N, ...), house time: a float64 scalar with gradient) -> clean-data estimates, differentiable in both."""


@dataclass(frozen=True, eq=False)
class Learned:
    """Times (steps+1), and the mean squared error at the start of learning, and the least on the validation samples."""

    times: tuple[float, ...]
    before: float
    after: float
    updates: int


def grid_of(theta: Tensor, start: float, end: float) -> Tensor:
    """theta: (steps,) -> (steps+1,) float64 times, falling from `start` to `end` exactly."""
    shares = torch.softmax(theta.to(torch.float64), 0).cumsum(0)
    inner = start - (start - end) * shares[:-1]
    return torch.cat([inner.new_tensor([start]), inner, inner.new_tensor([end])])


def theta_of(times: Sequence[float]) -> Tensor:
    """The inverse of `grid_of`, up to a constant: log of the steps' lengths."""
    grid = torch.tensor(list(times), dtype=torch.float64)
    return (grid[:-1] - grid[1:]).log()


def sampled(clean: Clean, path: Path, times: Tensor, x: Tensor, order: int, segment: bool = True) -> Tensor:
    """The end of steps of "ddim" (order 1) or "dpmpp-2m" (order 2) through `times`, differentiable in them.

    segment: recompute each call in the backward pass, so that memory holds one call.
    """
    at = path.alpha_sigma(times)
    before: Tensor | None = None
    count = len(times) - 1
    for i in range(count):
        call = lambda state, t: clean(state, t)  # noqa: E731
        estimate = checkpoint(call, x, times[i], use_reentrant=False) if segment else clean(x, times[i])
        keep = at.sigma[i + 1] / at.sigma[i]
        total = at.alpha[i + 1] - at.alpha[i] * keep
        kind = estimate.dtype
        final = float(at.sigma[i + 1].detach()) == 0.0 or (i == count - 1 and count < 15)
        if order == 1 or before is None or final or float(at.alpha[i - 1].detach()) == 0.0:
            push = total.to(kind) * estimate
        else:
            log_snr = [at.alpha[k].log() - at.sigma[k].log() for k in (i - 1, i, i + 1)]
            other = -0.5 * total * (log_snr[2] - log_snr[1]) / (log_snr[1] - log_snr[0])
            push = (total - other).to(kind) * estimate + other.to(kind) * before
        x, before = keep.to(kind) * x + push, estimate
    return x


def learn_times(
    clean: Callable[[slice], Clean],
    path: Path,
    times: Sequence[float],
    starts: Tensor,
    targets: Tensor,
    order: int = 2,
    updates: int = 60,
    batch: int = 16,
    rate: float = 0.05,
    seed: int = 0,
    report: Callable[[int, int, str], None] | None = None,
) -> Learned:
    """Times from `times` by Adam on the mean squared distance to `targets` (N, ...), where teachers from `starts` end.

    clean(rows): the estimates of these samples (a model's depend on their labels). The last quarter of the samples
    validates: the grid that is best on it is kept, the given one if none is better. batch: samples per update.
    """
    count = len(starts)
    held = count - count // 4
    if not 1 <= batch <= held or held == count:
        raise PlanError(f"learning times needs at least 4 samples and a batch of at most three quarters, got {count}")
    theta = theta_of(times).requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=rate)
    generator = torch.Generator().manual_seed(seed)

    def loss(rows: slice, grid: Tensor) -> Tensor:
        found = sampled(clean(rows), path, grid, starts[rows], order, torch.is_grad_enabled())
        return (found - targets[rows]).double().square().mean()

    def validate() -> float:
        with torch.no_grad():
            return float(loss(slice(held, count), grid_of(theta, times[0], times[-1])))

    first = best = validate()
    kept, every = theta.detach().clone(), max(1, updates // 15)
    for k in range(updates):
        offset = int(torch.randint(held - batch + 1, (1,), generator=generator))
        optimiser.zero_grad()
        loss(slice(offset, offset + batch), grid_of(theta, times[0], times[-1])).backward()
        optimiser.step()
        if (k + 1) % every == 0 or k == updates - 1:
            found = validate()
            if found < best:
                best, kept = found, theta.detach().clone()
            if report is not None:
                report(k + 1, updates, f"{best**0.5:.4g} (at first {first**0.5:.4g})")
    grid = tuple(times) if best == first else tuple(grid_of(kept, times[0], times[-1]).tolist())
    return Learned(grid, first, best, updates)
