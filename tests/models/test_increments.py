"""Corrected reuse against its formula, layer by layer, with the weights' own truncated factors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.compute.sites import Branch
from pliant.models.increments import Increments
from pliant.models.layers import Block
from pliant.plans.memory import _increments

B, N, WIDTH, HEADS = 2, 9, 24, 3


@pytest.fixture
def increments() -> Increments:
    torch.manual_seed(0)
    return Increments([Block(WIDTH, HEADS, 4.0, 1e-6).requires_grad_(False)])


def truncated(weight: Tensor, rank: int, parts: int) -> Tensor:
    """The best approximation of that rank of each of the matrices below each other."""
    best = []
    for matrix in weight.chunk(parts):
        u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
        best.append(u[:, :rank] * sigma[:rank] @ v[:rank])
    return torch.cat(best)


def between(block: Block, s: int, middle: Tensor) -> Tensor:
    if s == 1:
        return F.gelu(middle, approximate="tanh")
    q, k, v = (m.view(B, N, HEADS, -1).transpose(1, 2) for m in middle.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, WIDTH)


@pytest.mark.parametrize("rank", [1, 5, 12, 15, 20])
@pytest.mark.parametrize("s", [0, 1])
def test_every_layer_adds_its_low_rank_part_of_the_change(increments: Increments, s: int, rank: int) -> None:
    block = increments.blocks[0]
    first, second = (block.fc1, block.fc2) if s else (block.qkv, block.proj)
    x, then = torch.randn(2, B, N, WIDTH)
    kept: Branch = increments.traced(s, then, rank)
    middle = first(then)
    old = between(block, s, middle)
    torch.testing.assert_close(kept[0], second(old), atol=1e-6, rtol=1e-5)

    def layer(layer: torch.nn.Linear, y: Tensor, change: Tensor, now: Tensor, parts: int) -> Tensor:
        inputs, outputs = layer.in_features, layer.out_features // parts
        if rank * (inputs + outputs) >= inputs * outputs:  # the matrix costs less than its two factors
            return layer(now)  # type: ignore[no-any-return]
        return y + change @ truncated(layer.weight, rank, parts).T

    now = between(block, s, layer(first, middle, x - then, x, 1 if s else 3))
    want = layer(second, second(old), now - old, now, 1)
    got = increments.corrected(s, x, kept, rank)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    error = float((got - second(between(block, s, first(x)))).abs().max())
    assert error < 1e-5 if rank >= (20 if s else 12) else error > 1e-3  # from where matrices cost less, exact
    numbers = sum(part.numel() for part in kept[1:] if part is not None)
    assert numbers == B * N * _increments(rank, WIDTH, 4 * WIDTH if s else WIDTH, 1 if s else 3)


def test_rank_zero_keeps_the_branch_alone(increments: Increments) -> None:
    assert [part.shape for part in increments.traced(0, torch.randn(B, N, WIDTH), 0)] == [(B, N, WIDTH)]
