"""Routed width (DyDiT): function preservation, masks against slices, exact costs, files."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pliant
from pliant import Denoiser
from pliant.adapters import DynamicDiT, WidthSpec
from pliant.adapters.width import Masks, switch, token_shares
from pliant.adapters.width_slicing import (
    SkippingDiT,
    slice_network,
    width_macs,
    width_masks,
    width_variants,
)
from pliant.compute import counted_flops
from pliant.errors import ConfigError, FormatError
from pliant.models.dit import DiT, DiTConfig
from pliant.models.layers import Block
from pliant.models.precision import converted
from support.networks import batch, randomize, tiny_denoiser, tiny_dit

DEPTH, HEADS = 2, 4  # of the tiny network


def routed(denoiser: Denoiser, seed: int = 5, std: float = 0.6, **options: object) -> DynamicDiT:
    """A tiny network whose routers decide at random."""
    network = pliant.route_width(denoiser, **options).network
    assert isinstance(network, DynamicDiT)
    randomize(network.routers, seed, std)
    hooks = [router.register_forward_hook(_centred) for router in network.routers.tokens]
    with torch.no_grad():
        network(*batch(network.base, 8, seed))
    for hook in hooks:
        hook.remove()
    return network


def _centred(router: nn.Module, _: object, logits: Tensor) -> Tensor:
    """Half of the tokens skip."""
    router.fc2.bias -= logits.median()
    return logits - logits.median()


# At the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_new_routers_change_nothing(grad: bool) -> None:
    denoiser = tiny_denoiser()
    dynamic = pliant.route_width(denoiser).network
    x, t, y = batch(denoiser.network, 4)
    with torch.set_grad_enabled(grad):
        assert torch.equal(dynamic(x, t, y), denoiser.network(x, t, y))
        variants = width_variants(dynamic, t)
        modulations = denoiser.network.modulations(t, y)
        assert torch.equal(variants[0].forward_modulated(x, modulations), denoiser.network(x, t, y))
    assert len({id(v) for v in variants}) == 1


def test_without_token_routers_nothing_to_cut_is_the_base_itself() -> None:
    dynamic = pliant.route_width(tiny_denoiser(), routes=("heads", "groups")).network
    assert width_variants(dynamic, torch.tensor([10.0]))[0] is dynamic.base


def test_shipped_model_is_preserved_at_every_time() -> None:
    """The paper's biases outweigh the random first weights on real time embeddings too."""
    dynamic = pliant.route_width(pliant.load("digits")).network
    heads, groups = dynamic.time_masks(torch.linspace(0, 1000, 1001))
    assert bool(heads.all()) and bool(groups.all())
    x, t, y = batch(dynamic.base, 8)
    with torch.no_grad():
        out, masks = dynamic.routed(x, t, y)
        assert bool(masks.tokens.all())
        assert torch.equal(out, dynamic.base(x, t, y))


def test_routers_start_where_the_paper_says() -> None:
    routers = pliant.route_width(tiny_denoiser()).network.routers
    assert routers.heads.linear.bias.detach().unique().tolist() == [15.0]
    assert routers.groups.linear.bias.detach().unique().tolist() == [15.0]
    assert [router.fc2.bias.item() for router in routers.tokens] == [35.0] * DEPTH
    assert routers.heads.linear.weight.shape == (DEPTH * (HEADS - 1), 32)
    assert routers.tokens[0].fc1.weight.shape == (2, 32)  # D / 16


# Decisions ----------------------------------------------------------------------------------------------------------


def test_switch_is_hard_forward_and_soft_backward() -> None:
    logits = torch.tensor([-3.0, -0.1, 0.1, 4.0], requires_grad=True)
    noise = torch.tensor([5.0, 0.0, -1.0, 0.0])
    on = switch(logits, noise, 5.0)
    assert on.tolist() == [1.0, 0.0, 0.0, 1.0]
    on.sum().backward()
    soft = torch.sigmoid((logits.detach() + noise) / 5.0)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5.0)
    assert switch(logits, None, 5.0).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_decisions_are_random_as_a_sigmoid() -> None:
    """P(logit + logistic noise > 0) = sigmoid(logit), whatever the temperature."""
    noise = torch.logit(torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    rate = float(switch(torch.full((20_000,), 0.7), noise, 5.0).mean())
    expected = float(torch.sigmoid(torch.tensor(0.7)))
    assert rate == pytest.approx(expected, abs=5 * (expected * (1 - expected) / 20_000) ** 0.5)


def test_first_head_and_group_always_run() -> None:
    network = routed(tiny_denoiser())
    for router in (network.routers.heads, network.routers.groups):
        nn.init.constant_(router.linear.bias, -1e4)
    heads, groups = network.time_masks(torch.linspace(0, 1000, 11))
    assert heads.sum(-1).tolist() == groups.sum(-1).tolist() == [[1.0] * DEPTH] * 11
    assert bool(heads[..., 0].all()) and bool(groups[..., 0].all())


def test_decisions_of_heads_depend_on_the_time_only() -> None:
    network = routed(tiny_denoiser())
    x, _, y = batch(network.base, 4)
    t = torch.full((4,), 333.0)
    _, masks = network.routed(x, t, y)
    assert torch.equal(masks.heads, masks.heads[:1].expand_as(masks.heads))
    assert not torch.equal(masks.tokens, masks.tokens[:1].expand_as(masks.tokens))
    assert 0 < float(masks.tokens.mean()) < 1


# Masks are slices ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([("heads",), ("groups",), ("tokens",), ("heads", "groups", "tokens")]))
@settings(max_examples=20)
def test_masked_equals_sliced_and_gathered(seed: int, routes: tuple[str, ...]) -> None:
    network = routed(tiny_denoiser(seed), seed + 1, routes=routes, groups=8)
    times = torch.tensor([0.0, 100.0, 400.0, 1000.0])
    x, _, y = batch(network.base, 3, seed)
    with torch.no_grad():
        for t, variant in zip(times, width_variants(network, times), strict=True):
            at = t.expand(3)
            masked = network(x, at, y)
            sliced = variant.forward_modulated(x, network.base.modulations(at, y))
            torch.testing.assert_close(sliced, masked, atol=1e-5, rtol=1e-5)


def test_slices_are_not_trivially_the_full_network() -> None:
    network = routed(tiny_denoiser())
    x, t, y = batch(network.base, 3)
    with torch.no_grad():
        assert float((network(x, t, y) - network.base(x, t, y)).abs().max()) > 1e-2


def test_one_modulation_for_all_samples() -> None:
    """Samplers pass a single row where all labels are equal."""
    network = routed(tiny_denoiser())
    x, _, _ = batch(network.base, 3)
    t, y = torch.tensor([250.0]), torch.tensor([1])
    variant = width_variants(network, t)[0]
    with torch.no_grad():
        one = network.base.modulations(t, y)
        each = variant.forward_modulated(x, one.expand(3, -1, -1))
        torch.testing.assert_close(variant.forward_modulated(x, one), each, atol=1e-5, rtol=1e-5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Samples keep different numbers of tokens; nobody waits for or pads to another."""
    network = routed(tiny_denoiser())
    x, _, y = batch(network.base, 3)
    t = torch.full((3,), 250.0)
    variant = width_variants(network, t[:1])[0]
    with torch.no_grad():
        rows = network.base.modulations(t, y)
        counts = network.routed(x, t, y)[1].tokens.sum(-1)
        assert len({tuple(c) for c in counts.tolist()}) > 1
        together = variant.forward_modulated(x, rows)
        for i in range(3):
            alone = variant.forward_modulated(x[i : i + 1], rows[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("on", [True, False])
def test_all_or_no_tokens(on: bool) -> None:
    network = routed(tiny_denoiser(), routes=("tokens",))
    for router in network.routers.tokens:
        nn.init.constant_(router.fc2.bias, 1e4 if on else -1e4)
    x, t, y = batch(network.base, 3)
    variant = width_variants(network, t[:1])[0]
    with torch.no_grad():
        rows = network.base.modulations(t, y)
        sliced = variant.forward_modulated(x, rows)
        torch.testing.assert_close(sliced, network(x, t, y), atol=1e-5, rtol=1e-5)
        assert torch.equal(sliced, network.base(x, t, y)) == on


def test_equal_masks_share_one_network() -> None:
    network = routed(tiny_denoiser())
    times = torch.linspace(0, 1000, 41)
    cache: dict = {}
    variants = width_variants(network, times, cache)
    masks = width_masks(network, times)
    assert 1 < len(cache) == len(set(masks)) == len({id(v) for v in variants}) < 41
    assert all(cache[kept] is variant for kept, variant in zip(masks, variants, strict=True))
    assert width_variants(network, times[:1], cache)[0] is variants[0]
    # What is not cut is not copied.
    assert variants[0].modulation.weight.data_ptr() == network.base.modulation.weight.data_ptr()


def test_heads_kept_are_the_heads_named() -> None:
    """Keeping heads 1 and 3 is zeroing the others' columns of the output projection."""
    dit = tiny_dit()
    every = [list(range(HEADS))] * DEPTH
    sliced = slice_network(dit, [[1, 3], [0]], every, HEADS)
    zeroed = tiny_dit()
    for block, gone in zip(zeroed.blocks, ([0, 2], [1, 2, 3]), strict=True):
        block.proj.weight.data.view(32, HEADS, -1)[:, gone] = 0
    x, t, y = batch(dit)
    with torch.no_grad():
        torch.testing.assert_close(sliced(x, t, y), zeroed(x, t, y), atol=1e-6, rtol=1e-5)
    assert sliced.config.block_heads == (2, 1) and sliced.config.block_hidden == (128, 128)


@pytest.mark.parametrize(
    ("heads", "hidden", "message"),
    [
        ([[0]], [[0], [0]], "one list per block"),
        ([[0], []], [[0], [0]], "block 1 has heads 0 to 3"),
        ([[0], [4]], [[0], [0]], "block 1 has heads 0 to 3"),
        ([[0], [1, 1]], [[0], [0]], "block 1 has heads 0 to 3"),
        ([[0], [0]], [[-1], [0]], "block 0 has groups 0 to 3"),
    ],
)
def test_impossible_slices(heads: list[list[int]], hidden: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slice_network(tiny_dit(), heads, hidden, 4)


def test_a_slice_in_bf16() -> None:
    network = routed(tiny_denoiser())
    t, y = torch.tensor([250.0, 250.0]), torch.tensor([0, 1])
    x = batch(network.base, 2)[0]
    variant = width_variants(network, t[:1])[0]
    half = converted(variant, torch.bfloat16)
    assert type(half) is SkippingDiT and converted(variant, torch.float32) is variant
    with torch.no_grad():
        full = variant.forward_modulated(x, network.base.modulations(t, y))
        rough = half.forward_modulated(x, half.modulations(t, y)).float()
    assert float((rough - full).norm() / full.norm()) < 0.1


# Costs --------------------------------------------------------------------------------------------------------------


def counted_share(network: DynamicDiT, masks: Masks, x: Tensor, t: Tensor, y: Tensor, variant: DiT) -> float:
    """Multiply-adds of attention and MLP that really ran, as a share of the base's, without the routers' own."""

    def blocks(dit: DiT) -> int:
        m = network.base.modulations(t, y)
        tokens = network.base.embed(x)

        def run() -> None:
            out = tokens
            for i, block in enumerate(dit.blocks):
                out = block(out, m[:, 6 * i : 6 * i + 6])

        return counted_flops(run)

    n, width = masks.tokens.shape[-1], network.config.width
    routers = 2 * len(x) * n * (width + 1) * max(1, width // 16) * len(network.routers.tokens)
    return (blocks(variant) - routers) / blocks(network.base)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=10)
def test_share_is_what_the_counter_counts(seed: int, tokens: bool) -> None:
    """Rho of the FLOPs loss against the counter on the network that really runs."""
    routes = ("heads", "groups", "tokens") if tokens else ("heads", "groups")
    network = routed(tiny_denoiser(seed), seed + 1, routes=routes)
    x, _, y = batch(network.base, 3, seed)
    t = torch.full((3,), 1000.0 * (seed % 97) / 97)
    variant = width_variants(network, t[:1])[0]
    with torch.no_grad():
        masks = network.routed(x, t, y)[1]
        share = float(masks.share(network.config).mean())
        assert share == pytest.approx(counted_share(network, masks, x, t, y, variant), abs=1e-6)
    assert share < 1


@pytest.mark.parametrize("tokens", [True, False])
def test_macs_of_a_slice_are_counted_macs(tokens: bool) -> None:
    routes = ("heads", "groups", "tokens") if tokens else ("heads", "groups")
    network = routed(tiny_denoiser(), routes=routes)
    x, _, y = batch(network.base, 3)
    t = torch.full((3,), 250.0)
    variant = width_variants(network, t[:1])[0]
    with torch.no_grad():
        shares = token_shares([network.routed(x, t, y)[1]])
        counted = counted_flops(lambda: variant(x, t, y))
    assert 2 * 3 * width_macs(variant, shares) == pytest.approx(counted, rel=1e-5)
    assert shares == (1.0, 1.0) if not tokens else 0 < min(shares) < 1
    if not tokens:  # the general cost model agrees
        denoiser = tiny_denoiser()
        plain = Denoiser(variant, denoiser.path, denoiser.prediction, denoiser.network_time)
        assert plain.flops() == 2 * width_macs(variant)


def test_published_block_costs() -> None:
    """Attention and MLP of a DiT-XL/2 layer as the official loss has them (sheet A, 5.2)."""
    config = DiTConfig.named("DiT-XL/2")
    some = Masks(torch.ones(1, 28, 16), torch.zeros(1, 28, 16), torch.ones(1, 28, 256))
    assert float(some.share(config)) == pytest.approx(1.50994944 / (1.50994944 + 2.717908992), abs=1e-6)


# Files --------------------------------------------------------------------------------------------------------------


def test_model_folder_round_trip(tmp_path: Path) -> None:
    denoiser = pliant.route_width(tiny_denoiser(), groups=8, routes=("tokens", "heads"))
    randomize(denoiser.network.routers, 3, 0.6)
    pliant.save(denoiser, tmp_path / "m")
    back = pliant.load(tmp_path / "m")
    assert isinstance(back.network, DynamicDiT) and back.network.spec == denoiser.network.spec
    x, t, y = batch(denoiser.network.base)
    with torch.no_grad():
        assert torch.equal(back.network(x, t, y), denoiser.network(x, t, y))
    assert back.fingerprint() == tiny_denoiser().fingerprint()


def test_adapter_holds_the_routers_only(tmp_path: Path) -> None:
    base = tiny_denoiser()
    denoiser = pliant.route_width(base, base="frozen")
    assert not any(p.requires_grad for p in denoiser.network.base.parameters())
    randomize(denoiser.network.routers, 3, 0.6)
    pliant.save_adapter(denoiser, tmp_path / "a")
    assert (tmp_path / "a" / "adapter.safetensors").stat().st_size < 20_000
    back = pliant.load_adapter(base, tmp_path / "a")
    x, t, y = batch(base.network)
    with torch.no_grad():
        assert torch.equal(back.network(x, t, y), denoiser.network(x, t, y))
    with pytest.raises(FormatError, match="another architecture"):
        pliant.load_adapter(tiny_denoiser(width=64), tmp_path / "a")


def test_trained_base_has_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter to save"):
        pliant.save_adapter(pliant.route_width(tiny_denoiser()), tmp_path / "a")


def test_a_cut_network_is_a_model_of_its_own(tmp_path: Path) -> None:
    """Statically pruned: saved, loaded and priced like any plain network."""
    denoiser = tiny_denoiser()
    sliced = slice_network(denoiser.network, [[0, 2], [1]], [[0], [1, 2]], 4)
    cut = Denoiser(sliced, denoiser.path, denoiser.prediction, denoiser.network_time)
    pliant.save(cut, tmp_path / "cut")
    back = pliant.load(tmp_path / "cut")
    x, t, y = batch(sliced)
    with torch.no_grad():
        assert torch.equal(back.network(x, t, y), sliced(x, t, y))
        assert back.flops() * len(x) == counted_flops(lambda: sliced(x, t, y))
    assert back.fingerprint() != denoiser.fingerprint()


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routes": ()}, "routes needs"),
        ({"routes": ("head",)}, "did you mean 'heads'"),
        ({"base": "free"}, "base='free' is unknown"),
        ({"groups": 7}, "do not divide into 7 groups"),
        ({"temperature": 0.0}, "temperature"),
        ({"rank": 4}, "unexpected keyword"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pliant.route_width(tiny_denoiser(), **options)


def test_routing_twice_or_something_else_is_refused(tmp_path: Path) -> None:
    routed_once = pliant.route_width(tiny_denoiser())
    with pytest.raises(ConfigError, match="plain network"):
        pliant.route_width(routed_once)
    with pytest.raises(ConfigError, match="plain network"):
        pliant.route_width(pliant.flexify(tiny_denoiser(), [4], recipe="shared"))
    with pytest.raises(ConfigError, match="flexify its original"):
        pliant.flexify(routed_once, [4])
    with pytest.raises(ConfigError, match="attach them to its original"):
        pliant.attach_exits(routed_once, [1])
    with pytest.raises(FormatError, match="differ in width"):
        pliant.save(routed_once, tmp_path / "m.safetensors", format="official-dit")
    with pytest.raises(ConfigError, match="cut already"):
        DynamicDiT(slice_network(tiny_dit(), [[0], [0]], [[0], [0]], 4), WidthSpec())


def test_a_block_is_cut_by_numbers() -> None:
    block = Block(32, 4, 4.0, 1e-6, kept_heads=1, hidden=12)
    assert (block.heads, block.qkv.out_features, block.proj.in_features, block.fc1.out_features) == (1, 24, 8, 12)
    with pytest.raises(ConfigError, match="block_hidden needs a number of 1 to 128"):
        DiTConfig.from_dict({**tiny_dit().config.to_dict(), "block_hidden": [4]})
