"""Routing: the known best assignment is found, costs follow the price, and grouping changes no image."""

from itertools import pairwise

import pytest
import torch

import pliant
from pliant.compute import Compute
from pliant.errors import PlanError
from pliant.planning.routing import Head, Neighbours, PlanPolicy, Router, class_means, measured_quality
from pliant.plans import Plan, RoutedPlans

MODEL = pliant.load("digits")
CHEAP = Plan.uniform(MODEL, 2, compute=Compute.of(2, precision="fp32"))
DEAR = Plan.uniform(MODEL, 3, compute=Compute(precision="fp32"))
COSTS = torch.tensor([1.0, 10.0], dtype=torch.float64)
EASY, HARD = (0.90, 0.91), (0.40, 0.90)


def crowd(count: int = 500, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sheet E's example: 70 % of conditions are easy; two separable features. -> features, quality."""
    g = torch.Generator().manual_seed(seed)
    easy = torch.arange(count) % 10 < 7
    centre = torch.where(easy[:, None], torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.5]))
    features = centre + 0.2 * torch.randn(count, 2, generator=g)
    quality = torch.where(easy[:, None], torch.tensor(EASY), torch.tensor(HARD))
    return features, quality.double()


def known(features: torch.Tensor) -> torch.Tensor:
    return torch.where(features[:, :1] > 0, torch.tensor(EASY), torch.tensor(HARD)).double()


def outcome(router: Router, features: torch.Tensor, quality: torch.Tensor, price: float) -> tuple[float, float]:
    chosen = router.decide(features, price)
    return float(quality[torch.arange(len(chosen)), chosen].mean()), float(router.costs[chosen].mean())


@pytest.mark.parametrize(
    ("price", "quality", "cost"), [(0.0011, 0.907, 10), (0.00112, 0.90, 3.7), (0.0555, 0.90, 3.7), (0.0556, 0.75, 1)]
)
def test_the_known_best_assignment(price, quality, cost):
    features, truth = crowd()
    router = Router((CHEAP, DEAR), COSTS, known)
    assert outcome(router, features, truth, price) == pytest.approx((quality, cost), abs=1e-6)


def test_cost_and_quality_fall_with_the_price():
    features, truth = crowd()
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for estimate in (known, Neighbours.fit(features, truth + 0.02 * noise)):
        router = Router((CHEAP, DEAR), COSTS, estimate)
        believed = estimate(features)
        rows = [outcome(router, features, believed, price) for price in torch.linspace(0, 0.1, 25).tolist()]
        assert all(a[0] >= b[0] - 1e-12 and a[1] >= b[1] for a, b in pairwise(rows))
        assert rows[0][0] > rows[-1][0] and rows[0][1] > rows[-1][1]


@pytest.mark.parametrize("kind", [Neighbours, Head])
def test_estimates_from_noisy_labels_reach_the_oracle(kind):
    features, truth = crowd()
    noisy = truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    new, quality = crowd(200, seed=5)
    router = Router((CHEAP, DEAR), COSTS, kind.fit(features, noisy))
    price = router.price_for(new, 3.7)
    value, cost = outcome(router, new, quality, price)
    assert cost <= 3.7 + 1e-9
    assert value >= 0.95 * 0.90


def test_a_dominated_plan_changes_nothing():
    features, _ = crowd(100)
    plain = Router((CHEAP, DEAR), COSTS, known)
    costs = torch.cat([COSTS, torch.tensor([11.0])])
    worse = Router((CHEAP, DEAR, DEAR), costs, lambda f: torch.cat([known(f), known(f)[:, :1]], 1))
    for price in (0.0, 0.005, 0.02, 0.1):
        assert torch.equal(plain.decide(features, price), worse.decide(features, price))


def test_the_budget_sets_the_price():
    features, _ = crowd()
    router = Router((CHEAP, DEAR), COSTS, known)
    assert router.price_for(features, 10.0) == 0.0
    assert 0.00111 <= router.price_for(features, 9.9) <= 0.00112
    with pytest.raises(PlanError, match="below the cheapest plan, which costs 1"):
        router.price_for(features, 0.5)
    with pytest.raises(PlanError, match="at least 0"):
        router.decide(features, -1.0)


def test_means_of_few_samples_are_shrunk():
    quality = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    means = class_means(quality, [0, 1, 1, 1], 3, shrink=1.0)
    torch.testing.assert_close(means[0], torch.tensor([0.625, 0.125], dtype=torch.float64))
    torch.testing.assert_close(means[2], quality.mean(0), msg="a class without samples is like all")


def test_a_policy_learns_which_cluster_needs_steps():
    """Sheet D, 8: cluster A reaches quality 1 at 10 steps, B only at 40."""
    clusters = torch.arange(40) % 2
    features = torch.nn.functional.one_hot(clusters, 2).float()
    quality = torch.tensor([[1.0, 1.0, 1.0], [0.3, 0.6, 1.0]])[clusters]
    costs = torch.tensor([10.0, 20.0, 40.0])
    policy = PlanPolicy.fit(features, quality, costs)
    chance = policy.probabilities(torch.eye(2))
    assert chance[0, 0] >= 0.95 and chance[1, 2] >= 0.95
    # Without regard to quality the price decides: all take the cheapest.
    stingy = PlanPolicy.fit(features, quality, costs, gamma=50.0, kappa=0.0)
    assert stingy.probabilities(torch.eye(2)).argmax(1).tolist() == [0, 0]
    # Without a price a bare preference for quality takes what is best.
    free = PlanPolicy.fit(features, quality + 0.1 * torch.tensor([0.0, 1.0, 2.0]), costs, gamma=0.0)
    assert free.probabilities(torch.eye(2)).argmax(1).tolist() == [2, 2]


def test_image_k_is_unchanged_by_grouping():
    labels, seeds = [3, 1, 3, 0, 1, 2], [10, 11, 12, 13, 14, 15]
    routed = RoutedPlans((CHEAP, DEAR), (0, 1, 1, 0, *[0] * 7))
    images = pliant.sample(MODEL, routed, labels, seeds, batch_size=2)
    for k, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        plan = DEAR if label in (1, 2) else CHEAP
        alone = pliant.sample(MODEL, plan, [label], [seed])
        torch.testing.assert_close(images[k : k + 1], alone, rtol=1e-4, atol=1e-4)
    assert routed.flops(MODEL, torch.tensor(labels), seeds) == pytest.approx(
        (CHEAP.cost(MODEL).flops + DEAR.cost(MODEL).flops) / 2
    )
    by_noise = RoutedPlans((CHEAP, DEAR), choose=lambda labels, seeds: torch.tensor([s % 2 for s in seeds]))
    torch.testing.assert_close(
        pliant.sample(MODEL, by_noise, labels, seeds)[1:2], pliant.sample(MODEL, DEAR, [1], [11]), rtol=1e-4, atol=1e-4
    )


def test_from_measured_quality_to_a_file(tmp_path):
    """A class whose images the cheap plan spoils gets the dear one."""
    labels, seeds = [0, 1, 2] * 4, list(range(12))
    reference = pliant.sample(MODEL, DEAR, labels, seeds)

    def score(images, asked):
        error = (images - reference).square().flatten(1).mean(1)
        return 1.0 - error * (asked == 1)  # only class 1 minds

    quality = measured_quality(MODEL, (CHEAP, DEAR), labels, seeds, score)
    assert float(quality[:, 1].min()) == 1.0
    means = class_means(quality, labels, 3, shrink=0.5)
    router = Router((CHEAP, DEAR), COSTS, lambda f: means)
    routed = router.by_class(torch.eye(3), budget=4.0)
    assert routed.table == (0, 1, 0)
    routed.save(tmp_path / "routed.json")
    loaded = RoutedPlans.load(tmp_path / "routed.json")
    assert loaded.table == routed.table and [p.digest() for p in loaded.plans] == [CHEAP.digest(), DEAR.digest()]


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(PlanError, match="names plan 2"):
        RoutedPlans((CHEAP, DEAR), (0, 2))
    with pytest.raises(PlanError, match="give one of them"):
        RoutedPlans((CHEAP,))
    with pytest.raises(PlanError, match="class 3 is not in it"):
        pliant.sample(MODEL, RoutedPlans((CHEAP, DEAR), (0, 1, 1)), [3])
    with pytest.raises(PlanError, match="cannot be written"):
        RoutedPlans((CHEAP,), choose=lambda labels, seeds: labels * 0).save(tmp_path / "x.json")
    with pytest.raises(PlanError, match="must return 1 plan numbers below 1"):
        pliant.sample(MODEL, RoutedPlans((CHEAP,), choose=lambda labels, seeds: labels + 5), [0])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(PlanError, match="no routed plans"):
        RoutedPlans.load(tmp_path / "x.json")
    with pytest.raises(PlanError, match="routing learns from"):
        Neighbours.fit(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(PlanError, match="finite"):
        Head.fit(torch.zeros(3, 2), torch.full((3, 2), float("nan")))
