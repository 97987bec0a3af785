"""Averaged tokens at some depths, without plans: sheet H, sections 3 and 3b."""

from __future__ import annotations

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
    Pool,
    Pooled,
    Reuse,
    Subset,
    TransformerShape,
    counted_flops,
    spent_macs,
)
from pliant.compute.executor import Call
from pliant.compute.lowering import lower
from pliant.compute.pooling import averaged, check_grid, copied_back
from pliant.errors import ConfigError, PlanError
from pliant.models import DiT, DiTConfig
from pliant.models.dit_tokens import DiTTokens
from pliant.models.sparse_span import pooled, pooled_span, regridded

SITES, BATCH, GRID = 8, 3, (4, 8)


@pytest.fixture(scope="module")
def network() -> DiT:
    """Four blocks on 4 x 8 tokens."""
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=(8, 16), patch_size=(2, 2), in_channels=4, width=32, depth=4, heads=4, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    net = DiT(config)
    for p in net.parameters():
        p.data.normal_(std=0.08)
    return net.requires_grad_(False)


def inputs(network: DiT, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, 4, 8, 16, generator=torch.Generator().manual_seed(seed))
    return x, network.modulations(torch.full((BATCH,), 500.0), torch.tensor([0, 1, 2]))


def run(network: DiT, compute: Compute, x: Tensor, rows: Tensor, cache: Cache | None = None, step: int = 0) -> Tensor:
    cache = Cache() if cache is None else cache
    return Call(lower(compute, SITES), DiTTokens(network), cache, "net", ("cond",), Moment(step, 1.0, 0.0))(x, rows)


def by_hand(network: DiT, x: Tensor, rows: Tensor, pool: Pool) -> Tensor:
    """Whole blocks with `models.sparse_span.pooled_span`."""
    tokens, start = network.embed(x), 0

    def blocks(a: int, b: int, z: Tensor) -> Tensor:
        for i in range(a, b):
            z = network.blocks[i](z, rows[:, 6 * i : 6 * i + 6])
        return z

    for span in pool.spans:
        first, last = span.first // 2, span.last // 2
        few = (GRID[0] // span.ratio[0], GRID[1] // span.ratio[1])
        tokens = blocks(start, first, tokens)
        tokens = pooled_span(lambda z, a=first, b=last: blocks(a, b, z), tokens, GRID, few)
        start = last
    return network.read(blocks(start, len(network.blocks), tokens), rows)


# The maths ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=20)
def test_means_and_copies(rows: int, columns: int, h: int, w: int, seed: int) -> None:
    """A loop over windows; and copying back the means of copies is the identity."""
    grid = (rows * h, columns * w)
    x = torch.randn(2, grid[0] * grid[1], 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    few = averaged(x, grid, (h, w))
    back = copied_back(few, grid, (h, w))
    assert few.shape == (2, rows * columns, 5) and back.shape == x.shape
    for r in range(rows):
        for c in range(columns):
            members = [i * grid[1] + j for i in range(r * h, r * h + h) for j in range(c * w, c * w + w)]
            mean = x[:, members].mean(1, keepdim=True)
            assert float((back[:, members] - mean).abs().max()) < 1e-12
    torch.testing.assert_close(averaged(back, grid, (h, w)), few)
    torch.testing.assert_close(few, pooled(x, grid, (rows, columns)))
    assert torch.equal(back, regridded(few, (rows, columns), grid))


# What is exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pool", [Pool.of(2, 6, 1), Pool.of(3, 3), Pool(()), Pool((Pooled(0, 8, (1, 1)), Pooled(4, 4)))], ids=str
)
def test_ratio_one_and_empty_spans_are_the_plain_network(network: DiT, pool: Pool) -> None:
    x, rows = inputs(network)
    assert Compute(tokens=pool) == Compute()
    assert torch.equal(run(network, Compute(tokens=pool), x, rows), network.forward_modulated(x, rows))


@pytest.mark.parametrize(
    "pool",
    [
        Pool.of(2, 6),
        Pool.of(0, 8, 4),
        Pool.of(4, 8, (1, 2)),
        Pool((Pooled(0, 4, (4, 4)), Pooled(4, 6))),
        Pool((Pooled(6, 8, (1, 4)), Pooled(2, 4))),
    ],
    ids=str,
)
def test_spans_are_those_of_the_model(network: DiT, pool: Pool) -> None:
    x, rows = inputs(network)
    found = run(network, Compute(tokens=pool), x, rows)
    torch.testing.assert_close(found, by_hand(network, x, rows, pool), atol=1e-5, rtol=1e-5)
    assert float((found - network.forward_modulated(x, rows)).abs().max()) > 1e-3


def test_skipped_sites_change_nothing_on_means_either(network: DiT) -> None:
    x, rows = inputs(network)
    pooled_skip = Compute(tokens=Pool.of(2, 6), sites="R2K4R2")
    assert torch.equal(run(network, pooled_skip, x, rows), run(network, Compute(sites="R2K4R2"), x, rows))


@pytest.mark.parametrize("first", [2, 3])
def test_equal_tokens_in_every_window_are_exact(network: DiT, first: int) -> None:
    """Attention to four equal tokens is attention to one of them; a span may begin at an MLP."""
    model, (_, rows) = DiTTokens(network), inputs(network)
    few = torch.randn(BATCH, 8, 32)
    state = (copied_back(few, GRID, (2, 2)),)
    dense = model.run(first, 6, state, rows)[0]
    program = lower(Compute(tokens=Pool.of(first, 6), sites=f"K{first}R{6 - first}K2"), SITES)
    call = Call(program, model, Cache(), "net", ("cond",), Moment(0, 1.0, 0.0))
    found = call._play(program.miss, state, rows, {}, None, BATCH)[0]
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)
    # Detail inside windows survives as it came.
    noise = torch.randn(BATCH, 32, 32)
    noise -= copied_back(averaged(noise, GRID, (2, 2)), GRID, (2, 2))
    with_detail = call._play(program.miss, (state[0] + noise,), rows, {}, None, BATCH)[0]
    torch.testing.assert_close(with_detail, found + noise, atol=1e-5, rtol=1e-5)


# Together with caches -------------------------------------------------------------------------------------------------


def test_other_spans_are_kept_and_reused_in_the_same_call(network: DiT) -> None:
    """span(4,8) kept by a pooled call is added by another; branches are kept outside the pooled sites only."""
    x, rows = inputs(network)
    pool, cache = Pool.of(0, 4), Cache()
    kept = run(network, Compute(tokens=pool, write=("span(4,8)",)), x, rows, cache)
    assert torch.equal(kept, run(network, Compute(tokens=pool), x, rows))
    again = run(network, Compute(tokens=pool, sites="R4C4", reuse=Reuse("span")), x, rows, cache, 1)
    torch.testing.assert_close(again, kept, atol=1e-5, rtol=1e-5)
    cache = Cache()
    run(network, Compute(tokens=pool, write=("branch",)), x, rows, cache)
    again = run(network, Compute(tokens=pool, sites="R4C4", reuse=Reuse("branch")), x, rows, cache, 1)
    torch.testing.assert_close(again, kept, atol=1e-5, rtol=1e-5)


def test_a_kept_span_around_pooled_sites_is_of_all_tokens(network: DiT) -> None:
    x, rows = inputs(network)
    for pool in (Pool.of(2, 6), Pool.of(3, 5), Pool((Pooled(2, 4), Pooled(4, 6, (4, 4))))):
        cache = Cache()
        kept = run(network, Compute(tokens=pool, write=("span(2,6)",)), x, rows, cache)
        again = run(network, Compute(sites="R2C4R2", reuse=Reuse("span")), x, rows, cache, 1)
        torch.testing.assert_close(again, kept, atol=1e-5, rtol=1e-5)


def test_a_gate_before_and_around_pooled_sites(network: DiT) -> None:
    """Misses pool; hits reuse the span around the pooled sites, or pool what they still run."""
    x, rows = inputs(network)
    pool = Pool((Pooled(2, 4), Pooled(6, 8)))
    gate = Gate(0.5, "R2C4R2", probe=2)
    compute = Compute(tokens=pool, write=("span(2,6)",), reuse=Reuse("span"), gate=gate)
    cache = Cache()
    first = run(network, compute, x, rows, cache)
    assert torch.equal(first, run(network, Compute(tokens=pool), x, rows))
    second = run(network, compute, x, rows, cache, 1)
    assert [d.hit for d in cache.decisions] == [(False,) * BATCH, (True,) * BATCH]
    torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-5)
    counted = counted_flops(lambda: run(network, compute, x, rows, cache, 2))
    assert counted == BATCH * 2 * spent_macs(shape(network), compute, WITHOUT_CONDITIONING, hit=True)


# Cost and refusals ----------------------------------------------------------------------------------------------------


def shape(network: DiT) -> TransformerShape:
    c = network.config
    return TransformerShape(c.depth, c.width, c.heads, c.in_channels, c.out_channels, c.patch_size, 32)


@pytest.mark.parametrize(
    "compute",
    [
        Compute(tokens=Pool.of(2, 6)),
        Compute(tokens=Pool.of(3, 8, 4)),
        Compute(tokens=Pool((Pooled(0, 3, (1, 2)), Pooled(5, 8, (4, 8))))),
        Compute(tokens=Pool.of(0, 4), sites="R1K2R3C2", reuse=Reuse("span")),
    ],
    ids=lambda c: c.describe(),
)
def test_the_cost_is_what_is_counted(network: DiT, compute: Compute) -> None:
    x, rows = inputs(network)
    cache = Cache()
    run(network, Compute(write=("span(6,8)",)), x, rows, cache)
    counted = counted_flops(lambda: run(network, compute, x, rows, cache, 1))
    want = BATCH * 2 * spent_macs(shape(network), compute, WITHOUT_CONDITIONING)
    assert counted == want
    assert want < BATCH * 2 * spent_macs(shape(network), Compute(), WITHOUT_CONDITIONING)


def test_a_quarter_of_the_tokens_is_a_quarter_and_a_sixteenth() -> None:
    """Linear maps see N / 4 tokens, attention N / 4 pairs with N / 4."""
    from pliant.compute import spent_parts

    s = TransformerShape(2, 64, 4, 4, 4, (2, 2), 64)
    some, whole = spent_parts(s, Compute(tokens=Pool.of(0, 4))), spent_parts(s, Compute())
    assert some.self_projections * 4 == whole.self_projections and some.mlp * 4 == whole.mlp
    assert some.self_attention * 16 == whole.self_attention and some.final == whole.final


def test_json_and_spelling() -> None:
    compute = Compute(tokens=Pool((Pooled(4, 6, (2, 4)), Pooled(0, 2))))
    assert compute.tokens == Pool((Pooled(0, 2), Pooled(4, 6, (2, 4))))
    assert compute.to_dict()["tokens"] == {
        "kind": "pool",
        "spans": [{"first": 0, "last": 2, "ratio": [2, 2]}, {"first": 4, "last": 6, "ratio": [2, 4]}],
    }
    again = Compute.from_dict(compute.to_dict())
    assert again == compute and hash(again) == hash(compute)
    assert "sites 0-1 on 1/4 of tokens, sites 4-5 on 1/8 of tokens" in compute.describe()
    assert not compute.plain


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Pool.of(3, 2), "0 <= first <= last"),
        (lambda: Pool.of(-1, 2), "0 <= first <= last"),
        (lambda: Pool.of(0, 2, 0), "whole numbers >= 1"),
        (lambda: Pool.of(0, 2, (2, 2, 2)), "rows and columns"),  # type: ignore[arg-type]
        (lambda: Pool.of(0, 2, 1.5), "rows and columns"),  # type: ignore[arg-type]
        (lambda: Pool((Pooled(0, 4), Pooled(3, 6))), "sites 0-3 and sites 3-5 .* overlap"),
        (lambda: Compute(tokens=Pool.of(2, 6), write=("kv",)), "keys and values"),
        (lambda: Compute(tokens=Pool.of(2, 6), sites="R4C2R2", reuse=Reuse("span")), "some of them are reused"),
        (lambda: Compute(tokens=Pool.of(2, 6), sites="R4"), "only 4 sites"),
        (lambda: Compute(tokens=Pool.of(2, 6), write=("span(3,5)",)), r"span\(3,5\) cannot begin or end inside"),
        (lambda: Compute(tokens=Pool.of(2, 6), write=("span(4,8)",)), r"span\(4,8\) cannot begin or end inside"),
        (lambda: Compute(tokens=Pool.of(2, 6), reuse=Reuse("span"), gate=Gate(0.5, "R3C5", 3)), "all of them or none"),
        (lambda: Compute(tokens=Pool.of(2, 6), reuse=Reuse("span"), gate=Gate(0.5, "R6C2", 3)), "cannot end inside"),
        (lambda: Compute.from_dict({"tokens": {"kind": "pool", "spans": [[0, 2]]}}), "object with first"),
        (lambda: Compute.from_dict({"tokens": {"kind": "pool", "span": []}}), "kind 'pool'"),
        (lambda: Compute.from_dict({"tokens": {"kind": "pool", "spans": [{"frist": 0}]}}), "kind 'pool'"),
        (lambda: Compute.from_dict({"tokens": {"kind": "pool", "spans": 3}}), "kind 'pool'"),
    ],
)
def test_bad_values_are_refused_in_one_line(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_what_a_model_cannot_do() -> None:
    with pytest.raises(PlanError, match="this model has only 4 sites"):
        lower(Compute(tokens=Pool.of(2, 6)), 4)
    with pytest.raises(PlanError, match="3x3 tokens, which do not divide this call's grid of 4x8"):
        check_grid(Pool.of(0, 2, 3), GRID)
    assert Compute(tokens=Subset(0.5)).tokens != Compute(tokens=Pool.of(0, 2)).tokens
