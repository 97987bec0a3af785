"""Sheet D's "It works when" of sections 1-4, 10 and 13, solver by solver, against formulas written out here."""

import dataclasses
import inspect
import math
from itertools import pairwise

import pytest
import torch

from analytic import (
    GAUSS1D,
    GMM2D,
    Mixture,
    exact_flow,
    gaussian,
    gaussian_flow,
    noise_of,
    sample,
    slope,
    start_points,
    times_between,
)
from pliant.errors import PlanError
from pliant.paths import get_path, uniform_times
from pliant.solvers import (
    SOLVERS,
    TABLEAUS,
    Eval,
    Lin,
    Output,
    ProgramBuilder,
    Singlestep,
    compile_program,
    dpm_adaptive,
    fast_orders,
    fast_plan,
    get_solver,
    ode_adaptive,
    run,
    solver_infos,
)
from pliant.solvers.coefficients import get_form, step_weights
from pliant.solvers.fits import lagrange, moments, taylor
from pliant.solvers.pndm import ADAMS_BASHFORTH
from pliant.solvers.singlestep import block_orders
from pliant.solvers.usf import relaxation

START = start_points()
VP = get_path("vp")
TIMES = times_between(VP, 8, -3.0, 3.0)


def rows(solvers, times=TIMES, stored="epsilon", path=VP):
    return compile_program(path, times, solvers, stored).normal_form().rows()


def equal(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    scale = b.abs().amax(dim=1, keepdim=True)
    assert float(((a - b) / scale).abs().max()) < tolerance


def differ(a, b):
    assert a.shape != b.shape or float((a - b).abs().max()) > 1e-6


# ------------------------------------------------------------------------------------------------ section 1: DPM-Solver


def test_first_order_is_one_map_in_every_form():
    ddim = rows("ddim")
    for form in ("sample", "epsilon", "epsilon-rho"):
        equal(rows({"name": "multistep", "order": 1, "form": form}), ddim)
    for order in (2, 3):
        differ(*(rows({"name": "multistep", "order": order, "form": form}) for form in ("sample", "epsilon")))


@pytest.mark.parametrize("stored", ["sample", "epsilon"])
@pytest.mark.parametrize("name", [n for n, e in SOLVERS.items() if e().form == "sample" and not e.alias])
def test_last_step_to_clean_data_is_the_x0_estimate(name, stored):
    variance = name == "ddpm"
    program = compile_program(get_path("vp-discrete"), uniform_times(6), name, stored, variance=variance)
    last = [op for op in program.instructions() if isinstance(op, Lin)][-1]
    assert [j for j, _ in last.m] == [program.num_evaluations - 1] and last.z == ()
    if stored == "sample":
        assert last.x == () and last.m[0][1] == 1.0


def test_step_allocation():
    """Sheet D, 1.7: a budget of calls spent exactly, in the official pattern."""
    assert (
        fast_orders(9, 3) == [3, 3, 2, 1] and fast_orders(10, 3) == [3, 3, 3, 1] and fast_orders(11, 3) == [3, 3, 3, 2]
    )
    assert fast_orders(3, 3) == [2, 1] and fast_orders(1, 3) == [1] and fast_orders(2, 3) == [2]
    assert fast_orders(7, 2) == [2, 2, 2, 1] and fast_orders(4, 1) == [1] * 4
    for order in (1, 2, 3):
        for n in range(1, 30):
            assert sum(fast_orders(n, order)) == n
            times, solvers = fast_plan(VP, times_between(VP, n, -3.0, 3.0), order)
            assert compile_program(VP, times, solvers, "epsilon").num_evaluations == n
            assert len(block_orders(n, order, True)) == len(block_orders(n, order, False)) == n
    assert block_orders(9, 3, True) == [1, 2, 3, 1, 2, 3, 1, 2, 1]
    assert block_orders(8, 2, True) == [1, 2, 1, 2, 1, 2, 1, 1] and block_orders(7, 2, True) == [1, 2, 1, 2, 1, 2, 1]


def test_fast_plan_takes_its_inner_nodes_from_the_grid():
    times, solvers = fast_plan(VP, times_between(VP, 7, -3.0, 3.0), 3, form="epsilon")
    assert solvers[0].inner == pytest.approx((1 / 3, 2 / 3), abs=1e-9) and len(times) == 4
    equal(rows(solvers[:2], times[:3]), rows("dpm-3s", times[:3]), 1e-9)
    grid = uniform_times(9, 0.99)
    times, solvers = fast_plan(VP, grid, 3)
    program = compile_program(VP, times, solvers, "epsilon")
    assert [e.node.t for e in program.evaluations] == pytest.approx(grid[:9].tolist(), abs=1e-9)
    assert [s.order for s in solvers] == [3, 3, 2, 1] and abs(solvers[0].inner[0] - 1 / 3) > 0.02
    to_data = fast_plan(VP, uniform_times(8), 3)[1]  # two intervals end at sigma = 0: no inner node there
    assert [s.order for s in to_data] == [3, 3, 1]
    with pytest.raises(PlanError, match="at least 1"):
        fast_orders(0, 3)


@pytest.mark.parametrize("form", ["sample", "epsilon"])
def test_singlestep_weights_by_hand(form):
    """Sheet D, 1.4 and 1.5, written out."""
    s, t = -1.0, 0.4
    times = VP.time_of_log_snr(torch.tensor([s, t], dtype=torch.float64))
    nodes = ProgramBuilder(VP, times, form)
    a, b = nodes.nodes
    h = b.log_snr - a.log_snr
    m0, m1 = moments(h, 1.0 if form == "sample" else -1.0, 2)
    front = b.alpha if form == "sample" else -b.sigma
    for fit, w1 in (("midpoint", m0 / (2 * 0.4)), ("lagrange", m1 / (0.4 * h))):
        program = compile_program(VP, times, {"name": "dpm-2s", "form": form, "fit": fit, "inner": [0.4]}, form)
        last = program.steps[0][-1]
        assert dict(last.m) == pytest.approx({0: front * (m0 - w1), 1: front * w1}, rel=1e-9)
    program = compile_program(VP, times, {"name": "dpm-3s", "form": form}, form)
    last = program.steps[0][-1]
    w2 = m1 / (2 / 3 * h)
    assert dict(last.m) == pytest.approx({0: front * (m0 - w2), 2: front * w2}, rel=1e-9)
    second = program.steps[0][3]
    n1 = moments(2 / 3 * h, 1.0 if form == "sample" else -1.0, 2)
    inner = second.node.alpha if form == "sample" else -second.node.sigma
    v1 = n1[1] / (h / 3)
    assert dict(second.m) == pytest.approx({0: inner * (n1[0] - v1), 1: inner * v1}, rel=1e-9)


def test_blocks_shrink_to_what_is_remembered():
    """A grid singlestep block whose history was forgotten half-way falls back to lower orders."""
    times = times_between(VP, 7, -3.0, 3.0)
    solver = {"name": "dpmpp-3s-grid", "fit": "lagrange"}
    for forgotten, expected in (
        ([], [1, 2, 3, 1, 2, 3, 1]),
        ([2], [1, 2, 1, 1, 2, 3, 1]),
        ([4], [1, 2, 3, 1, 1, 2, 1]),
    ):
        program = compile_program(VP, times, solver, "sample", reset_history=forgotten)
        assert [len(step[-1].m) for step in program.steps] == expected
        starts = [0, *(step[-1].out for step in program.steps)]
        for i, (step, order) in enumerate(zip(program.steps, expected, strict=True)):
            assert step[-1].x[0][0] == starts[i + 1 - order]


def variance_of(program, std):
    """Exact variance of the sample for data N(0, std^2) and a start with the path's own variance."""
    noise = {slot: k for k, slot in enumerate(program.noise_slots)}
    size, one = 1 + len(noise), torch.ones(1, 1, dtype=torch.float64)
    start = torch.zeros(size, dtype=torch.float64)
    start[-1] = math.hypot(program.start.alpha * std, program.start.sigma)
    x, m = {0: start}, {}
    for op in program.instructions():
        if isinstance(op, Eval):
            m[op.out] = float(gaussian(std).predict(program.stored, one, op.node)) * x[op.state]
        else:
            row = sum(c * x[i] for i, c in op.x) + sum(c * m[j] for j, c in op.m)
            row = row.clone()
            for slot, c in op.z:
                row[noise[slot]] += c
            x[op.out] = row
    return float(x[program.final].square().sum())


STOCHASTIC = [name for name, entry in SOLVERS.items() if entry().stochastic]
EXACT_LAW = {"ddpm": {"variance": "posterior"}, "edm-churn": {"noise": 1.0}}  # S_noise = 1.003 inflates on purpose


@pytest.mark.parametrize("name", STOCHASTIC)
def test_order_of_the_variance_is_the_declared_one(name):
    """Stochastic solvers: error of the sample's variance on a Gaussian, no randomness involved."""
    options = dict(EXACT_LAW.get(name, {}))
    if "lower_order_final" in SOLVERS[name].takes:
        options["lower_order_final"] = False
    solver, found = get_solver({"name": name, **options}), []
    for n in (200, 400):
        program = compile_program(VP, times_between(VP, n, -3.0, 3.0), solver, "epsilon")
        exact = (program.end.alpha * 0.3) ** 2 + program.end.sigma**2
        found.append(abs(variance_of(program, 0.3) - exact))
    assert slope(found) == pytest.approx(solver.convergence, abs=0.15)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_refuse_inversion(name):
    options = EXACT_LAW.get(name, {})
    with pytest.raises(PlanError, match="inversion"):
        compile_program(VP, TIMES.flip(0), {"name": name, **options}, "epsilon")


def test_tau_interpolates_between_ode_and_sde():
    """`exp(-2 tau^2 h) = 1 - eta^2 (1 - exp(-2h))`: constant tau is DDIM with an eta of its own at every step."""
    tau = 0.6
    nodes = ProgramBuilder(VP, TIMES, "epsilon").nodes
    steps = [b.log_snr - a.log_snr for a, b in pairwise(nodes)]
    etas = [math.sqrt(math.expm1(-2 * tau**2 * h) / math.expm1(-2 * h)) for h in steps]
    equal(rows({"name": "multistep", "order": 1, "tau": tau}), rows([{"name": "ddim", "eta": e} for e in etas]))
    equal(rows({"name": "multistep", "order": 1, "tau": 1.0}), rows("euler-ancestral"))


def test_euler_ancestral_by_hand():
    """Sheet D, 13.6: `y += (down - s) eps + up z` in y = x/alpha."""
    program = compile_program(VP, TIMES[:2], "euler-ancestral", "epsilon")
    a, b = program.start, program.end
    s, t = a.sigma / a.alpha, b.sigma / b.alpha
    up = math.sqrt(t**2 * (s**2 - t**2) / s**2)
    down = math.sqrt(t**2 - up**2)
    (row,) = rows("euler-ancestral", TIMES[:2])[1:]
    assert row.tolist() == pytest.approx([b.alpha / a.alpha, b.alpha * (down - s), b.alpha * up, 0.0], rel=1e-11)


def test_full_noise_by_hand():
    program = compile_program(get_path("linear"), [0.8, 0.3, 0.0], "flow-stochastic", "velocity")
    first, last = program.steps[0][-1], program.steps[1][-1]
    assert first.x[0][1] == pytest.approx(0.7) and first.m[0][1] == pytest.approx(-0.7 * 0.8)
    assert first.z == ((0, 0.3),)
    assert last.z == () and last.m[0][1] == pytest.approx(-0.3)


@pytest.mark.parametrize(
    ("rule", "ends", "orders"),
    [
        ("auto", 0.0, [1, 2, 3, 3, 2, 1]),
        ("auto", 0.1, [1, 2, 3, 3, 3, 3]),
        (True, 0.1, [1, 2, 3, 3, 2, 1]),
        (False, 0.1, [1, 2, 3, 3, 3, 3]),
        (False, 0.0, [1, 2, 3, 3, 3, 1]),  # the step to sigma = 0 is infinite
        (7, 0.1, [1, 2, 3, 3, 2, 1]),
        (6, 0.1, [1, 2, 3, 3, 3, 3]),
    ],
)
def test_lower_orders_at_the_end(rule, ends, orders):
    solver = {"name": "dpmpp-3m", "lower_order_final": rule}
    program = compile_program(VP, uniform_times(6, 1.0, ends), solver, "sample")
    assert [len(step[-1].m) for step in program.steps] == orders
    nine, ten = (
        [len(step[-1].m) for step in compile_program(VP, uniform_times(n), "dpmpp-3m", "sample").steps][-2:]
        for n in (9, 10)
    )
    assert (nine, ten) == ([2, 1], [3, 1])
    lms = compile_program(VP, uniform_times(6), "lms-4", "sample")
    assert [len(step[-1].m) for step in lms.steps] == [1, 2, 3, 4, 4, 4]


# --------------------------------------------------------------------------------------------------- section 1: UniPC


def test_unip_3_is_deis_3():
    off = {"name": "unipc-eps-3", "disable_corrector": list(range(8)), "lower_order_final": False, "B": "exact"}
    equal(rows(off), rows({"name": "deis-3", "lower_order_final": False}))
    off["form"] = "sample"
    equal(rows(off), rows({"name": "dpmpp-3m", "lower_order_final": False}))


def test_b_rules_agree_from_three_nodes_on():
    def one(b, order, form, i):
        warm = ["dpmpp-3m"] * i  # the same history for all
        solver = {"name": "unipc", "order": order, "B": b, "form": form, "lower_order_final": False}
        return rows([*warm, solver, "ddim"], TIMES[: i + 3])

    for form in ("sample", "epsilon"):
        for b in ("bh1", "bh2"):
            equal(one(b, 3, form, 3), one("exact", 3, form, 3))
            differ(one(b, 2, form, 3), one("exact", 2, form, 3))
            differ(one(b, 1, form, 3), one("exact", 1, form, 3))  # the corrector of order 1 has two nodes
        differ(one("bh1", 2, form, 3), one("bh2", 2, form, 3))


@pytest.mark.parametrize(("B", "value"), [("bh1", lambda z: z), ("bh2", math.expm1)])
@pytest.mark.parametrize("form", ["sample", "epsilon"])
def test_unipc_weights_by_hand(form, B, value):
    """Sheet D, 1: predictor of order 2 `w = s B/(2r)`, corrector of order 1 `w = s B/2`; s = +1 eps, -1 x0."""
    program = compile_program(VP, TIMES[:4], {"name": "unipc", "order": 2, "form": form, "B": B}, form)
    sign = 1.0 if form == "epsilon" else -1.0

    def weights(lin, base):
        h = lin.node.log_snr - base.log_snr
        front = lin.node.alpha if form == "sample" else -lin.node.sigma
        return {j: c / front for j, c in lin.m}, h, sign * value(sign * h)

    nodes = ProgramBuilder(VP, TIMES[:4], form).nodes
    corrector = program.steps[0][3]
    w, h, b = weights(corrector, nodes[0])
    total = moments(h, -sign, 1)[0]
    assert w == pytest.approx({0: total - b / 2, 1: b / 2}, rel=1e-9)
    predictor = program.steps[1][0]
    w, h, b = weights(predictor, nodes[1])
    r = (nodes[0].log_snr - nodes[1].log_snr) / h
    total = moments(h, -sign, 1)[0]
    assert w == pytest.approx({1: total - b / (2 * r), 0: b / (2 * r)}, rel=1e-9)


def test_unipc_spends_one_call_per_step_and_remembers_predictions():
    program = compile_program(VP, TIMES, "unipc-3", "sample")
    assert [e.step for e in program.evaluations] == list(range(8))  # a call taken ahead is the next step's
    for step in program.steps[:-1]:
        *_, predict, evaluate, correct = step
        assert isinstance(evaluate, Eval) and evaluate.state == predict.out  # the uncorrected state
        assert correct.x[0][0] == predict.x[0][0] and correct.node == predict.node  # both from the old state
    assert [type(op) for op in program.steps[-1]] == [Lin]  # the last step only predicts
    tapered = compile_program(VP, uniform_times(8, 0.99), "unipc-3", "sample")
    assert [len(step[-1].m) for step in tapered.steps][-2:] == [3, 1]  # order 2 and its corrector, then order 1


@pytest.mark.parametrize(("stored", "states"), [("sample", 3), ("epsilon", 6)])
def test_unipc_3_keeps_four_outputs_and_three_states(stored, states):
    """Sheet D, 14.8(4): live registers at any time; stored as epsilon the x0 conversion keeps up to 3 more states."""
    program = compile_program(VP, times_between(VP, 20, -3.0, 3.0), "unipc-3", stored)
    live, peak = {("x", 0)}, {"x": 0, "m": 0}
    for op, gone in zip(program.instructions(), program.last_uses(), strict=True):
        live.add(("m" if isinstance(op, Eval) else "x", op.out))
        peak = {kind: max(peak[kind], sum(k == kind for k, _ in live)) for kind in peak}
        live -= set(gone)
    assert peak["m"] <= 4 and peak["x"] <= states


# --------------------------------------------------------------------------------------------------- section 2: PNDM


@pytest.mark.parametrize("name", ["plms", "f-pndm", "s-pndm"])
def test_pndm_is_exact_for_constant_noise(name):
    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for n in (1, 2, 5, 9):
        program = compile_program(VP, uniform_times(n, 0.99), name, "epsilon")
        *_, last = run(program, START, lambda x, ev: Output(noise))
        a, b = program.start, program.end
        exact = b.alpha / a.alpha * (START - a.sigma * noise) + b.sigma * noise
        torch.testing.assert_close(last.x, exact, rtol=1e-12, atol=1e-12)


def test_pndm_counts_calls():
    for n in (5, 10):
        counts = {
            name: compile_program(VP, uniform_times(n, 0.99), name, "epsilon").num_evaluations
            for name in ("plms", "f-pndm", "s-pndm")
        }
        assert counts == {"plms": n + 1, "f-pndm": n + 9, "s-pndm": n + 1}
    euler = {"name": "pndm", "order": 4, "warmup": "euler"}
    assert compile_program(VP, TIMES, euler, "epsilon").num_evaluations == 8
    assert [len(step[-1].m) for step in compile_program(VP, TIMES, euler, "epsilon").steps] == [1, 2, 3, 4, 4, 4, 4, 4]


def test_adams_bashforth_constants_come_from_lagrange():
    """On a constant grid the variable-step rule gives the classical numbers."""
    for order, expected in ADAMS_BASHFORTH.items():
        weights = lagrange(moments(0.1, 0.0, order), 0.1, [-0.1 * k for k in range(order)])
        assert [w / 0.1 for w in weights] == pytest.approx(expected, rel=1e-12)
    trapezoid = lagrange(moments(0.1, 0.0, 2), 0.1, [0.1, 0.0])
    third = lagrange(moments(0.1, 0.0, 3), 0.1, [0.1, 0.0, -0.1])
    fourth = lagrange(moments(0.1, 0.0, 4), 0.1, [0.1, 0.0, -0.1, -0.2])
    assert [w / 0.1 for w in trapezoid] == pytest.approx([0.5, 0.5])
    assert [w / 0.1 for w in third] == pytest.approx([5 / 12, 8 / 12, -1 / 12])
    assert [w / 0.1 for w in fourth] == pytest.approx([9 / 24, 19 / 24, -5 / 24, 1 / 24])


# ----------------------------------------------------------------------------------------------- section 3: DC-Solver


def dc(ratios, **options):
    return {"name": "dc-solver", "ratios": ratios, "lower_order_final": False, **options}


def test_ratios_of_one_change_nothing():
    one = compile_program(VP, TIMES, dc([1.0] * 8), "sample")
    plain = compile_program(VP, TIMES, {"name": "unipc-3", "lower_order_final": False}, "sample")
    assert one.steps == plain.steps


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("order", [2, 3])
def test_compensation_by_hand(order, degree):
    """UniPC with its buffer overwritten before steps 3 and 4, written out on tensors."""
    ratios = [1.0, 1.0, 1.0, 0.8, 1.3, 1.0, 1.0, 1.0]
    program = compile_program(VP, TIMES, dc(ratios, order=order, degree=degree), "sample")
    *_, got = run(program, START, GMM2D.evaluate(program))
    nodes, buffer = ProgramBuilder(VP, TIMES, "sample").nodes, []
    x, here = START, GMM2D.predict("sample", START, ProgramBuilder(VP, TIMES, "sample").nodes[0])
    for i in range(8):
        s, t = nodes[i], nodes[i + 1]
        buffer.insert(0, here)
        if ratios[i] != 1.0:
            at = ratios[i] * s.t + (1 - ratios[i]) * nodes[i - 1].t
            places = [nodes[i - a].t for a in range(degree + 1)]
            buffer[0] = sum(
                math.prod((at - v) / (u - v) for v in places if v != u) * buffer[a] for a, u in enumerate(places)
            )
        p = min(order, i + 1)

        def step(outputs, where, s=s, t=t, x=x):
            fit = "midpoint" if len(where) == 2 else "lagrange"
            move, weights = step_weights(get_form("sample"), s, t, where, fit)
            return move.a * x + sum(w * o for w, o in zip(weights, outputs, strict=True))

        where = [nodes[i - a] for a in range(p)]
        ahead = step(buffer[:p], where)
        if i < 7:
            here = GMM2D.predict("sample", ahead, t)
            x = step([*buffer[:p], here], [*where, t])
    torch.testing.assert_close(got.x, ahead, rtol=1e-10, atol=1e-10)
    differ(program.normal_form().rows(), rows(dc([1.0] * 8, order=order), stored="sample"))


def test_compensated_solvers_keep_constants():
    """Lagrange weights sum to 1, so `x0 = c` stays exact."""
    program = compile_program(VP, TIMES, dc([1, 1, 0.6, 1.4, 0.9, 1.1, 1.2, 0.7]), "epsilon")
    c = torch.tensor([[0.3, -0.2]], dtype=torch.float64).expand(8, 2)
    *_, last = run(program, START, lambda x, ev: Output((x - ev.node.alpha * c) / ev.node.sigma))
    a, b = program.start, program.end
    exact = b.alpha * c + b.sigma / a.sigma * (START - a.alpha * c)
    torch.testing.assert_close(last.x, exact, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------------- section 4: USF


@pytest.mark.parametrize("form", ["sample", "epsilon"])
def test_usf_decisions_that_are_named_solvers(form):
    usf = {"name": "usf", "form": form}
    eps = "" if form == "sample" else "eps-"
    two = "dpmpp-2m" if form == "sample" else "dpm-2m"
    equal(rows(usf | {"order": 2, "scale": "midpoint"}), rows({"name": two, "lower_order_final": False}))
    lagrange_two = rows({"name": "multistep", "form": form, "fit": "lagrange"})
    equal(rows(usf | {"order": 2}), lagrange_two)
    equal(rows(usf | {"order": 2, "scale": "linear", "kappa": 0.0}), lagrange_two)
    differ(rows(usf | {"order": 2, "scale": "linear", "kappa": 0.1}), lagrange_two)
    unipc = {"name": f"unipc-{eps}3", "B": "exact", "lower_order_final": False}
    equal(rows(usf | {"order": 3, "corrector": "pseudo"}), rows(unipc))
    first = unipc | {"name": "unipc", "order": 1, "form": form}
    equal(rows(usf | {"order": 1, "corrector": "pseudo"}), rows(first))
    bh1 = {"name": f"unipc-{eps}2", "B": "bh1", "lower_order_final": False, "disable_corrector": list(range(8))}
    equal(rows(usf | {"order": 2, "scale": "bh1"}), rows(bh1))
    # 3S ("taylor") in diffusers' layout: blocks that start from an older state.
    block = [usf | {"order": k, "start": k} for k in (1, 2, 3)]
    grid = {"name": "dpmpp-3s-grid", "form": form, "fit": "lagrange"}
    times = times_between(VP, 7, -3.0, 3.0)
    named = rows(grid, times)
    equal(rows([*block, *block, block[0]], times), named)
    wrong = [*block[:2], usf | {"order": 3, "start": 2}]
    differ(rows([*block, *wrong, block[0]], times), named)
    # 3S as published: the last stage's line through the outer two nodes only.
    published = usf | {"order": 2, "start": 3, "stencils": [[0]]}
    line = [block[0], usf | {"order": 2, "start": 2, "scale": "midpoint"}, published]
    equal(rows([*line, *line, block[0]], times), rows(grid | {"fit": "midpoint"}, times))


@pytest.mark.parametrize(("corrector", "more"), [("none", 0), ("pseudo", 1), ("implicit", 1)])
def test_usf_s_corrector_raises_the_order_it_declares_by_one(corrector, more):
    for order in (1, 2, 3):
        assert get_solver({"name": "usf", "order": order, "corrector": corrector}).convergence == order + more
    calls = get_solver({"name": "usf", "order": 2, "corrector": corrector}).evaluations_per_step
    assert calls == (2 if corrector == "implicit" else 1)
    usf = get_solver({"name": "usf", "order": 2, "corrector": "pseudo"})
    assert usf.convergence == get_solver("unipc-2").convergence


def test_usf_starts_where_its_variable_is_finite():
    """A start two nodes back falls to one where that node is pure noise, and only there."""
    path = get_path("linear")
    program = compile_program(path, [1.0, 0.7, 0.4, 0.1], {"name": "usf", "order": 1, "start": 2}, "velocity")
    states = [0, *(step[-1].out for step in program.steps)]
    assert [[register for register, _ in step[-1].x] for step in program.steps] == [[0], [states[1]], [states[1]]]
    program = compile_program(path, [0.9, 0.7, 0.4, 0.1], {"name": "usf", "order": 1, "start": 2}, "velocity")
    assert [[register for register, _ in step[-1].x] for step in program.steps] == [[0], [0], [states[1]]]


def test_usf_stencils_and_calls():
    """A first derivative from the previous node only, a second from two; "implicit" spends a second call."""
    mixed = rows({"name": "usf", "order": 3, "stencils": [[1], [1, 2]]})
    full = rows({"name": "usf", "order": 3, "stencils": [[1, 2], [2, 1]]})
    equal(full, rows({"name": "usf", "order": 3}))
    differ(mixed, full)
    counts = {
        c: compile_program(VP, TIMES, {"name": "usf", "corrector": c}, "epsilon").num_evaluations
        for c in ("none", "pseudo", "implicit")
    }
    assert counts == {"none": 8, "pseudo": 8, "implicit": 15}  # the last step is never corrected
    implicit = compile_program(VP, TIMES, {"name": "usf", "corrector": "implicit"}, "epsilon")
    assert [e.step for e in implicit.evaluations] == [k for k in range(8) for _ in range(2)][:15]
    assert len({e.state for e in implicit.evaluations}) == 15
    predictor = next(op for op in implicit.steps[1] if hasattr(op, "m"))  # looks at the corrected state's output, 2
    assert {register for register, _ in predictor.m} == {0, 2}
    with pytest.raises(PlanError, match="derivative 2"):
        get_solver({"name": "usf", "order": 3, "stencils": [[1], [1]]})
    with pytest.raises(PlanError, match="derivatives"):
        get_solver({"name": "usf", "order": 3, "stencils": [[1]]})
    for wrong in ({"form": "velocity"}, {"scale": "midpont"}, {"corrector": "psuedo"}, {"order": 5}, {"start": 0}):
        with pytest.raises(PlanError):
            get_solver({"name": "usf", **wrong})


@pytest.mark.parametrize("h", [1e-4, 0.3, 2.0, -0.4])
def test_relaxation_by_hand(h):
    for form, z in (("epsilon", h), ("sample", -h)):
        gap = sum(z**k / math.factorial(k) for k in range(2, 40))
        assert relaxation("midpoint", h, form) == pytest.approx(0.5 * z * math.expm1(z) / gap, rel=1e-11)
        assert relaxation("bh1", h, form) == pytest.approx(0.5 * z * z / gap, rel=1e-11)
        assert relaxation("plus-exp", h, form) == pytest.approx(1 + 0.5 * math.expm1(z))
        assert relaxation("minus-exp", h, form) == pytest.approx(1 - 0.5 * math.expm1(z))
        assert relaxation("linear", h, form, 0.3) == pytest.approx(1 + 0.3 * h)
        assert relaxation("none", h, form) == 1.0


def test_taylor_by_hand():
    """Derivatives of a parabola from its own stencils are exact, so the weights integrate it exactly."""
    h, offsets = 0.3, [0.0, -0.2, -0.55, 0.1]
    m = moments(h, 1.0, 4)
    weights = taylor([[1, 2], [2, 3]])(m, h, offsets)
    for power in range(3):
        assert sum(w * v**power for w, v in zip(weights, offsets, strict=True)) == pytest.approx(m[power], rel=1e-11)
    scaled = taylor([[1]], scale=1.5)(m, h, offsets)
    assert scaled == pytest.approx([m[0] + 1.5 * m[1] / 0.2, -1.5 * m[1] / 0.2, 0.0, 0.0], rel=1e-12)


# ------------------------------------------------------------------------------------------ section 10: mean reversion

MRS_PATH = get_path("mean-reverting")
MRS = [name for name in SOLVERS if name.startswith("mrs-")]


def mrs_times(steps, first=-3.0, last=3.0):
    """Uniform in log-SNR, within the path's table."""
    low, high = (float(MRS_PATH.log_snr(t)) for t in (1.0, 0.01))
    return times_between(MRS_PATH, steps, max(first, low), min(last, high))


@pytest.mark.parametrize("stored", ["sample", "epsilon"])
@pytest.mark.parametrize("name", MRS)
def test_mean_reverting_formulas(name, stored):
    """Sheet D, 10: the four formulas with their mu-terms, at every step, for orders 1 to 3."""
    solver = get_solver({"name": name, "lower_order_final": False})
    program = compile_program(MRS_PATH, mrs_times(6), solver, solver.form)
    nodes = [program.start]
    for i, step in enumerate(program.steps):
        lin = step[-1]
        s, t = nodes[-1], lin.node
        nodes.append(t)
        h = t.log_snr - s.log_snr
        order = min(solver.order, i + 1)
        where = [n.log_snr - s.log_snr for n in nodes[i::-1][:order]]
        c = (2.0 if solver.tau else 1.0) if solver.form == "sample" else -1.0
        m = moments(h, c, order)
        w = lagrange(m, h, where)
        if order == 3:
            v0, v1, v2 = where
            q = [1 / ((v0 - v1) * (v0 - v2)), 1 / ((v1 - v0) * (v1 - v2)), 1 / ((v2 - v0) * (v2 - v1))]
            w = [a - 0.5 * m[2] * b for a, b in zip(w, q, strict=True)]
        if solver.form == "sample":
            a, front = t.sigma / s.sigma * math.exp(-h * solver.tau), t.alpha * c
            z = t.sigma * math.sqrt(1 - math.exp(-2 * h)) if solver.tau else 0.0
            ratio = t.alpha / s.alpha * math.exp(-2 * h)
            if solver.tau:  # the sheet's own expression
                mu = 1 - ratio - t.alpha * (1 - math.exp(-2 * h))
            else:
                mu = 1 - t.sigma / s.sigma + t.sigma / s.sigma * s.alpha - t.alpha
        else:
            a, front = t.alpha / s.alpha, -t.sigma * (2.0 if solver.tau else 1.0)
            z = t.sigma * math.sqrt(math.expm1(2 * h)) if solver.tau else 0.0
            mu = 1 - t.alpha / s.alpha
        assert lin.x[0][1] == pytest.approx(a, rel=1e-10)
        assert [v for _, v in sorted(lin.m, reverse=True)] == pytest.approx([front * v for v in w], rel=1e-8)
        assert sum(v for _, v in lin.z) == pytest.approx(z, rel=1e-9)
        assert lin.mu == pytest.approx(mu, rel=1e-9, abs=1e-13)
    assert program.needs_offset


def shifted(mixture, mu):
    """The same mixture moved by mu (for exact denoisers of data around mu)."""
    return Mixture(mixture.weights, mixture.means + mu, mixture.stds)


def restored(program, mixture, mu, x, noise=None):
    """Sample with the exact denoiser of `mixture` on the offset path."""

    def evaluate(state, ev):
        centred = state - ev.node.beta * mu
        return Output(mixture.predict(program.stored, centred, ev.node))

    *_, last = run(program, x, evaluate, noise, mu.expand_as(x))
    return last.x


# Every solver that does not need a velocity, which is ambiguous on a path with an offset.
CENTRED = [
    name for name, entry in SOLVERS.items()
    if not entry.alias and entry().form in ("sample", "epsilon", "epsilon-rho") and name != "ddpm"
]  # fmt: skip


@pytest.mark.parametrize("stored", ["sample", "epsilon"])
@pytest.mark.parametrize("name", CENTRED)
def test_mean_reversion_is_equivariant(name, stored):
    """Moving data and mu by one vector moves the sample by it."""
    program = compile_program(MRS_PATH, mrs_times(8), name, stored)
    mu, move = torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([1.5, 2.0], dtype=torch.float64)
    x, noise = mu + 0.2 * START, noise_of(START.shape)
    one = restored(program, GMM2D, mu, x, noise)
    two = restored(program, shifted(GMM2D, move), mu + move, x + move, noise)
    torch.testing.assert_close(two, one + move, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_on_the_mean_reverting_path_is_equivariant(variance):
    solver = get_solver({"name": "ddpm", "variance": variance})
    program = compile_program(MRS_PATH, mrs_times(8), solver, "epsilon")
    mu, move = torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([1.5, 2.0], dtype=torch.float64)
    x, noise = mu + 0.2 * START, noise_of(START.shape)
    one = restored(program, GMM2D, mu, x, noise)
    two = restored(program, shifted(GMM2D, move), mu + move, x + move, noise)
    torch.testing.assert_close(two, one + move, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [n for n in MRS if "sde" not in n])
def test_mean_reverting_orders(name):
    mu, found = torch.tensor([0.4, -0.3], dtype=torch.float64), []
    solver = get_solver({"name": name, "lower_order_final": False})
    for n in (96, 192):
        program = compile_program(MRS_PATH, mrs_times(n), solver, solver.form)
        x = START * 0.2
        exact = exact_flow(shifted(GMM2D, -mu), x, program.start, program.end) + mu
        found.append(float((restored(program, GMM2D, mu, x + mu) - exact).square().mean().sqrt()))
    assert slope(found) == pytest.approx(solver.convergence, abs=0.15)


def test_mean_reversion_of_a_network_that_says_mu():
    program = compile_program(MRS_PATH, mrs_times(5), "mrs-2", "sample")
    mu = torch.tensor([0.4, -0.3], dtype=torch.float64).expand(8, 2)
    *_, last = run(program, START, lambda x, ev: Output(mu), mu=mu)
    exact = mu + program.end.sigma / program.start.sigma * (START - mu)
    torch.testing.assert_close(last.x, exact, rtol=1e-12, atol=1e-12)


def test_mean_reverting_velocity_network():
    """MR-Sampler's velocity parametrisation, turned into x0 by the path: the same samples."""
    program = compile_program(MRS_PATH, mrs_times(6), "mrs-2", "sample")
    mu = torch.tensor([[0.4, -0.3]], dtype=torch.float64).expand(8, 2)
    x = mu + 0.2 * START

    def by_velocity(state, ev):
        n = ev.node
        centred = state - n.beta * mu
        x0, eps = (GMM2D.predict(kind, centred, n) for kind in ("sample", "epsilon"))
        v = n.alpha * eps * MRS_PATH.sigma_inf - n.sigma / MRS_PATH.sigma_inf * (x0 - mu)
        return Output(MRS_PATH.pair_of_velocity(v, state, mu, n.t)[0])

    *_, last = run(program, x, by_velocity, mu=mu)
    torch.testing.assert_close(last.x, restored(program, GMM2D, mu[0], x), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------- section 13: churn


def test_churn_by_hand():
    """EDM's Algorithm 2, one step, on the EDM path."""
    path = get_path("edm")
    times = path.time_of_noise_ratio(torch.tensor([2.0, 1.2, 0.7], dtype=torch.float64))
    solver = {"name": "edm-churn", "churn": 0.6, "low": 1.5, "high": 3.0, "noise": 1.01}
    program = compile_program(path, times, solver, "epsilon")
    gamma = 0.3
    raised = 2.0 * (1 + gamma)
    added = math.sqrt(raised**2 - 4.0) * 1.01
    lift, first, ahead, second, step = program.steps[0]
    assert (lift.x[0][1], lift.z[0][1]) == pytest.approx((1.0, added), rel=1e-12)
    assert first.node.sigma == pytest.approx(raised) and second.node.sigma == pytest.approx(1.2)
    assert ahead.m[0][1] == pytest.approx(1.2 - raised, rel=1e-12)
    assert [c for _, c in step.m] == pytest.approx([(1.2 - raised) / 2] * 2, rel=1e-12)
    assert step.x == ((lift.out, 1.0),)
    assert len(program.steps[1]) == 4 and program.noise_slots == (0,)  # 1.2 lies below `low`
    many = compile_program(path, times, solver | {"churn": 40.0}, "epsilon")
    assert many.steps[0][1].node.sigma == pytest.approx(2.0 * math.sqrt(2.0))  # at most sqrt(2)


@pytest.mark.parametrize(("method", "share"), [("midpoint", 1 / 2), ("ralston", 2 / 3)])
def test_churn_with_a_stage_inside_looks_there_from_the_raised_level(method, share):
    path, times = get_path("edm"), get_path("edm").time_of_sigma(torch.tensor([2.0, 1.2, 0.7])).tolist()
    program = compile_program(path, times, {"name": "edm-churn", "churn": 0.4, "method": method}, "epsilon")
    ratios = [e.node.sigma / e.node.alpha for e in program.evaluations]
    for k, (here, there) in enumerate(((2.0, 1.2), (1.2, 0.7))):
        raised = here * (1 + 0.4 / 2)
        assert ratios[2 * k] == pytest.approx(raised, rel=1e-6)
        assert ratios[2 * k + 1] == pytest.approx(raised + share * (there - raised), rel=1e-6)


def test_churn_of_nothing_is_heun():
    path = get_path("edm")
    times = torch.cat([path.time_of_noise_ratio(torch.tensor([80.0, 5.0, 0.4], dtype=torch.float64)), torch.zeros(1)])
    plain = compile_program(path, times, "heun-edm", "epsilon")
    for solver in ({"name": "edm-churn", "churn": 0.0}, {"name": "edm-churn", "low": 90.0, "high": 99.0}):
        assert compile_program(path, times, solver, "epsilon").steps == plain.steps
    assert not get_solver({"name": "edm-churn", "churn": 0.0}).stochastic
    beyond = compile_program(path, times, {"name": "edm-churn", "high": 100.0}, "epsilon")
    assert beyond.steps[0][1].node.sigma == pytest.approx(80.0 * math.sqrt(2.0))  # EDM's path goes on beyond t = 1
    capped = compile_program(VP, [1.0, 0.5], {"name": "edm-churn", "high": 1e9}, "epsilon")
    assert capped.steps[0][1].node == capped.start  # other paths end there
    assert capped.noise_slots == () and capped.steps[0][0].x == ((0, 1.0),)  # and nothing is added
    with pytest.raises(PlanError, match="alpha is 0"):
        compile_program(get_path("linear"), [1.0, 0.5], "edm-churn", "velocity")


# ----------------------------------------------------------------------------------------------------------- adaptive


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("direction", [1, -1])
def test_dpm_adaptive(order, direction):
    ends = VP.time_of_log_snr(torch.tensor([-4.0, 4.0], dtype=torch.float64)).tolist()[::direction]
    calls = []

    def evaluate(x, ev):
        calls.append(ev.node.t)
        return Output(GMM2D.predict("epsilon", x, ev.node))

    errors, counts = [], []
    for tolerance in (1.0, 0.01):
        calls.clear()
        options = {"order": order, "rtol": 0.05 * tolerance, "atol": 0.0078 * tolerance}
        found = dpm_adaptive(VP, START, evaluate, "epsilon", *ends, **options)
        assert found.evaluations == len(calls) == order * (len(found.solvers) + found.rejected)
        assert (found.times[0], found.times[-1]) == tuple(ends)
        program = compile_program(VP, found.times, found.solvers, "epsilon")
        torch.testing.assert_close(sample(program, GMM2D, START), found.x, rtol=1e-9, atol=1e-9)
        errors.append(float((found.x - exact_flow(GMM2D, START, program.start, program.end)).abs().max()))
        counts.append(len(calls))
    assert errors[1] < errors[0] / 5 and errors[1] < 5e-3 and counts[1] > counts[0]


@pytest.mark.parametrize(("order", "shares"), [(2, (0.0, 1 / 2)), (3, (0.0, 1 / 3, 2 / 3))])
def test_dpm_adaptive_calls_where_the_paper_says(order, shares):
    """DPM-Solver-12 looks half-way, -23 at a third and two thirds of the log-SNR step."""
    start, end = VP.time_of_log_snr(torch.tensor([-1.0, 1.0], dtype=torch.float64)).tolist()
    calls = []

    def evaluate(x, ev):
        calls.append(ev.node.log_snr)
        return Output(GMM2D.predict("epsilon", x, ev.node))

    dpm_adaptive(VP, START, evaluate, "epsilon", start, end, order=order, first=0.25)
    assert [c - calls[0] for c in calls[:order]] == pytest.approx([0.25 * r for r in shares], rel=1e-9, abs=1e-12)


def test_dpm_adaptive_controller_by_hand():
    """The first attempts of DPM-Solver-12: the error, and the step that follows from it."""
    start, end = VP.time_of_log_snr(torch.tensor([-1.0, 4.0], dtype=torch.float64)).tolist()
    calls = []

    def evaluate(x, ev):
        calls.append(ev.node.log_snr)
        return Output(GMM2D.predict("sample", x, ev.node))

    found = dpm_adaptive(VP, START, evaluate, "sample", start, end, order=2, form="sample", first=0.3)
    assert calls[1] - calls[0] == pytest.approx(0.15, rel=1e-9)  # an attempt calls at its start and half-way
    times = list(found.times[:2])
    low = sample(compile_program(VP, times, "ddim", "sample"), GMM2D, START)
    high = sample(compile_program(VP, times, "dpmpp-2s", "sample"), GMM2D, START)
    scale = torch.clamp(0.05 * torch.maximum(low.abs(), START.abs()), min=0.0078)
    error = float(((high - low) / scale).square().mean(1).sqrt().max())
    step = 0.9 * 0.3 * error**-0.5
    assert error < 1.0
    assert calls[2] - calls[0] == pytest.approx(0.3, rel=1e-9)
    assert calls[3] - calls[2] == pytest.approx(step / 2, rel=1e-8)
    # The second attempt compares with the low-order result of the first.
    after = float(VP.time_of_log_snr(-1.0 + 0.3 + step))
    low2 = sample(compile_program(VP, [times[1], after], "ddim", "sample"), GMM2D, high)
    high2 = sample(compile_program(VP, [times[1], after], "dpmpp-2s", "sample"), GMM2D, high)
    scale = torch.clamp(0.05 * torch.maximum(low2.abs(), low.abs()), min=0.0078)
    error2 = float(((high2 - low2) / scale).square().mean(1).sqrt().max())
    assert calls[5] - calls[4] == pytest.approx(0.9 * step * error2**-0.5 / 2, rel=1e-8)
    assert calls[4] == pytest.approx(calls[2] if error2 > 1.0 else calls[2] + step, rel=1e-9)


def test_adaptive_drivers_refuse():
    evaluate = lambda x, ev: Output(x)  # noqa: E731
    with pytest.raises(PlanError, match="orders 2"):
        dpm_adaptive(VP, START, evaluate, "epsilon", 1.0, 0.1, order=4)
    with pytest.raises(PlanError, match="finite log-SNR"):
        dpm_adaptive(VP, START, evaluate, "epsilon", 1.0, 0.0)
    with pytest.raises(PlanError, match="attempts"):
        dpm_adaptive(
            VP, START, GMM2D.evaluate(compile_program(VP, TIMES, "ddim", "sample")), "sample", 0.9, 0.1, max_steps=2
        )
    with pytest.raises(PlanError, match="dopri5"):
        ode_adaptive(VP, START, evaluate, "epsilon", 0.9, 0.1, method="dopri")
    with pytest.raises(PlanError, match="no finite velocity"):
        ode_adaptive(VP, START, evaluate, "epsilon", 0.9, 0.0)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("stored", ["velocity", "epsilon"])
def test_ode_adaptive(method, direction, stored):
    pytest.importorskip("torchdiffeq")
    path = get_path("linear")
    start, end = (0.98, 0.02)[::direction]
    calls = []

    def evaluate(x, ev):
        assert (ev.out, ev.state, ev.step) == (len(calls), 0, 0)
        calls.append(ev.node.t)
        return Output(GMM2D.predict(stored, x, ev.node))

    errors = []
    for tolerance in (1e-4, 1e-7):
        calls.clear()
        found = ode_adaptive(
            path, START, evaluate, stored, start, end, method=method, rtol=tolerance, atol=tolerance
        )
        program = compile_program(path, found.times, found.solvers, stored)
        assert (program.start.t, program.end.t) == (start, end)
        torch.testing.assert_close(sample(program, GMM2D, START), found.x, rtol=1e-6, atol=1e-8)
        errors.append(float((found.x - exact_flow(GMM2D, START, program.start, program.end)).abs().max()))
        # Two calls find the first step; every attempt, accepted or not, makes as many as the tableau has new stages.
        stages = {"dopri5": 6, "bosh3": 3}[method]
        assert found.evaluations == len(calls) == 2 + stages * (len(found.solvers) + found.rejected)
    assert errors[1] < errors[0] and errors[1] < 1e-4


# ----------------------------------------------------------------------------------------------------------- registry


def test_infos_and_options():
    infos = {info.name: info for info in solver_infos()}
    assert list(infos) == list(SOLVERS) and all(info.source for info in infos.values())
    assert infos["rf-solver"].alias_of == "midpoint" and infos["deis-3"].alias_of == "dpm-3m"
    assert [n for n, i in infos.items() if i.compat] == ["sde-dpmpp-3m-diffusers"]
    for info in infos.values():
        solver = get_solver(info.name)
        if info.name == "ddpm":
            solver = get_solver({"name": "ddpm", "variance": "beta"})
        program = compile_program(VP, times_between(VP, 12, -3.0, 3.0), solver, "epsilon")
        regular = sum(isinstance(op, Eval) for op in program.steps[6])
        assert regular == info.evaluations and bool(program.noise_slots) == info.stochastic
        assert hash(solver) == hash(get_solver(solver.to_config()))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"name": "unipc-2", "order": 0}, "orders 1 to 5"),
        ({"name": "unipc-2", "B": "bh3"}, "bh2"),
        ({"name": "unipc-2", "form": "velocity"}, "epsilon"),
        ({"name": "dpmpp-2m", "order": 7}, "orders 1 to 6"),
        ({"name": "dpmpp-2m", "order": True}, "orders 1 to 6"),
        ({"name": "dpmpp-2m", "order": "2"}, "orders 1 to 6"),
        ({"name": "dpmpp-2m", "form": "smaple"}, "sample"),
        ({"name": "dpmpp-2m", "tau": -1.0}, "tau"),
        ({"name": "dpmpp-2m", "tau": math.inf}, "tau"),
        ({"name": "lms-4", "tau": 1.0}, "stochastic"),
        ({"name": "dpmpp-2m", "lower_order_final": "sometimes"}, "auto"),
        ({"name": "dpm-3m", "fit": "diffusers-sde3"}, "one scheduler"),
        ({"name": "dpmpp-2s", "order": 4}, "orders 1 to 3"),
        ({"name": "dpmpp-2s", "inner": [1.2]}, "inner nodes"),
        ({"name": "dpmpp-2s", "inner": [1.0]}, "inner nodes"),
        ({"name": "dpmpp-2s", "inner": [0.0]}, "inner nodes"),
        ({"name": "dpmpp-3s", "inner": [0.6, 0.3]}, "ascending"),
        ({"name": "dpmpp-2s", "form": "velocity"}, "sample"),
        ({"name": "dpmpp-2s", "fit": "published3"}, "midpoint"),
        ({"name": "dpmpp-2s-grid", "tau": -0.1}, "tau"),
        ({"name": "plms", "order": 5}, "orders 1 to 4"),
        ({"name": "plms", "warmup": "prc"}, "prk"),
        ({"name": "heun", "method": "huen"}, "heun"),
        ({"name": "heun", "form": "sample"}, "without decay"),
        ({"name": "edm-churn", "churn": -1.0}, "churn >= 0"),
        ({"name": "edm-churn", "method": "heum"}, "heun"),
        ({"name": "dc-solver", "ratios": [math.nan]}, "finite"),
        ({"name": "dc-solver", "degree": 0}, "orders 1 to 5"),
        ({"name": "ddim", "eta": "much"}, "does not take"),
        ({"name": "dpmpp-3n"}, "dpmpp-3m"),
        ({"name": "unipc2"}, "unipc-2"),
    ],
)
def test_bad_options_are_explained(spec, match):
    with pytest.raises(PlanError, match=match):
        get_solver(spec)


def test_inner_nodes_may_lie_near_the_ends():
    for share in (1e-4, 1.0 - 1e-4):
        assert get_solver({"name": "dpmpp-2s", "inner": [share]}).inner == (share,)


def test_entry_options_are_real():
    for name, entry in SOLVERS.items():
        fields = {f.name for f in dataclasses.fields(entry.solver)}
        assert set(entry.options) <= fields, name
    assert set(TABLEAUS) <= {*SOLVERS, "dormand-prince-5"}
    assert isinstance(get_solver("dpmpp-2s"), Singlestep)
    assert GAUSS1D.means.item() == 0.3 and gaussian_flow is not None


# What a bare class name means, written out: a default is part of what users get.
TAPER = {"lower_order_final": "auto"}
DEFAULTS = {
    "multistep": {"order": 2, "form": "sample", "fit": "midpoint", "tau": 0.0, **TAPER},
    "singlestep": {"order": 2, "form": "sample", "fit": "midpoint", "inner": ()},
    "grid-singlestep": {"order": 2, "form": "sample", "fit": "midpoint", "tau": 0.0, "lower_order_final": True},
    "unipc": {"order": 2, "B": "bh2", "form": "sample", "disable_corrector": (), **TAPER},
    # arXiv 2409.03755; nothing changes until ratios are given.
    "dc-solver": {
        "order": 3, "B": "bh2", "form": "sample", "disable_corrector": (), **TAPER, "ratios": (), "degree": 2
    },
    "usf": {
        "order": 2, "form": "sample", "start": 1, "stencils": (), "scale": "none", "kappa": 0.0, "corrector": "none"
    },
    "pndm": {"order": 4, "warmup": "plms"},
    "runge-kutta": {"method": "heun", "form": "velocity", "last": "euler"},
    "edm-churn": {"churn": 40.0, "low": 0.05, "high": 50.0, "noise": 1.003, "method": "heun"},
    "ddim": {"eta": 0.0},
    "ddpm": {"variance": "learned-range"},
    "sit-sde": {"diffusion": "sigma", "norm": 1.0, "last": "mean"},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    config = get_solver(name).to_config()
    config.pop("name")
    assert config == DEFAULTS[name]


def test_defaults_of_the_adaptive_drivers():
    """Sheet D, 1.10."""

    def numbers(driver):
        return {k: p.default for k, p in inspect.signature(driver).parameters.items() if p.default is not p.empty}

    assert numbers(dpm_adaptive) == {
        "order": 3, "form": "epsilon", "fit": "midpoint", "first": 0.05, "atol": 0.0078, "rtol": 0.05, "safety": 0.9,
        "max_steps": 10_000,
    }  # fmt: skip
    assert numbers(ode_adaptive) == {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}
