"""Fused inference kernels compute what plain PyTorch computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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


def test_gradients_take_the_plain_route() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    w, b = torch.randn(6, 8), torch.randn(6)
    kernels.linear_gelu(x, w, b).sum().backward()
    mine = x.grad.clone()  # type: ignore[union-attr]
    x.grad = None
    F.gelu(F.linear(x, w, b), approximate="tanh").sum().backward()
    assert torch.equal(mine, x.grad)  # type: ignore[arg-type]
