"""FlexiViT's PI-resize and FlexiDiT's stored weights (sheet A, sections 1.2, 1.3 and 2)."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.errors import ConfigError, ShapeError
from pliant.models.patches import (
    kernel_projection,
    patch_pair,
    patchify,
    pi_resize,
    resize_head,
    resize_kernel,
    resize_matrix,
    token_grid,
    unpatchify,
)

SIDES = st.integers(1, 12)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The resize matrix ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES))
def test_bilinear_is_torchs(p_from: tuple[int, int], p_to: tuple[int, int]) -> None:
    """Half-pixel centres, no antialiasing, any rectangle to any rectangle."""
    patches = draw(5, 1, *p_from)
    expected = F.interpolate(patches, p_to, mode="bilinear", align_corners=False, antialias=False)
    ours = patches.flatten(1) @ resize_matrix(p_from, p_to).T
    torch.testing.assert_close(ours, expected.flatten(1), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES))
def test_area_is_torchs_where_torch_has_one(p_from: tuple[int, int], p_to: tuple[int, int]) -> None:
    """Torch's "area" rounds footprints to whole pixels; it is the true area mean where sides divide one another."""
    p_to = tuple(b if a % b == 0 or b % a == 0 else a for a, b in zip(p_from, p_to, strict=True))  # type: ignore[assignment]
    patches = draw(5, 1, *p_from)
    ours = patches.flatten(1) @ resize_matrix(p_from, p_to, "area").T
    torch.testing.assert_close(ours, F.interpolate(patches, p_to, mode="area").flatten(1), rtol=0, atol=1e-12)


def test_area_splits_pixels() -> None:
    expected = torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(resize_matrix((3,), (2,), "area"), expected, rtol=0, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    st.sampled_from(["bilinear", "area"]),
)
def test_any_number_of_axes(sides: list[tuple[int, int]], resample: str) -> None:
    """Rows sum to 1 (a constant stays constant), and the matrix resizes one axis after the other, row-major."""
    p_from, p_to = tuple(a for a, _ in sides), tuple(b for _, b in sides)
    matrix = resize_matrix(p_from, p_to, resample)  # type: ignore[arg-type]
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64))
    patch = draw(*p_from)
    expected = patch
    for axis, (a, b) in enumerate(sides):
        one = resize_matrix((a,), (b,), resample)  # type: ignore[arg-type]
        expected = torch.tensordot(one, expected, dims=([1], [axis])).movedim(0, axis)
    torch.testing.assert_close(matrix @ patch.flatten(), expected.flatten(), rtol=0, atol=1e-12)


def test_the_example_of_the_sheet() -> None:
    """`B_{4->2}` averages each quadrant."""
    row = torch.zeros(4, 4, dtype=torch.float64)
    row[:2, :2] = 0.25
    assert torch.equal(resize_matrix((4, 4), (2, 2))[0], row.flatten())
    assert torch.equal(resize_matrix((4, 4), (2, 2)), resize_matrix((4, 4), (2, 2), "area"))
    assert torch.count_nonzero(resize_matrix((8, 8), (2, 2))[0]) == 4
    assert torch.count_nonzero(resize_matrix((8, 8), (2, 2), "area")[0]) == 16


def test_unknown_resampling() -> None:
    with pytest.raises(ConfigError, match="'bilinear' or 'area'"):
        resize_matrix((2, 2), (4, 4), "bicubic")  # type: ignore[arg-type]


# Kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "bigger"), [((8, 8), (16, 16)), ((2, 2), (4, 4)), ((2, 3), (4, 4)), ((2, 2), (2, 8)), ((2, 2, 2), (2, 4, 4))]
)
def test_bigger_patches_keep_their_tokens(p: tuple[int, ...], bigger: tuple[int, ...]) -> None:
    """FlexiViT check 1: `<Bx, w^> = <x, w>` for every x; resizing the kernel like an image fails by O(1)."""
    kernel, x = draw(5, 3, *p), draw(200, 3, *p, seed=1)
    matrix = resize_matrix(p, bigger)
    tokens = torch.einsum("nci,dci->nd", x.flatten(2), kernel.flatten(2))
    resized = x.flatten(2) @ matrix.T
    good = torch.einsum("nci,dci->nd", resized, pi_resize(kernel, bigger).flatten(2))
    plain = torch.einsum("nci,dci->nd", resized, kernel.flatten(2) @ matrix.T)
    assert (good - tokens).abs().max() <= 1e-10
    assert (plain - tokens).abs().max() > 0.5


def test_there_and_back() -> None:
    """FlexiViT check 2: PI-resize up and down is no identity, but the stored kernel read at its own size is."""
    there, back = kernel_projection((2, 2), (4, 4)), kernel_projection((4, 4), (2, 2))
    identity = torch.eye(4, dtype=torch.float64)
    assert (back @ there - identity).abs().max() > 0.1
    for resample in ("bilinear", "area"):
        stored_from_own = resize_matrix((4, 4), (2, 2), resample).T  # W' = B^T W0
        own_from_stored = kernel_projection((4, 4), (2, 2), resample)
        torch.testing.assert_close(own_from_stored @ stored_from_own, identity, rtol=0, atol=1e-14)


SIZES = [(1, 1), (2, 2), (3, 2), (4, 4), (2, 6), (5, 5)]


@pytest.mark.parametrize("resample", ["bilinear", "area"])
def test_stored_weights_are_exact_at_every_smaller_size(resample: str) -> None:
    """1.2 and 1.3 for every own size under every underlying size that contains it."""
    for own, stored in itertools.product(SIZES, SIZES):
        if any(a > b for a, b in zip(own, stored, strict=True)):
            continue
        kernel, head, bias = draw(3, 2, *own), draw(own[0] * own[1] * 2, 3), draw(own[0] * own[1] * 2)
        down, up = resize_matrix(stored, own, resample), resize_matrix(own, stored, resample)  # type: ignore[arg-type]
        grown = resize_kernel(kernel, down.T, stored)
        back = resize_kernel(grown, kernel_projection(stored, own, resample), own)  # type: ignore[arg-type]
        torch.testing.assert_close(back, kernel, rtol=0, atol=1e-11)
        read = torch.linalg.pinv(up)
        torch.testing.assert_close(resize_head(resize_head(head, up), read), head, rtol=0, atol=1e-11)
        torch.testing.assert_close(resize_head(resize_head(bias, up), read), bias, rtol=0, atol=1e-11)


def test_constant_kernels() -> None:
    """FlexiViT check 3."""
    ones = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(pi_resize(ones, (4, 4)), torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64))
    quarter = torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64)
    torch.testing.assert_close(pi_resize(quarter, (2, 2)), ones)


def test_smaller_patches_get_the_least_squares_kernel() -> None:
    """FlexiViT check 4: no multiple of a plainly resized kernel is closer on white noise, 16 -> 8."""
    kernel = draw(1, 1, 16, 16)
    matrix = resize_matrix((16, 16), (8, 8))
    projected, resized = pi_resize(kernel, (8, 8)).flatten(), resize_matrix((16, 16), (8, 8), "area") @ kernel.flatten()

    def error(w: Tensor) -> float:  # E(<x,w0> - <Bx,w>)^2 for E[xx^T] = I
        return float((kernel.flatten() - matrix.T @ w).square().sum())

    scales = 8.0 * torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert error(projected) <= min(error(float(s) * resized) for s in scales)
    assert error(projected) < 0.999 * error(torch.zeros_like(projected))


def test_channels_do_not_mix() -> None:
    kernel, head = draw(3, 2, 2, 2), draw(4 * 2, 3)
    down, up = resize_matrix((4, 4), (2, 2)), resize_matrix((2, 2), (4, 4))
    only_first, head_first = kernel.clone(), head.clone()
    only_first[:, 1] = 0
    head_first[1::2] = 0  # channel fastest
    assert not resize_kernel(only_first, down.T, (4, 4))[:, 1].any()
    assert torch.equal(resize_kernel(only_first, down.T, (4, 4))[:, 0], resize_kernel(kernel, down.T, (4, 4))[:, 0])
    assert not resize_head(head_first, up)[1::2].any()
    assert torch.equal(resize_head(head_first, up)[::2], resize_head(head, up)[::2])


def test_resizing_is_computed_in_float64_and_differentiable() -> None:
    kernel = draw(3, 2, 2, 2).float().requires_grad_()
    down = resize_matrix((4, 4), (2, 2))
    out = resize_kernel(kernel, down.T, (4, 4))
    assert out.dtype == torch.float32
    assert torch.equal(out, resize_kernel(kernel.double(), down.T, (4, 4)).float())
    out.square().sum().backward()
    assert kernel.grad is not None
    assert kernel.grad.abs().min() > 0


# Cutting and joining ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), *[st.integers(1, 4)] * 4)
def test_cutting_is_a_convolution(n: int, c: int, gh: int, gw: int, ph: int, pw: int) -> None:
    x, kernel = draw(n, c, gh * ph, gw * pw), draw(5, c, ph, pw, seed=1)
    tokens = patchify(x, (ph, pw)) @ kernel.flatten(1).T
    expected = F.conv2d(x, kernel, stride=(ph, pw)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), *[st.integers(1, 4)] * 4)
def test_joining_inverts_cutting(n: int, c: int, gh: int, gw: int, ph: int, pw: int) -> None:
    """Cutting puts the channel first (a kernel's layout), joining reads it last (DiT's head)."""
    x = draw(n, c, gh * ph, gw * pw)
    channel_last = patchify(x, (ph, pw)).view(n, gh * gw, c, ph * pw).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(channel_last, (gh, gw), (ph, pw)), x)


def test_joining_has_the_channel_fastest() -> None:
    """Official DiT: features of a token are (row, column, channel)."""
    tokens = torch.arange(8.0).view(1, 1, 8)
    assert unpatchify(tokens, (1, 1), (2, 2)).tolist() == [[[[0, 2], [4, 6]], [[1, 3], [5, 7]]]]


def test_patch_sizes_are_checked() -> None:
    assert patch_pair(4) == (4, 4)
    assert patch_pair([2, 4]) == (2, 4)
    for wrong in (0, -2, (2,), (1, 2, 3), (2, 0), "4", 2.0, (2.0, 2)):
        with pytest.raises(ConfigError, match="patch size"):
            patch_pair(wrong)  # type: ignore[arg-type]
    assert token_grid((8, 12), (2, 3)) == (4, 4)
    with pytest.raises(ShapeError, match="3x2 does not divide the input of 8x8"):
        token_grid((8, 8), (3, 2))
