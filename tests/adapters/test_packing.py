"""Packing changes how patch sizes are computed together, never what they compute (sheet A, 1.9 and 1.13(6))."""

from __future__ import annotations

import pytest
import torch

from pliant.adapters import FlexiDiT, FlexSpec
from pliant.adapters.packing import Approach, Call, Places, arrange, choose_packing, packed_forward, packed_macs
from pliant.compute import WITHOUT_CONDITIONING, Compute, TransformerShape, counted_flops, macs
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError, ShapeError
from pliant.models import DiTConfig
from pliant.paths import get_path
from support.networks import batch, randomize, tiny_dit

PACKED: tuple[Approach, ...] = ("padded", "joined", "rows")


def flexible(recipe: str = "lora", sizes: tuple[tuple[int, int], ...] = ((4, 4),), **options: object) -> FlexiDiT:
    network = FlexiDiT(tiny_dit(), FlexSpec(sizes, recipe=recipe, rank=4, **options))  # type: ignore[arg-type]
    randomize(network.modes, seed=3)
    return network.eval()


def call(network: FlexiDiT, n: int, seed: int, patch: tuple[int, int] | None = None) -> Call:
    return Call(*batch(network.base, n, seed), patch)


@pytest.mark.parametrize("approach", PACKED)
@pytest.mark.parametrize("recipe", ["lora", "shared"])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_same_outputs_as_separate_calls(recipe: str, n: int, approach: Approach) -> None:
    """Other states, times and labels in the two calls: nothing may leak from one sequence into another."""
    network = flexible(recipe)
    calls = [call(network, n, 1), call(network, n, 2, (4, 4))]
    with torch.no_grad():
        together, apart = packed_forward(network, calls, approach), packed_forward(network, calls, "separate")
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("approach", ["padded", "rows"])
def test_any_mixture_of_calls(approach: Approach) -> None:
    """Three sizes, one of them rectangular, different batch sizes, the long call not first, affine norms."""
    network = flexible(sizes=((4, 4), (2, 4)), patch_norm="affine")
    calls = [call(network, 5, 1, (4, 4)), call(network, 2, 2), call(network, 3, 3, (2, 4)), call(network, 1, 4, (4, 4))]
    with torch.no_grad():
        for a, c in zip(packed_forward(network, calls, approach), calls, strict=True):
            torch.testing.assert_close(a, network(c.x, c.t, c.y, c.patch), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_separate_calls() -> None:
    network = flexible()
    calls = [call(network, 2, 1), call(network, 2, 2, (4, 4))]
    parameters = [p for p in network.parameters() if p.requires_grad]
    grads = []
    for approach in ("rows", "separate"):
        loss = sum(out.square().mean() for out in packed_forward(network, calls, approach))  # type: ignore[arg-type]
        grads.append(torch.autograd.grad(loss, parameters))  # type: ignore[arg-type]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_arrangements() -> None:
    assert arrange([2, 2], [4, 1], "padded") == [[0], [1], [2], [3]]
    assert arrange([2, 2], [4, 1], "joined") == [[0, 2], [1, 3]]
    assert arrange([2, 5], [4, 1], "rows") == [[0], [1], [2, 3, 4, 5], [6]]
    assert arrange([5, 2], [1, 4], "rows") == [[5], [6], [0, 1, 2, 3], [4]]
    with pytest.raises(ShapeError, match="equal batch size"):
        arrange([2, 3], [4, 1], "joined")
    with pytest.raises(ConfigError, match="did you mean 'rows'"):
        arrange([2, 3], [4, 1], "row")  # type: ignore[arg-type]


def test_mask_is_block_diagonal() -> None:
    mask = Places.of([1, 2], [4, 2], "rows", torch.device("cpu")).mask()
    assert mask.shape == (2, 1, 4, 4)
    assert mask[0].all()
    block = torch.ones(2, 2, dtype=torch.bool)
    assert torch.equal(mask[1, 0], torch.block_diag(block, block))


@pytest.mark.parametrize("approach", ["separate", *PACKED])
@pytest.mark.parametrize(("recipe", "n"), [("shared", 4), ("shared", 5), ("lora", 3)])
def test_cost_is_what_is_counted(recipe: str, n: int, approach: Approach) -> None:
    network = flexible(recipe)
    calls = [call(network, n, 1), call(network, n, 2, (4, 4))]
    denoiser = Denoiser(network, get_path("linear"), "velocity")
    shapes = [denoiser.shape(), denoiser.shape(Compute.of(patch=4, merged=False))]
    with torch.no_grad():
        counted = counted_flops(lambda: packed_forward(network, calls, approach))
    expected = 2 * packed_macs(shapes, [n, n], approach)
    projections = 0
    if recipe == "shared":  # resizing the stored kernel and head, once per call and not per image
        with torch.no_grad():
            for patch in network.patch_sizes:
                mode = network.mode(patch)
                assert mode is not None
                weights = mode.weights
                projections += counted_flops(lambda w=weights: (w.kernel(network.base), w.head(network.base)))
    assert counted == expected + projections


@pytest.mark.parametrize(
    ("approach", "ratio", "large_ratio"),
    [("padded", 1.609, 1.662), ("separate", 1.0, 1.0), ("joined", 1.014, 1.104), ("rows", 1.005, 1.039)],
)
def test_ratios_of_the_sheet(approach: Approach, ratio: float, large_ratio: float) -> None:
    """DiT-XL at 256^2, and 24 blocks of width 2048 with 4096 and 1024 tokens (blocks alone)."""
    long, short = (shape_of(DiTConfig.named("DiT-XL/2"), patch) for patch in ((2, 2), (4, 4)))
    separate = 4 * (macs(long, WITHOUT_CONDITIONING) + macs(short, WITHOUT_CONDITIONING))
    packed = packed_macs([long, short], [4, 4], approach, WITHOUT_CONDITIONING)
    assert packed / separate == pytest.approx(ratio, abs=5e-4)
    blocks = frozenset({"self_projections", "self_attention", "mlp"})
    long, short = (TransformerShape(24, 2048, 16, 8, 8, p, n) for p, n in (((2, 2), 4096), ((4, 4), 1024)))
    separate = 4 * (macs(long, blocks) + macs(short, blocks))
    assert packed_macs([long, short], [4, 4], approach, blocks) / separate == pytest.approx(large_ratio, abs=6e-4)


def shape_of(config: DiTConfig, patch: tuple[int, int]) -> TransformerShape:
    grid = config.grid(patch)
    return TransformerShape(
        config.depth, config.width, config.heads, config.in_channels, config.out_channels, patch, grid[0] * grid[1]
    )


@pytest.mark.parametrize(
    ("images", "long", "device", "approach"),
    [
        (1, 256, "cpu", "separate"),
        (64, 256, "cpu", "separate"),
        (1, 256, "cuda", "joined"),
        (4, 256, "cuda", "joined"),
        (5, 256, "cuda", "rows"),
        (4, 4096, "cuda", "separate"),
        (5, 4096, "cuda", "rows"),
    ],
)
def test_choice(images: int, long: int, device: str, approach: Approach) -> None:
    assert choose_packing(images, long, long // 4, torch.device(device)) == approach
