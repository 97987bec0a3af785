"""Flexible networks: what flexifying preserves, what the new sizes start as, and every way to store and run them.

Sheet A, 1.2-1.6 and 1.13(1, 2). All networks have random weights in every parameter.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pliant import Compute, Denoiser, flexify, load_adapter, save_adapter
from pliant.adapters import FlexiDiT, FlexSpec
from pliant.adapters.flexible_dit import Tokenizer
from pliant.errors import ConfigError, FormatError, ShapeError
from pliant.formats.native import load, save
from pliant.models import DiT
from support.networks import batch, randomize, tiny_denoiser, tiny_dit

RECIPES = ("lora", "shared")
NORMS = ("none", "affine", "layernorm")
# (input, own patch, new patches)
SHAPES: list[tuple[tuple[int, int], tuple[int, int], list[Any]]] = [
    ((8, 8), (2, 2), [4]),
    ((8, 8), (2, 2), [4, 8]),
    ((8, 16), (2, 2), [4, (2, 4), (8, 4)]),
    ((8, 8), (1, 2), [(2, 2), (4, 8)]),
    ((12, 8), (2, 4), [(6, 4), (4, 8)]),
]


def flexible(recipe: str = "lora", patches: Any = ((4, 4),), trained: bool = True, **options: Any) -> FlexiDiT:
    """A flexible tiny network; `trained` puts random numbers into everything that flexifying added."""
    dit = {k: options.pop(k) for k in ("input_size", "patch_size", "learn_sigma") if k in options}
    sizes = tuple((p, p) if isinstance(p, int) else p for p in patches)
    network = FlexiDiT(tiny_dit(**dit), FlexSpec(sizes, recipe=recipe, rank=4, **options))  # type: ignore[arg-type]
    if trained:
        randomize(network.modes, seed=5)
    return network.eval()


# What is preserved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize(("size", "own", "new"), SHAPES)
def test_lora_keeps_every_bit_at_the_original_size(
    size: tuple[int, int], own: tuple[int, int], new: Any, learn_sigma: bool
) -> None:
    """Before and after any change of the adapters (1.13(1)), and the original denoiser is left alone."""
    original = tiny_denoiser(input_size=size, patch_size=own, learn_sigma=learn_sigma)
    network = original.network
    state = copy.deepcopy(network.state_dict())
    denoiser = flexify(original, new, rank=4)
    x, t, y = batch(network)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = network(x, t, y)
        assert torch.equal(denoiser.network(x, t, y), expected)
        randomize(denoiser.network.modes, seed=7)  # type: ignore[arg-type]
        assert torch.equal(denoiser.network(x, t, y), expected)
        assert torch.equal(denoiser.network(x, t, y, own), expected)
        assert torch.equal(denoiser.network.materialize()(x, t, y), expected)  # type: ignore[operator]
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in state.items())


def test_lora_training_cannot_touch_the_base() -> None:
    network = flexible(patch_norm="affine")
    x, t, y = batch(network.base)
    assert {n.split(".")[0] for n, p in network.named_parameters() if p.requires_grad} == {"modes"}
    before = network(x, t, y).detach()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(x, t, y, (4, 4)).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.modes.parameters())
    assert torch.equal(network(x, t, y), before)


@pytest.mark.parametrize("initialisation", ["average", "noise-aligned"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("size", "own", "new"), SHAPES)
def test_shared_starts_as_the_original(
    size: tuple[int, int], own: tuple[int, int], new: Any, norm: str, initialisation: str
) -> None:
    original = tiny_dit(input_size=size, patch_size=own)
    network = flexible(
        "shared", new, False, input_size=size, patch_size=own, patch_norm=norm, initialisation=initialisation
    )
    x, t, y = batch(original)
    with torch.no_grad():
        expected = original(x, t, y)
        assert (network(x, t, y) - expected).abs().max() <= 1e-5
        assert expected.abs().max() > 0.1


@pytest.mark.parametrize("underlying", [(4, 4), (8, 4), (8, 8)])
def test_shared_at_any_underlying_size(underlying: tuple[int, int]) -> None:
    original = tiny_dit()
    network = flexible("shared", trained=False, underlying=underlying)
    assert network.base.patch_embed.weight.shape[2:] == underlying
    x, t, y = batch(original)
    with torch.no_grad():
        assert (network(x, t, y) - original(x, t, y)).abs().max() <= 1e-5


def test_shared_trains_everything_through_every_size() -> None:
    network = flexible("shared", [4, (2, 4)])
    x, t, y = batch(network.base)
    assert all(p.requires_grad for p in network.parameters())
    for patch in network.patch_sizes:
        network.zero_grad()
        network(x, t, y, patch).square().mean().backward()
        assert network.base.patch_embed.weight.grad is not None
        assert network.base.head.weight.grad is not None
        assert network.base.blocks[0].qkv.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


# What the new sizes start as --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weak_token_is_the_token_of_the_average(recipe: str) -> None:
    """1.13(2): `embed_weak(x) == embed_p0(avgpool2(x))`, tokens before positions."""
    original, network = tiny_dit(), flexible(recipe, trained=False, initialisation="average")
    x, _, _ = batch(original)
    mode = network.mode((4, 4))
    assert mode is not None
    with torch.no_grad():
        weak = network.embed(x, (4, 4)) - mode.positions
        expected = original.patch_embed(F.avg_pool2d(x, 2))
    torch.testing.assert_close(weak, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weak_head_is_the_upsampled_head(recipe: str) -> None:
    """1.13(2): `head_weak(h) == bilinear_up2(head_p0(h))`; the other reading of the paper is 4 times too small."""
    original, network = tiny_dit(), flexible(recipe, trained=False, initialisation="average")
    mode = network.mode((4, 4))
    assert mode is not None
    h = torch.randn(5, original.config.width, generator=torch.Generator().manual_seed(0))

    def patches(out: torch.Tensor, side: int) -> torch.Tensor:
        return out.view(5, side, side, original.config.out_channels).permute(0, 3, 1, 2)

    with torch.no_grad():
        own = patches(original.head(h), 2)
        weak = patches(F.linear(h, *mode.weights.head(network.base)), 4)
    expected = F.interpolate(own, (4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(weak, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("patch", [(4, 4), (2, 8), (8, 4)])
def test_aligned_weights_average_and_repeat(recipe: str, patch: tuple[int, int]) -> None:
    """The low-pass of the alignment, for any rectangle: embed the block means, repeat the prediction."""
    original = tiny_dit()
    network = flexible(recipe, [patch], trained=False, initialisation="noise-aligned")
    mode = network.mode(patch)
    assert mode is not None
    x, _, _ = batch(original)
    ratio = (patch[0] // 2, patch[1] // 2)
    with torch.no_grad():
        weak = network.embed(x, patch) - mode.positions
        torch.testing.assert_close(weak, original.patch_embed(F.avg_pool2d(x, ratio)), rtol=0, atol=2e-6)
        h = torch.randn(3, weak.shape[1], original.config.width, generator=torch.Generator().manual_seed(0))
        m = original.modulations(*batch(original)[1:])
        coarse = DiT(original.config.__class__(**{**original.config.to_dict(), "input_size": [8 // r for r in ratio]}))
        coarse.load_state_dict(original.state_dict())
        expected = coarse.read(h, m).repeat_interleave(ratio[0], 2).repeat_interleave(ratio[1], 3)
        torch.testing.assert_close(network.read(h, m, patch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fresh_weak_mode_is_a_small_image_at_the_original_size(recipe: str) -> None:
    """With positions "own" and the aligned weights: the pre-trained network run on the block means."""
    original = tiny_dit(class_dropout=0.1)
    network = flexible(recipe, trained=False, initialisation="noise-aligned", position="own")
    x, t, y = batch(original)
    small = DiT(original.config.__class__(**{**original.config.to_dict(), "input_size": [4, 4]}))
    small.load_state_dict(original.state_dict())
    with torch.no_grad():
        expected = small(F.avg_pool2d(x, 2), t, y)
        out = network(x, t, y, (4, 4))
    torch.testing.assert_close(out, expected.repeat_interleave(2, 2).repeat_interleave(2, 3), rtol=1e-4, atol=1e-5)


def test_large_ratios_average_all_pixels_by_default() -> None:
    """1.3: plain bilinear 8 -> 2 reads 4 of 16 pixels; "auto" takes the mean beyond a ratio of 2."""
    auto = flexible(patches=[8], trained=False, initialisation="average")
    literal = flexible(patches=[8], trained=False, initialisation="average", resample="bilinear")
    for network, used in ((auto, 64), (literal, 16)):
        weights = network.mode((8, 8)).weights  # type: ignore[union-attr]
        assert isinstance(weights, Tokenizer)
        assert torch.count_nonzero(weights.weight[0, 0]) == used


# Ways to run them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("norm", ["none", "affine"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("size", "own", "new"), SHAPES)
def test_materialized_equals_unmerged(
    size: tuple[int, int], own: tuple[int, int], new: Any, recipe: str, norm: str, learn_sigma: bool
) -> None:
    network = flexible(recipe, new, input_size=size, patch_size=own, patch_norm=norm, learn_sigma=learn_sigma)
    x, t, y = batch(network.base)
    outputs = []
    with torch.no_grad():
        for patch in network.patch_sizes:
            out = network(x, t, y, patch)
            plain = network.materialize(patch)
            assert type(plain) is DiT
            assert plain.config.patch_size == patch
            torch.testing.assert_close(plain(x, t, y), out, rtol=1e-4, atol=2e-5)
            outputs.append(out)
    for i, a in enumerate(outputs):  # the sizes do differ
        assert all((a - b).abs().max() > 1e-2 for b in outputs[:i])


def test_layernorm_runs_unmerged_and_says_why_it_cannot_be_folded() -> None:
    for recipe in RECIPES:
        network = flexible(recipe, patch_norm="layernorm")
        x, t, y = batch(network.base)
        assert network(x, t, y, (4, 4)).isfinite().all()
        network.materialize()
        with pytest.raises(ConfigError, match="cannot be folded"):
            network.materialize((4, 4))


@pytest.mark.parametrize("norm", NORMS)
def test_every_added_parameter_matters(norm: str) -> None:
    """Each of the new tensors changes the weak mode (nothing is stored in vain) and none the powerful one."""
    network = flexible(patch_norm=norm)
    x, t, y = batch(network.base)
    network(x, t, y, (4, 4)).square().sum().backward()
    for name, parameter in network.modes.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert any("scale_in" in n for n, _ in network.modes.named_parameters()) == (norm != "none")


def test_norms_start_as_identity_where_they_promise() -> None:
    x, t, y = batch(tiny_dit())
    with torch.no_grad():
        plain = flexible(trained=False, patch_norm="none")(x, t, y, (4, 4))
        assert torch.equal(flexible(trained=False, patch_norm="affine")(x, t, y, (4, 4)), plain)
        assert not torch.allclose(flexible(trained=False, patch_norm="layernorm")(x, t, y, (4, 4)), plain)


def test_defaults_of_the_recipes() -> None:
    assert FlexSpec(((4, 4),)).norm == "none"
    assert FlexSpec(((4, 4),), recipe="shared").norm == "affine"
    assert FlexSpec(((4, 4), (8, 2))).stored_size((2, 2)) == (8, 4)


def test_lora_scale() -> None:
    """alpha/rank, 1 by default."""
    ones, twos = flexible(), flexible(alpha=8.0)
    delta = lambda n: n.modes["4x4"].loras[0]["qkv"].delta()  # noqa: E731
    torch.testing.assert_close(delta(twos), 2 * delta(ones))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_new_sizes_take_the_number_format_of_the_base(recipe: str, dtype: torch.dtype) -> None:
    reference = flexible(recipe, trained=False, patch_norm="affine")
    network = FlexiDiT(tiny_dit().to(dtype), reference.spec)
    x, t, y = batch(tiny_dit())
    for patch in network.patch_sizes:
        with torch.no_grad():
            out, expected = network(x.to(dtype), t, y, patch), reference(x, t, y, patch)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-4)
    assert {p.dtype for p in network.parameters()} == {dtype}


# Files ------------------------------------------------------------------------------------------------------------


def test_adapter_folder_round_trip(tmp_path: Path) -> None:
    """Only the new tensors are written; base + folder gives the same bits back."""
    base = tiny_denoiser()
    denoiser = flexify(base, [4, (4, 2)], rank=3, patch_norm="affine")
    randomize(denoiser.network.modes, seed=9)  # type: ignore[arg-type]
    save_adapter(denoiser, tmp_path / "adapter")
    assert sorted(f.name for f in (tmp_path / "adapter").iterdir()) == ["adapter.safetensors", "config.json"]
    assert isinstance(denoiser.network, FlexiDiT)
    assert all(k.startswith("modes.") for k in denoiser.network.adapter_state_dict())
    again = load_adapter(base, tmp_path / "adapter")
    assert isinstance(again.network, FlexiDiT)
    assert again.network.spec == denoiser.network.spec
    x, _, y = batch(again.network.base)
    for patch in denoiser.patch_sizes:
        compute = Compute(patch=patch)
        assert torch.equal(again(x, 0.4, y, compute).value, denoiser(x, 0.4, y, compute).value)
    with pytest.raises(FormatError, match="only an adapter"):
        load(tmp_path / "adapter")
    with pytest.raises(FormatError, match="another architecture"):
        load_adapter(tiny_denoiser(depth=3), tmp_path / "adapter")


@pytest.mark.parametrize("recipe", RECIPES)
def test_model_folder_round_trip(recipe: str, tmp_path: Path) -> None:
    denoiser = flexify(tiny_denoiser(), [4, (2, 8)], recipe=recipe, rank=3)
    randomize(denoiser.network, seed=9)
    save(denoiser, tmp_path / "model")
    again = load(tmp_path / "model")
    x, _, y = batch(tiny_dit())
    for patch in denoiser.patch_sizes:
        compute = Compute(patch=patch)
        assert torch.equal(again(x, 0.4, y, compute).value, denoiser(x, 0.4, y, compute).value)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    network = flexible()
    state = network.adapter_state_dict()
    with pytest.raises(ConfigError, match=r"modes\.4x4.* does not match"):
        network.load_adapter_state_dict({k: v for k, v in state.items() if "embedding" not in k})
    with pytest.raises(ConfigError, match="does not match"):
        network.load_adapter_state_dict({k: v[..., :1] for k, v in state.items()})
    with pytest.raises(ConfigError, match="no separate adapter"):
        flexible("shared").adapter_state_dict()
    with pytest.raises(FormatError, match=r"not flexible.*flexify"):
        save_adapter(tiny_denoiser(), tmp_path / "a")


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "options", "error", "message"),
    [
        ([], {}, ConfigError, "at least one new patch size"),
        ([3], {"initialisation": "average"}, ShapeError, "3x3 does not divide"),
        ([2], {}, ConfigError, "network's own"),
        ([0], {}, ConfigError, "positive"),
        ([1], {}, ConfigError, r"needs multiples.*initialisation='average'"),
        ([4], {"recipe": "loar"}, ConfigError, "did you mean 'lora'"),
        ([4], {"resample": "bicubic"}, ConfigError, "'bicubic' is unknown"),
        ([4], {"patch_norm": "batch"}, ConfigError, "patch_norm"),
        ([4], {"position": "centre"}, ConfigError, "did you mean 'center'"),
        ([4], {"missing_power": -1.0}, ConfigError, "variance, at least 0"),
        ([4], {"rank": 0}, ConfigError, "rank must be at least 1"),
        ([8], {"recipe": "shared", "underlying": 4}, ConfigError, "at least as large"),
        ([4], {"recipe": "shared", "underlying": 6}, ShapeError, "6x6 does not divide"),
        ([4], {"ranks": 3}, ConfigError, "ranks"),
    ],
)
def test_impossible_requests(patches: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        flexify(tiny_denoiser(), patches, **options)


def test_wrong_calls() -> None:
    denoiser = flexify(tiny_denoiser(), [4], rank=2)
    x, t, y = batch(tiny_dit())
    with pytest.raises(ConfigError, match="has patch sizes 2x2, 4x4, not 8x8"):
        denoiser(x, 0.5, y, Compute.of(patch=8))
    with pytest.raises(ConfigError, match="flexible already"):
        flexify(denoiser, [8])
    for patch in (None, (4, 4)):
        with pytest.raises(ShapeError, match=r"takes inputs of \(2, 8, 8\)"):
            denoiser.network(x[..., :4], t, y, patch)
    with pytest.raises(ConfigError, match="only has patch size"):
        tiny_denoiser()(x, 0.5, y, Compute.of(patch=4))


def test_a_smaller_patch_than_the_original_can_be_added_too() -> None:
    """ "average" goes both ways: p0 = 4 with a finer mode of 2."""
    original = Denoiser(tiny_dit(patch_size=(4, 4)), tiny_denoiser().path, "velocity")
    for recipe in RECIPES:
        finer = flexify(original, [2], recipe=recipe, initialisation="average", rank=2)
        x, _, y = batch(tiny_dit())
        assert (finer(x, 0.5, y).value - original(x, 0.5, y).value).abs().max() <= 1e-5
        assert finer(x, 0.5, y, Compute.of(patch=2)).value.shape == x.shape


def test_flexify_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    original = tiny_denoiser()
    state = torch.get_rng_state()
    one, two = flexify(original, [4], seed=3), flexify(original, [4], seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_spec_round_trip() -> None:
    spec = FlexSpec(((8, 4), (4, 4)), "shared", "average", underlying=(8, 8), patch_norm="none")
    assert spec.patch_sizes == ((4, 4), (8, 4))
    assert FlexSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        FlexSpec.from_dict({**spec.to_dict(), "ranl": 3})
