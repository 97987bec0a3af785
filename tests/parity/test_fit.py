"""Official FiT and FiTv2 against Pliant: outputs on equal random weights, any size, every extrapolation (sheet B, 1).

`reference_fit.py` stands in for the official code. The tests that end in "official_code" run the real thing and skip
without a checkout (see `official_code.py`). Measured there in fp32, largest differences over outputs of size about 0.6:
the reference against the official code 1.0e-6, Pliant 1.5e-6, all rules, plain and guided. Weights return bit-equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pliant
from parity.official_code import official_network
from parity.reference_fit import FiTSizes, fit, image_of_tokens, random_fit_state, tokens_of_image
from pliant import Denoiser
from pliant.guidance import guide
from pliant.models.fit import FiT
from pliant.models.token_batch import TokenBatch
from pliant.paths import NetworkTime, VPDiscrete

V1, V2 = FiTSizes(version=1), FiTSizes(version=2)
TOLERANCE = 1e-5
L0 = 4
GRIDS = [(3, 5), (6, 4), (2, 2), (4, 9)]
"""Token grids; with L0 = 4 all but one are beyond the training size along some axis."""

# Pliant's name -> (name in the official code, decoupled?).
RULES = {
    "none": ("normal", True),
    "linear": ("linear", False),
    "vision-linear": ("linear", True),
    "ntk": ("ntk-aware", False),
    "vision-ntk": ("ntk-aware", True),
    "ntk-by-parts": ("ntk-by-parts", False),
    "vision-ntk-by-parts": ("ntk-by-parts", True),
    "yarn": ("yarn", False),
    "vision-yarn": ("yarn", True),
    "vision-ntk+code-side": ("ntk-aware-pro1", True),
    "vision-ntk+code-area": ("ntk-aware-pro2", True),
}


def loaded(sizes: FiTSizes, state: dict[str, Tensor], folder: Path, **options: Any) -> Denoiser:
    torch.save(state, folder / "weights.bin")
    return pliant.load(folder / "weights.bin", heads=sizes.num_heads, train_length=L0, **options)


def images(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 2 * h, 2 * w, generator=generator) for h, w in GRIDS]


def conditions(sizes: FiTSizes) -> tuple[Tensor, Tensor]:
    """Times in the network's own words, labels (one of them null)."""
    t = torch.tensor([0.0, 517.0, 999.0, 3.0]) if sizes.version == 1 else torch.tensor([0.0, 0.31, 0.75, 1.0])
    return t, torch.tensor([0, 5, 2, 3])


def expected(sizes: FiTSizes, state: dict[str, Tensor], xs: list[Tensor], name: str = "none") -> list[Tensor]:
    t, y = conditions(sizes)
    rule, decoupled = RULES[name]
    return [fit(state, sizes, x, float(t[i]), int(y[i]), rule, decoupled, L0) for i, x in enumerate(xs)]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert all(w.abs().mean() > 0.1 for w in wanted), "the comparison must not be about zeros"
    return max(float((f - w).abs().max()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sizes", [V1, V2], ids=["v1", "v2"])
@torch.no_grad()
def test_padded_packed_and_alone(sizes: FiTSizes, name: str, tmp_path: Path) -> None:
    """A batch of four shapes: padded to the longest and beyond, packed into two rows, side by side, one by one."""
    state = random_fit_state(sizes)
    network = loaded(sizes, state, tmp_path).network
    assert isinstance(network, FiT)
    xs, (t, y) = images(), conditions(sizes)
    wanted = expected(sizes, state, xs, name)
    padded = TokenBatch.padded(xs, (2, 2), length=41)
    out = network.forward_tokens(padded, t, y, name)
    assert not out[padded.ids == 0].any()
    assert worst(padded.images(out), wanted) < TOLERANCE
    packed = TokenBatch.packed([xs[:3], xs[3:]], (2, 2))
    assert worst(packed.images(network.forward_tokens(packed, t, y, name)), wanted) < TOLERANCE
    groups = network.forward_packed([x[None] for x in xs], t, y, extrapolation=name)
    assert worst([g[0] for g in groups], wanted) < TOLERANCE
    alone = [network(x[None], t[i : i + 1], y[i : i + 1], extrapolation=name)[0] for i, x in enumerate(xs)]
    assert worst(alone, wanted) < TOLERANCE


@pytest.mark.parametrize("name", ["none", "vision-ntk", "vision-yarn"])
@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
@torch.no_grad()
def test_guided(scale: float, name: str, tmp_path: Path) -> None:
    """forward_with_cfg: three guided channels, the fourth from the conditional half (sheet B, 1)."""
    state = random_fit_state(V2)
    model = loaded(V2, state, tmp_path)
    rule, decoupled = RULES[name]
    x = images()[1]
    conditional, null = (fit(state, V2, x, 0.3, label, rule, decoupled, L0) for label in (2, 5))
    want = torch.cat([null[:3] + scale * (conditional[:3] - null[:3]), conditional[3:]])
    sized = model.at_size((12, 8), name) if name != "none" else model.at_size((12, 8))
    ours = [-sized(x[None], 0.7, torch.tensor([label])).value for label in (2, sized.null_label)]
    assert float((guide(ours[0], ours[1], scale, channels=3)[0] - want).abs().max()) < TOLERANCE


@pytest.mark.parametrize("sizes", [V1, V2], ids=["v1", "v2"])
@torch.no_grad()
def test_denoiser_speaks_house_time(sizes: FiTSizes, tmp_path: Path) -> None:
    """FiTv2: house time is 1 - t and house velocity minus theirs; FiT: epsilon and variance of the 1000-step table."""
    state = random_fit_state(sizes)
    model = loaded(sizes, state, tmp_path)
    (t, y), x = conditions(sizes), images()[0]
    batch = torch.stack([x] * 4)
    wanted = torch.stack(expected(sizes, state, [x] * 4))
    if sizes.version == 2:
        assert (model.path.name, model.prediction, model.network_time) == ("linear", "velocity", NetworkTime.sit())
        assert float((model(batch, 1.0 - t.double(), y).value + wanted).abs().max()) < TOLERANCE
        return
    assert (model.path, model.prediction, model.network_time) == (VPDiscrete(), "epsilon", NetworkTime.timesteps())
    found = model(batch, VPDiscrete().time_of_timestep(t), y)
    assert found.variance is not None
    assert float((torch.cat([found.value, found.variance], dim=1) - wanted).abs().max()) < TOLERANCE


@torch.no_grad()
def test_padding_is_never_seen(tmp_path: Path) -> None:
    """Sheet B, 1 "it works when" 1: padded tokens changed by 7 change nothing that is real."""
    from dataclasses import replace

    network = loaded(V2, random_fit_state(V2), tmp_path).network
    assert isinstance(network, FiT)
    batch, (t, y) = TokenBatch.packed([[*images()[:2]], [*images()[2:]]], (2, 2), length=50), conditions(V2)
    other = replace(batch, tokens=batch.tokens + 7.0 * (batch.ids == 0)[..., None])
    assert not torch.equal(batch.tokens, other.tokens)
    before, after = network.forward_tokens(batch, t, y), network.forward_tokens(other, t, y)
    assert float((before - after).abs().max()) <= 1e-6


# The official code itself ----------------------------------------------------------------------------------------


def official_calls(sizes: FiTSizes, x: Tensor, grid: tuple[int, int], padding: int) -> dict[str, Tensor]:
    """The released class's arguments for a batch of images of one grid, padded."""
    rows, columns = grid
    tokens = torch.stack([tokens_of_image(image, 2) for image in x])
    tokens = torch.cat([tokens, torch.randn(len(x), padding, tokens.shape[2])], dim=1)
    places = torch.zeros(len(x), 2, tokens.shape[1], dtype=torch.int64)
    ys, xs = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places[:, :, : rows * columns] = torch.stack([xs.flatten(), ys.flatten()])
    mask = torch.zeros(len(x), tokens.shape[1])
    mask[:, : rows * columns] = 1
    size = torch.tensor([[list(grid)]] * len(x))
    return {"x": tokens if sizes.version == 2 else tokens.mT, "grid": places, "mask": mask, "size": size}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sizes", [V1, V2], ids=["v1", "v2"])
@torch.no_grad()
def test_pliant_and_reference_equal_official_code(sizes: FiTSizes, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rule, decoupled = RULES[name]
    found, reference = 0.0, 0.0
    for grid in GRIDS[:2]:
        stretch = {"custom_freqs": rule, "decouple": decoupled, "ori_max_pe_len": L0}
        network = official_network(
            "fit", **sizes.official_arguments(), **stretch, max_pe_len_h=grid[0], max_pe_len_w=grid[1]
        )
        state = network.state_dict()
        assert set(state) == set(random_fit_state(sizes))
        model = loaded(sizes, state, tmp_path)
        # FiT's released class clamps times to 1, which the class that made the weights did not.
        t = torch.tensor([0.0, 1.0] if sizes.version == 1 else [0.3, 0.9]).repeat(2)
        y, x = torch.tensor([1, 3, 5, 5]), torch.randn(2, 4, 2 * grid[0], 2 * grid[1])
        call = official_calls(sizes, torch.cat([x, x]), grid, padding=3)
        theirs = network(t=t, y=y, **call)
        if sizes.version == 1:
            theirs = theirs.mT
        wanted = torch.stack([image_of_tokens(out, sizes.out_channels, *grid, 2) for out in theirs[:, :-3]])
        ours = model.network(torch.cat([x, x]), t, y, None, name)
        found = max(found, float((ours - wanted).abs().max()))
        for i in range(4):
            slow = fit(state, sizes, x[i % 2], float(t[i]), int(y[i]), rule, decoupled, L0)
            reference = max(reference, float((slow - wanted[i]).abs().max()))
        guided = network.forward_with_cfg(t=t, y=y, cfg_scale=1.5, **call)
        guided = (guided.mT if sizes.version == 1 else guided)[:2, :-3]
        want = torch.stack([image_of_tokens(out, sizes.out_channels, *grid, 2) for out in guided])
        # Of FiT's eight output channels, too, only the first three are guided.
        found = max(found, float((guide(ours[:2], ours[2:], 1.5, channels=3) - want).abs().max()))
        pliant.save(model, tmp_path / "back.pt", format="fit")
        back = torch.load(tmp_path / "back.pt", weights_only=True)
        assert all(torch.equal(back[key], value) for key, value in state.items())
    print(f"{name}: Pliant against official {found:.1e}, reference {reference:.1e}")
    assert max(found, reference) < TOLERANCE
