"""Rules that decide while sampling, from how much a cheap signal has changed. Sheets E 9 and H 7."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pliant.compute import Gate, Reuse
from pliant.compute.numbers import is_number
from pliant.compute.reuse import MAX_ORDER, Basis
from pliant.compute.sites import format_sites
from pliant.errors import ConfigError
from pliant.plans.caching.options import change_threshold, number, warm, whole
from pliant.plans.caching.rows import PLAIN, Row, Target


def teacache(target: Target, *, threshold: float, polynomial: Sequence[float] = ()) -> list[Row]:
    """TeaCache (arXiv 2411.19108): the change of the first block's modulated input, summed since the last full step.

    Each step adds `polynomial(relative L1 change since the last step)`; below `threshold` the residual of the whole
    stack is reused, else everything runs and the sum begins anew. The first and the last step are full. polynomial:
    this model's, highest power first (`calibrate` measures it); without one the change itself is summed, and
    thresholds of other models mean nothing.
    """
    m = target.sites
    gate = Gate(
        number("threshold", threshold), f"C{m}", 0, "input", "last_step", _coefficients(polynomial), accumulate=True
    )
    row = Row(write=(f"span(0,{m})",), reuse=Reuse("span"), gate=gate)
    return [row] * (target.steps - 1) + [PLAIN]


def first_block(target: Target, *, threshold: float = 0.05, warmup: int = 0, max_run: int | None = None) -> list[Row]:
    """First-block cache (ParaAttention; diffusers' `FirstBlockCacheConfig`): block 0 runs, and if its residual has
    changed by at most `threshold` since the last full step, the residual of all others is reused.
    """
    return _blocks(target, change_threshold(threshold, max_run is not None), 1, 0, warmup, max_run, comparison="<=")


def dbcache(
    target: Target,
    *,
    threshold: float = 0.08,
    front: int = 8,
    back: int = 0,
    warmup: int = 8,
    max_run: int | None = None,
    max_hits: int | None = None,
    max_seen: float | None = None,
    mask: str | None = None,
    order: int = 0,
    basis: Basis = "newton",
) -> list[Row]:
    """DBCache of cache-dit: `front` blocks run and their residual decides, the middle is reused, `back` blocks run.

    A hit needs a relative L1 change below `threshold` since the last full step; never in the first `warmup` steps,
    more than `max_run` times in a row or `max_hits` times in all, nor once the changes looked at sum to `max_seen`.
    mask: one digit per step, 1 must be full (instead of the warm-up). order: forecast of the middle's residual. The
    streams of guided steps decide each for itself.
    """
    return _blocks(
        target,
        change_threshold(threshold, max_run is not None or max_hits is not None),
        whole("front", front),
        whole("back", back, 0),
        warmup,
        max_run,
        max_hits,
        max_seen,
        mask,
        Reuse("span", whole("order", order, 0, MAX_ORDER), basis),
    )


def easycache(target: Target, *, threshold: float = 0.05, warmup: int = 10) -> list[Row]:
    """EasyCache (arXiv 2507.02860): the change of the output is predicted from that of the network's input.

    `A += k mean|x_i - x_(i-1)| / mean|last full output|`, k = the ratio of their changes between the last two full
    steps; below `threshold` the answer is the input plus the last full step's output minus input, else full and A = 0.
    The first `warmup` steps and the last are full. The conditional stream decides for both.
    """
    m = target.sites
    gate = Gate(number("threshold", threshold), f"C{m}", 0, "output", "last_step", accumulate=True, deciders="cond")
    row = Row(write=("drift",), reuse=Reuse("drift"), gate=gate)
    first = warm("warmup", warmup, target)
    watching = replace(row, gate=replace(gate, threshold=0.0))
    return [watching] * first + [row] * (target.steps - 1 - first) + [PLAIN]


def _blocks(
    target: Target,
    threshold: float,
    front: int,
    back: int,
    warmup: int,
    max_run: int | None = None,
    max_hits: int | None = None,
    max_seen: float | None = None,
    mask: str | None = None,
    reuse: Reuse = Reuse("span"),  # noqa: B008 (frozen)
    comparison: str = "<",
) -> list[Row]:
    """`front` blocks run and decide, the blocks between them and the last `back` are run or reused."""
    m, first = target.sites, 2 * front
    last = m - 2 * back
    if first >= last:
        raise ConfigError(
            f"{front} front and {back} back blocks always run, and the network has {target.blocks}: nothing is left "
            f"to reuse; lower front or back"
        )
    letters = "R" * first + "C" * (last - first) + "R" * (m - last)
    gate = Gate(
        threshold,
        format_sites(letters),
        first,
        max_run=max_run,
        max_hits=max_hits,
        max_seen=max_seen,
        comparison="<=" if comparison == "<=" else "<",
    )
    row = Row(write=(f"span({first},{last})",), reuse=reuse, gate=gate)
    watching = replace(row, gate=replace(gate, threshold=0.0))
    return [watching if must else row for must in _must(target, warmup, mask)]


def _must(target: Target, warmup: int, mask: str | None) -> list[bool]:
    """Which steps are full whatever the gate says."""
    if mask is None:
        first = warm("warmup", warmup, target)
        return [i < first for i in range(target.steps)]
    text = str(mask)
    if len(text) != target.steps or set(text) - {"0", "1"}:
        raise ConfigError(f"mask is {text!r}; expected a 1 (full) or 0 for each of the {target.steps} steps")
    return [digit == "1" for digit in text]


def _coefficients(polynomial: Sequence[float]) -> tuple[float, ...]:
    given: object = polynomial  # command lines may hold anything
    if not isinstance(given, (list, tuple)) or not all(is_number(c) for c in given):
        raise ConfigError(f"polynomial is {polynomial!r}; expected coefficients, highest power first")
    return tuple(float(c) for c in polynomial)
