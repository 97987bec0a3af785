"""Low-rank training (LoRA, arXiv 2106.09685) of any network: `W + B A` where W is frozen, merged when training ends.

For distillers whose papers train few weights (BOSS, Hyper-SD). What a flexible network's patch modes add is in
`pliant.adapters`; here nothing of the architecture changes, and the result is an ordinary model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """`weight + up @ down`, zero at the start. The same scale whatever the rank (alpha = rank)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_low_rank(network: nn.Module, rank: int, seed: int = 0) -> None:
    """Freeze everything and give every linear layer of the blocks a trainable low-rank change."""
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in low_rank_layers(network):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def low_rank_layers(network: nn.Module) -> list[nn.Linear]:
    """Linear layers inside blocks."""
    return [m for name, m in network.named_modules() if isinstance(m, nn.Linear) and "blocks." in name]


def merge_low_rank(network: nn.Module) -> None:
    """Put the changes into the weights; a network without any is left as it is."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], LowRank):  # type: ignore[union-attr,index]
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
