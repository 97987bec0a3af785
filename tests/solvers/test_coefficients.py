"""Moments, fit rules and forms; and that the representation carries what the catalogue will need."""

import dataclasses
import math

import pytest
import torch

from analytic import GMM2D, exact_flow, sample, slope, start_points, times_between
from pliant.errors import PlanError
from pliant.paths import get_path, uniform_times
from pliant.solvers import (
    TABLEAUS,
    Eval,
    Lin,
    Multistep,
    ProgramBuilder,
    compile_program,
)
from pliant.solvers.coefficients import FORMS, depth_of_eta, depth_of_tau, get_form, order_allowed, step_weights
from pliant.solvers.exponential import emit_multistep
from pliant.solvers.fits import FITS, Pseudo, lagrange, midpoint, moments, published3, raw

START = start_points()


@pytest.mark.parametrize("decay", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("h", [1e-6, 1e-2, 0.4, -0.7, 1.3, 3.0, -2.5, 9.0])
def test_moments_against_quadrature(h, decay):
    # 60-point Gauss-Legendre is exact to rounding for these smooth integrands.
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(60)
    u = 0.5 * h * (nodes + 1.0)
    for k, value in enumerate(moments(h, decay, 5)):
        exact = float(np.sum(0.5 * h * weights * np.exp(-decay * (h - u)) * u**k))
        assert value == pytest.approx(exact, rel=2e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_lagrange_solves_the_moment_equations(count):
    h, offsets = 0.35, [0.0, -0.4, -0.71, 0.35, -1.3, 0.2][:count]
    m = moments(h, 1.0, count)
    weights = lagrange(m, h, offsets)
    for k in range(count):
        assert sum(w * nu**k for w, nu in zip(weights, offsets, strict=True)) == pytest.approx(m[k], rel=1e-10)


def test_published_rules_by_hand():
    """2M midpoint: `w_0 = M_0 (1 + 1/(2r))`; 3M published = lagrange minus half the quadratic moment."""
    h, r = 0.3, 1.4
    m = moments(h, 1.0, 3)
    assert midpoint(m, h, [0.0, -r * h]) == pytest.approx([m[0] * (1 + 0.5 / r), -m[0] * 0.5 / r], rel=1e-13)
    w = published3(m, h, [0.0, -h, -2 * h])
    quadratic = [v * f for v, f in zip(w, (0.0, h**2, 4 * h**2), strict=True)]
    assert sum(w) == pytest.approx(m[0])
    assert sum(quadratic) == pytest.approx(m[2] * 0.5)


def test_published3_on_any_nodes():
    """The subtracted row is the second divided difference: 0 on lines, 1 on u^2, wherever the nodes lie."""
    offsets, h = [0.1, -0.3, -0.7], 0.5
    m = moments(h, 1.0, 3)
    gap = [a - b for a, b in zip(lagrange(m, h, offsets), published3(m, h, offsets), strict=True)]
    for power, expected in enumerate((0.0, 0.0, 0.5 * m[2])):
        assert sum(w * v**power for w, v in zip(gap, offsets, strict=True)) == pytest.approx(expected, abs=1e-14)


def test_pseudo_divides_the_total():
    m = moments(0.5, 1.0, 2)
    rule = Pseudo((1.5, -0.5))
    assert rule(m, 0.5, [0.0, -0.4]) == [1.5 * m[0], -0.5 * m[0]]
    assert rule.shares(4.0, 2) == [6.0, -2.0]
    with pytest.raises(PlanError, match="2 weights for 3"):
        rule.shares(4.0, 3)


def order_of(solver, path="vp", stored="epsilon", counts=(96, 192, 384)):
    p = get_path(path)
    found = []
    for n in counts:
        program = compile_program(p, times_between(p, n, -4.0, 4.0), solver, stored)
        exact = exact_flow(GMM2D, START, program.start, program.end)
        found.append(float((sample(program, GMM2D, START) - exact).abs().max()))
    return slope(found)


@pytest.mark.parametrize("form", ["sample", "epsilon", "epsilon-rho", "velocity", "angle"])
def test_third_order_in_every_form(form):
    """The coefficient builder beyond today's catalogue: 3M lagrange is third order whatever is
    interpolated.
    """
    # (on grids uniform in log-SNR, where the first-order warm-up costs less than the third-order error)
    assert order_of(Multistep(3, form, "lagrange"), path="linear" if form == "velocity" else "vp") == pytest.approx(
        3.0, abs=0.3
    )


def test_published_third_order_is_second():
    assert order_of(Multistep(3, fit="published3")) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("name", FORMS)
def test_order_conditions(name):
    """`sum_j c_j nu_j^k = b * M_k` for k < n, in every form."""
    path = get_path("vp")
    s, t, a, b = (ProgramBuilder(path, [0.5, 0.4], "epsilon").node(v) for v in (0.5, 0.4, 0.6, 0.75))
    form = get_form(name)
    step, weights = step_weights(form, s, t, [s, a, b])
    nu = [form.variable(n) - form.variable(s) for n in (s, a, b)]
    for k, m in enumerate(moments(step.h, step.decay, 3)):
        assert sum(w * v**k for w, v in zip(weights, nu, strict=True)) == pytest.approx(step.b * m, rel=1e-10)
    assert step_weights(form, s, t, [s])[1][0] == pytest.approx(step.total, rel=1e-12)


def test_stochastic_forms_share_their_marginal():
    """x0 form: `A^2 sigma_s^2 + N^2 = sigma_t^2`. eps form at tau=1: `a^2 + ...` by DPM-Solver's own
    formula.
    """
    path = get_path("vp")
    s, t = (ProgramBuilder(path, [0.5, 0.4], "epsilon").node(v) for v in (0.5, 0.4))
    h = t.log_snr - s.log_snr
    for depth in (depth_of_eta(0.5, s, t), depth_of_tau(1.0, s, t), depth_of_tau(0.3, s, t)):
        step, _ = step_weights(get_form("sample"), s, t, [s], depth=depth)
        assert step.a**2 * s.sigma**2 + step.noise**2 == pytest.approx(t.sigma**2, rel=1e-13)
    assert depth_of_eta(1.0, s, t) == pytest.approx(h, rel=1e-13)
    step, weights = step_weights(get_form("epsilon"), s, t, [s], depth=depth_of_tau(1.0, s, t))
    assert weights[0] == pytest.approx(-2.0 * t.sigma * math.expm1(h))
    assert step.noise == pytest.approx(t.sigma * math.sqrt(math.expm1(2 * h)))


def test_limits():
    path = get_path("linear")
    b = ProgramBuilder(path, [1.0, 0.5, 0.0], "velocity")
    noise, mid, data = b.nodes
    step, weights = step_weights(get_form("sample"), mid, data, [mid])
    assert (step.a, weights, step.noise) == (0.0, [1.0], 0.0)
    step, weights = step_weights(get_form("epsilon"), mid, data, [mid])
    assert (step.a, weights) == (2.0, [-1.0])
    step, weights = step_weights(get_form("sample"), noise, mid, [noise])
    assert (step.a, weights) == (0.5, [0.5])
    late = b.node(0.25)  # arriving at pure noise, where alpha is 0: x = sigma_t eps, eps = (x - alpha x0)/sigma
    step, weights = step_weights(get_form("sample"), late, noise, [late])
    assert (step.a, weights, step.noise) == (4.0, [-3.0], 0.0)
    step, weights = step_weights(get_form("epsilon"), late, noise, [late])
    assert (step.a, weights, step.noise) == (0.0, [1.0], 0.0)
    form = get_form("sample")
    assert order_allowed(form, mid, data, [mid, noise]) == 1
    assert order_allowed(form, mid, b.node(0.4), [mid, noise]) == 1  # history at log-SNR = -inf is not used
    assert order_allowed(form, mid, b.node(0.4), [mid, b.node(0.5 + 1e-9)]) == 1  # nearly repeated
    assert order_allowed(form, mid, b.node(0.4), [mid, b.node(0.6)]) == 2
    with pytest.raises(PlanError, match="alpha"):
        step_weights(get_form("epsilon"), noise, mid, [noise])
    with pytest.raises(PlanError, match="sigma"):
        step_weights(form, data, mid, [data])
    with pytest.raises(PlanError, match="infinite"):
        step_weights(form, mid, data, [mid, noise])


def test_last_step_to_data_is_first_order_and_exact():
    """At sigma = 0 the sample is the x0 estimate of the last call, bit for bit in its own coefficients."""
    for stored in ("sample", "epsilon", "velocity"):
        program = compile_program(get_path("linear"), uniform_times(6, 0.99), "dpmpp-2m", stored)
        last = program.steps[-1][-1]
        assert isinstance(last, Lin) and [j for j, _ in last.m] == [program.num_evaluations - 1]
        if stored == "sample":
            assert last.x == () and last.m == ((program.num_evaluations - 1, 1.0),)


def test_lower_order_final_on_a_grid_that_ends_early():
    path = get_path("vp")
    times = uniform_times(5, 1.0, 0.1)
    second = compile_program(path, times, "dpmpp-2m", "sample").steps[-1][-1]
    first = compile_program(path, times, {"name": "dpmpp-2m", "lower_order_final": True}, "sample").steps[-1][-1]
    assert isinstance(second, Lin) and isinstance(first, Lin)
    assert (len(second.m), len(first.m)) == (2, 1)


def test_history_is_kept_or_reset():
    path = get_path("vp")
    times = uniform_times(6)
    kept = compile_program(path, times, "dpmpp-2m", "sample")
    reset = compile_program(path, times, "dpmpp-2m", "sample", reset_history=[3])
    sizes = [[len(op.m) for op in p.instructions() if isinstance(op, Lin)] for p in (kept, reset)]
    assert sizes == [[1, 2, 2, 2, 2, 1], [1, 2, 2, 1, 2, 1]]


def test_raw_rows_and_unknown_names():
    path = get_path("vp")
    s, t = (ProgramBuilder(path, [0.5, 0.4], "epsilon").node(v) for v in (0.5, 0.4))
    _, weights = step_weights(get_form("velocity"), s, t, [s, t], raw([0.25, -0.5]))
    assert weights == [0.25, -0.5]
    with pytest.raises(PlanError, match="lagrange"):
        step_weights(get_form("sample"), s, t, [s, t], "lagrang")
    with pytest.raises(PlanError, match="epsilon"):
        get_form("epsilo")
    with pytest.raises(PlanError, match="angle form"):
        b = ProgramBuilder(get_path("linear"), [0.5, 0.4], "velocity")
        step_weights(get_form("angle"), *b.nodes, [b.nodes[0]])
    assert set(FITS) >= {"lagrange", "midpoint", "published3"}


def test_offset_follows_the_path():
    """On `alpha x0 + sigma eps + beta mu`, constant x0 and eps: every state is exact, mu included."""
    path = get_path("vp")
    b = ProgramBuilder(path, [0.9, 0.6, 0.3, 0.0], "epsilon")
    b.nodes = [dataclasses.replace(n, beta=1.0 - n.alpha) for n in b.nodes]
    for i in range(3):
        emit_multistep(b, i, 2, "sample", "lagrange")
        b.close_step("test")
    program = b.finish()
    program = dataclasses.replace(program, start=b.nodes[0], end=b.nodes[-1])
    assert program.needs_offset
    values = {0: program.start.beta}  # coefficient of mu in each state; outputs (epsilon) carry none
    for op in program.instructions():
        if not isinstance(op, Eval):
            values[op.out] = op.mu + sum(c * values[i] for i, c in op.x)
            assert values[op.out] == pytest.approx(op.node.beta, abs=1e-12)
    v = ProgramBuilder(path, [0.9, 0.6], "velocity")
    v.nodes = [dataclasses.replace(n, beta=1.0 - n.alpha) for n in v.nodes]
    with pytest.raises(PlanError, match="offset"):
        emit_multistep(v, 0, 1, "sample", "lagrange")


def test_coefficients_are_float64():
    program = compile_program(
        get_path("vp-discrete"), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), "ddim", "epsilon"
    )
    s, t = program.start, program.steps[0][-1].node
    lin = program.steps[0][-1]
    assert isinstance(lin, Lin)
    assert dict(lin.x)[0] == pytest.approx(t.alpha / s.alpha, rel=1e-14)
    assert dict(lin.m)[0] == pytest.approx(t.sigma - s.sigma * t.alpha / s.alpha, rel=1e-13)


# Order conditions of Runge-Kutta methods: one per rooted tree, as (order, left side, right side).
def tree_conditions(tableau):
    c = torch.tensor(tableau.c, dtype=torch.float64)
    b = torch.tensor(tableau.b, dtype=torch.float64)
    a = torch.zeros(len(c), len(c), dtype=torch.float64)
    for i, row in enumerate(tableau.a):
        a[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    ac, acc = a @ c, a @ c**2
    sides = [(1, b.sum(), 1), (2, b @ c, 1 / 2), (3, b @ c**2, 1 / 3), (3, b @ ac, 1 / 6)]
    sides += [(4, b @ c**3, 1 / 4), (4, b @ (c * ac), 1 / 8), (4, b @ acc, 1 / 12), (4, b @ (a @ ac), 1 / 24)]
    sides += [
        (5, b @ c**4, 1 / 5),
        (5, b @ (c**2 * ac), 1 / 10),
        (5, b @ (c * acc), 1 / 15),
        (5, b @ (a @ c**3), 1 / 20),
    ]
    sides += [(5, b @ (c * (a @ ac)), 1 / 30), (5, b @ ac**2, 1 / 20), (5, b @ (a @ (c * ac)), 1 / 40)]
    sides += [(5, b @ (a @ acc), 1 / 60), (5, b @ (a @ (a @ ac)), 1 / 120)]
    rows = [float((a.sum(1) - c).abs().max())]
    return sides, rows


@pytest.mark.parametrize("name", TABLEAUS)
def test_tableaus_satisfy_their_order_conditions(name):
    sides, rows = tree_conditions(TABLEAUS[name])
    assert max(rows) < 1e-14
    wrong = [(order, float(left) - right) for order, left, right in sides if abs(float(left) - right) > 1e-14]
    assert not [w for w in wrong if w[0] <= TABLEAUS[name].order]
    if TABLEAUS[name].order < 5:
        assert [w for w in wrong if w[0] == TABLEAUS[name].order + 1]  # and not more than declared
