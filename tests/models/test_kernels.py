"""Fused inference kernels compute what plain PyTorch computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pliant.compute import counted_flops
from pliant.models import kernels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (1, 24)])
def test_equal_to_plain_pytorch(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(shape, dtype=dtype), torch.randn(16, 24, dtype=dtype), torch.randn(16, dtype=dtype)
    exact = F.linear(x.double(), w.double(), b.double())
    with torch.no_grad():
        for ours, reference in [
            (kernels.linear(x, w, b), exact),
            (kernels.linear_gelu(x, w, b), F.gelu(exact, approximate="tanh")),
        ]:
            assert ours.dtype == dtype
            assert ((ours.double() - reference).abs() / (1 + reference.abs())).max() < tolerance


@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize("rows", [3, 2000])
def test_fp32_on_processors_where_onednn_is_faster(amd: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both routes compute the same, and only large products take the other one; FLOPs are counted either way."""
    monkeypatch.setattr(kernels, "mkl_is_slow", lambda: amd)
    torch.manual_seed(0)
    gate, up, x = torch.nn.Linear(40, 64), torch.nn.Linear(40, 64), torch.randn(1, rows, 40)
    assert kernels._prefers_onednn(x, gate.weight) == (amd and rows == 2000)
    with torch.no_grad():
        exact = F.linear(x.double(), gate.weight.double(), gate.bias.double())
        assert (kernels.linear(x, gate.weight, gate.bias).double() - exact).abs().max() < 1e-5
        other = F.linear(x.double(), up.weight.double(), up.bias.double())
        assert (kernels.linear_silu_gate(x, gate, up).double() - F.silu(exact) * other).abs().max() < 1e-5
        assert counted_flops(lambda: kernels.linear(x, gate.weight, gate.bias)) == 2 * rows * 40 * 64
        assert counted_flops(lambda: kernels.linear_silu_gate(x, gate, up)) == 4 * rows * 40 * 64


def test_gradients_take_the_plain_route() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    w, b = torch.randn(6, 8), torch.randn(6)
    kernels.linear_gelu(x, w, b).sum().backward()
    mine = x.grad.clone()  # type: ignore[union-attr]
    x.grad = None
    F.gelu(F.linear(x, w, b), approximate="tanh").sum().backward()
    assert torch.equal(mine, x.grad)  # type: ignore[arg-type]


def test_forward_mode_derivatives_are_not_lost() -> None:
    """The fused operator knows none: inside a dual level it must not be taken, also where no gradient is wanted."""
    torch.manual_seed(0)
    x, tangent = torch.randn(64, 256), torch.randn(64, 256)
    w, b = torch.randn(256, 256) / 16, torch.randn(256)
    with torch.no_grad(), forward_ad.dual_level():
        for function in (kernels.linear, kernels.linear_gelu):
            _, moved = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent), w, b))
            before, after = (function(x.double() + s * tangent, w.double(), b.double()) for s in (-1e-4, 1e-4))
            assert moved is not None
            assert (moved - (after - before) / 2e-4).abs().max() < 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_attention_for_training_in_bf16_is_attention(masked: bool) -> None:
    """As exact as PyTorch's own kernel in bf16, outputs and gradients, with and without autocast."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, 50, 16) for _ in range(4))
    mask = (torch.arange(50) < torch.tensor([50, 31])[:, None])[:, None, None] if masked else None

    def errors(attend, dtype: torch.dtype, autocast: bool) -> list[float]:
        leaves = [u.to(dtype, copy=True).requires_grad_() for u in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = attend(*leaves, mask)
        found = [out, *torch.autograd.grad(out, leaves, g.to(out.dtype))]
        return [((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]

    leaves = [u.clone().requires_grad_() for u in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    exact = [out.detach(), *torch.autograd.grad(out, leaves, g)]
    fused = errors(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), torch.bfloat16, False)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        ours = errors(kernels.attention, dtype, autocast)
        assert max(ours) < 0.02 and max(ours) < 2.5 * max(fused)
    assert not kernels._trains_in_bf16(leaves[0])
    assert kernels._trains_in_bf16(leaves[0].bfloat16()) and not kernels._trains_in_bf16(q.bfloat16())
    assert errors(kernels.attention, torch.float32, False) == [0.0] * 4


def _heads(batch: int, tokens: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as a block makes them: views of one tensor, (batch, 4, tokens, 32) in bf16."""
    generator = torch.Generator().manual_seed(seed)
    qkv = scale * torch.randn(batch, tokens, 3, 4, 32, generator=generator)
    q, k, v = qkv.to(torch.bfloat16).permute(2, 0, 3, 1, 4)
    return q, k, v


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_split_attention_is_attention_in_bf16(scale: float) -> None:
    q, k, v = _heads(3, 80, scale=scale)
    wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    for found in (kernels._split_attention(q, k, v), kernels._split_attention(q[:, :, :50], k, v)):
        error = (found.float() - wanted[:, :, : found.shape[2]]).abs().max()
        assert error < 0.012 * scale**2 * float(v.abs().max())


def test_split_attention_is_the_same_in_every_batch_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _heads(5, 80)
    whole = kernels._split_attention(q, k, v)
    alone = torch.cat([kernels._split_attention(*(part[i : i + 1] for part in (q, k, v))) for i in range(5)])
    assert torch.equal(whole, alone)
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", 3 * 80 * 80)
    assert torch.equal(whole, kernels._split_attention(q, k, v))


def test_attention_splits_by_the_shape_of_one_sample_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_matrix_tiles", lambda: False)
    split: list[int] = []
    monkeypatch.setattr(kernels, "_split_attention", lambda q, k, v: split.append(len(q)) or q)
    with torch.no_grad():
        for batch in (1, 40):
            kernels.attention(*_heads(batch, 16))  # too small, in any batch
            kernels.attention(*_heads(batch, 80))
        kernels.attention(*(part.float() for part in _heads(1, 80)))  # fp32 is PyTorch's
        kernels.attention(*_heads(1, 80), torch.ones(80, 80, dtype=torch.bool))
    kernels.attention(*(part.detach().requires_grad_() for part in _heads(1, 80)))  # and so are gradients
    assert split == [1, 40]


def test_split_attention_counts_its_products() -> None:
    q, k, v = _heads(2, 80)
    assert counted_flops(lambda: kernels._split_attention(q, k, v)) == 2 * 2 * 2 * 4 * 80 * 80 * 32


@torch.no_grad()
def test_gelu_alone_and_a_product_on_top_of_a_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 64, 768, generator=generator)).to(torch.bfloat16)
    exact = F.gelu(x.float(), approximate="tanh")
    assert (kernels.gelu(x).float() - exact).abs().max() <= 2**-9 * exact.abs().max()
    assert torch.equal(kernels.gelu(x)[:1], kernels.gelu(x[:1]))
    few, weight = x[..., :8].contiguous(), torch.randn(768, 8, generator=generator).to(torch.bfloat16)
    wanted = x.float() + few.float() @ weight.float().T
    assert (kernels.linear_plus(few, weight, x).float() - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    assert torch.allclose(kernels.linear_plus(few.float(), weight.float(), x.float()), wanted, atol=1e-5)
