"""The representation: JSON, liveness, validation, the interpreter's rules, normal forms, errors for bad
input.
"""

import dataclasses
import json
import time

import pytest
import torch

from analytic import GMM2D, gaussian, noise_of, sample, start_points, times_between
from pliant.errors import FormatError, PlanError, ShapeError
from pliant.paths import get_path, respaced_times, uniform_times
from pliant.solvers import (
    SOLVERS,
    Eval,
    LearnedNoise,
    Lin,
    Node,
    Output,
    Program,
    compile_program,
    get_solver,
    run,
)

START = start_points()
NODE = Node(t=0.5, alpha=0.5, sigma=0.5, dalpha=-1.0, dsigma=1.0)
ALL = [*SOLVERS, {"name": "ddim", "eta": 0.5}, {"name": "ddpm", "variance": "beta"}]


def program_for(solver, steps=8, stored="velocity", **options) -> Program:
    variance = solver == "ddpm"
    return compile_program(get_path("gvp"), uniform_times(steps, 0.99), solver, stored, variance=variance, **options)


def with_variance(program):
    """The exact denoiser, plus a made-up variance code."""
    exact = GMM2D.evaluate(program)
    return lambda x, ev: Output(exact(x, ev).value, torch.tanh(x))


def states(program, x=START, **options):
    return [r.x for r in run(program, x, with_variance(program), noise_of(x.shape), **options)]


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_json_round_trip_gives_bit_identical_samples(solver):
    program = program_for(solver)
    text = json.dumps(program.to_dict(), allow_nan=False)
    again = Program.from_dict(json.loads(text))
    assert again == program
    assert all(torch.equal(a, b) for a, b in zip(states(program), states(again), strict=True))


def test_json_keeps_infinite_derivatives():
    program = compile_program(get_path("vp-discrete"), respaced_times(get_path("vp-discrete"), "5"), "ddim", "epsilon")
    assert program.end.dsigma == float("inf")
    assert Program.from_dict(json.loads(json.dumps(program.to_dict(), allow_nan=False))) == program


def test_json_refuses_what_it_does_not_know():
    data = program_for("heun").to_dict()
    cases = [
        lambda d: d.update(extra=1),
        lambda d: d.pop("final"),
        lambda d: d.update(version=99),
        lambda d: d["start"].update(c_in=1.0),
        lambda d: d["steps"][0][0].update(hook="x"),
        lambda d: d["steps"][0][1].update(op="conv"),
        lambda d: d["steps"][0][1].update(mu="nan"),
        lambda d: d["steps"][0][1].update(mu=True),
        lambda d: d["steps"][0][1].update(x=7),
        lambda d: d.update(steps=3),
        lambda d: d.update(start=[]),
    ]
    for damage in cases:
        broken = json.loads(json.dumps(data))
        damage(broken)
        with pytest.raises(FormatError):
            Program.from_dict(broken)
    broken = json.loads(json.dumps(data))
    broken["steps"][0][1]["x"][0][0] = 55
    with pytest.raises(PlanError, match="x55"):
        Program.from_dict(broken)


@pytest.mark.parametrize("solver", ALL, ids=str)
def test_freeing_registers_changes_nothing(solver, monkeypatch):
    program = program_for(solver)
    freed = states(program)
    instructions = sum(len(s) for s in program.steps)
    monkeypatch.setattr(Program, "last_uses", lambda self: ((),) * instructions)
    assert all(torch.equal(a, b) for a, b in zip(freed, states(program), strict=True))


def test_liveness_is_tight():
    """Every register dies exactly once, after its last read; a 2M run holds two outputs and two states."""
    program = program_for("dpmpp-2m", steps=10)
    dead = [r for group in program.last_uses() for r in group]
    assert len(dead) == len(set(dead))
    written = 1 + sum(len(s) for s in program.steps)
    assert len(dead) == written - 1  # all but the sample
    live, peak = {("x", 0)}, 0
    for op, gone in zip(program.instructions(), program.last_uses(), strict=True):
        live.add(("m" if isinstance(op, Eval) else "x", op.out))
        peak = max(peak, len(live))
        live -= set(gone)
    assert live == {("x", program.final)}
    assert peak <= 5


def test_x0_estimate_is_the_denoisers():
    program = program_for("heun", steps=5)
    seen = []
    exact = GMM2D.evaluate(program)

    def evaluate(x, ev):
        seen.append((x, ev.node))
        return exact(x, ev)

    for result in run(program, START, evaluate):
        x, node = seen[-1]
        torch.testing.assert_close(result.x0, GMM2D.predict("sample", x, node), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.x, result.x0, rtol=0.3, atol=0.3)


@pytest.mark.parametrize("stored", ["sample", "epsilon", "velocity", "v_prediction"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m"])
def test_sample_at_sigma_zero_is_the_x0_estimate(solver, stored):
    program = program_for(solver, stored=stored)
    *_, result = run(program, START, with_variance(program))
    tolerance = 0.0 if stored == "sample" else 1e-12
    torch.testing.assert_close(result.x, result.x0, rtol=tolerance, atol=tolerance)
    assert result.node.sigma == 0.0


def test_states_stay_wide_when_the_network_is_not():
    program = program_for("dpmpp-2m")
    exact = GMM2D.evaluate(program)

    def narrow(x, ev):
        return Output(exact(x.double(), ev).value.bfloat16())

    for start, dtype in ((START.float(), torch.float32), (START.bfloat16(), torch.float32), (START, torch.float64)):
        assert all(r.x.dtype == dtype for r in run(program, start, narrow))
    single = [r.x for r in run(program, START.float(), with_variance(program))][-1]
    torch.testing.assert_close(single.double(), states(program)[-1], rtol=1e-4, atol=1e-5)


def test_run_is_differentiable_and_leaves_its_input_alone():
    program = program_for("heun", steps=4)
    x = START.clone().requires_grad_()
    final = [r.x for r in run(program, x, with_variance(program))][-1]
    final.sum().backward()
    assert x.grad is not None and torch.equal(x.detach(), START)


def test_run_reports_missing_and_misshapen_inputs():
    program = program_for({"name": "ddim", "eta": 1.0})
    evaluate = with_variance(program)
    with pytest.raises(PlanError, match="noise"):
        run(program, START, evaluate)
    with pytest.raises(ShapeError, match="noise 0"):
        list(run(program, START, evaluate, lambda slot: torch.zeros(1)))
    with pytest.raises(ShapeError, match="output"):
        list(run(program, START, lambda x, ev: Output(x[:1]), noise_of(START.shape)))
    with pytest.raises(ShapeError, match="floating"):
        run(program, torch.zeros(2, dtype=torch.long), evaluate, noise_of(START.shape))


def test_every_noise_slot_is_asked_for_once():
    asked = []
    program = program_for({"name": "ddim", "eta": 1.0})

    def noise(slot):
        asked.append(slot)
        return torch.zeros_like(START)

    list(run(program, START, with_variance(program), noise))
    assert asked == list(program.noise_slots) == list(range(7))


def hand_made(*ops, final=1, **options) -> Program:
    labels = options.pop("labels", ("hand",))
    return Program({}, options.pop("stored", "sample"), (ops,), NODE, NODE, final, labels)


def test_shared_noise_offset_and_learned_noise_by_hand():
    """Two Lins share a slot, mu enters, learned noise scales: against plain arithmetic."""
    program = hand_made(
        Eval(0, 0, NODE, 0),
        Lin(1, NODE, x=((0, 2.0),), m=((0, -1.0),), z=((5, 0.5),), mu=3.0),
        Lin(2, NODE, x=((0, 1.0), (1, 1.0)), learned=LearnedNoise(5, 0, log_low=-2.0, log_high=1.0)),
        final=2,
    )
    x, z, mu, u = (start_points(3, 2, seed=k) for k in range(4))
    (result,) = run(program, x, lambda s, ev: Output(s.sin(), u), lambda slot: z * slot, mu)
    first = 2 * x - x.sin() + 0.5 * 5 * z + 3 * mu
    f = (u + 1) / 2
    torch.testing.assert_close(result.x, x + first + torch.exp(0.5 * (f * 1.0 + (1 - f) * -2.0)) * 5 * z)
    torch.testing.assert_close(result.x0, x.sin())  # this network returns the sample itself
    with pytest.raises(PlanError, match="offset"):
        run(program, x, lambda s, ev: Output(s, u), lambda slot: z)
    form = program.normal_form()
    assert form.rows()[-1].tolist() == [3.0, -1.0, 0.5, 1.0, 3.0]
    assert form.states == (0, 1, 2) and form.evaluated == (0,)
    assert "mu" in program.describe() and "learned(m0) z5" in program.describe()


def test_programs_that_cannot_run_are_refused():
    ok = Lin(1, NODE, x=((0, 1.0),))
    for ops, match in [
        ((Lin(1, NODE, x=((3, 1.0),)),), "x3"),
        ((Lin(1, NODE, m=((0, 1.0),)),), "m0"),
        ((ok, Lin(1, NODE, x=((0, 1.0),))), "twice"),
        ((Lin(0, NODE, x=((0, 1.0),)),), "twice"),
        ((Eval(1, 0, NODE, 0), ok), "output 1"),
        ((Eval(0, 4, NODE, 0), ok), "state 4"),
        ((Eval(0, 0, NODE, 0),), "no state"),
        ((Lin(1, NODE, x=((0, float("nan")),)),), "not finite"),
        ((Lin(1, NODE, x=((0, 1.0),), z=((-1, 1.0),)),), "z-1"),
        ((Lin(1, NODE, learned=LearnedNoise(0, 0, 0.0, 1.0)),), "u0"),
    ]:
        with pytest.raises(PlanError, match=match):
            hand_made(*ops)
    with pytest.raises(PlanError, match="final"):
        hand_made(ok, final=9)
    with pytest.raises(PlanError, match="labels"):
        hand_made(ok, labels=())


@pytest.mark.parametrize("solver", ["unipc-3", "rk4", "f-pndm", "edm-churn"])
def test_registers_and_slots_are_numbered_without_gaps(solver):
    """States from 1 (0 is the start), outputs and noise slots from 0, in the order they are made."""
    program = compile_program(get_path("vp"), times_between(get_path("vp"), 6, -3.0, 3.0), solver, "epsilon")
    ops = list(program.instructions())
    states = [op.out for op in ops if isinstance(op, Lin)]
    assert states == list(range(1, len(states) + 1))
    assert [e.out for e in program.evaluations] == list(range(program.num_evaluations))
    assert program.noise_slots == tuple(range(len(program.noise_slots)))


def test_a_step_may_reuse_an_old_output():
    """No Eval in a step: whole-network caching is just a Lin."""
    first = (Eval(0, 0, NODE, 0), Lin(1, NODE, m=((0, 1.0),)))
    second = (Lin(2, NODE, x=((1, 1.0),), m=((0, 0.5),)),)
    cached = Program({}, "sample", (first, second), NODE, NODE, 2, ("a", "b"))
    results = list(run(cached, START, lambda x, ev: Output(x * 2)))
    torch.testing.assert_close(results[1].x, START * 3)
    assert torch.equal(results[1].x0, START * 2)
    skipped = hand_made(Lin(1, NODE, x=((0, 1.0),)))
    (only,) = run(skipped, START, lambda x, ev: Output(x))
    with pytest.raises(PlanError, match="first network call"):
        _ = only.x0


def test_normal_form_predicts_the_sample():
    """Rows times (start, outputs, noises) equal every state the interpreter produced."""
    mixed = ["heun", "dpmpp-2m", {"name": "ddim", "eta": 0.7}, "dpmpp-2m", "euler", "sit-sde", "midpoint", "ddim"]
    program = program_for(mixed)
    outputs, noise = [], noise_of(START.shape)
    exact = GMM2D.evaluate(program)

    def evaluate(x, ev):
        out = exact(x, ev)
        outputs.append((x, out.value))
        return out

    final = [r.x for r in run(program, START, evaluate, noise)][-1]
    form = program.normal_form()
    columns = torch.stack([START, *(v for _, v in outputs), *(noise(s) for s in program.noise_slots), START * 0])
    rows = torch.einsum("rc,cbd->rbd", form.rows(), columns)
    torch.testing.assert_close(rows[-1], final, rtol=1e-11, atol=1e-11)
    for k, (x, _) in enumerate(outputs):
        torch.testing.assert_close(rows[k], x, rtol=1e-11, atol=1e-11)
    assert torch.equal(torch.triu(form.c[list(form.evaluated)]), torch.zeros_like(form.c[list(form.evaluated)]))


def test_describe_is_a_table():
    text = program_for(["ddim"] * 3 + ["heun"] * 2, steps=5).describe()
    assert "7 network calls" not in text and "6 network calls" in text  # heun's last step is a single call
    assert text.splitlines()[2].split()[:2] == ["0", "ddim"]
    assert len(text.splitlines()) == 2 + 6 + 6


@pytest.mark.parametrize(
    "solver", ["dpmpp-2m", "heun", "ddpm", "unipc-3", "dpmpp-3s", "f-pndm", "edm-churn", "rk4", "usf"]
)
def test_a_thousand_steps_compile_fast(solver):
    """Under 0.5 s of processor time, in the best of three (other processes may be busy)."""
    times, path = uniform_times(1000, 0.999), get_path("vp-discrete")
    compile_program(path, uniform_times(3), "ddim", "epsilon")  # warm tables
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        program = compile_program(path, times, solver, "epsilon", variance=True)
        program.last_uses()
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.5
    assert len(program.steps) == 1000


def test_solvers_by_name_and_config():
    for name, entry in SOLVERS.items():
        assert get_solver(name) == entry()
        assert get_solver(entry().to_config()) == entry()
        assert (
            entry.alias
            or entry().name == name
            or name in ("multistep", "singlestep", "grid-singlestep", "unipc", "pndm", "runge-kutta")
        )
    assert get_solver({"name": "ddim", "eta": 0.5}).to_config() == {"name": "ddim", "eta": 0.5}
    for spec, match in [
        ("dpmp-2m", "did you mean 'dpmpp-2m'"),
        ({"name": "ddim", "etta": 1}, "did you mean 'eta'"),
        ({"name": "flow-stochastic", "eta": 1}, "takes none"),
        ({"eta": 1}, "unknown solver None"),
        ({"name": "ddim", "eta": 1.5}, "between 0"),
        ({"name": "dpmpp-2m", "fit": "midpiont"}, "midpoint"),
        ({"name": "heun", "last": "x"}, "heun"),
        ({"name": "unipc-3", "order": 7}, "orders 1 to 5"),
        ({"name": "dpmpp-2m", "order": 0}, "orders 1 to 6"),
        ({"name": "ddpm", "variance": "post"}, "posterior"),
        ({"name": "sit-sde", "diffusion": "sigmoid"}, "sigma"),
        ({"name": "sit-sde", "last": "x"}, "mean"),
        ({"name": "sit-sde", "norm": 0.0}, "positive"),
    ]:
        with pytest.raises(PlanError, match=match):
            get_solver(spec)


def test_bad_grids_are_refused():
    path = get_path("linear")
    for times, match in [
        ([0.5], "at least 2"),
        ([[1.0, 0.0]], "at least 2"),
        ([1.0, 0.5, 0.5, 0.0], "both 0.5"),
        ([1.0, 0.4, 0.6, 0.0], "turns back"),
        ([0.0, 0.6, 0.4, 1.0], "turns back"),
        ([1.2, 0.5], "between 0 .* for step 0"),
        ([float("nan"), 0.5], "between 0"),
        ([0.5, -0.1], "between 0 .* for the end"),
    ]:
        with pytest.raises(PlanError, match=match):
            compile_program(path, times, "euler", "velocity")
    with pytest.raises(PlanError, match="one per step"):
        compile_program(path, uniform_times(4), ["euler"] * 3, "velocity")
    with pytest.raises(PlanError, match="reset_history"):
        compile_program(path, uniform_times(4), "euler", "velocity", reset_history=[4])


def test_what_a_path_cannot_do_is_said():
    with pytest.raises(PlanError, match="does not determine"):
        compile_program(get_path("linear"), uniform_times(4), "ddim", "epsilon")  # alpha = 0 at t = 1
    with pytest.raises(PlanError, match="does not determine"):
        compile_program(get_path("linear"), uniform_times(4).flip(0), "ddim", "sample")  # sigma = 0 at t = 0
    with pytest.raises(PlanError, match="sbdm"):
        compile_program(get_path("gvp"), uniform_times(4), {"name": "sit-sde", "diffusion": "sbdm"}, "velocity")
    program = compile_program(get_path("linear"), uniform_times(4), "euler", "velocity")
    for result in run(program, START, GMM2D.evaluate(program)):
        assert bool(torch.isfinite(result.x0).all())


def test_compute_and_solver_are_orthogonal():
    """Which step pays for a call changes nothing in the coefficients (sheet D, 14.8(5))."""
    program = program_for("unipc-2")
    steps = tuple(
        tuple(dataclasses.replace(op, step=7 - op.step) if isinstance(op, Eval) else op for op in step)
        for step in program.steps
    )
    other = dataclasses.replace(program, steps=steps)
    assert other != program and torch.equal(other.normal_form().rows(), program.normal_form().rows())


def test_evaluations_carry_their_step():
    program = program_for("heun", steps=3)
    assert [e.step for e in program.evaluations] == [0, 0, 1, 1, 2]
    assert dataclasses.asdict(program.evaluations[0])["step"] == 0
    assert float(sample(program_for("ddim"), gaussian(1.0), torch.ones(1, 1)).abs()) < 3


def test_x0_estimate_on_a_path_with_an_offset():
    """x = alpha x0 + sigma eps + beta mu: the estimate subtracts the offset."""
    node = dataclasses.replace(NODE, beta=0.25)
    program = hand_made(Eval(0, 0, node, 0), Lin(1, node, x=((0, 1.0),)), stored="epsilon")
    x0, eps, mu = (start_points(seed=k) for k in range(3))
    (result,) = run(program, 0.5 * x0 + 0.5 * eps + 0.25 * mu, lambda x, ev: Output(eps), mu=mu)
    torch.testing.assert_close(result.x0, x0)


@pytest.mark.slow
def test_fused_updates_equal_the_plain_ones() -> None:
    """One generated kernel per number of terms, any shape and dtype; the same sums but for rounding."""
    from pliant.solvers import fused_combine

    for terms in (1, 3, 5):
        for shape, dtype in (((2, 3, 5), torch.float32), ((4, 7), torch.float64)):
            values = [(0.3 * k - 0.5, torch.randn(shape, dtype=dtype)) for k in range(terms)] + [(0.0, torch.ones(1))]
            got = fused_combine(values, values[0][1])
            want = sum(c * v for c, v in values[:-1])
            torch.testing.assert_close(got, want)
    assert not fused_combine([(0.0, torch.ones(3))], torch.ones(3)).any()
