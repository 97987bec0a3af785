"""Networks on paths they were not trained on, and preconditioned networks (sheet C, 13 and 15.3)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import pliant
from analytic import GMM2D, start_points
from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.paths import (
    EDM,
    PREDICTION_TYPES,
    NetworkTime,
    Path,
    Preconditioning,
    PredictionType,
    carried,
    get_path,
    make_grid,
    match,
)
from pliant.plans import Plan, sample
from pliant.plans.sampling import Sampler
from pliant.solvers import Eval, Output, compile_program, run
from pliant.solvers.builder import nodes_of
from support.networks import tiny_denoiser, tiny_dit

SD = get_path("vp-discrete", betas="scaled-linear")
VP, LINEAR, EDM_PATH, GVP = get_path("vp"), get_path("linear"), EDM(), get_path("gvp")
PAIRS = [
    (VP, LINEAR),
    (VP, EDM_PATH),
    (SD, LINEAR),
    (EDM_PATH, LINEAR),
    (LINEAR, VP),
    (EDM_PATH, GVP),
    (GVP, get_path("sub-vp")),
]
every_pair = pytest.mark.parametrize(("trained", "path"), PAIRS, ids=lambda p: p.name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The mathematics --------------------------------------------------------------------------------------------------


@every_pair
def test_matched_states_are_states_of_the_other_path(trained: Path, path: Path) -> None:
    """Equal noise ratio, and the scaled state is the trained path's state of the same pair (x0, eps)."""
    t = path.time_of_noise_ratio(torch.tensor([0.05, 0.4, 1.0, 3.0, 14.0]))
    found, x0, eps = match(trained, path, t), normal(5, 3), normal(5, 3, seed=1)
    torch.testing.assert_close(trained.noise_ratio(found.time), path.noise_ratio(t), rtol=1e-7, atol=0)
    assert not bool(found.clipped.any())
    torch.testing.assert_close(found.scale[:, None] * path.mix(x0, eps, t), trained.mix(x0, eps, found.time))


@every_pair
def test_carried_predictions(trained: Path, path: Path) -> None:
    """What the network says about the pair becomes any prediction of the other path (15.3, step 3)."""
    t = path.time_of_noise_ratio(torch.tensor([0.05, 0.4, 3.0, 14.0]))
    time, x0, eps = match(trained, path, t).time, normal(4, 3), normal(4, 3, seed=1)
    y = trained.mix(x0, eps, time)
    for kind_from in PREDICTION_TYPES:
        value = trained.target(kind_from, x0, eps, time)
        for kind_to in PREDICTION_TYPES:
            p, q = carried(trained, time, kind_from, path, t, kind_to)
            found, wanted = p[:, None] * y + q[:, None] * value, path.target(kind_to, x0, eps, t)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7 * float(wanted.abs().max()))


def test_scores_scale_with_the_state() -> None:
    """S_B = S_A alpha_A(t)/alpha_B(tau)."""
    t = torch.tensor(0.6)
    found = match(VP, LINEAR, t)
    p, q = carried(VP, found.time, "score", LINEAR, t, "score")
    assert float(p) == pytest.approx(0.0, abs=1e-12)
    assert float(q) == pytest.approx(float(VP.alpha_sigma(found.time).alpha / LINEAR.alpha_sigma(t).alpha), rel=1e-9)


def test_clipping() -> None:
    """Ratios the network never saw: SD's n runs from 0.0292 to 14.61 (linear t 0.02834 to 0.935958)."""
    found = match(SD, LINEAR, torch.tensor([1.0, 0.97, 0.935, 0.5, 0.0284, 0.02, 0.0]))
    assert found.clipped.tolist() == [True, True, False, False, False, True, True]
    assert found.time[:2].tolist() == [1.0, 1.0]
    assert found.time[-2:].tolist() == [0.001, 0.001]
    assert bool(torch.isfinite(found.scale).all())
    assert not bool(match(LINEAR, GVP, torch.tensor([0.0, 1.0])).clipped.any())
    assert match(EDM_PATH, LINEAR, 1.0).time == 1.0


# Check (4) of sheet C, 15 -----------------------------------------------------------------------------------------


class Exact:
    """The exact denoiser of gmm2d as a network trained on one path, used along another."""

    def __init__(self, trained: Path, path: Path, kind: PredictionType) -> None:
        self.trained, self.path, self.kind = trained, path, kind

    def __call__(self, x: Tensor, evaluation: Eval) -> Output:
        t = evaluation.node.t
        found = match(self.trained, self.path, t)
        y, node = found.scale * x, nodes_of(self.trained, [float(found.time)])[0]
        p, q = carried(self.trained, found.time, self.kind, self.path, t, "velocity")
        return Output(p * y + q * GMM2D.predict(self.kind, y, node))


def along(path: Path, solver: str, ratios: Tensor, noise: Tensor, kind: PredictionType = "epsilon") -> Tensor:
    times = torch.cat([path.time_of_noise_ratio(ratios), torch.zeros(1, dtype=torch.float64)])
    program = compile_program(path, times, solver, "velocity")
    for result in run(program, noise * nodes_of(path, [float(times[0])])[0].sigma, Exact(VP, path, kind)):
        x = result.x
    return x


def test_ddim_agrees_on_every_path() -> None:
    """A VP-trained network, 200 steps at matched ratios: DDIM lands on the same samples, Euler on v does not."""
    ratios, noise = torch.logspace(1.9, -2.5, 200, dtype=torch.float64), start_points(32)
    on_vp = along(VP, "ddim", ratios, noise)
    for path in (LINEAR, EDM_PATH):
        assert float((along(path, "ddim", ratios, noise) - on_vp).abs().max()) < 1e-4
    assert float((along(VP, "ddim", ratios, noise, "velocity") - on_vp).abs().max()) < 1e-4
    euler = float((along(get_path("gvp"), "euler", ratios, noise) - on_vp).abs().max())
    assert 1e-3 < euler < 1e-1


# Denoisers --------------------------------------------------------------------------------------------------------


def test_the_own_path_changes_nothing() -> None:
    model = tiny_denoiser()
    assert model.on_path(LINEAR) == model
    there_and_back = model.on_path(GVP).on_path(LINEAR)
    assert there_and_back == model
    assert model.native.path is model.path
    assert model.match(0.3) is None
    assert model.known_noise is None
    assert model.on_path(GVP).known_noise == (0.0, math.inf)
    assert Plan.uniform(model.on_path(GVP), 4, "euler", times="karras").times == make_grid(GVP, 4, "karras").tolist()


@pytest.mark.parametrize("kind", ["epsilon", "velocity", "sample", "v_prediction"])
def test_a_denoiser_on_another_path(kind: PredictionType) -> None:
    """One call by hand: times matched, state scaled, and the pair (x0, eps) is the same on both paths."""
    model = Denoiser(tiny_dit(), VP, kind, NetworkTime(scale=999.0))
    there = model.on_path(LINEAR)
    x, cond, t = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(3), 0.6
    found = match(VP, LINEAR, t)
    own = model(float(found.scale) * x, float(found.time), cond)
    moved = there(x, t, cond)
    assert (moved.kind, moved.path) == (kind, LINEAR)
    for same in ("sample", "epsilon"):
        torch.testing.assert_close(moved.to(same), own.to(same), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    velocity = model.on_path(LINEAR, "velocity")(x, t, cond)
    torch.testing.assert_close(velocity.value, own.to("epsilon") - own.to("sample"), rtol=1e-4, atol=1e-5)


def test_a_reversed_network_keeps_its_sign() -> None:
    """SiT's velocity runs backwards on its own path, whatever is asked of it elsewhere."""
    model = Denoiser(tiny_dit(), LINEAR, "velocity", NetworkTime.sit())
    x, cond, t = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(2), 0.4
    found = match(LINEAR, GVP, t)
    own = model(float(found.scale) * x, float(found.time), cond).to("sample")
    torch.testing.assert_close(model.on_path(GVP, "sample")(x, t, cond).value, own, rtol=1e-4, atol=1e-5)


def test_weak_calls_on_another_path() -> None:
    """Alignment happens on the network's own path, then the answer is carried over."""
    model = pliant.flexify(Denoiser(tiny_dit(), VP, "epsilon", NetworkTime(scale=999.0)), [4], rank=2)
    weak, x, cond = Compute(patch=(4, 4)), normal(2, 2, 8, 8).float(), torch.arange(2)
    found = match(VP, LINEAR, 0.7)
    own = model(float(found.scale) * x, float(found.time), cond, weak)
    moved = model.on_path(LINEAR, "velocity")(x, 0.7, cond, weak)
    torch.testing.assert_close(moved.value, own.to("epsilon") - own.to("sample"), rtol=1e-3, atol=1e-4)


def test_errors() -> None:
    with pytest.raises(ConfigError, match="not Gaussian"):
        tiny_denoiser().on_path(get_path("interpolant"))
    with pytest.raises(ConfigError, match="unknown prediction type"):
        tiny_denoiser().on_path(VP, "noise")  # type: ignore[arg-type]
    blind = Denoiser(tiny_dit(), GVP, "epsilon").on_path(LINEAR, "velocity")  # epsilon at alpha = 0
    with pytest.raises(ConfigError, match=r"does not determine velocity on path 'linear'; keep to times"):
        blind(torch.zeros(1, 2, 8, 8), 1.0, torch.zeros(1, dtype=torch.int64))


# Plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [False, True])
def test_plans_run_on_the_other_path(weak: bool) -> None:
    """The sampler's precomputed coefficients give what calling the denoiser gives."""
    model: Any = Denoiser(tiny_dit(), SD, "epsilon", NetworkTime.timesteps())
    if weak:
        model = pliant.flexify(model, [4], rank=2)
    model = model.on_path(LINEAR, "velocity")
    compute = Compute(patch=(4, 4)) if weak else Compute()
    plan = Plan.uniform(model, 6, "euler", compute, times="shifted")
    x, cond = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(3)
    found = Sampler(model, plan)(cond, [0, 1, 2], x)
    expected = x
    with torch.no_grad():
        for t, u in pairwise(plan.times):
            expected = expected + (u - t) * model(expected, t, cond, compute).value
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_plans_record_what_was_clipped() -> None:
    model = Denoiser(tiny_dit(), SD, "epsilon", NetworkTime.timesteps()).on_path(LINEAR, "velocity")
    plan = Plan.uniform(model, 50, "euler")
    # Starts where the network's noise does (15.3, step 4); the last step starts below its least noise.
    assert plan.times[0] == pytest.approx(14.614641 / 15.614641, abs=1e-6)
    assert plan.provenance["clipped"] == [pytest.approx(0.935958 / 50)]
    karras = Plan.uniform(model, 5, "euler", times="karras")  # grids of noise ratios keep to the network's
    ratios = LINEAR.noise_ratio(torch.tensor(karras.times[:-1:4])).tolist()
    assert ratios == pytest.approx([14.614641, 0.029167], rel=1e-4)
    assert "clipped" not in karras.provenance
    shifted = Plan.uniform(model, 5, "euler", times={"name": "shifted", "start": 1.0})
    assert shifted.provenance["clipped"] == [1.0]
    given = Plan.uniform(model, 2, "euler", times=[1.0, 0.5, 0.0])
    assert given.times[0] == 1.0
    assert given.provenance["clipped"] == [1.0]
    assert "clipped" not in Plan.uniform(tiny_denoiser(), 4, "euler").provenance
    assert bool(torch.isfinite(sample(model, given, [0, 1])).all())


def test_plans_take_grids_by_name() -> None:
    model = tiny_denoiser()
    plan = Plan.uniform(model, 4, "euler", times={"name": "shifted", "shift": 3.0})
    assert plan.times == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert plan.provenance["times"] == {"name": "shifted", "shift": 3.0}
    assert Plan.uniform(model, 4, "euler", times="uniform").digest() == Plan.uniform(model, 4, "euler").digest()
    with pytest.raises(pliant.PliantError, match="did you mean 'shifted'"):
        Plan.uniform(model, 4, times="shift")


def test_files_remember(tmp_path: Any) -> None:
    """A model folder keeps preconditioning and the path of training; fingerprints tell the variants apart."""
    plain = Denoiser(tiny_dit(), EDM_PATH, "sample", preconditioning=Preconditioning(sigma_data=0.7))
    moved = plain.on_path(LINEAR, "velocity")
    for model in (plain, moved):
        pliant.save(model, tmp_path / "model")
        back = pliant.load(tmp_path / "model")
        assert (back.path, back.prediction, back.trained) == (model.path, model.prediction, model.trained)
        assert back.preconditioning == model.preconditioning
        assert back.fingerprint() == model.fingerprint()
    assert plain.fingerprint() != moved.fingerprint()
    foreign = Denoiser(tiny_dit(), SD, "epsilon", NetworkTime.timesteps()).on_path(get_path("vp-discrete"))
    for model, message in ((plain, "is preconditioned"), (foreign, "trained on path 'vp-discrete'")):
        for name, target in (("official-dit", "foreign.pt"), ("diffusers", "foreign")):
            with pytest.raises(pliant.PliantError, match=message):
                pliant.save(model, tmp_path / target, format=name)
    assert replace(plain, preconditioning=Preconditioning()).fingerprint() != plain.fingerprint()


# Preconditioned networks ------------------------------------------------------------------------------------------


def test_preconditioned_call() -> None:
    """D = c_skip x + c_out F(c_in x, c_noise), on EDM's path and, the same D, on the linear path."""
    network, p = tiny_dit(), Preconditioning()
    model = Denoiser(network, EDM_PATH, "sample", preconditioning=p)
    x, cond, sigma = 3.0 * torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(2), 3.0
    skip, out, inp, noise = (float(v) for v in p.coefficients(sigma))
    with torch.no_grad():
        expected = skip * x + out * network(inp * x, torch.full((2,), noise), cond)
        found = model(x, sigma / 80.0, cond)
        torch.testing.assert_close(found.value, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.to("epsilon"), (x - expected) / sigma, rtol=1e-4, atol=1e-5)
        t = sigma / (1 + sigma)
        there = model.on_path(LINEAR)(x * (1 - t), t, cond)
        torch.testing.assert_close(there.value, expected, rtol=1e-4, atol=1e-5)


def test_preconditioned_plan_is_edm() -> None:
    """A compiled Heun plan on the default (Karras) grid is EDM's loop in sigma, written out."""
    model = Denoiser(tiny_dit(), EDM_PATH, "sample", preconditioning=Preconditioning())
    plan = Plan.uniform(model, 5, "heun")
    sigmas = [80.0 * t for t in plan.times]
    assert sigmas[-2:] == pytest.approx([0.002, 0.0])
    x, cond = 80.0 * torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(2)
    found = Sampler(model, plan)(cond, [0, 1], x)
    with torch.no_grad():
        for s, u in pairwise(sigmas):
            slope = (x - model(x, s / 80.0, cond).value) / s
            after = x + (u - s) * slope
            if u > 0:
                after = x + (u - s) * 0.5 * (slope + (after - model(after, u / 80.0, cond).value) / u)
            x = after
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_vp_row_equals_the_vp_path() -> None:
    """EDM's "vp" preconditioning is the epsilon network of the VP path seen from EDM's: two ways, one denoiser."""
    network = tiny_dit()
    by_row = Denoiser(network, EDM_PATH, "sample", preconditioning=Preconditioning("vp"))
    by_path = Denoiser(network, VP, "epsilon", NetworkTime(scale=999.0)).on_path(EDM_PATH, "sample")
    x, cond = 5.0 * torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(2)
    with torch.no_grad():
        a, b = by_row(x, 4.0 / 80, cond).value, by_path(x, 4.0 / 80, cond).value
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_preconditioned_weak_calls() -> None:
    """A preconditioned flexible network: the weak call is aligned, then preconditioned at the aligned noise."""
    model = pliant.flexify(Denoiser(tiny_dit(), EDM_PATH, "sample", preconditioning=Preconditioning()), [4], rank=2)
    weak, x, cond = Compute(patch=(4, 4)), normal(2, 2, 8, 8).float(), torch.arange(2)
    a = model.align(weak, torch.tensor(1.0 / 80, dtype=torch.float64))
    assert a is not None
    assert float(a.time) == pytest.approx(0.5 / 80)  # blocks of 4 pixels: half the noise
    assert float(a.input_scale) == pytest.approx(float(Preconditioning().c_in(0.5)))
    assert float(a.on_output) == pytest.approx(float(Preconditioning().c_out(0.5)))
    assert bool(torch.isfinite(model(x, 1.0 / 80, cond, weak).value).all())
    plan = Plan.uniform(model, 3, "euler", weak)
    found = Sampler(model, plan)(cond, [0, 1], 80 * x)
    expected = 80 * x
    with torch.no_grad():
        for t, u in pairwise(plan.times):
            expected = expected + (u - t) * model(expected, t, cond, weak).to("velocity")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_preconditioned_networks_predict_samples() -> None:
    with pytest.raises(ConfigError, match=r"predicts 'sample', not 'epsilon'; on_path"):
        Denoiser(tiny_dit(), EDM_PATH, "epsilon", preconditioning=Preconditioning())


# Other laws of noise ----------------------------------------------------------------------------------------------


def test_pfgmpp_starts_from_its_own_noise() -> None:
    """The sampler draws start states from the path: the Gaussian draw times one radius per seed."""
    seeds, steps = [3, 4, 5], {}
    for name in ("edm", "pfgmpp"):
        model = Denoiser(tiny_dit(), get_path(name), "sample", preconditioning=Preconditioning())
        plan = Plan.uniform(model, 1, "euler")
        steps[name] = (sample(model, plan, [0, 1, 2], seeds), sample(model, plan, [1], [4]))
        torch.testing.assert_close(steps[name][0][1:2], steps[name][1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steps["edm"][0], steps["pfgmpp"][0], rtol=1e-3)
