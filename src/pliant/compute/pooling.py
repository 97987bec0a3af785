"""Averaged tokens: some sites run on means over windows of the token grid, and what they change is copied back.

`x <- x + U(f(P x) - P x)`, with P the mean over windows and U the copy to every token of a window: detail within a
window passes by untouched. SparseDiT's sparse part (arXiv 2412.06028; sheet H, section 3) without the learned merge
and recover blocks; several spans are a patch schedule over depth, as in MPDiT (2603.26357; section 3b), untrained.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pliant.compute.tokens import Pool
from pliant.errors import ConfigError, PlanError


def averaged(tokens: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """(B, N, D) on a grid (rows, columns) -> (B, N / (h * w), D): means over windows of h x w tokens."""
    h, w = window
    cells = tokens.unflatten(1, (grid[0] // h, h, grid[1] // w, w))
    return cells.mean((2, 4)).flatten(1, 2)


def copied_back(few: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """(B, N / (h * w), D) -> (B, N, D) on the grid (rows, columns): every token gets its window's row."""
    h, w = window
    rows, columns = grid[0] // h, grid[1] // w
    cells = few.unflatten(1, (rows, 1, columns, 1)).expand(-1, -1, h, -1, w, -1)
    return cells.flatten(1, 4)


def check_grid(pool: Pool, grid: tuple[int, int]) -> None:
    """Raise PlanError unless every window divides the token grid (rows, columns)."""
    for span in pool.spans:
        if any(side % w for side, w in zip(grid, span.ratio, strict=True)):
            h, w = span.ratio
            raise PlanError(
                f"{span.name} run on means over {h}x{w} tokens, which do not divide this call's grid of "
                f"{grid[0]}x{grid[1]} tokens"
            )


def check_pool(pool: Pool, letters: str, on_hit: str, written: Sequence[tuple[int, int]], probe: int) -> None:
    """Raise ConfigError where averaged tokens meet what is reused, written or probed.

    letters: one per site of the call ("" for all R); on_hit: those of a gate's hit ("" without a gate); written: spans.
    """
    for span in pool.spans:
        first, last = span.first, span.last
        if letters and last > len(letters):
            raise ConfigError(f"{span.name} run on averaged tokens, but this call has only {len(letters)} sites")
        if "C" in letters[first:last]:
            raise ConfigError(f"{span.name} run on averaged tokens, but some of them are reused; leave those out")
        if "C" in on_hit[first:last] and set(on_hit[first:last]) != {"C"}:
            raise ConfigError(f"{span.name} run on averaged tokens; a gate's hit reuses all of them or none")
        if first < probe < last:
            raise ConfigError(f"{span.name} run on averaged tokens; a gate's probe cannot end inside, at site {probe}")
        for a, b in written:
            if a < last and first < b and not (a <= first and last <= b):
                raise ConfigError(f"{span.name} run on averaged tokens; span({a},{b}) cannot begin or end inside")


def pool_of_hit(pool: Pool, on_hit: str) -> Pool:
    """The spans that a gate's hit still runs: those it reuses are gone."""
    return Pool(tuple(span for span in pool.spans if "C" not in on_hit[span.first : span.last]))
