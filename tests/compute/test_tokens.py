"""Fewer tokens per call, without plans: subsets with keys and values (sheet E, section 1) and merging (section 9)."""

from __future__ import annotations

from collections.abc import Callable
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
    Merge,
    Moment,
    Reuse,
    Subset,
    TransformerShape,
    counted_flops,
    spent_macs,
)
from pliant.compute.executor import Call
from pliant.compute.lowering import lower
from pliant.compute.merging import match, places
from pliant.compute.subset import Regions, choose, pixels_of, token_scores
from pliant.errors import ConfigError, ShapeError
from pliant.models import DiT, DiTConfig
from pliant.models.dit_tokens import DiTTokens

SITES, BATCH = 6, 3
KEEP, HALF = Compute(write=("kv",)), Compute(tokens=Subset(0.5))


@pytest.fixture(scope="module")
def network() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(16, 16), patch_size=(2, 2), in_channels=4, width=64, depth=3, heads=4, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    net = DiT(config)
    for p in net.parameters():
        p.data.normal_(std=0.06)
    return net.requires_grad_(False)


def inputs(network: DiT, seed: int = 0, labels: tuple[int, ...] = (0, 1, 2)) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    return x, network.modulations(torch.full((BATCH,), 500.0), torch.tensor(labels))


def run(network: DiT, compute: Compute, cache: Cache, x: Tensor, rows: Tensor, step: int = 0) -> Tensor:
    call = Call(lower(compute, SITES), DiTTokens(network), cache, "net", ("cond",), Moment(step, 1.0, 0.0))
    return call(x, rows)


# Subsets --------------------------------------------------------------------------------------------------------------


def test_keeping_keys_and_values_changes_no_bit(network: DiT) -> None:
    x, rows = inputs(network)
    for compute in (KEEP, Compute(write=("kv", "branch", "span(1,4)")), Compute(tokens=Subset(1.0))):
        assert torch.equal(run(network, compute, Cache(), x, rows), network.forward_modulated(x, rows))


def test_active_tokens_with_fresh_keys_are_the_dense_network_s(network: DiT) -> None:
    """RAS, check 4, through all blocks and the head: every sample has its own tokens."""
    x, rows = inputs(network)
    cache = Cache()
    dense = run(network, KEEP, cache, x, rows)
    active = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:20] for i in range(BATCH)])
    cache.regions.active = active
    out = run(network, Compute(tokens=Subset(20 / 64)), cache, x, rows, 1)
    mask = pixels_of(active, (16, 16), (2, 2)).expand_as(out)
    torch.testing.assert_close(out[mask], dense[mask], atol=1e-5, rtol=1e-5)
    assert not out[~mask].any()


def test_stale_keys_are_seen_and_own_ones_replaced(network: DiT) -> None:
    """On another input the active tokens attend to the others as they were, and leave their keys behind."""
    x, rows = inputs(network)
    other = inputs(network, seed=1)[0]
    cache = Cache()
    run(network, KEEP, cache, x, rows)
    cache.regions.active = torch.arange(32).expand(BATCH, 32)
    first = run(network, HALF, cache, other, rows, 1)
    again = run(network, HALF, cache, other, rows, 2)  # its own rows are replaced by the same numbers
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first[:, :, :8], network.forward_modulated(other, rows)[:, :, :8], atol=1e-3)
    # Both halves one after the other have replaced every key of the first site.
    cache.regions.active = torch.arange(32, 64).expand(BATCH, 32)
    run(network, HALF, cache, other, rows, 3)
    fresh = Cache()
    run(network, KEEP, fresh, other, rows)
    pair = [c.read(("net", ("kv", 0, 1)), ("cond",), Reuse(), Moment(9, 0.0, 0.0)) for c in (cache, fresh)]
    for got, want in zip(*pair, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["update_std", "update_norm"])
def test_scores_are_means_over_the_pixels_of_a_token(rule: str) -> None:
    u = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    got = token_scores(u, (2, 3), rule)
    for b in range(2):
        for n in range(4):
            r, c = divmod(n, 2)
            block = u[b, :, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3]
            each = block.std(0, unbiased=True) if rule == "update_std" else block.norm(dim=0)
            assert float(got[b, n]) == pytest.approx(float(each.mean()), rel=1e-6)


@given(st.integers(0, 999), st.sampled_from([-1, 1]), st.integers(1, 16))
@settings(max_examples=30)
def test_a_drop_never_lowers_a_token_s_chance(seed: int, sign: int, count: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores, drops = torch.rand(1, 16, generator=g), torch.randint(0, 5, (1, 16), generator=g).float()
    subset = Subset(count / 16, sign=sign, starvation=0.5)
    before = choose(scores, drops, subset)[0].tolist()
    assert len(set(before)) == count and before == sorted(before)
    for token in range(16):
        more = drops.clone()
        more[0, token] += 3
        assert token not in before or token in choose(scores, more, subset)[0].tolist()
    assert before == choose(7.5 * scores, drops, subset)[0].tolist()  # the length of a step ranks nobody


def test_zero_scores_and_ties_are_fine() -> None:
    assert choose(torch.zeros(1, 8), torch.arange(8.0)[None], Subset(0.25)).tolist() == [[6, 7]]


TOKENS, STEPS, START, RESETS = 64, 28, 4, (12, 20)


def analytic(start: int = START, constant: bool = False) -> tuple[Callable[[Tensor, float], Tensor], Tensor]:
    """Velocity of tokens distributed as N(mu_n, sd_n^2) (check 3), or of one point per token (check 2); and noise."""
    g = torch.Generator().manual_seed(start)
    mu = torch.randn(16, 4, 8, 8, generator=g)
    sd = torch.linspace(0.05, 1, TOKENS).view(8, 8) * (not constant)

    def velocity(x: Tensor, t: float) -> Tensor:
        variance = (1 - t) ** 2 * sd**2 + t**2
        return -mu + (t - (1 - t) * sd**2) / variance * (x - (1 - t) * mu)

    return velocity, torch.randn(16, 4, 8, 8, generator=g)


def sampled(
    subset: Subset | None, pick: Callable[[Tensor, Tensor, Subset], Tensor] = choose, constant: bool = False
) -> tuple[Tensor, Tensor]:
    """Final state by Euler's method, and how often each token was evaluated (16, 64)."""
    velocity, x = analytic(constant=constant)
    regions, counts = Regions(), torch.zeros(16, TOKENS)
    times = torch.linspace(1, 0, STEPS + 1).tolist()
    for i, (t, following) in enumerate(pairwise(times)):
        partial = subset is not None and i >= START and i not in RESETS
        counts += 1 if not partial else torch.zeros(16, TOKENS).scatter(1, regions.active, 1.0)  # type: ignore[arg-type]
        field = regions.complete("guided", velocity(x, t), partial)
        if subset is not None and i + 1 >= START and i + 1 not in RESETS:
            scores = token_scores(field, (1, 1), subset.rule)
            drops = regions.drops.get((1, 1), torch.zeros_like(scores))
            if pick is choose:
                regions.choose(field, subset, (1, 1))
            else:
                regions.active = pick(scores, drops, subset)
                regions.drops[1, 1] = drops + 1 - torch.zeros_like(drops).scatter(1, regions.active, 1.0)
        x = x + (following - t) * field
    return x, counts


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [-1, 1])
def test_constant_velocities_are_reused_exactly(ratio: float, sign: int) -> None:
    """RAS, check 2."""
    got, counts = sampled(Subset(ratio, sign=sign), constant=True)
    torch.testing.assert_close(got, sampled(None, constant=True)[0], atol=1e-5, rtol=0)
    assert float(counts.mean()) < STEPS


def test_starvation_brings_dropped_tokens_back() -> None:
    """RAS, check 3: RMSE about .12, .085 and .029; least evaluations 6, 6 and 16."""
    dense, found = sampled(None)[0], {}
    for k in (0.0, 0.1, 1.0):
        x, counts = sampled(Subset(0.5, sign=1, starvation=k))
        found[k] = float((x - dense).square().mean().sqrt()), int(counts.min()), float(counts.mean())
    assert found[0.0][0] == pytest.approx(0.12, abs=0.02)
    assert found[0.1][0] == pytest.approx(0.085, abs=0.015)
    assert found[1.0][0] == pytest.approx(0.029, abs=0.008)
    assert found[0.0][1] == 6 and found[0.1][1] in (6, 7) and found[1.0][1] >= 14
    assert all(mean == (6 + 28) / 2 for _, _, mean in found.values())


def test_the_published_sign_of_starvation_fails_where_ours_holds() -> None:
    """The same check must fail for feedback of the wrong sign: cached the top, of `metric * exp(k drops)`."""
    def wrong(scores: Tensor, drops: Tensor, subset: Subset) -> Tensor:
        rank = scores.log() + subset.starvation * drops
        return (-rank).topk(subset.count(TOKENS), dim=1).indices.sort(dim=1).values

    dense = sampled(None)[0]
    for k in (0.1, 1.0):
        x, counts = sampled(Subset(0.5, starvation=k), wrong)
        assert int(counts.min()) == 6
        assert float((x - dense).square().mean().sqrt()) > 0.13
    ours, counts = sampled(Subset(0.5, starvation=1.0))  # cached the top, as there, but drops count against it
    assert int(counts.min()) >= 14
    assert float((ours - dense).square().mean().sqrt()) < 0.06


# Merging --------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 9), st.integers(2, 9), st.sampled_from([2, 3]), st.integers(0, 50))
@settings(max_examples=30)
def test_every_window_has_one_destination(rows: int, columns: int, window: int, moment: int) -> None:
    if min(rows, columns) < window:
        with pytest.raises(ShapeError, match="windows"):
            places((rows, columns), window, moment)
        return
    sources, ends = places((rows, columns), window, moment)
    assert sorted([*sources.tolist(), *ends.tolist()]) == list(range(rows * columns))
    windows = [(int(e) // columns // window, int(e) % columns // window) for e in ends]
    assert len(set(windows)) == len(windows) == (rows // window) * (columns // window)


def test_destinations_are_a_function_of_grid_and_moment_and_change() -> None:
    assert torch.equal(places((8, 8), 2, 3)[1], places((8, 8), 2, 3)[1])
    drawn = [places((8, 8), 2, m)[1].tolist() for m in range(8)]
    assert len({tuple(d) for d in drawn}) == 8
    assert {(e // 8 % 2, e % 2) for d in drawn for e in d} == {(0, 0), (0, 1), (1, 0), (1, 1)}


@given(st.integers(0, 99), st.floats(0.02, 0.75))
@settings(max_examples=20)
def test_merging_means_and_copying_back(seed: int, ratio: float) -> None:
    """The count of tokens; means against a loop; every token gets its own or its destination's row."""
    x = torch.randn(2, 24, 5, generator=torch.Generator().manual_seed(seed))
    merge = Merge(ratio)
    found = match(x, (4, 6), merge, seed)
    if found is None:
        assert merge.count(24) == 24
        return
    few = found.merge(x)
    assert few.shape == (2, merge.count(24), 5)
    back = found.unmerge(few)
    unit = torch.nn.functional.normalize(x, dim=-1)
    for b in range(2):
        ends = found.destinations.tolist()
        into = dict(zip(found.merged[b].tolist(), (ends[i] for i in found.into[b].tolist()), strict=True))
        kept = set(found.kept[b].tolist())
        assert len(into) == 24 - merge.count(24) and not kept & into.keys() and not set(ends) & into.keys()
        similarity = {s: max(float(unit[b, s] @ unit[b, e]) for e in ends) for s in [*kept, *into]}
        assert min(similarity[s] for s in into) >= max([similarity[s] for s in kept], default=-1) - 1e-6
        for n in range(24):
            group = [into.get(n, n)]
            group += [s for s, e in into.items() if e == group[0]]
            want = x[b, n] if n in kept else x[b, group].mean(0)
            torch.testing.assert_close(back[b, n], want)


def test_a_ratio_that_merges_nothing_is_the_plain_network(network: DiT) -> None:
    x, rows = inputs(network)
    assert torch.equal(run(network, Compute(tokens=Merge(0.001)), Cache(), x, rows), network.forward_modulated(x, rows))


def test_merging_duplicates_is_exact(network: DiT) -> None:
    """Windows of four equal tokens, merged to one each: attention has the same answer on a quarter of the tokens."""
    sites, (_, rows) = DiTTokens(network), inputs(network)
    tokens = torch.randn(BATCH, 4, 4, 64).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    seen = sites.norm(0, (tokens,), rows)
    found = match(tokens, (8, 8), Merge(0.75), 0)
    assert found is not None
    few = found.merge(seen[0])
    assert few.shape[1] == 16
    torch.testing.assert_close(found.unmerge(few), seen[0], atol=1e-6, rtol=0)
    (merged,), (dense,) = sites.inner(0, (few,), rows), sites.inner(0, seen, rows)
    assert merged is not None and dense is not None
    torch.testing.assert_close(found.unmerge(merged), dense, atol=1e-5, rtol=1e-5)


def test_merging_changes_the_more_the_more_is_merged(network: DiT) -> None:
    x, rows = inputs(network)
    dense = network.forward_modulated(x, rows)
    off = [float((run(network, Compute(tokens=Merge(r)), Cache(), x, rows) - dense).norm()) for r in (0.1, 0.4, 0.75)]
    assert 0 < off[0] < off[1] < off[2]
    # Kept branches of merged calls are those of all tokens, and sites keep their letters.
    cache = Cache()
    first = run(network, Compute(tokens=Merge(0.5), write=("branch",)), cache, x, rows)
    again = run(network, Compute(sites="C6", reuse=Reuse("branch")), cache, x, rows, 1)
    torch.testing.assert_close(first, again)


# Cost and refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compute",
    [
        KEEP,
        Compute(tokens=Subset(0.75)),
        HALF,
        Compute(tokens=Subset(0.1)),
        Compute(tokens=Merge(0.25)),
        Compute(tokens=Merge(0.75)),
        Compute(tokens=Merge(0.5), sites="R2C2R2", reuse=Reuse("span")),
    ],
)
def test_the_cost_is_what_is_counted(network: DiT, compute: Compute) -> None:
    config, cache = network.config, Cache()
    shape = TransformerShape(
        config.depth, config.width, config.heads, config.in_channels, config.out_channels, config.patch_size, 64
    )
    x, rows = inputs(network)
    run(network, Compute(write=("kv", "span(2,4)")), cache, x, rows)
    if isinstance(compute.tokens, Subset):
        cache.regions.choose(x, compute.tokens, (2, 2))
    counted = counted_flops(lambda: run(network, compute, cache, x, rows, 1))
    assert counted == BATCH * 2 * spent_macs(shape, compute, WITHOUT_CONDITIONING)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Subset(0.0), r"share in \(0, 1\]"),
        (lambda: Subset(1.5), r"share in \(0, 1\]"),
        (lambda: Subset(0.5, "update_sdt"), "did you mean 'update_std'"),  # type: ignore[arg-type]
        (lambda: Subset(0.5, sign=0), "1 or -1"),
        (lambda: Subset(0.5, starvation=-1), "number >= 0"),
        (lambda: Merge(0.8), "at most 0.75"),
        (lambda: Merge(0.5, 1), "whole number >= 2"),
        (lambda: Compute(tokens=Subset(0.5), write=("kv",)), "writes nothing"),
        (lambda: Compute(tokens=Merge(0.5), write=("kv",)), "merged tokens"),
        (lambda: Compute(tokens=Merge(0.5), write=("increment(8)",)), "merged tokens"),
        (lambda: Compute(sites="R4K2", write=("kv",)), "run all sites"),
        (lambda: Compute(write=("kv", "branch"), reuse=Reuse("branch"), gate=Gate(0.1, "R1C5", 1)), "without a gate"),
        (lambda: Compute(write=("increment(8)", "kv")), "increments"),
    ],
)
def test_bad_values_are_refused_in_one_line(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
