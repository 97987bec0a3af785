"""A small network that learns to rank solver schedules from those measured so far (S³, arXiv 2312.07243; sheet D, 4).

A schedule is a sequence of feature rows, one per step. An ensemble of recurrent networks is trained on the order of the
scores, not on their values: pairs in the wrong order, or too close, are penalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MARGIN = 0.1


class Ranker(nn.Module):
    """(B, T, F) rows, padded, and (B,) lengths -> (B,) scores; lower is better."""

    def __init__(self, features: int, width: int = 32) -> None:
        super().__init__()
        self.recurrent = nn.GRU(features, width, batch_first=True)
        self.head = nn.Linear(2 * width, 1)

    def forward(self, rows: Tensor, lengths: Tensor) -> Tensor:
        states, _ = self.recurrent(rows)
        inside = torch.arange(rows.shape[1])[None] < lengths[:, None]
        mean = (states * inside[..., None]).sum(1) / lengths[:, None]
        last = states[torch.arange(len(rows)), lengths - 1]
        out: Tensor = self.head(torch.cat([mean, last], 1))
        return out.squeeze(1)


def padded(schedules: Sequence[Sequence[Sequence[float]]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(rows) for rows in schedules])
    out = torch.zeros(len(schedules), int(lengths.max()), len(schedules[0][0]))
    for k, rows in enumerate(schedules):
        out[k, : len(rows)] = torch.tensor(rows)
    return out, lengths


def ranking_loss(predicted: Tensor, scores: Tensor) -> Tensor:
    """Mean over pairs with score_i < score_j of max(0, margin + predicted_i - predicted_j)."""
    better = scores[:, None] < scores[None, :]
    gap = (MARGIN + predicted[:, None] - predicted[None, :]).clamp(min=0.0)
    return gap[better].mean() if bool(better.any()) else gap.sum() * 0.0


def fit_ranker(
    schedules: Sequence[Sequence[Sequence[float]]],
    scores: Sequence[float],
    seed: int = 0,
    members: int = 3,
    updates: int = 50,
) -> Callable[[Sequence[Sequence[Sequence[float]]]], list[float]]:
    """A function from schedules to predicted ranks (lower is better). Deterministic by seed; scores must be finite."""
    rows, lengths = padded(schedules)
    inside = torch.arange(rows.shape[1])[None] < lengths[:, None]
    mean, spread = rows[inside].mean(0), rows[inside].std(0).nan_to_num(1.0) + 1e-3
    target = torch.tensor(scores, dtype=torch.float64)
    rows = (rows - mean) / spread * inside[..., None]
    nets = []
    with torch.random.fork_rng(devices=[]):
        for k in range(members):
            torch.manual_seed(1000 * seed + k)
            net = Ranker(rows.shape[2])
            optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
            for _ in range(updates):
                optimiser.zero_grad()
                ranking_loss(net(rows, lengths), target).backward()
                optimiser.step()
            nets.append(net)

    @torch.no_grad()
    def predict(asked: Sequence[Sequence[Sequence[float]]]) -> list[float]:
        x, n = padded(asked)
        x = (x - mean) / spread * (torch.arange(x.shape[1])[None] < n[:, None])[..., None]
        found: list[float] = torch.stack([net(x, n) for net in nets]).mean(0).tolist()
        return found

    return predict
