"""SparseDiT's layout (arXiv 2412.06028): sheet H, section 3, "It works when"."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.nn.functional as F

from pliant.compute import counted_flops
from pliant.errors import ConfigError
from pliant.models import DiT, DiTConfig
from pliant.models.layers import Block
from pliant.models.sparse_span import (
    CrossBlock,
    PoolingBlock,
    RecoverBlock,
    SparseDiT,
    SparseLayout,
    block_roles,
    pooled,
    pooled_span,
    regridded,
    sparse_block_macs,
)
from support.networks import batch, randomize, tiny_dit

LAYOUT = SparseLayout(pooling=1, groups=2, semantic=1, normal=1, dense=1, grid=(2, 2))


def model(seed: int = 0) -> tuple[DiT, SparseDiT]:
    dit = tiny_dit(seed, depth=LAYOUT.depth).double()
    return dit, SparseDiT(dit, LAYOUT)


def test_a_fresh_group_with_closed_gates_is_the_identity() -> None:
    """W1 = 0 and W2 = 1, exactly; a pooling block adds nothing either."""
    _, sparse = model()
    tokens = torch.randn(3, 16, 32, dtype=torch.float64)
    rows = torch.randn(3, 6 * LAYOUT.depth + 2, 32, dtype=torch.float64)
    for i in range(LAYOUT.depth):
        rows[:, 6 * i + 2] = rows[:, 6 * i + 5] = 0
    assert torch.equal(sparse.run_blocks(tokens, rows), tokens)
    rows[:, 6 * 3 + 2] = 1  # the first group's recover block may look at its sparse tokens
    assert not torch.equal(sparse.run_blocks(tokens, rows), tokens)


def test_a_pooling_block_says_the_same_to_every_token() -> None:
    """And it is attention with the uniform matrix, to rounding."""
    _, sparse = model()
    block = cast(PoolingBlock, sparse.base.blocks[0])
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    out = block.attention(x, lambda _: None, None)
    assert out.shape == (2, 1, 32)
    v = F.linear(x, block.qkv.weight[64:], block.qkv.bias[64:])
    uniform = torch.full((16, 16), 1 / 16, dtype=torch.float64) @ v
    torch.testing.assert_close(out.expand(2, 16, 32), block.proj(uniform), rtol=0, atol=1e-12)


def test_a_block_that_looks_at_itself_is_an_ordinary_one() -> None:
    """Cross-attention with queries = context is self-attention with the same weights."""
    dit, sparse = model()
    block = cast(CrossBlock, sparse.base.blocks[1])
    x, m = torch.randn(2, 16, 32, dtype=torch.float64), torch.randn(2, 6, 32, dtype=torch.float64)
    torch.testing.assert_close(block.look(x, x, m), dit.blocks[1](x, m), rtol=0, atol=1e-10)


def test_gradients_reach_everything_in_the_first_step() -> None:
    _, sparse = model()
    x, t, y = batch(sparse.base)
    sparse(x.double(), t, y).square().sum().backward()
    for name, p in sparse.named_parameters():
        assert p.grad is not None, name
        assert float(p.grad.abs().max()) > 0 or "label_embed" in name, name
    recovers = [b for b in sparse.base.blocks if isinstance(b, RecoverBlock)]
    assert len(recovers) == 2
    assert float(recovers[0].spread.weight.grad.abs().max()) > 0  # type: ignore[union-attr]


def test_weights_come_from_the_dit_block_by_block() -> None:
    dit, sparse = model()
    mine = sparse.base.state_dict()
    for name, value in dit.state_dict().items():
        assert torch.equal(mine[name], value)
    assert {n for n in mine if n not in dit.state_dict()} == {
        f"blocks.{i}.{w}.weight" for i in (3, 7) for w in ("spread", "keep")
    }
    assert all(type(b) is Block for b in dit.blocks)  # the given network is left alone


def test_by_hand() -> None:
    """One group, written out."""
    layout = SparseLayout(pooling=0, groups=1, semantic=1, normal=0, dense=0, grid=(2, 2))
    dit = tiny_dit(3, depth=3).double()
    sparse = SparseDiT(dit, layout)
    randomize(sparse, seed=5)
    x, t, y = batch(dit)
    rows = sparse.base.modulations(t, y)
    tokens = sparse.base.embed(x.double())
    merge, semantic, recover = sparse.base.blocks
    few = tokens.view(3, 2, 2, 2, 2, 32).mean((2, 4)).reshape(3, 4, 32)  # 4x4 tokens in blocks of 2x2
    few = semantic(merge.look(few, tokens, rows[:, :6]), rows[:, 6:12])
    spread = few.view(3, 2, 2, 32).repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(3, 16, 32)
    z = recover.spread(spread) + recover.keep(tokens)
    expected = sparse.base.read(recover.look(z, few, rows[:, 12:18]), rows)
    torch.testing.assert_close(sparse(x.double(), t, y), expected, rtol=0, atol=1e-10)


def test_published_cost() -> None:
    """XL at 256 pixels: 68.05 GMAC of 118.64 (within 2 %); the parts equal counted FLOPs."""
    assert SparseLayout().depth == 28
    xl = DiTConfig.named("DiT-XL/2")
    dense = 28 * (256 * 12 * 1152**2 + 2 * 256**2 * 1152)
    rest = 118.64e9 - dense
    assert sparse_block_macs(xl, SparseLayout()) + rest == pytest.approx(68.05e9, rel=0.02)
    dit, sparse = model()
    tokens, rows = torch.randn(1, 16, 32).double(), torch.randn(1, 6 * LAYOUT.depth + 2, 32).double()
    counted = counted_flops(lambda: sparse.run_blocks(tokens, rows))
    assert counted == 2 * sparse_block_macs(dit.config, LAYOUT)


def test_grids() -> None:
    tokens = torch.arange(24.0).view(1, 24, 1).expand(1, 24, 3)
    assert pooled(tokens, (4, 6), (2, 3))[0, :, 0].tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5]
    back = regridded(pooled(tokens, (4, 6), (2, 3)), (2, 3), (4, 6))
    assert back[0, :6, 0].tolist() == back[0, 6:12, 0].tolist() == [3.5, 3.5, 5.5, 5.5, 7.5, 7.5]
    torch.testing.assert_close(pooled(tokens, (4, 6), (4, 6)), tokens)


def test_a_span_on_fewer_tokens() -> None:
    """Full grid: the blocks themselves, bit for bit. Otherwise the mean is theirs and the detail stays."""
    dit = tiny_dit(2)
    tokens, m = torch.randn(3, 16, 32), torch.randn(3, 6, 32)

    def blocks(x: torch.Tensor) -> torch.Tensor:
        for block in dit.blocks:
            x = block(x, m)
        return x

    assert torch.equal(pooled_span(blocks, tokens, (4, 4), (4, 4)), blocks(tokens))
    out = pooled_span(blocks, tokens, (4, 4), (2, 2))
    means = pooled(tokens, (4, 4), (2, 2))
    torch.testing.assert_close(pooled(out, (4, 4), (2, 2)), blocks(means), rtol=1e-4, atol=1e-4)
    detail = tokens - regridded(means, (2, 2), (4, 4))
    after = out - regridded(pooled(out, (4, 4), (2, 2)), (2, 2), (4, 4))
    torch.testing.assert_close(after, detail, rtol=1e-4, atol=1e-4)
    # Tokens that are equal within every coarse one lose nothing: attention over copies is attention over one of each.
    even = regridded(means, (2, 2), (4, 4))
    torch.testing.assert_close(pooled_span(blocks, even, (4, 4), (2, 2)), blocks(even), rtol=1e-4, atol=1e-4)


def test_layouts_are_checked() -> None:
    assert block_roles(LAYOUT)[:5] == ["pooling", "merge", "semantic", "recover", "normal"]
    with pytest.raises(ConfigError, match="10 blocks, the network 2"):
        SparseDiT(tiny_dit(), LAYOUT)
    with pytest.raises(ConfigError, match="fewer than"):
        SparseDiT(tiny_dit(depth=3), SparseLayout(0, 1, 1, 0, 0, (8, 8)))
    with pytest.raises(ConfigError, match="at least one group"):
        SparseLayout(groups=0)
