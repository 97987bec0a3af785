"""Gradients through sampling, against autograd through the unrolled program and against closed forms (sheet D, 11)."""

import math

import pytest
import torch
from torch import nn

from analytic import GAUSS1D, GMM2D, Mixture, noise_of, start_points
from pliant.errors import PlanError
from pliant.paths import get_path, uniform_times
from pliant.solvers import Output, compile_program, run
from pliant.solvers.adjoint import continuous_run, differentiable_run
from support.memory import watching

PATH = get_path("vp")
SOLVERS = ["ddim", "dpmpp-2m", "heun", "midpoint", "unipc-2", "dpmpp-3s", "f-pndm", {"name": "ddim", "eta": 0.8}]


def unrolled(program, x, evaluate, noise=None):
    for result in run(program, x, evaluate, noise):
        final = result.x
    return final


def mixture_with(means: torch.Tensor) -> Mixture:
    return Mixture(GMM2D.weights, means, GMM2D.stds)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("stored", ["epsilon", "sample", "v_prediction"])
def test_discrete_equals_autograd(solver, stored):
    """D 11, "it works when" (2): to 1e-10, for the start and for parameters of the denoiser."""
    program = compile_program(PATH, uniform_times(7, 1.0, 0.02), solver, stored)
    noise = noise_of((8, 2))
    found = []
    for mode in ("adjoint", "unrolled"):
        x, means = start_points().requires_grad_(), GMM2D.means.clone().requires_grad_()

        def evaluate(state, op, means=means):
            return Output(mixture_with(means).predict(stored, state, op.node))

        if mode == "adjoint":
            final = differentiable_run(program, x, evaluate, [means], noise)
        else:
            final = unrolled(program, x, evaluate, noise)
        (final**3).sum().backward()
        found.append((final.detach(), x.grad, means.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert float(found[0][2].abs().min()) > 1e-3


@pytest.mark.parametrize("solver", ["ddim", "mrs-2"])
def test_offset_of_a_mean_reverting_path(solver):
    program = compile_program(get_path("mean-reverting"), uniform_times(6, 0.9, 0.05), solver, "epsilon")
    assert program.needs_offset
    found = []
    for adjoint in (True, False):
        x, mu = start_points().requires_grad_(), start_points(seed=1).requires_grad_()

        def evaluate(state, op):
            return Output(torch.tanh(state * (1.0 + op.node.t)))

        if adjoint:
            final = differentiable_run(program, x, evaluate, mu=mu)
        else:
            for result in run(program, x, evaluate, mu=mu):
                final = result.x
        (final**2).sum().backward()
        found.append((x.grad, mu.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert float(theirs.abs().min()) > 0


class Net(nn.Module):
    """A network with variance output, many activations, and a condition."""

    def __init__(self, width=64, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(width if i else 3, width) for i in range(depth)])
        self.head = nn.Linear(width, 4)
        self.double()

    def forward(self, x, t, cond):
        h = torch.cat([x, torch.full_like(x[:, :1], t)], 1)
        for layer in self.layers:
            h = torch.tanh(layer(h)) + cond
        return self.head(h).chunk(2, 1)


def network_run(steps, solver, adjoint, variance=False):
    net, cond = Net(), torch.full((1, 64), 0.1, dtype=torch.float64, requires_grad=True)
    program = compile_program(PATH, uniform_times(steps, 0.9, 0.1), solver, "epsilon", variance)

    def evaluate(x, op):
        return Output(*net(x, op.node.t, cond))

    x = start_points(16).requires_grad_()
    inputs = [*net.parameters(), cond]
    noise = noise_of((16, 2))
    with watching() as held:
        if adjoint:
            final = differentiable_run(program, x, evaluate, inputs, noise)
        else:
            final = unrolled(program, x, evaluate, noise)
        gradients = torch.autograd.grad(final.square().sum(), [x, *inputs])
    return gradients, held.peak


@pytest.mark.parametrize("solver", [{"name": "ddpm", "variance": "learned-range"}, "dpmpp-2m"])
def test_weights_condition_and_learned_variance(solver):
    variance = solver != "dpmpp-2m"
    ours, theirs = (network_run(6, solver, adjoint, variance)[0] for adjoint in (True, False))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert float(b.abs().max()) > 0


def test_memory_does_not_grow_with_steps():
    """D 11, (4): what autograd holds at once is one call's activations; unrolled it is all calls'."""
    few, many = (network_run(n, "dpmpp-2m", adjoint=True)[1] for n in (5, 50))
    assert few == many > 0
    plain_few, plain_many = (network_run(n, "dpmpp-2m", adjoint=False)[1] for n in (5, 50))
    assert plain_many > 9 * plain_few and plain_few > 3 * few


def test_continuous_memory_does_not_grow_with_steps():
    """D 11, (4): the flow keeps its end state only; backwards there is one call's graph at a time."""
    net = torch.nn.Linear(2, 2).double()
    peaks = []
    for steps in (4, 40):
        times = log_ratio_times(get_path("vp"), steps, first=1.0, last=-2.0)
        x = start_points().requires_grad_()
        with watching() as held:
            continuous_run(
                get_path("vp"), times, x, lambda v, n: torch.tanh(net(v)), list(net.parameters())
            ).sum().backward()
        peaks.append(held.peak)
        assert float(x.grad.abs().min()) > 0 and float(net.weight.grad.abs().min()) > 0
    assert peaks[0] == peaks[1] > 0


# The continuous adjoint -------------------------------------------------------------------------------------------


def log_ratio_times(path, steps, first=4.0, last=None):
    """steps+1 times uniform in ln(rho) from rho = e^first to e^last."""
    last = math.log(1e-3) if last is None else last
    rho = torch.exp(torch.linspace(first, last, steps + 1, dtype=torch.float64))
    return path.time_of_noise_ratio(rho)


def test_continuous_against_the_closed_form():
    """D 11, (1): dx0/dxT = s / sqrt(alpha_T^2 s^2 + sigma_T^2); errors within 3 x 2.3e-4, 1.5e-5, 1.6e-6."""
    path = get_path("vp")
    for steps, allowed in ((25, 2.3e-4), (50, 1.5e-5), (100, 1.6e-6)):
        times = log_ratio_times(path, steps)
        s = path.alpha_sigma(times[0])
        exact = 0.7 / float((s.alpha**2 * 0.7**2 + s.sigma**2).sqrt())
        assert exact == pytest.approx(0.70006, abs=1e-5)
        x = torch.tensor([[0.4]], dtype=torch.float64, requires_grad=True)
        final = continuous_run(path, times, x, lambda v, n: GAUSS1D.predict("epsilon", v, n), method="rk4")
        final.sum().backward()
        assert abs(float(x.grad) - exact) < 3 * allowed


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4", "kutta-3"])
def test_continuous_parameter_gradients_converge_to_the_discrete_ones(method):
    path, errors = get_path("vp"), []
    for steps in (20, 40, 80):
        found = []
        for run_it in ("continuous", "finite differences"):
            means = GMM2D.means.clone().requires_grad_(run_it == "continuous")
            times = log_ratio_times(path, steps, first=1.0, last=-2.0)

            def loss(means, times=times):
                def epsilon(x, n):
                    return mixture_with(means).predict("epsilon", x, n)

                return (continuous_run(path, times, start_points(), epsilon, [means], method) ** 2).sum()

            if run_it == "continuous":
                loss(means).backward()
                found.append(float(means.grad[0, 0]))
            else:
                h = torch.zeros_like(means)
                h[0, 0] = 1e-5
                found.append(float(loss(means + h) - loss(means - h)) / 2e-5)
        errors.append(abs(found[0] - found[1]))
    assert errors[2] < 0.7 * errors[0] and errors[2] < (0.05 if method == "euler" else 1e-3)


def test_mean_gradient_equals_finite_differences():
    """D 11, (3): to 1e-6."""
    program = compile_program(PATH, uniform_times(20, 1.0, 0.01), "dpmpp-2m", "epsilon")

    def loss(mean):
        m = Mixture(GAUSS1D.weights, mean, GAUSS1D.stds)
        final = differentiable_run(
            program, start_points(4, 1), lambda x, op: Output(m.predict("epsilon", x, op.node)), [mean]
        )
        return (final**2).sum()

    mean = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    loss(mean).backward()
    with torch.no_grad():
        numeric = float(loss(mean + 1e-4) - loss(mean - 1e-4)) / 2e-4
    assert float(mean.grad) == pytest.approx(numeric, abs=1e-6)


# Misuse -----------------------------------------------------------------------------------------------------------


def test_missing_gradients_are_refused_not_zero():
    program = compile_program(PATH, uniform_times(3, 1.0, 0.1), "ddim", "epsilon")
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = start_points().requires_grad_()
    with pytest.raises(PlanError, match="1 tensors that require gradients"):
        differentiable_run(program, x, lambda v, op: Output(weight * v)).sum().backward()
    differentiable_run(program, x, lambda v, op: Output(weight * v), partial=True).sum().backward()
    assert weight.grad is None and x.grad is not None
    with pytest.raises(PlanError, match="no gradient"):
        differentiable_run(program, x, lambda v, op: Output(v.detach())).sum().backward()


def test_inputs_made_from_other_tensors():
    """An embedding looked up from a table: the gradient reaches the table through it."""
    program = compile_program(PATH, uniform_times(3, 1.0, 0.1), "ddim", "epsilon")
    table = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    row = table[1] * 2.0
    differentiable_run(program, start_points(), lambda v, op: Output(torch.sin(v * row)), [row]).sum().backward()
    assert float(table.grad[1].abs().min()) > 0 and float(table.grad[0].abs().max()) == 0


def test_continuous_refuses():
    x = start_points()
    with pytest.raises(PlanError, match="rk4"):
        continuous_run(PATH, [0.9, 0.1], x, lambda v, n: v, method="rk5")
    with pytest.raises(PlanError, match="alpha > 0"):
        continuous_run(get_path("linear"), [1.0, 0.1], x, lambda v, n: v)
