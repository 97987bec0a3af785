"""The losses of flow maps at their exact solutions, and what they make of a toy (sheets C 8-9 and H 5)."""

import math
from itertools import pairwise

import pytest
import torch

from pliant.errors import ConfigError
from pliant.paths import get_time_density, like
from pliant.training.draws import Draws
from pliant.training.objectives.alpha_flow import AlphaFlow, Curriculum
from pliant.training.objectives.base import Batch
from pliant.training.objectives.improved_mean_flow import ImprovedMeanFlow
from pliant.training.objectives.jump_times import jump_times
from pliant.training.objectives.jumps import heun_step, jump
from pliant.training.objectives.jvp import velocity_and_derivative, velocity_and_difference
from pliant.training.objectives.mean_flow import MeanFlow, learned_velocity
from pliant.training.objectives.segmented import SegmentedConsistency, segment_start
from pliant.training.objectives.shortcut import Shortcut
from pliant.training.objectives.split_mean_flow import SplitMeanFlow
from pliant.training.objectives.trajectory import TrajectoryConsistency, balance
from pliant.training.objectives.trig_consistency import TrigConsistency, trig_velocity
from support.flow_maps import (
    Stub,
    ToyMap,
    gaussian_map,
    gaussian_teacher,
    gaussian_velocity,
    mixture_samples,
    mixture_teacher,
    spread,
)
from support.networks import batch as network_batch
from support.networks import randomize, tiny_denoiser

STD = 0.5
GRID = tuple(1 - k / 16 for k in range(17))


def states(n=64, low=0.45, high=0.95):
    generator = torch.Generator().manual_seed(3)
    t = low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
    x = torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64) * spread(t, STD)[:, None, None, None]
    s = t * torch.rand(n, generator=generator, dtype=torch.float64)
    return x, t, s, torch.zeros(n, dtype=torch.int64)


def gaussian_batch(n=512):
    generator = torch.Generator().manual_seed(1)
    return Batch(STD * torch.randn(n, 1, 2, 2, generator=generator), torch.zeros(n, dtype=torch.int64))


def loss(objective, model, batch=None, step=0):
    batch = batch or gaussian_batch()
    return objective(model, batch, Draws(0, step, range(len(batch)), len(batch)))


def test_the_mean_flow_identity_holds_and_needs_the_right_derivative():
    x, t, s, y = states()
    v = gaussian_velocity(x, t, STD)
    u, du = velocity_and_derivative(gaussian_map(STD), x, t, y, v, lands=s)
    length = like(t - s, x)
    assert float((u - (v - length * du)).abs().max()) < 1e-12
    # Improved MeanFlow: V = u + (t - s) du/dt is the velocity itself.
    assert float((u + length * du - v).abs().max()) < 1e-12
    _, partial = velocity_and_derivative(gaussian_map(STD), x, t, y, v, rate=torch.zeros_like(t), lands=s)
    assert float((u - (v - length * partial)).abs().mean()) > 0.05  # as if the jump's length did not change with t


def test_averaged_derivatives_keep_the_slope_and_lose_the_ripples():
    """Networks that are told 1000 t ripple in t: of little size, but steeper than the map itself."""
    x, t, s, y = states()
    v = gaussian_velocity(x, t, STD)
    _, du = velocity_and_derivative(gaussian_map(STD), x, t, y, v, lands=s)
    u, averaged = velocity_and_difference(gaussian_map(STD), x, t, y, v, s, 0.02)
    assert torch.equal(u, gaussian_map(STD).value(x, t, s))
    length = like(t - s, x)  # what the loss multiplies it with
    assert float((length * (averaged - du)).abs().max()) < 0.02

    rippled = Stub(lambda x, t, s: gaussian_map(STD).value(x, t, s) + 0.02 * torch.cos(700 * like(t, x)))
    _, steep = velocity_and_derivative(rippled, x, t, y, v, lands=s)
    _, smooth = velocity_and_difference(rippled, x, t, y, v, s, 0.02)
    error, left = ((length * (found - du)).square().mean().sqrt() for found in (steep, smooth))
    assert float(error) > 2.0  # 700 * 0.02 / sqrt(2), times the jumps' lengths
    assert float(left) < 0.15 * float(error)
    # At the ends there is nothing to look at: rows that land where they are, at t = 1 and at t = 0, stay finite.
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    _, none = velocity_and_difference(gaussian_map(STD), x[:2], ends, y[:2], v[:2], ends, 0.02)
    assert bool(torch.isfinite(none).all())
    with pytest.raises(ConfigError, match="window"):
        MeanFlow(window=-0.1)


def test_one_jump_of_the_exact_map_is_the_data():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    one, zero = torch.ones(len(z), dtype=torch.float64), torch.zeros(len(z), dtype=torch.float64)
    final = jump(gaussian_map(STD), z, one, zero, zero.long())
    assert float(final.std() / z.std()) == pytest.approx(STD, abs=1e-12)
    middle = jump(gaussian_map(STD), z, one, one * 0.37, zero.long())
    assert torch.allclose(jump(gaussian_map(STD), middle, one * 0.37, zero, zero.long()), final, atol=1e-10)
    # Sheet C 8 (1): the shorter the jump, the more it is the flow's own velocity, and its clean data the denoiser's.
    x, t, _, _ = states()
    torch.testing.assert_close(gaussian_map(STD).value(x, t, t - 1e-6), gaussian_velocity(x, t, STD), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        MeanFlow(teacher=gaussian_teacher(STD), class_dropout=0),
        ImprovedMeanFlow(teacher=gaussian_teacher(STD), class_dropout=0),
        SplitMeanFlow(teacher=gaussian_teacher(STD), class_dropout=0),
        Shortcut(teacher=gaussian_teacher(STD), bootstrap=0.5, octaves=9, clip=9.0, class_dropout=0),
        TrajectoryConsistency(gaussian_teacher(STD), tuple(1 - k / 96 for k in range(97)), denoising=0.0),
        SegmentedConsistency(gaussian_teacher(STD), 4, 96),
    ],
    ids=lambda o: type(o).__name__,
)
def test_losses_vanish_at_the_exact_map_and_nowhere_near(objective):
    def size(model):
        logs = loss(objective, model)
        return float(logs.logs.get("error", logs.logs.get("bootstrap", logs.loss)))

    exact = size(gaussian_map(STD))
    # Jumps are as they should be for short steps, and 30 % too far for long ones.
    off = size(Stub(lambda x, t, s: (1 + 0.3 * like((t - s).clamp(0, 1), x)) * gaussian_map(STD).value(x, t, s)))
    assert exact < 2e-6
    assert off > 30 * exact


def test_still_rows_are_flow_matching():
    draws = Draws(0, 0, range(4096), 4096)
    t, s = jump_times(get_time_density("uniform"), 0.75, draws)
    assert bool((t >= s).all())
    assert float((t == s).double().mean()) == pytest.approx(0.75, abs=0.03)
    objective = MeanFlow(still=1.0, power=0.0, class_dropout=0)
    found = loss(objective, gaussian_map(STD))
    batch, draws = gaussian_batch(), Draws(0, 0, range(512), 512)
    t, _ = jump_times(objective.time, 1.0, draws)
    noise = draws.noise(Stub.path, batch.images.shape[1:])
    x = Stub.path.mix(batch.images, noise, t)
    expected = (gaussian_velocity(x, t, STD) - (noise - batch.images)).square().flatten(1).sum(1).mean()
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)


def test_guidance_is_learned_with_its_effective_scale():
    """omega v + (1 - omega - kappa) u(null) + kappa u(c): at the fixed point the scale is omega / (1 - kappa)."""
    omega, kappa = 0.6, 0.5
    conditional, unconditional = 2.0, 0.5

    def value(x, t, s):
        return torch.full_like(x, unconditional)

    class Guided(Stub):
        def __call__(self, x, t, labels, compute=None, lands=None):
            found = super().__call__(x, t, labels, compute, lands)
            fixed = unconditional + omega / (1 - kappa) * (conditional - unconditional)
            found.value = torch.where((labels == 1)[:, None, None, None], unconditional, torch.full_like(x, fixed))
            return found

    batch = Batch(torch.zeros(8, 1, 2, 2), torch.zeros(8, dtype=torch.int64))
    noise = torch.full((8, 1, 2, 2), conditional)  # the data's velocity: noise - image
    x, t = torch.zeros(8, 1, 2, 2), torch.full((8,), 0.5, dtype=torch.float64)
    labels = torch.tensor([0] * 7 + [1])
    out = learned_velocity(Guided(value), None, omega, kappa, batch, noise, x, t, labels)
    # The paper's combination weighs (omega, 1 - omega - kappa, kappa); its fixed point is the guided velocity.
    fixed = unconditional + omega / (1 - kappa) * (conditional - unconditional)
    assert torch.allclose(out[:7], torch.full((7, 1, 2, 2), fixed))
    assert torch.allclose(out[7:], torch.full((1, 1, 2, 2), conditional))  # a row without label is not guided


def test_alpha_flow_s_error_vanishes_linearly_and_alpha_1_is_flow_matching():
    """Sheet H, 5.3: (u - target)/alpha tends to MeanFlow's residual, zero at the exact map."""
    sizes = []
    for alpha in (0.4, 0.2, 0.1, 0.05):
        objective = AlphaFlow(
            gaussian_teacher(STD), alpha=Curriculum(0, 1, alpha), still=0.0, power=0.0, class_dropout=0
        )
        # error is already divided by alpha once: sqrt(error/alpha) is |u - target|/alpha.
        sizes.append(math.sqrt(float(loss(objective, gaussian_map(STD), step=5).logs["error"]) / alpha))
    for longer, shorter in pairwise(sizes):
        assert 1.6 < longer / shorter < 2.8
    curriculum = Curriculum(10, 110, 0.05)
    assert curriculum(0) == 1.0 and curriculum(60) == pytest.approx(0.5) and curriculum(110) == 0.05
    assert all(curriculum(k) >= curriculum(k + 1) for k in range(120))


def test_segments_begin_where_published():
    """Sheet C 9 (1): T = 1000, t = 700; a boundary belongs to the segment below it."""
    t = torch.tensor([0.7], dtype=torch.float64)
    assert [float(segment_start(t, k)) for k in (8, 4, 2, 1)] == [0.625, 0.5, 0.5, 0.0]
    boundary = torch.tensor([0.5], dtype=torch.float64)
    assert [float(segment_start(boundary, k)) for k in (8, 4, 2, 1)] == [0.375, 0.25, 0.0, 0.0]


def test_jumps_to_the_segment_s_start_are_phased_consistency():
    """Sheet C 9 (4): with the end always at t_b the loss is PCM's, written out here."""

    class ToTheStart(Draws):
        def uniform(self):
            return torch.zeros(len(self.rows))

    x0 = gaussian_batch(256)
    draws = ToTheStart(0, 0, range(256), 256)
    off = Stub(lambda x, t, s: 1.2 * gaussian_map(STD).value(x, t, s))
    found = SegmentedConsistency(gaussian_teacher(STD), 4, 16)(off, x0, draws)

    again = ToTheStart(0, 0, range(256), 256)
    n = 1 + again.integers(16)
    t, before = n.double() / 16, (n - 1).double() / 16
    start = torch.div(n - 1, 4, rounding_mode="floor").double() / 4  # four grid steps to a segment
    x = Stub.path.mix(x0.images, again.noise(Stub.path, x0.images.shape[1:]), t)
    target = jump(off, heun_step(gaussian_teacher(STD), x, t, before, x0.labels, 1.0), before, start, x0.labels)
    expected = (jump(off, x, t, start, x0.labels) - target).square().mean()
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_error_of_local_targets_falls_with_the_teacher_s_step():
    """Sheet C 9 (2): zero as h -> 0. With Heun's step the squared loss falls like h^6, here at least 16-fold."""
    coarse, fine = (
        float(loss(SegmentedConsistency(gaussian_teacher(STD), 2, n), gaussian_map(STD)).loss) for n in (8, 32)
    )
    assert fine < coarse / 16
    far, near = (
        float(
            loss(
                TrajectoryConsistency(gaussian_teacher(STD), tuple(1 - k / n for k in range(n + 1)), denoising=0.0),
                gaussian_map(STD),
            ).loss
        )
        for n in (8, 32)
    )
    assert near < far / 16


def test_only_the_estimate_carries_gradients():
    """Sheet C 8 (4): the branch through the teacher is a constant."""
    model = tiny_denoiser(flow_map=True)
    randomize(model.network, 4)
    teacher = tiny_denoiser(seed=2)
    x, _, y = network_batch(model.network, 4)
    objective = TrajectoryConsistency(teacher, GRID, denoising=0.0)
    grid = torch.tensor(GRID, dtype=torch.float64)
    start = torch.tensor([0, 1, 2, 3])
    target, _ = objective.target(model, x, grid, start, 2, start + 4, y)
    assert not target.requires_grad
    result = objective(model, Batch(x, y), Draws(0, 0, range(4), 4))
    result.loss.backward()
    assert float(model.network.head.weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_jumps_that_end_at_clean_data_are_finite_at_weak_patches():
    """A noise-aligned weak patch divides by t: nobody may ask it at t = 0, where CTM's flights and landings may be."""
    from pliant import flexify
    from pliant.adapters.flow_map import flow_map
    from pliant.training.objectives.shared import AtPatch

    weak = AtPatch.of(flow_map(flexify(tiny_denoiser(), [4], initialisation="noise-aligned")), (4, 4))
    x, _, y = network_batch(weak.network, 8)
    zero = torch.zeros(8, dtype=torch.float64)
    assert torch.equal(jump(weak, x, zero, zero, y), x)
    objective = TrajectoryConsistency(tiny_denoiser(), (1.0, 0.5, 0.0), most=2)
    for step in range(4):
        result = objective(weak, Batch(x, y), Draws(0, step, range(8), 8))
        result.loss.backward()
        assert bool(torch.isfinite(result.loss))
    assert all(bool(torch.isfinite(p.grad).all()) for p in weak.network.parameters() if p.grad is not None)


def test_split_mean_flow_converges_at_all_patch_sizes():
    """Halves by the running average at the model's own patch size; by the weak student itself its error only grows."""
    from pliant import flexify
    from pliant.adapters.flow_map import flow_map
    from pliant.training.ema import EMA
    from pliant.training.models import prepared
    from pliant.training.objectives.shared import AtPatch, SharedPatches

    teacher = tiny_denoiser()
    randomize(teacher.network, 4)
    model = flow_map(flexify(teacher, [4], initialisation="noise-aligned"))
    generator, labels = torch.Generator().manual_seed(5), torch.arange(24) % 3
    z, exact = (torch.randn(24, 2, 8, 8, generator=generator),) * 2
    grid = torch.linspace(1, 1e-3, 9, dtype=torch.float64)
    with torch.no_grad():
        for a, b in pairwise(grid):
            exact = heun_step(teacher, exact, a.expand(24), b.expand(24), labels, 1.0)

    def errors():
        one, zero = torch.ones(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
        with torch.no_grad():
            landed = [jump(m, z, one, zero, labels) for m in (model, AtPatch.of(model, (4, 4)))]
        return [float((x - exact).square().mean().sqrt()) for x in landed]

    before = errors()
    ema = EMA(dict(model.network.named_parameters()), 0.98)
    own = SplitMeanFlow(teacher=teacher, still=0.25, time=get_time_density("uniform"), class_dropout=0)
    objective = prepared(SharedPatches(own), model, ema)
    assert objective.own.average is not None
    optimizer = torch.optim.Adam(model.network.parameters(), 3e-3)
    losses: tuple[list[float], list[float]] = ([], [])
    for step in range(60):
        x = 0.5 * torch.randn(24, 2, 8, 8, generator=generator)
        optimizer.zero_grad()
        found = objective(model, Batch(x, labels), Draws(0, step, range(24), 24))
        found.loss.backward()
        optimizer.step()
        ema.update(step)
        losses["loss_patch_4x4" in found.logs].append(float(found.logs["error"]))
    assert all(math.isfinite(error) for found in losses for error in found)
    for found in losses:  # of strong steps, and of weak ones, whose targets are as good as the strong ones
        assert sum(found[-10:]) < 0.9 * sum(found[:10])
    strong, weak = errors()
    assert strong < before[0] and weak < 0.85 * before[1]


def test_ctm_balances_both_losses_at_the_last_layer():
    model, teacher = tiny_denoiser(flow_map=True), tiny_denoiser(seed=2)
    randomize(model.network, 4)
    x, _, y = network_batch(model.network, 4)
    objective = TrajectoryConsistency(teacher, GRID)
    draws = lambda: Draws(0, 0, range(4), 4)  # noqa: E731
    result = objective(model, Batch(x, y), draws())
    weight = (float(result.loss.detach()) - float(result.logs["consistency"])) / float(result.logs["denoising"])
    head = model.network.head.weight
    both = balance(model, head.square().sum(), 2 * head.square().sum())
    assert float(both) == pytest.approx(0.5, rel=1e-3)  # a loss twice as steep gets half the weight
    assert weight > 0


def test_trigflow_wraps_a_rectified_flow_and_its_exact_consistency_has_no_tangent():
    """Sheet H, 5.5: f = s x / sigma(a), sigma^2 = cos^2 s^2 + sin^2; g = 0 at the exact F, not at the flow's own."""
    n, y = 4096, torch.zeros(4096, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    angle = 0.05 + 1.5 * torch.rand(n, generator=generator, dtype=torch.float64)
    cos, sin = torch.cos(angle), torch.sin(angle)
    sigma = (cos**2 * STD**2 + sin**2).sqrt()
    x = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64) * sigma[:, None, None, None]
    flow = trig_velocity(gaussian_teacher(STD), x, angle, y)
    exact_flow = x * like(sin * cos * (1 - STD**2) / sigma**2, x)
    assert float((flow - exact_flow).abs().max()) < 1e-12
    # The consistency function as a rectified-flow velocity: x0 = (STD/sigma) x at every state.
    def consistent(state, t, s):
        total = 1 / ((1 - t) ** 2 + t**2).sqrt()  # cos + sin at the angle of time t
        a = torch.atan2(t, 1 - t)
        own = (torch.cos(a) ** 2 * STD**2 + torch.sin(a) ** 2).sqrt()
        clean = like(STD / own * total, state) * state
        return (state - clean) / like(t, state)

    def tangent(model, window=0.0):
        objective = TrigConsistency(gaussian_teacher(STD), warmup=0, window=window)
        answer, moved = objective._derivative(model, x, angle, y, flow)
        c, s = like(cos, x), like(sin, x)
        return -(c**2) * (answer - flow) - (c * s * x + moved)

    assert float(tangent(Stub(consistent, flow_map=False)).abs().max()) < 1e-10
    assert float(tangent(gaussian_teacher(STD)).abs().mean()) > 0.1
    # Averaged over a window the exact one has next to none, and ripples in t do not make one.
    assert float(tangent(Stub(consistent, flow_map=False), 0.02).abs().mean()) < 2e-3

    def rippled(state, t, s):
        return consistent(state, t, s) + 0.02 * torch.cos(700 * like(t, state))

    steep, smooth = (tangent(Stub(rippled, flow_map=False), window).abs().mean() for window in (0.0, 0.02))
    assert float(steep) > 10 * float(smooth)


def test_scm_moves_towards_consistency():
    """The gradient of the loss is -2 g / size: a network off its fixed point has one, along the tangent."""
    model, teacher = tiny_denoiser(), tiny_denoiser(seed=2)
    x, _, y = network_batch(model.network, 4)
    result = TrigConsistency(teacher, warmup=0)(model, Batch(x, y), Draws(0, 3, range(4), 4))
    result.loss.backward()
    assert float(model.network.head.weight.grad.abs().sum()) > 0
    assert float(result.loss) <= 1.0 / x[0].numel()  # normalised tangents: at most 1 per sample


def test_heun_step_is_second_order():
    x, t, s, y = states()
    errors = []
    for n in (4, 8):
        z = x
        for k in range(n):
            a, b = t + (s - t) * k / n, t + (s - t) * (k + 1) / n
            z = heun_step(gaussian_teacher(STD), z, a, b, y, 1.0)
        errors.append(float((z - x * like(spread(s, STD) / spread(t, STD), x)).abs().mean()))
    assert 3.3 < errors[0] / errors[1] < 5.0


@pytest.mark.parametrize("objective", [MeanFlow(), AlphaFlow(), SplitMeanFlow(), Shortcut(), ImprovedMeanFlow()])
def test_objectives_of_flow_maps_train_networks_and_refuse_others(objective):
    model = tiny_denoiser(flow_map=True)
    randomize(model.network, 4)
    objective.check(model)
    x, _, y = network_batch(model.network, 16)
    result = objective(model, Batch(x, y % 3), Draws(0, 600, range(16), 16))
    result.loss.backward()
    assert float(model.network.jump_embed.fc2.weight.grad.abs().sum()) > 0  # it learns from where it lands
    assert objective.flops(model) > 3 * model.flops()
    with pytest.raises(ConfigError, match="flow map"):
        objective.check(tiny_denoiser())
    with pytest.raises(ConfigError, match="linear path"):
        objective.check(tiny_denoiser(path="cosine", flow_map=True))


def one_jump_error(model, gamma_jumps=1):
    """RMSE of the toy's samples in so many jumps to the exact flow (Heun, 64 steps of the exact velocity)."""
    generator = torch.Generator().manual_seed(9)
    z = torch.randn(2000, 1, 1, 1, generator=generator)
    y = torch.zeros(2000, dtype=torch.int64)
    grid = torch.linspace(1, 0, 65, dtype=torch.float64)
    exact = z
    for a, b in pairwise(grid):
        exact = heun_step(mixture_teacher(), exact, a.expand(2000), b.expand(2000), y, 1.0)
    x = z
    ends = torch.linspace(1, 0, gamma_jumps + 1, dtype=torch.float64)
    with torch.no_grad():
        for a, b in pairwise(ends):
            told = b if model.config.flow_map else None
            p = model(x, a.expand(2000), y, lands=told)
            x = x - float(a - b) * p.to("velocity")
    return float((x - exact).square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        MeanFlow(mixture_teacher(), still=0.25, power=0.5, time=get_time_density("uniform"), class_dropout=0),
        ImprovedMeanFlow(mixture_teacher(), still=0.25, power=0.5, time=get_time_density("uniform"), class_dropout=0),
        AlphaFlow(
            mixture_teacher(), alpha=Curriculum(0, 1000, 0.1), still=0.25, power=0.5,
            time=get_time_density("uniform"), class_dropout=0,
        ),
        SplitMeanFlow(mixture_teacher(), still=0.4, power=0.5, time=get_time_density("uniform"), class_dropout=0),
        Shortcut(mixture_teacher(), bootstrap=0.5, octaves=5, class_dropout=0),
        TrajectoryConsistency(mixture_teacher(), GRID, denoising=1.0),
        SegmentedConsistency(mixture_teacher(), 4, 16),
        TrigConsistency(mixture_teacher(), warmup=200),
    ],
    ids=lambda o: type(o).__name__,
)  # fmt: skip
def test_a_toy_learns_to_jump(objective, record_property):
    """Sheets C 8 (3), 9 (3), H 5.1 (3): one jump within .25 of the exact flow (TSCD of 4 segments: four jumps)."""
    model = ToyMap(flow_map=not isinstance(objective, TrigConsistency))
    start = one_jump_error(model)
    optimizer = torch.optim.Adam(model.network.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(1)
    steps = 2000
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        batch = Batch(mixture_samples(256, generator), torch.zeros(256, dtype=torch.int64))
        optimizer.zero_grad()
        objective(model, batch, Draws(0, step, range(256), 256)).loss.backward()
        optimizer.step()
    jumps = 4 if isinstance(objective, SegmentedConsistency) else 1
    found = one_jump_error(model, jumps)
    print(f"{type(objective).__name__}: {jumps} jump(s), RMSE {found:.3f} (untrained {start:.3f})")
    record_property("rmse", found)
    assert found < 0.25
    if isinstance(objective, TrajectoryConsistency):  # sheet C 8 (3): four jumps are not worse than one
        four = one_jump_error(model, 4)
        print(f"four jumps: RMSE {four:.3f}")
        assert four < found + 0.01


def test_a_critic_trains_beside_the_map_and_resumes_exactly(tmp_path):
    """CTM's adversarial term: the critic learns to tell, the map to fool it, and checkpoints hold both."""
    from pliant.training import parse_config
    from pliant.training.critic import Critic
    from pliant.training.models import companions
    from pliant.training.state import Trainable

    model, teacher = tiny_denoiser(flow_map=True), tiny_denoiser(seed=2)
    randomize(model.network, 4)
    x, _, y = network_batch(model.network, 8)
    critic = Critic(2, 3, 8)
    objective = TrajectoryConsistency(teacher, GRID, critic=critic, adversarial=0.5, after=2)
    assert companions(objective) == [critic]
    early = objective(model, Batch(x, y), Draws(0, 0, range(8), 8))
    assert "adversarial" not in early.logs and "critic" in early.logs
    late = objective(model, Batch(x, y), Draws(0, 2, range(8), 8))
    late.loss.backward()
    assert float(critic.score.weight.grad.abs().sum()) > 0
    # The term that fools the critic must not train it: its gradient is that of the critic's own loss alone.
    alone = torch.autograd.grad(late.logs["critic"] * 0 + critic.hinge(x, torch.zeros_like(x), y), critic.score.weight)
    assert alone[0].shape == critic.score.weight.shape
    fake = torch.zeros_like(x, requires_grad=True)
    critic.zero_grad()
    (-critic.frozen(fake, y).mean()).backward()
    assert critic.score.weight.grad is None and float(fake.grad.abs().sum()) > 0
    tree = {"model": {"dit": model.config.to_dict()}}
    tree |= {"data": {"source": "digits"}, "steps": 2, "batch_size": 8, "output": str(tmp_path)}
    state = Trainable(model.network, parse_config(tree), [critic])
    assert any(name.startswith("companions.0.") for name in state.capture(1).model)
    assert not any("companions" in name for name in state.capture(1).ema)
    before = critic.score.weight.detach().clone()
    kept = state.capture(1)
    kept = type(kept)(kept.step, {k: v.clone() for k, v in kept.model.items()}, kept.ema, kept.optimizer, kept.info)
    with torch.no_grad():
        critic.score.weight.add_(1.0)
    state.restore(tmp_path, kept)
    assert torch.equal(critic.score.weight, before)
