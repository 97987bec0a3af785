"""The site executor against the plain network (sheet E, 10.4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.compute import (
    WITHOUT_CONDITIONING,
    Cache,
    Compute,
    Gate,
    Moment,
    Reuse,
    TransformerShape,
    counted_flops,
    spent_macs,
)
from pliant.compute.executor import Call
from pliant.compute.lowering import lower
from pliant.compute.reuse import forecast_weights
from pliant.compute.sites import State, format_sites, parse_sites
from pliant.errors import ConfigError, PlanError
from pliant.models import DiT, DiTConfig
from pliant.models.dit_sites import DiTSites

SITES, STEPS, BATCH = 12, 12, 4


@pytest.fixture(scope="module")
def network() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(8, 8), patch_size=(2, 2), in_channels=4, width=64, depth=6, heads=4, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    net = DiT(config)
    for p in net.parameters():
        p.data.normal_(std=0.06)
    return net.requires_grad_(False)


class Inputs:
    """Slowly varying inputs `a + 0.02 i b`, one row per sample, each with its own speed."""

    def __init__(self, speeds: Sequence[float] = (1.0,) * BATCH, rows: slice = slice(None)) -> None:
        generator = torch.Generator().manual_seed(1)
        a, b = torch.randn(2, BATCH, 4, 8, 8, generator=generator)
        self.a, self.b = a[rows], (b * torch.tensor(speeds).view(-1, 1, 1, 1))[rows]
        self.labels = torch.arange(BATCH)[rows]

    def at(self, i: int, network: DiT) -> tuple[Tensor, Tensor]:
        x = self.a + 0.02 * i * self.b
        return x, network.modulations(torch.full((len(x),), 500.0), self.labels)


class Counting(DiTSites):
    """Counts the sites that really run."""

    def __init__(self, network: DiT) -> None:
        super().__init__(network)
        self.ran: list[int] = []

    def run(self, first: int, last: int, state: State, context: Tensor) -> State:
        self.ran += range(first, last)
        return DiTSites(self.network).run(first, last, state, context)

    def inner(self, s: int, seen: State, context: Tensor):  # type: ignore[no-untyped-def]
        self.ran.append(s)
        return super().inner(s, seen, context)


def play(
    network: DiT, computes: Sequence[Compute], inputs: Inputs | None = None, depth: int = 4
) -> tuple[list[Tensor], Cache]:
    sites, cache, out = DiTSites(network), Cache(depth), []
    inputs = inputs or Inputs()
    for i, compute in enumerate(computes):
        moment = Moment(i, 1 - i / STEPS, 0.1 * i)
        call = Call(lower(compute, SITES), sites, cache, "net", ("cond",), moment)
        out.append(call() if call.from_memory else call(*inputs.at(i, network)))
    return out, cache


def plain(network: DiT, inputs: Inputs | None = None, steps: int = STEPS) -> list[Tensor]:
    inputs = inputs or Inputs()
    return [network.forward_modulated(*inputs.at(i, network)) for i in range(steps)]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "compute",
    [
        Compute(sites="R12"),
        Compute(write=("branch",)),
        Compute(sites="R12", write=("branch", "out", "span(0,12)", "span(3,9)", "span(5,7)")),
        Compute(write=("span(2,12)",), reuse=Reuse("span"), gate=Gate(0.0, "R2C10", 2)),
        Compute(write=("branch",), reuse=Reuse("branch", 2), gate=Gate(0.0, "R1C11", 1)),
        Compute(write=("out",), reuse=Reuse("out"), gate=Gate(0.0, "C12", signal="input")),
        Compute(write=("span(1,12)",), reuse=Reuse("span"), gate=Gate(0.0, "R1C11", 1, polynomial=(1.0, 0.0))),
    ],
)
def test_running_everything_is_the_plain_network_bit_for_bit(network: DiT, compute: Compute) -> None:
    """Check 1, and thresholds of zero (check 2): whatever is kept, and wherever a gate looks."""
    assert same(play(network, [compute] * STEPS)[0], plain(network))


@pytest.mark.parametrize("kind", ["branch", "span", "out"])
def test_refreshing_every_step_reuses_nothing(network: DiT, kind: str) -> None:
    """Check 2: an interval of one."""
    write = {"branch": "branch", "span": "span(2,10)", "out": "out"}[kind]
    assert same(play(network, [Compute(write=(write,))] * 3)[0], plain(network, steps=3))


def interval(period: int, reuse: Reuse, cheap: str, write: str) -> list[Compute]:
    """Full every `period` steps, and until there is enough to forecast from; the rest reuses."""
    full, less = Compute(write=(write,)), Compute(sites=cheap, reuse=reuse)
    return [full if i % period == 0 or i <= period * reuse.order else less for i in range(STEPS)]


def residual_error(network: DiT, computes: list[Compute]) -> float:
    """Mean relative error of the output over the steps that reused something."""
    got, want = play(network, computes)[0], plain(network)
    pairs = [(g, w) for g, w, c in zip(got, want, computes, strict=True) if c.reuse is not None]
    return sum(float((g - w).norm() / w.norm()) for g, w in pairs) / len(pairs)


def test_errors_fall_with_the_order_and_rise_with_the_interval(network: DiT) -> None:
    """Check 3."""
    errors = {
        (n, q): residual_error(network, interval(n, Reuse("branch", q), "C12", "branch"))
        for n in (2, 3)
        for q in (0, 1, 2)
    }
    assert errors[2, 0] > errors[2, 1] > errors[2, 2]
    assert errors[3, 0] > errors[3, 1] > errors[3, 2]
    assert all(errors[3, q] > errors[2, q] for q in (0, 1, 2))
    first_block = residual_error(network, interval(2, Reuse("span"), "R2C10", "span(2,12)"))
    rear = residual_error(network, interval(2, Reuse("span"), "R6C6", "span(6,12)"))
    assert rear < first_block  # the less is reused, the better


@given(
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
)
@settings(max_examples=30)
def test_newton_is_exact_on_polynomials_and_taylor_is_not(coefficients: list[float], gaps: list[int]) -> None:
    """Check 4, on uneven steps."""
    nodes = [0.0]
    for gap in gaps[:3]:
        nodes.append(nodes[-1] - gap)
    at = float(gaps[3])
    for order in (0, 1, 2, 3):

        def f(s: float, order: int = order) -> float:
            return sum(c * s**k for k, c in enumerate(coefficients[: order + 1]))

        seen = nodes[: order + 1]
        got = sum(w * f(s) for w, s in zip(forecast_weights(at, seen), seen, strict=True))
        assert got == pytest.approx(f(at), abs=1e-8 * (1 + sum(map(abs, coefficients)) * 1e3))


def test_taylor_is_the_published_recursion() -> None:
    """Sheet E 9, defect 1: on s^2 with gap N the prediction at k is off by -kN; on lines both are exact."""
    for n, k in ((5, 1), (5, 4), (3, 2)):
        nodes = [0.0, -float(n), -2.0 * n]
        weights = forecast_weights(float(k), nodes, "taylor")
        assert sum(w * s * s for w, s in zip(weights, nodes, strict=True)) - k * k == pytest.approx(-k * n)
        line = sum(w * (2 * s + 1) for w, s in zip(weights, nodes, strict=True))
        assert line == pytest.approx(2 * k + 1)
    assert forecast_weights(2.0, [0.0, -1.0], "taylor") == forecast_weights(2.0, [0.0, -1.0])


@pytest.mark.parametrize(
    ("sites", "reuse", "ran"),
    [
        ("R12", None, list(range(12))),
        ("R4C4R4", Reuse("span"), [0, 1, 2, 3, 8, 9, 10, 11]),
        ("C5R2C5", Reuse("branch"), [5, 6]),
        ("R3K6R3", None, [0, 1, 2, 9, 10, 11]),
        ("C12", Reuse("out"), []),
    ],
)
def test_the_sites_that_run_are_the_plan_s(network: DiT, sites: str, reuse: Reuse | None, ran: list[int]) -> None:
    """Check 5, first half."""
    counting, cache = Counting(network), Cache()
    full = Compute(write=("branch", "out", "span(4,8)"))
    for i, compute in enumerate((full, Compute(sites=sites, reuse=reuse))):
        counting.ran.clear()
        call = Call(lower(compute, SITES), counting, cache, "net", ("cond",), Moment(i, 1.0, 0.0))
        call() if call.from_memory else call(*Inputs().at(i, network))
    assert counting.ran == ran


def test_skipping_a_site_contributes_nothing(network: DiT) -> None:
    sites = DiTSites(network)
    x, modulations = Inputs().at(0, network)
    state, context = sites.begin(x, modulations)
    state = sites.run(0, 3, state, context)
    state = sites.run(9, 12, state, context)
    assert torch.equal(play(network, [Compute(sites="R3K6R3")])[0][0], sites.head(state, context))


def test_order_zero_reuse_adds_the_kept_branch_through_the_gate_of_now(network: DiT) -> None:
    sites, inputs = DiTSites(network), Inputs()
    state, context = sites.begin(*inputs.at(0, network))
    branches = []
    for s in range(SITES):
        branches.append(sites.inner(s, sites.norm(s, state, context), context))
        state = sites.add(s, state, branches[-1], context)
    state, context = sites.begin(*inputs.at(1, network))
    for s in range(SITES):
        state = sites.add(s, state, branches[s], context)
    got = play(network, [Compute(write=("branch",)), Compute(sites="C12", reuse=Reuse("branch"))])[0][1]
    assert torch.equal(got, sites.head(state, context))


def test_two_interleaved_requests_are_two_separate_ones(network: DiT) -> None:
    """Check 6, with different computes, on the same adapter."""
    sites = DiTSites(network)
    plans = [interval(2, Reuse("branch", 1), "C12", "branch"), interval(3, Reuse("span"), "R2C10", "span(2,12)")]
    inputs = [Inputs(), Inputs((2.0, 1.0, 3.0, 1.0))]
    caches, mixed = [Cache(2), Cache(2)], ([], [])  # type: ignore[var-annotated]
    for i in range(STEPS):
        for r in (0, 1):
            call = Call(lower(plans[r][i], SITES), sites, caches[r], "net", ("cond",), Moment(i, 1.0, 0.0))
            mixed[r].append(call(*inputs[r].at(i, network)))
    for r in (0, 1):
        assert same(mixed[r], play(network, plans[r], inputs[r], depth=2)[0])


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("threshold", [0.05, 0.1])
def test_a_batch_decides_row_by_row(network: DiT, order: int, threshold: float) -> None:
    """Check 7: the decisions of single runs, and their outputs to 1e-5."""
    speeds = (1.0, 3.0, 2.0, 0.5)
    gate = Compute(write=("span(2,12)",), reuse=Reuse("span", order), gate=Gate(threshold, "R2C10", 2))
    together, cache = play(network, [gate] * STEPS, Inputs(speeds))
    decisions = torch.tensor([d.hit for d in cache.decisions])
    assert (decisions.any(1) & ~decisions.all(1)).any()  # some step is mixed, or this tests nothing
    for r in range(BATCH):
        alone, own = play(network, [gate] * STEPS, Inputs(speeds, slice(r, r + 1)))
        assert [d.hit[0] for d in own.decisions] == decisions[:, r].tolist()
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(got[r : r + 1], want, atol=1e-5, rtol=1e-5)


def test_gates_obey_their_limits(network: DiT) -> None:
    always = Gate(float("inf"), "R2C10", 2, max_run=2)
    cache = play(network, [Compute(write=("span(2,12)",), reuse=Reuse("span"), gate=always)] * 7)[1]
    assert [d.hit[0] for d in cache.decisions] == [False, True, True, False, True, True, False]
    order = Compute(write=("span(2,12)",), reuse=Reuse("span", 1), gate=always)
    cache = play(network, [order] * 6)[1]  # a forecast of order 1 needs two values first
    assert [d.hit[0] for d in cache.decisions] == [False, False, True, True, False, True]


def test_accumulated_changes_and_the_last_step_as_reference(network: DiT) -> None:
    """TeaCache's rule: changes from step to step add up, a full call clears them."""
    def gate(threshold: float, **options: object) -> Compute:
        g = Gate(threshold, "C12", signal="input", reference="last_step", **options)  # type: ignore[arg-type]
        return Compute(write=("span(0,12)",), reuse=Reuse("span"), gate=g)

    inputs, sites = Inputs(), DiTSites(network)
    seen = [sites.norm(0, *sites.begin(*inputs.at(i, network)))[0] for i in range(STEPS)]
    change = [[float((b - a).abs().mean((1, 2))[r] / a.abs().mean((1, 2))[r]) for r in range(BATCH)]
              for a, b in pairwise(seen)]  # fmt: skip
    threshold, total, want = 3.5 * change[0][0], 0.0, [False]
    for step in change:
        total += step[0]
        want.append(total < threshold)
        total = total if want[-1] else 0.0
    cache = play(network, [gate(threshold, accumulate=True)] * STEPS)[1]
    assert [d.hit[0] for d in cache.decisions] == want
    assert 0 < sum(want) < STEPS - 1
    cache = play(network, [gate(threshold)] * STEPS)[1]  # without adding up, every step is small enough
    assert sum(d.hit[0] for d in cache.decisions) == STEPS - 1


def test_streams_share_a_batch_and_part_again(network: DiT) -> None:
    """Guided calls keep both streams at once; a later unguided call reads its own, and back."""
    sites, cache = DiTSites(network), Cache()
    x, modulations = Inputs().at(0, network)
    full, cheap = Compute(write=("branch",)), Compute(sites="C12", reuse=Reuse("branch"))

    def call(compute: Compute, streams: tuple[str, ...], rows: slice, i: int) -> Tensor:
        run = Call(lower(compute, SITES), sites, cache, "net", streams, Moment(i, 1.0, 0.0))
        return run(x[rows], modulations[rows])

    both = call(full, ("cond", "null"), slice(0, 4), 0)
    torch.testing.assert_close(call(cheap, ("cond",), slice(0, 2), 1), both[:2])
    torch.testing.assert_close(call(cheap, ("null",), slice(2, 4), 2), both[2:])
    torch.testing.assert_close(call(cheap, ("cond", "null"), slice(0, 4), 3), both)
    assert cache.bytes() == 12 * 4 * 16 * 64 * 4
    call(full, ("cond",), slice(0, 2), 4)  # cond is newer than null now: the batch is put together from both
    torch.testing.assert_close(call(cheap, ("cond", "null"), slice(0, 4), 5), both)


def test_sites_are_written_in_runs() -> None:
    assert parse_sites("R2C3K1") == "RRCCCK" and format_sites("RRCCCK") == "R2C3K1"
    for wrong in ("", "R", "R0", "X3", "R2 C3", "r2"):
        with pytest.raises(ConfigError, match="runs such as"):
            parse_sites(wrong)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Compute(sites="R2C2"), "no reuse that says what C means"),
        (lambda: Compute(sites="R4", reuse=Reuse()), "no site that is C"),
        (lambda: Compute(sites="R2C2", reuse=Reuse("out")), "all sites C"),
        (lambda: Compute(write=("spam",)), "expected one of branch"),
        (lambda: Compute(write=("span(4,4)",)), "first < last"),
        (lambda: Reuse("brunch"), "did you mean 'branch'"),  # type: ignore[arg-type]
        (lambda: Reuse(order=4), "order 0 to 3"),
        (lambda: Gate(0.1, "R4", 2), "saves nothing"),
        (lambda: Gate(0.1, "C4", 2), "begin with R2"),
        (lambda: Gate(0.1, "C4"), "probe >= 1"),
        (lambda: Gate(-0.1, "R1C3", 1), "number >= 0"),
        (lambda: Gate(float("inf"), "R1C3", 1), "never recomputes"),
        (lambda: Gate(0.1, "R1C3", 1, max_run=0), ">= 1"),
        (lambda: Gate.from_dict({"treshold": 1}), "not a gate"),
        (lambda: Compute(exit=0), "at least 1"),
    ],
)
def test_bad_values_are_refused_in_one_line(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_another_number_of_sites_is_refused() -> None:
    with pytest.raises(PlanError, match="'R10' is for 10 sites, this model has 12"):
        lower(Compute(sites="R10"), 12)
    with pytest.raises(PlanError, match=r"span\(3,20\)"):
        lower(Compute(write=("span(3,20)",)), 12)
    with pytest.raises(PlanError, match="inside the reused span"):
        lower(Compute(sites="R4C8", reuse=Reuse("span"), write=("span(6,12)",)), 12)


@pytest.mark.parametrize(
    "compute",
    [
        Compute(write=("branch", "out")),
        Compute(sites="R4C4R4", reuse=Reuse("span")),
        Compute(sites="C1R1C1R1C1R1C6", reuse=Reuse("branch")),
        Compute(sites="R3K6R3"),
        Compute(sites="C12", reuse=Reuse("out")),
        Compute(sites="C12", reuse=Reuse("branch")),
    ],
)
def test_the_cost_is_what_is_counted(network: DiT, compute: Compute) -> None:
    """Check 5, second half: exactly, attention included; conditioning is computed outside the call."""
    config = network.config
    shape = TransformerShape(
        config.depth, config.width, config.heads, config.in_channels, config.out_channels, config.patch_size, 16
    )
    sites, cache = DiTSites(network), Cache()
    inputs = Inputs().at(0, network)
    full = Compute(write=("branch", "out", "span(4,8)"))
    Call(lower(full, SITES), sites, cache, "net", ("cond",), Moment(0, 1.0, 0.0))(*inputs)
    call = Call(lower(compute, SITES), sites, cache, "net", ("cond",), Moment(1, 1.0, 0.0))
    counted = counted_flops(lambda: call() if call.from_memory else call(*inputs))
    assert counted == BATCH * 2 * spent_macs(shape, compute, WITHOUT_CONDITIONING)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_bf16_forecasts_keep_the_differences_of_close_values(order: int) -> None:
    """Values near 4 that differ by a few of bf16's last bits (1/64): their trend survives, rounded a little."""
    generator = torch.Generator().manual_seed(order)
    steps = torch.randint(-3, 4, (order + 1, 2, 5, 8), generator=generator) / 64
    kept = (4 + steps.cumsum(0)).bfloat16()
    cache, reuse = Cache(depth=order + 1), Reuse("branch", order)
    for j, value in enumerate(kept):
        cache.write(("net", ("branch", 0, 1)), ("cond",), (value,), Moment(2 * j, 0.5, 0.0))
    at = Moment(2 * order + 1, 0.5, 0.0)
    (found,) = cache.read(("net", ("branch", 0, 1)), ("cond",), reuse, at)
    weights = forecast_weights(at.step, [2.0 * j for j in reversed(range(order + 1))])
    exact = sum(w * v.double() for w, v in zip(weights, kept.flip(0), strict=True))
    assert found is not None and found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= order * 2**-6 * 1.01  # half a last bit per term
    assert float((exact - kept[-1].double()).abs().max()) > 2**-6, "nothing to lose"
