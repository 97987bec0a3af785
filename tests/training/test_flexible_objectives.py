"""Recipe S, recipe L and the MMD estimator."""

import math

import pytest
import torch

from pliant import Denoiser, flexify
from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.training.draws import Draws
from pliant.training.objectives import Batch, FlowMatching, MMDBootstrap, PatchDistillation, SharedPatches, mmd_squared
from support.networks import randomize, tiny_denoiser


def flexible(recipe: str, path: str = "linear", **options: object) -> Denoiser:
    kind = "epsilon" if path == "vp-discrete" else "velocity"
    base = tiny_denoiser(path=path, prediction=kind, **options)  # type: ignore[arg-type]
    extra = {"rank": 2} if recipe == "lora" else {}
    return flexify(base, [4], recipe=recipe, **extra)


def batch(n: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images, partners = torch.randn(2, n, 2, 8, 8, generator=generator)
    return Batch(images, torch.arange(n) % 3, partners)


def gaussian_kernel_mean(offset: float, variance: float, h: float) -> float:
    """E exp(-D^2/(2h^2)) for D ~ N(offset, variance)."""
    return h / math.sqrt(h**2 + variance) * math.exp(-(offset**2) / (2 * (h**2 + variance)))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_mmd_is_unbiased(shift: float) -> None:
    """N(0,1) against N(shift,1) in one dimension, one RBF kernel of width 1."""
    exact = 2 * gaussian_kernel_mean(0, 2, 1) - 2 * gaussian_kernel_mean(shift, 2, 1)
    generator = torch.Generator().manual_seed(1)
    one = torch.ones(())
    draws = torch.stack(
        [
            mmd_squared(
                torch.randn(4, 1, generator=generator),
                shift + torch.randn(6, 1, generator=generator),
                bandwidths=(1.0,),
                median=one,
            )
            for _ in range(3000)
        ]
    )
    # The biased estimate would be off by (1 - E k)(1/4 + 1/6), about 0.18.
    assert float(draws.mean()) == pytest.approx(exact, abs=5 * float(draws.std()) / 3000**0.5)


def test_mmd_median_makes_it_scale_free() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(8, 5, generator=generator), torch.randn(8, 5, generator=generator) + 1
    assert float(mmd_squared(7 * a, 7 * b)) == pytest.approx(float(mmd_squared(a, b)), abs=1e-5)


def test_shared_draws_every_patch_size_equally_often() -> None:
    denoiser = flexible("shared")
    objective = SharedPatches(FlowMatching())
    small = batch(1)
    names = [next(iter(objective(denoiser, small, Draws.single(1, step=i)).logs)) for i in range(200)]
    share = names.count("loss_patch_2x2") / 200
    assert set(names) == {"loss_patch_2x2", "loss_patch_4x4"}
    assert share == pytest.approx(0.5, abs=5 * 0.5 / 200**0.5)


def test_shared_loss_is_the_own_loss_at_that_patch() -> None:
    denoiser, objective = flexible("shared"), SharedPatches(FlowMatching())
    shared = objective(denoiser, batch(), Draws.single(6))
    patch = tuple(int(side) for side in next(iter(shared.logs)).removeprefix("loss_patch_").split("x"))
    draws = Draws.single(6)
    draws.shared()  # the choice of the patch
    assert torch.equal(shared.loss, FlowMatching()(denoiser, batch(), draws, Compute(patch=patch)).loss)


def test_mmd_bootstrap_trains_the_powerful_steps_only() -> None:
    denoiser = flexible("shared")
    mmd = MMDBootstrap(weak_steps=1, powerful_steps=1, grid=20)
    gap = mmd(denoiser, batch(), Draws.single(6), denoiser.patch_sizes)
    gap.backward()
    modes = denoiser.network.modes  # type: ignore[union-attr]
    assert modes["4x4"].embedding.grad is None
    assert float(modes["2x2"].embedding.grad.abs().sum()) > 0
    assert SharedPatches(FlowMatching(), mmd).needs_partners


def test_mmd_bootstrap_is_small_for_a_perfect_chain() -> None:
    """A network that predicts the velocity of N(0, I) data moves noisy data to the right law: only noise remains."""
    generator = torch.Generator().manual_seed(3)
    n = 256
    data = Batch(
        torch.randn(n, 1, 8, 8, generator=generator),
        torch.zeros(n, dtype=torch.int64),
        torch.randn(n, 1, 8, 8, generator=generator),
    )
    from support.training import formula_denoiser

    def exact(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        t = t[:, None, None, None]
        return x * (2 * t - 1) / ((1 - t) ** 2 + t**2)  # d/dt ln std(x_t)

    mmd = MMDBootstrap(weak_steps=1, powerful_steps=2, grid=100)
    good = mmd(formula_denoiser(exact), data, Draws.single(n), [(4, 4)])
    bad = mmd(formula_denoiser(lambda x, t, y: -20 * x), data, Draws.single(n), [(4, 4)])
    assert abs(float(good)) < 2e-3
    assert float(bad) > 10 * abs(float(good))


@pytest.mark.parametrize("path", ["linear", "vp-discrete"])
def test_distillation_trains_the_adapter_only(path: str) -> None:
    denoiser = flexible("lora", path, learn_sigma=path == "vp-discrete")
    randomize(denoiser.network.modes, 5, 0.1)  # type: ignore[union-attr]
    result = PatchDistillation()(denoiser, batch(), Draws.single(6))
    result.loss.backward()
    grads = {name for name, p in denoiser.network.named_parameters() if p.grad is not None}
    assert grads == {name for name, _ in denoiser.network.named_parameters() if name.startswith("modes.")}
    assert ("variance_gap" in result.logs) == (path == "vp-discrete")


def test_distillation_is_the_gap_between_the_sizes() -> None:
    seen = []
    denoiser = flexible("lora", "vp-discrete", learn_sigma=True)

    class Spy(Denoiser):
        def __call__(self, x, t, cond, compute=None):  # type: ignore[no-untyped-def]
            prediction = super().__call__(x, t, cond, compute)
            seen.append((compute, prediction))
            return prediction

    spy = Spy(denoiser.network, denoiser.path, denoiser.prediction, denoiser.network_time)
    result = PatchDistillation(variance_weight=0.1)(spy, batch(), Draws.single(6))
    (_, teacher), (compute, student) = seen
    assert compute.patch == (4, 4)
    assert teacher.value.requires_grad is False
    assert student.variance is not None
    assert teacher.variance is not None
    expected = (student.value - teacher.value).square().mean()
    expected = expected + 0.1 * (student.variance - teacher.variance).square().mean()
    assert torch.allclose(result.loss, expected)


def test_objectives_for_flexible_models_refuse_others() -> None:
    for objective in (SharedPatches(FlowMatching()), PatchDistillation()):
        with pytest.raises(ConfigError, match="patch"):
            objective.check(tiny_denoiser())


def test_flops() -> None:
    denoiser = flexible("lora")
    powerful, weak = denoiser.flops(Compute()), denoiser.flops(Compute(patch=(4, 4), merged=False))
    assert PatchDistillation().flops(denoiser) == powerful + 3 * weak
    assert FlowMatching().flops(denoiser) == 3 * powerful
