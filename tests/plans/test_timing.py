"""Seconds of plans from a table of made-up times: sums by hand, budgets, files, machines. Nothing here looks at a clock
except the last test, which only asks that measuring gives a complete table.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pliant.compute import Compute, Merge, Pool
from pliant.compute.tokens import Pooled
from pliant.errors import ConfigError, PlanError
from pliant.guidance import Guidance
from pliant.plans import Budget, Plan, Sampler, parse_budget
from pliant.plans.calls import Call
from pliant.plans.timing import Curve, Machine, Prices, Throughput, cache_file, cached_table, this_machine
from pliant.plans.timing.adjust import adjusted, gauges
from pliant.plans.timing.measure import measure
from pliant.plans.timing.ready import ready_table
from support.throughput import OUTSIDE, PIECES, foreign, line, synthetic_table

CALL = PIECES["ends"] + 2 * (PIECES["attention"] + PIECES["mlp"])
"""Seconds per row of a whole call of the tests' networks (two blocks)."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path / "cache"))


# Curves ---------------------------------------------------------------------------------------------------------------


def test_curves_are_lines_between_points_and_beyond() -> None:
    curve = Curve((1.0, 2.0, 4.0), (10.0, 12.0, 20.0))
    assert [curve.at(r) for r in (1, 1.5, 2, 3, 4, 6)] == [10.0, 11.0, 12.0, 16.0, 20.0, 28.0]
    assert curve.at(0.5) == 9.0
    assert Curve((1.0, 2.0), (1.0, 4.0)).at(0.25) == 0.25  # not below zero: in proportion
    assert Curve((1.0, 2.0), (5.0, 4.0)).at(9) == 4.0  # noise never makes more work cheaper than what was measured
    assert Curve((4.0,), (2.0,)).at(6) == 3.0
    assert Curve.from_list(curve.to_list()) == curve == Curve.of([(4, 20.0), (1, 10.0), (2, 12.0)])
    for bad in ([], [[2, 1.0], [1, 1.0]], "fast", [[1]]):
        with pytest.raises(ConfigError):
            Curve.from_list(bad)


# Sums -----------------------------------------------------------------------------------------------------------------


def test_a_plain_plan_by_hand(make) -> None:
    model = make()
    prices = Prices(synthetic_table(model), model, batch=3)
    found = prices.plan(Plan.uniform(model, 5, "ddim"))
    around = OUTSIDE["step"] + OUTSIDE["update"]
    labels = min(3, model.num_classes)
    assert found.begin == pytest.approx(3 * OUTSIDE["begin"] + 5 * labels * PIECES["table"])
    cold, *warm = found.steps
    assert warm == pytest.approx([3 * (CALL + around)] * 4)
    assert cold == pytest.approx(3 * (CALL + around + PIECES["start"]))
    assert found.seconds == found.least == pytest.approx(found.begin + sum(found.steps))
    assert found.preparation == PIECES["prepare"]


def test_guided_calls_have_twice_the_rows_or_a_call_of_their_own(make) -> None:
    model = make()
    prices = Prices(synthetic_table(model), model)
    weak = Compute.of(4)
    joint = prices.call(Call(Compute(), ("cond", "null")))
    assert joint == pytest.approx(2 * CALL)
    split = Plan.uniform(model, 1, "ddim", guidance=Guidance.weak_model(1.5, weak))
    weak_call = PIECES["ends"] + 0.25 * 2 * (PIECES["attention"] + PIECES["mlp"])
    around = OUTSIDE["step"] + OUTSIDE["update"] + OUTSIDE["guided"]
    assert prices.plan(split).steps[0] == pytest.approx(CALL + weak_call + around + 2 * PIECES["start"])


def test_other_networks_find_the_caches_cold(make) -> None:
    """A network's first call in a run takes longer, and less so every call after another network's."""
    model = make()
    prices = Prices(synthetic_table(model), model)
    full, weak = Compute(), Compute.of(4)

    def seconds(*computes: Compute) -> list[float]:
        plan = Plan.uniform(model, len(computes), "ddim")
        steps = (replace(s, compute=c) for s, c in zip(plan.steps, computes, strict=True))
        return list(prices.plan(plan.with_steps(steps)).steps)

    a, b = seconds(full, full)[1], seconds(weak, weak)[1]
    start, switch = PIECES["start"], PIECES["switch"]
    assert seconds(full, weak, weak, full, weak) == pytest.approx([a + start, b + start, b, a + switch, b + switch])
    skipping = Compute(sites="R2K2")  # the same network, less of it
    assert seconds(full, skipping, full)[2] == pytest.approx(a)
    separate = Plan.uniform(model, 2, "ddim", guidance=Guidance.weak_model(1.5, weak))  # two networks at every step
    first, second = prices.plan(separate).steps
    assert first - second == pytest.approx(2 * start - 2 * switch)


def test_further_terms_and_noise_cost_more(make) -> None:
    model = make()
    prices = Prices(synthetic_table(model), model)
    plain, history = (prices.plan(Plan.uniform(model, 4, solver)) for solver in ("ddim", "dpmpp-2m"))
    # A middle step of the second-order multistep solver reads one more state and one more output.
    assert history.steps[2] - plain.steps[2] == pytest.approx(2 * OUTSIDE["term"])
    ancestral = prices.plan(Plan.uniform(model, 4, {"name": "ddim", "eta": 1.0}))
    assert ancestral.steps[0] - plain.steps[0] == pytest.approx(OUTSIDE["noise"] + OUTSIDE["term"])


@pytest.mark.parametrize("name,options", [("fora", {"interval": 2}), ("taylorseer", {}), ("deepcache", {})])
def test_caches_are_priced_as_the_executor_runs_them(make, name, options) -> None:
    """A reused step costs what it reads, a kept one what it keeps, exactly."""
    model = make(depth=4)
    prices = Prices(synthetic_table(model), model)
    plan = Plan.uniform(model, 6, "ddim").cached(model, name, **options)
    around = OUTSIDE["step"] + OUTSIDE["update"]
    for i, (step, seconds) in enumerate(zip(plan.steps, prices.plan(plan).steps, strict=True)):
        compute = step.compute
        expected = PIECES["ends"] + around + (PIECES["start"] if i == 0 else 0.0)
        letters = "R" * 8 if compute.sites is None else "".join(
            letter * int(n or 1) for letter, n in zip(compute.sites[::2], compute.sites[1::2], strict=True)
        )
        order = 0 if compute.reuse is None else compute.reuse.order
        mixed = PIECES["forecast"] + (order - 1) * PIECES["forecast more"] if order else 0.0
        for s, letter in enumerate(letters):
            if letter == "R":
                expected += PIECES["mlp" if s % 2 else "attention"]
                expected += PIECES["keep branch"] if "branch" in compute.write else 0.0
            elif compute.reuse is not None and compute.reuse.kind == "branch":
                expected += PIECES["branch"] + mixed
        if compute.reuse is not None and compute.reuse.kind == "span":
            expected += (PIECES["span"] + mixed) * len(compute.reads())
        expected += PIECES["keep span"] * len(compute.spans)
        assert seconds == pytest.approx(expected)


def test_reusing_everything_costs_next_to_nothing(make) -> None:
    model = make()
    prices = Prices(synthetic_table(model), model)
    plan = Plan.uniform(model, 6, "ddim").cached(model, "fora", interval=6)
    first, *later, last = prices.plan(plan).steps  # the last step runs in full
    assert max(later) < 0.1 * first and last == pytest.approx(first - PIECES["start"], rel=0.01)


def test_gates_give_two_bounds(make) -> None:
    model = make()
    prices = Prices(synthetic_table(model), model)
    gated = Plan.uniform(model, 8, "ddim").cached(model, "fbc", threshold=0.1)
    found = prices.plan(gated)
    plain = prices.plan(Plan.uniform(model, 8, "ddim"))
    assert found.least < plain.seconds < found.seconds
    frozen = gated.freeze(model, [0, 1])
    exact = prices.plan(frozen)
    assert exact.least == exact.seconds and exact.seconds < found.seconds


def test_every_memory_of_a_gate_begins_with_a_full_call(make) -> None:
    """Where guidance switches off and on, the guided calls remember apart from the others."""
    model = make()
    prices = Prices(synthetic_table(model), model)
    gated = Plan.uniform(model, 8, "ddim").cached(model, "fbc", threshold=0.1)
    guided = gated.with_steps(replace(s, guidance=Guidance(2.0) if i % 2 else None) for i, s in enumerate(gated.steps))
    found = prices.plan(guided)
    seconds = {}
    for call in (Call(gated.steps[1].compute, ("cond",)), Call(gated.steps[1].compute, ("cond", "null"))):
        seconds[call.streams] = prices.call(call) - prices.call(call, hit=True)
    assert found.seconds - found.least == pytest.approx(3 * sum(seconds.values()))


def test_fewer_tokens_take_less(make) -> None:
    model = make()
    prices = Prices(synthetic_table(model), model)
    whole = prices.call(Call(Compute(), ("cond",)))
    merged = prices.call(Call(Compute(tokens=Merge(0.5)), ("cond",)))
    width, tokens = model.config.width, 64
    attention = PIECES["attention"] * 0.5 * (4 * width + tokens) / (4 * width + 2 * tokens)
    assert merged == pytest.approx(PIECES["ends"] + 2 * (attention + PIECES["merge"] + PIECES["mlp"]))
    pooled = prices.call(Call(Compute(tokens=Pool((Pooled(0, 2),))), ("cond",)))
    assert merged < whole and pooled < whole - 0.5 * (PIECES["attention"] + PIECES["mlp"])


def test_skipping_sites_and_more_images(make) -> None:
    model = make()
    table = synthetic_table(model)
    one, four = Prices(table, model), Prices(table, model, 4)
    calls = [Call(Compute(sites=text), ("cond",)) for text in ("R4", "R3K1", "R2K2", "R1K3", "K4")]
    seconds = [one.call(c) for c in calls]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] == pytest.approx(one.call(Call(Compute(), ("cond",))))
    assert [four.call(c) for c in calls] == pytest.approx([4 * s for s in seconds])


def test_seconds_add_up_and_grow_with_steps(make) -> None:
    model = make()
    prices = Prices(synthetic_table(model), model, 2)
    found = [prices.plan(Plan.uniform(model, n, "euler")).seconds for n in (1, 2, 4, 8, 16)]
    assert found == sorted(found)
    by_split = [prices.plan(Plan.weak_to_powerful(model, 8, weak_steps=k)).seconds for k in range(9)]
    assert by_split == sorted(by_split, reverse=True)
    differences = [a - b for a, b in pairwise(by_split)]
    inner = differences[1:-1]
    assert max(inner) == pytest.approx(min(inner), rel=1e-2)  # every weak step saves the same
    # The first brings a second network with it, the last leaves the first one out.
    once = 2 * (PIECES["start"] + PIECES["table"])
    assert [differences[0], differences[-1]] == pytest.approx([inner[0] - once, inner[0] + once], rel=1e-2)


def test_what_was_not_measured_is_named(make) -> None:
    model = replace(make(), metadata={"name": "toy"})
    table = synthetic_table(model, ("fp32",))
    plan = Plan.uniform(model, 2, compute=Compute(precision="int8d"))
    with pytest.raises(PlanError, match=r"'1x1 int8d'.*pliant bench toy --precision int8d"):
        Prices(table, model).plan(plan)
    with pytest.raises(PlanError, match="at least 1 image"):
        Prices(table, model, 0)


def test_plan_cost_with_a_table(make) -> None:
    model = make()
    table, plan = synthetic_table(model), Plan.uniform(model, 4, guidance=2.0)
    cost = plan.cost(model, batch=4, throughput=table)
    assert cost.batch is not None and cost.batch.images == 4
    assert cost.batch.seconds == Prices(table, model, 4).plan(plan).seconds
    assert cost.batch.seconds_per_image == cost.batch.seconds / 4
    assert replace(cost, batch=None) == plan.cost(model)
    without = plan.cost(model, batch=4).batch
    assert without is not None and without.seconds is None and without.memory == cost.batch.memory
    assert "predicted" not in plan.describe(model)
    table.save(cache_file(model))
    assert plan.describe(model, 4).splitlines()[-1].startswith("predicted ")
    assert "for 4 images on" in plan.describe(model, 4)


# Budgets --------------------------------------------------------------------------------------------------------------


def test_times_as_people_write_them() -> None:
    for text, seconds, batch in (
        ("2.0 s", 2.0, 1), ("2s", 2.0, 1), ("350 ms", 0.35, 1), ("1.5 min", 90.0, 1), ("3 SECONDS", 3.0, 1),
        ("8 s for 4 images", 8.0, 4), ("0.5 sec for 1 image", 0.5, 1),
    ):  # fmt: skip
        budget = parse_budget(text)
        assert (budget.seconds, budget.batch, budget.unit) == (pytest.approx(seconds), batch, "seconds")
        again = parse_budget(budget.amount)
        assert (again.seconds, again.batch) == (pytest.approx(seconds), batch)
    assert (parse_budget("60%").unit, parse_budget("30 TFLOP").unit) == ("share", "flops")
    assert parse_budget(parse_budget("60%").amount).share == pytest.approx(0.6)
    assert parse_budget(parse_budget("1.5 GFLOP").amount).flops == pytest.approx(1.5e9)


@pytest.mark.parametrize("text,words", [
    ("2 m", "2 min, 2 ms or 2 MFLOP"),
    ("30 T", "did you mean 30 TFLOP"),
    ("30 GMAC", "MAC, counts as two FLOPs"),
    ("30 TFLOP/s", "a speed, not a budget"),
    ("2 s/image", "'2 s for 4 images'"),
    ("2 parsec", "unit .* is unknown; write a share"),
    ("-2 s", "cannot read"),
    ("0 s", "cannot read"),
    ("2 s for 0 images", "no image"),
    ("60% for 4 images", "only a time"),
    ("2", "did you mean 2% or 2 s"),
    ("s", "350 ms, 1.5 min"),
])  # fmt: skip
def test_misunderstood_units_are_refused_with_examples(text, words) -> None:
    with pytest.raises(PlanError, match=words):
        parse_budget(text)


def test_a_budget_is_one_number() -> None:
    infinite = ({"flops": math.inf}, {"seconds": math.nan}, {"share": 1.5})
    for bad in ({}, {"share": 0.5, "seconds": 1.0}, {"seconds": 0.0}, {"seconds": 1.0, "batch": 0}, *infinite):
        with pytest.raises(PlanError):
            Budget(**bad)
    for text in ("1e400 FLOP", "1e999 s", "1e308 TFLOP"):  # what a float cannot hold
        with pytest.raises(PlanError, match="budget"):
            parse_budget(text)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_budget_in_seconds_is_met_and_used_up(make, batch) -> None:
    model = make()
    table = synthetic_table(model)
    full = Prices(table, model, batch).plan(Plan.uniform(model, 20, guidance=2.0)).seconds
    budget = Budget(seconds=0.6 * full, batch=batch, throughput=table)
    plan = Plan.weak_to_powerful(model, 20, budget, guidance=2.0)
    weak = plan.provenance["weak_steps"]
    spent = budget.spent(plan, model)
    one_less = Plan.weak_to_powerful(model, 20, weak_steps=weak - 1, guidance=2.0)
    assert spent <= 0.601 * full < budget.spent(one_less, model)
    whole = Plan.uniform(model, 20, guidance=2.0)
    assert budget.fits(plan, whole, model) and not budget.fits(one_less, whole, model)


def test_a_second_network_that_does_not_pay_is_left_out(make) -> None:
    """The first weak step may cost more than it saves; the search for the fewest is not misled by that."""
    model = make()
    table = synthetic_table(model, pieces={**PIECES, "start": 0.1})
    full, weak = (Plan.weak_to_powerful(model, 8, weak_steps=k) for k in (0, 8))
    prices = Prices(table, model)
    seconds = [prices.plan(Plan.weak_to_powerful(model, 8, weak_steps=k)).seconds for k in range(9)]
    assert seconds[1] > seconds[0]
    for limit in (1.001 * seconds[0], 0.999 * seconds[0], 1.01 * seconds[4], 1.001 * seconds[8]):
        plan = Plan.weak_to_powerful(model, 8, Budget(seconds=limit, throughput=table))
        assert plan.provenance["weak_steps"] == next(k for k in range(9) if seconds[k] <= limit)
    assert prices.plan(weak).seconds < prices.plan(full).seconds


def test_too_little_time_names_the_cheapest_plan(make) -> None:
    model = make()
    table = synthetic_table(model)
    least = Prices(table, model).plan(Plan.weak_to_powerful(model, 10, weak_steps=10)).seconds
    with pytest.raises(PlanError, match=rf"below the cheapest.*all 10 steps weak.*{1e3 * least:.3g} ms for 1 image"):
        Plan.weak_to_powerful(model, 10, Budget(seconds=0.5 * least, throughput=table))
    Plan.weak_to_powerful(model, 10, Budget(seconds=1.001 * least, throughput=table))


def test_a_budget_in_words_uses_the_kept_table(make) -> None:
    model = make()
    synthetic_table(model).save(cache_file(model))
    plan = Plan.weak_to_powerful(model, 10, "100 ms")
    assert 0 < plan.provenance["weak_steps"] < 10
    assert Plan.weak_to_powerful(model, 10, "10 s").provenance["weak_steps"] == 0


# Files and machines ---------------------------------------------------------------------------------------------------


def test_tables_survive_their_file(make, tmp_path) -> None:
    table = synthetic_table(make())
    table.save(tmp_path / "table.json")
    assert Throughput.load(tmp_path / "table.json") == table
    data = json.loads((tmp_path / "table.json").read_text())
    for spoil, words in (
        ({"format": "cake"}, "not a throughput table"),
        ({"version": 99}, "version 99"),
        ({"networks": {"1x1 fp32": {"call": [["a", 1]]}}}, "damaged"),
        ({"machine": {"cpu": "?"}}, "damaged"),
    ):
        with pytest.raises(PlanError, match=words):
            Throughput.from_dict({**data, **spoil})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PlanError, match="not readable JSON"):
        Throughput.load(tmp_path / "broken.json")
    with pytest.raises(PlanError, match="pliant bench MODEL -o"):
        Throughput.load(tmp_path / "absent.json")


def test_tables_of_another_machine_or_model_are_refused(make) -> None:
    model = make()
    table = synthetic_table(model)
    table.check(model)
    plan = Plan.uniform(model, 2)
    with pytest.raises(PlanError, match=r"another machine \(Difference Engine No. 2.*pliant bench"):
        plan.cost(model, throughput=foreign(table))
    with pytest.raises(PlanError, match="another machine"):
        Budget(seconds=1.0, throughput=foreign(table)).spent(plan, model)
    with pytest.raises(PlanError, match="another model"):
        table.check(make(depth=3))
    threads = replace(table, machine=replace(table.machine, threads=table.machine.threads + 1))
    with pytest.raises(PlanError, match="threads"):
        threads.check(model)
    # What is kept for another machine is not found, which is not an error.
    foreign(table).save(cache_file(model))
    assert cached_table(model) is None


def test_machines() -> None:
    here = this_machine()
    assert here.device == "cpu" and here.cores >= 1 and here.torch == torch.__version__
    assert Machine.from_dict(here.to_dict()) == here and len(here.digest()) == 8
    assert here.differences(here) == []
    assert replace(here, threads=99).differences(here) == [f"threads {here.threads}, not 99"]


def test_tables_are_added_to(make) -> None:
    model = make()
    first, second = synthetic_table(model, ("fp32",)), synthetic_table(model, ("bf16",))
    both = first.with_more(second)
    assert set(both.networks) == set(first.networks) | set(second.networks)
    newer = first.with_more(replace(first, networks={"1x1 fp32": {"call": line(9.0)}}))
    assert newer.networks["1x1 fp32"]["call"].at(1) == 9.0
    assert newer.networks["1x1 fp32"]["ends"] == first.networks["1x1 fp32"]["ends"]


# Measuring ------------------------------------------------------------------------------------------------------------


class Clock:
    """Between two looks 30 milliseconds pass: measuring without waiting, whatever else the machine does."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.03
        return self.now


def test_measuring_gives_a_table_that_prices_everything(make) -> None:
    model = make()
    seen: list[tuple[int, int]] = []
    table = measure(model, rows=(1, 2), advance=lambda done, total: seen.append((done, total)), clock=Clock())
    assert seen[-1][0] == seen[-1][1] and [d for d, _ in seen] == sorted(d for d, _ in seen)
    prices = Prices(table, model, 2)
    base = Plan.uniform(model, 6, "dpmpp-2m")
    for plan in (
        base,
        Plan.weak_to_powerful(model, 6, weak_steps=3, guidance=2.0, weak_guidance_steps=1),
        *(base.cached(model, name, **options) for name, options in (
            ("fora", {"interval": 2}), ("taylorseer", {}), ("delta-dit", {}), ("icc", {"interval": 2, "rank": 2}),
            ("tome", {"ratio": 0.5}), ("ras", {}), ("fbc", {"threshold": 0.1}),
            ("easycache", {"threshold": 0.1, "warmup": 1}),
        )),
    ):  # fmt: skip
        found = prices.plan(plan)
        assert found.seconds >= found.least >= 0.0
        Sampler(model, plan)  # and the plan is one that runs
    assert Throughput.from_dict(table.to_dict()) == table


def test_a_table_follows_the_machine(make) -> None:
    """Where every step takes 30 ms, a table that says otherwise is scaled by what plain runs show, all of it."""
    model = make()
    table = synthetic_table(model, ("fp32",))
    made = adjusted(table, model, 2, Clock())
    plan = Plan.uniform(model, 12, "ddim")
    before = Prices(table, model, 2)
    runs = [sampler.plan for sampler in gauges(table, model).values()]
    assert len(runs) == 2 * len(model.patch_sizes)  # plain and guided
    shares = [0.03 * len(plan.steps) / before.plan(plan).seconds for plan in runs]
    factor = made.measured["adjusted"]
    assert factor == pytest.approx(statistics.median(shares), rel=1e-3)
    again = adjusted(made, model, 2, Clock())
    assert again.measured["adjusted"] == pytest.approx(factor, rel=1e-3)  # of what was measured, not of the last time
    for unit, curve in table.outside.items():
        assert made.outside[unit].at(3) == pytest.approx(factor * curve.at(3), rel=1e-3)
    assert Prices(made, model, 2).plan(plan).seconds == pytest.approx(factor * before.plan(plan).seconds, rel=1e-3)
    with pytest.raises(PlanError, match="no patch size"):
        adjusted(replace(table, networks={}), model)


def test_a_table_is_measured_when_first_needed_and_kept(make, monkeypatch) -> None:
    model = make()
    calls = []

    def quick(model, computes=None, rows=(), advance=None):
        calls.append(list(computes))
        return synthetic_table(model, tuple({c.precision for c in computes}))

    monkeypatch.setattr("pliant.plans.timing.ready.measure", quick)
    table = ready_table(model)
    assert cached_table(model) == table and ready_table(model) == table and len(calls) == 1
    more = ready_table(model, [Compute(precision="bf16-mixed")])
    assert len(calls) == 2 and {c.precision for c in calls[1]} == {"bf16-mixed"}
    assert set(table.networks) < set(more.networks)
