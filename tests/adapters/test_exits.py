"""Early exits on a frozen network (sheet E, section 6: "It works when", and the pitfalls)."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant import Compute, Denoiser, DiT, Guidance, attach_exits, flexify
from pliant.adapters import ExitDiT, ExitSpec
from pliant.compute import counted_flops
from pliant.errors import ConfigError, FormatError, PlanError
from pliant.formats import native
from pliant.models.layers import Block
from pliant.models.precision import converted
from support.networks import batch, randomize, tiny_denoiser

LAYERS = 5


def with_exits(depths: tuple[int, ...] = (2, 3), seed: int = 7, **options: object) -> Denoiser:
    """Exits whose every tensor is random, on a random base."""
    denoiser = attach_exits(tiny_denoiser(depth=LAYERS, **options), depths)  # type: ignore[arg-type]
    randomize(exits_of(denoiser).exits, seed)
    return denoiser


def exits_of(denoiser: Denoiser) -> ExitDiT:
    assert isinstance(denoiser.network, ExitDiT)
    return denoiser.network


@torch.no_grad()  # as samplers call; with gradients a trainable network takes kernels that round differently
def call(denoiser: Denoiser, exit: int | None = None) -> Tensor:
    x, t, y = batch(exits_of(denoiser).plain if isinstance(denoiser.network, ExitDiT) else denoiser.network)  # type: ignore[arg-type]
    return denoiser(x, t.double() / 1000, y, Compute(exit=exit)).value


def by_hand(network: ExitDiT, e: int, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The definition: tokens after block e-1, the exit's block under its own adaLN of c, the frozen head."""
    base, own = network.plain, network.exit(e)
    rows = base.modulations(t, y)
    tokens = base.embed(x)
    for i in range(e):
        tokens = base.blocks[i](tokens, rows[:, 6 * i : 6 * i + 6])
    c = base.time_embed(t) + base.label_embed(y)
    six = (nn.functional.silu(c) @ own.modulation.weight.T + own.modulation.bias).view(len(y), 6, -1)
    six = six + torch.tensor([0.0, 1, 0, 0, 1, 0])[:, None]
    return base.read(own.block(tokens, six), rows)


# 1. The full network stays as it is ----------------------------------------------------------------------------------


def test_the_full_output_is_bit_identical_and_the_given_model_untouched() -> None:
    plain = tiny_denoiser(depth=LAYERS)
    before = {name: tensor.clone() for name, tensor in plain.network.state_dict().items()}
    answer = call(plain)
    denoiser = attach_exits(plain, (2, 3))
    randomize(exits_of(denoiser).exits)
    assert torch.equal(call(denoiser), answer)
    assert all(p.requires_grad for p in plain.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.network.state_dict().items())
    assert denoiser.fingerprint() == plain.fingerprint() and denoiser.exit_depths == (2, 3)


def test_one_pass_answers_as_separate_calls() -> None:
    denoiser = with_exits()
    x, t, y = batch(exits_of(denoiser).plain)
    full, exits = denoiser.exit_predictions(x, t.double() / 1000, y)
    assert torch.equal(full.value, call(denoiser)) and list(exits) == [2, 3]
    for e in exits:
        assert torch.allclose(exits[e].value, call(denoiser, e), rtol=1e-5, atol=1e-5)


# 2. Only exits learn -------------------------------------------------------------------------------------------------


def test_gradients_reach_every_tensor_of_the_exits_and_none_of_the_backbone() -> None:
    denoiser = with_exits()
    x, t, y = batch(exits_of(denoiser).plain)
    full, exits = denoiser.exit_predictions(x, t.double() / 1000, y)
    assert not full.value.requires_grad
    torch.stack([(p.value - full.value).square().mean() for p in exits.values()]).sum().backward()
    for name, parameter in exits_of(denoiser).named_parameters():
        assert (parameter.grad is None) == name.startswith("base."), name
        assert parameter.grad is None or bool(parameter.grad.any()), name


# 3. What an exit computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("e", [1, 2, 4])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_an_exit_is_its_definition_and_its_plain_network(e: int, learn_sigma: bool) -> None:
    denoiser = with_exits((1, 2, 4), learn_sigma=learn_sigma)
    network = exits_of(denoiser)
    x, t, y = batch(network.plain)
    answer = network(x, t, y, None, e)
    assert torch.allclose(answer, by_hand(network, e, x, t, y), rtol=1e-5, atol=1e-5)
    lowered = denoiser.network_for(Compute(exit=e))
    assert isinstance(lowered, DiT) and lowered.config.depth == e + 1
    assert torch.allclose(lowered(x, t, y), answer, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(answer, network(x, t, y), atol=1e-2)
    half = converted(lowered, torch.bfloat16)(x, t, y).float()
    assert (half - answer).norm() / answer.norm() < 0.1


def test_the_plain_network_shares_everything_but_modulation() -> None:
    network = exits_of(with_exits())
    theirs = {p.data_ptr() for p in (*network.parameters(), *network.buffers())}
    lowered = network.exit_network(3)
    own = [name for name, p in lowered.named_parameters() if p.data_ptr() not in theirs]
    assert own == ["modulation.weight", "modulation.bias"] and lowered.positions.data_ptr() in theirs
    assert not any(p.requires_grad for p in lowered.parameters())
    assert all(p.requires_grad for p in network.exits.parameters())


def test_new_exits_copy_the_last_block_or_start_as_the_identity() -> None:
    plain = tiny_denoiser(depth=LAYERS)
    copied = attach_exits(plain, (2, LAYERS - 1))
    assert torch.allclose(call(copied, LAYERS - 1), call(plain), atol=1e-6)  # the same block at the same place
    zero = attach_exits(plain, (2,), gates="zero")
    network = exits_of(zero)
    x, t, y = batch(network.plain)
    rows, tokens = network.plain.modulations(t, y), network.plain.embed(x)
    for i in range(2):
        tokens = network.plain.blocks[i](tokens, rows[:, 6 * i : 6 * i + 6])
    assert torch.allclose(call(zero, 2), network.plain.read(tokens, rows), atol=1e-6)
    assert not torch.allclose(call(zero, 2), call(copied, 2), atol=1e-2)


# 4. What an exit costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("e", [1, 3])
@pytest.mark.parametrize("through", ["call", "plan"])
def test_an_exit_runs_the_blocks_before_it_and_its_own(e: int, through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = with_exits((1, 3))
    network = exits_of(denoiser)
    names = {b.qkv.weight.data_ptr(): f"block {i}" for i, b in enumerate(network.plain.blocks)}
    names |= {network.exit(k).block.qkv.weight.data_ptr(): f"exit {k}" for k in network.exit_depths}
    ran: list[str] = []
    original = Block.forward

    def counting(self: Block, *args: object, **kwargs: object) -> Tensor:
        ran.append(names[self.qkv.weight.data_ptr()])
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Block, "forward", counting)
    if through == "call":
        call(denoiser, e)
    else:
        plan = pliant.Plan.uniform(denoiser, 1, "euler", Compute(exit=e, precision="fp32"))
        pliant.sample(denoiser, plan, [0], [0])
    assert ran == [*(f"block {i}" for i in range(e)), f"exit {e}"]


@pytest.mark.parametrize("e", [1, 3])
def test_flops_are_those_of_e_blocks_and_one(e: int) -> None:
    denoiser = with_exits((1, 3))
    exits_of(denoiser).requires_grad_(False)
    network = exits_of(denoiser)
    x, t, y = batch(network.plain, n=1)
    said = denoiser.flops(Compute(exit=e))
    assert counted_flops(lambda: network(x, t, y, None, e)) == said
    assert counted_flops(lambda: network.exit_network(e)(x, t, y)) == said
    blocks = [denoiser.flops(Compute(exit=1)), denoiser.flops(Compute(exit=3)), denoiser.flops()]
    assert 2 * (blocks[2] - blocks[1]) == blocks[1] - blocks[0]  # 2, 4 and 5 blocks of equal cost


def test_exits_of_cut_networks_are_shaped_like_the_last_block() -> None:
    widths = {"block_heads": (4, 3, 2, 1, 2), "block_hidden": (128, 64, 32, 16, 48)}
    denoiser = with_exits((2,), **widths)
    lowered = exits_of(denoiser).exit_network(2)
    assert lowered.config.block_widths == ((4, 128), (3, 64), (2, 48))
    x, t, y = batch(lowered, n=1)
    assert counted_flops(lambda: lowered(x, t, y)) == denoiser.flops(Compute(exit=2))


# Plans, other adapters, files ----------------------------------------------------------------------------------------


def test_a_plan_may_leave_early_in_some_steps() -> None:
    denoiser = with_exits()
    plan = pliant.Plan.uniform(denoiser, 4, "euler", Compute(precision="fp32"))
    steps = [replace(s, compute=Compute(exit=2, precision="fp32")) if i < 2 else s for i, s in enumerate(plan.steps)]
    mixed = plan.with_steps(steps)
    x = batch(exits_of(denoiser).plain)[0][:1]
    expected = x.clone()
    for i, (a, b) in enumerate(zip(mixed.times, mixed.times[1:], strict=False)):
        v = denoiser(expected, a, torch.tensor([1]), Compute(exit=2) if i < 2 else None).value
        expected = expected + (b - a) * v
    assert torch.allclose(pliant.sample(denoiser, mixed, [1], [0], x=x), expected, atol=1e-4)
    assert mixed.cost(denoiser).flops == 2 * denoiser.flops() + 2 * denoiser.flops(Compute(exit=2))


def test_an_exit_as_the_weak_model_of_guidance() -> None:
    """Autoguidance: the conditional prediction is pushed away from what an early exit says of the same label."""
    denoiser = with_exits()
    weak = Guidance(2.0, against="weak", compute=Compute(exit=2, precision="fp32"))
    plan = pliant.Plan.uniform(denoiser, 1, "euler", Compute(precision="fp32"), guidance=weak, times=[1.0, 0.5])
    x = batch(exits_of(denoiser).plain)[0][:1]
    label = torch.tensor([1])
    full, early = denoiser(x, 1.0, label).value, denoiser(x, 1.0, label, Compute(exit=2)).value
    expected = x - 0.5 * (early + 2.0 * (full - early))
    assert torch.allclose(pliant.sample(denoiser, plan, [1], [0], x=x), expected, atol=1e-4)


def test_plans_are_checked_for_their_exits() -> None:
    denoiser = with_exits()
    with pytest.raises(PlanError, match=r"step 0 .*not after 4"):
        pliant.Plan.uniform(denoiser, 2, "euler", Compute(exit=4))
    with pytest.raises(PlanError, match=r"step 0 .*no exit after 2"):
        pliant.Plan.uniform(tiny_denoiser(depth=LAYERS), 2, "euler", Compute(exit=2))
    deeper = Guidance(2.0, against="weak", compute=Compute(exit=3))
    with pytest.raises(PlanError, match="runs deeper than the conditional call, which leaves after 2 blocks"):
        pliant.Plan.uniform(denoiser, 2, "euler", Compute(exit=2), guidance=deeper)


def test_exits_on_a_flexible_model() -> None:
    flexible = flexify(tiny_denoiser(depth=3), [4], rank=2)
    randomize(flexible.network, 3)
    denoiser = attach_exits(flexible, (1,))
    x, _, y = batch(exits_of(denoiser).plain)
    for compute in (None, Compute.of(4), Compute.of(4, merged=False)):
        assert torch.equal(denoiser(x, 0.5, y, compute).value, flexible(x, 0.5, y, compute).value)
    assert denoiser.patch_sizes == flexible.patch_sizes
    assert denoiser.network_for(Compute.of(4)) is denoiser.core
    with pytest.raises(ConfigError, match="own patch size 2x2 only"):
        denoiser(x, 0.5, y, Compute(patch=(4, 4), exit=1))


def test_preconditioned_and_rerouted_models_read_exits_alike() -> None:
    """Alignment is the same whatever depth the output came from."""
    denoiser = with_exits(path="vp-discrete", prediction="epsilon").on_path(pliant.get_path("linear"), "velocity")
    x, _, y = batch(exits_of(denoiser).plain)
    full, exits = denoiser.exit_predictions(x, 0.4, y)
    assert torch.equal(full.value, denoiser(x, 0.4, y).value)
    assert torch.allclose(exits[2].value, denoiser(x, 0.4, y, Compute(exit=2)).value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flexible", [False, True])
def test_save_and_load(flexible: bool, tmp_path: Path) -> None:
    base = tiny_denoiser(depth=LAYERS)
    if flexible:
        base = flexify(base, [4], rank=2)
    denoiser = attach_exits(base, (2, 3), gates="zero")
    randomize(exits_of(denoiser).exits)
    pliant.save(denoiser, tmp_path / "whole")
    pliant.save_adapter(denoiser, tmp_path / "alone")
    whole, onto = pliant.load(tmp_path / "whole"), pliant.load_adapter(base, tmp_path / "alone")
    for loaded in (whole, onto):
        assert loaded.identity() == denoiser.identity() and exits_of(loaded).spec == ExitSpec((2, 3), "zero")
        assert torch.equal(call(loaded, 2), call(denoiser, 2)) and torch.equal(call(loaded), call(denoiser))
    stored = native.read_tensors(tmp_path / "alone" / native.ADAPTER_FILE)
    assert stored and all(name.startswith("exits.") for name in stored)
    weights = sum(t.numel() for t in stored.values() if t.ndim == 2)
    assert weights == 2 * 18 * base.config.width**2
    # Exits belong to the DiT: a flexible relative of their base can take them too, and the other way round.
    relative = tiny_denoiser(depth=LAYERS) if flexible else flexify(tiny_denoiser(depth=LAYERS), [4], rank=2)
    assert torch.equal(call(pliant.load_adapter(relative, tmp_path / "alone"), 2), call(denoiser, 2))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    denoiser = with_exits()
    pliant.save_adapter(denoiser, tmp_path / "exits")
    with pytest.raises(FormatError, match="another architecture"):
        pliant.load_adapter(tiny_denoiser(depth=4), tmp_path / "exits")
    pliant.save_adapter(flexify(tiny_denoiser(depth=LAYERS), [4], rank=2), tmp_path / "patches")
    with pytest.raises(FormatError, match="below exits"):
        pliant.load_adapter(denoiser, tmp_path / "patches")
    for format in ("official-dit", "diffusers"):
        with pytest.raises(FormatError, match="early exits"):
            pliant.save(denoiser, tmp_path / "x", format=format)
    with pytest.raises(FormatError, match="no exits"):
        pliant.save_adapter(tiny_denoiser(), tmp_path / "y")


@pytest.mark.parametrize(
    ("depths", "words"),
    [((), "at least one"), ((0,), "at least 1"), ((5,), "saves nothing"), ((True,), "at least 1"), (3, "sequence")],
)
def test_refused_depths(depths: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        attach_exits(tiny_denoiser(depth=LAYERS), depths)  # type: ignore[arg-type]


def test_refused_requests() -> None:
    denoiser = with_exits()
    plain = tiny_denoiser(depth=LAYERS)
    with pytest.raises(ConfigError, match="exits after 2, 3 blocks, not after 4"):
        call(denoiser, 4)
    with pytest.raises(ConfigError, match="no exit after 2"):
        plain.flops(Compute(exit=2))
    with pytest.raises(ConfigError, match="exits already"):
        attach_exits(denoiser, (1,))
    with pytest.raises(ConfigError, match="flexify comes before"):
        flexify(denoiser, [4])
    with pytest.raises(ConfigError, match="recipe 'shared'"):
        attach_exits(flexify(plain, [4], recipe="shared"), (1,))
    with pytest.raises(ConfigError, match="gates='no' is unknown"):
        attach_exits(plain, (1,), gates="no")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no exits"):
        plain.exit_predictions(*batch(copy.deepcopy(plain.network)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown option of exits 'depth'"):
        ExitSpec.from_dict({"depth": [1]})
