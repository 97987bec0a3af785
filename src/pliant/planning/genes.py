"""What a search may choose, typed: each gene draws a value, changes one a little, and mixes two.

Values are JSON-ready (numbers, text, lists, objects), so that a journal can keep them. Randomness comes in as a
`random.Random`: the same seed makes the same choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol


class Gene(Protocol):
    """One choice."""

    def sample(self, rng: Random) -> Any:
        """A value from the whole range."""
        ...

    def mutate(self, value: Any, rng: Random) -> Any:
        """A neighbour of `value`."""
        ...

    def cross(self, a: Any, b: Any, rng: Random) -> Any:
        """A value between or from two parents."""
        ...


@dataclass(frozen=True)
class Categorical:
    """One of some options, drawn with `weights` (default: equally)."""

    options: Sequence[Any]
    weights: Sequence[float] | None = None

    def sample(self, rng: Random) -> Any:
        return rng.choices(list(self.options), self.weights)[0]

    def mutate(self, value: Any, rng: Random) -> Any:
        return self.sample(rng)

    def cross(self, a: Any, b: Any, rng: Random) -> Any:
        return a if rng.random() < 0.5 else b


@dataclass(frozen=True)
class Integer:
    """A whole number from low to high, both included; a mutation moves it by up to `reach`."""

    low: int
    high: int
    reach: int = 1

    def sample(self, rng: Random) -> int:
        return rng.randint(self.low, self.high)

    def mutate(self, value: int, rng: Random) -> int:
        step = rng.randint(1, self.reach) * rng.choice((-1, 1))
        return min(self.high, max(self.low, value + step))

    def cross(self, a: int, b: int, rng: Random) -> int:
        return rng.choice((a, b, round((a + b) / 2)))


@dataclass(frozen=True)
class Real:
    """A number from low to high; a mutation adds a normal step of `spread` (a share of the range).

    log: steps and draws are taken in the logarithm; low must be positive.
    """

    low: float
    high: float
    spread: float = 0.1
    log: bool = False

    def _in(self, value: float) -> float:
        return math.log(value) if self.log else value

    def _out(self, value: float) -> float:
        kept = min(self._in(self.high), max(self._in(self.low), value))
        return min(self.high, max(self.low, math.exp(kept) if self.log else kept))

    def sample(self, rng: Random) -> float:
        return self._out(rng.uniform(self._in(self.low), self._in(self.high)))

    def mutate(self, value: float, rng: Random) -> float:
        return self._out(self._in(value) + rng.gauss(0.0, self.spread * (self._in(self.high) - self._in(self.low))))

    def cross(self, a: float, b: float, rng: Random) -> float:
        share = rng.random()
        return self._out(share * self._in(a) + (1.0 - share) * self._in(b))


@dataclass(frozen=True)
class Listed:
    """A list of `length` values of one gene; a mutation changes each with probability `rate`, at least one."""

    gene: Gene
    length: int
    rate: float = 0.3

    def sample(self, rng: Random) -> list[Any]:
        return [self.gene.sample(rng) for _ in range(self.length)]

    def mutate(self, value: list[Any], rng: Random) -> list[Any]:
        chosen = {rng.randrange(self.length)} | {k for k in range(self.length) if rng.random() < self.rate}
        return [self.gene.mutate(v, rng) if k in chosen else v for k, v in enumerate(value)]

    def cross(self, a: list[Any], b: list[Any], rng: Random) -> list[Any]:
        return [x if rng.random() < 0.5 else y for x, y in zip(a, b, strict=True)]


@dataclass(frozen=True)
class Record:
    """Named genes; a mutation changes each with probability `rate`, at least one."""

    genes: Mapping[str, Gene]
    rate: float = 0.3

    def sample(self, rng: Random) -> dict[str, Any]:
        return {name: gene.sample(rng) for name, gene in self.genes.items()}

    def mutate(self, value: dict[str, Any], rng: Random) -> dict[str, Any]:
        names = list(self.genes)
        chosen = {rng.choice(names)} | {name for name in names if rng.random() < self.rate}
        return {n: self.genes[n].mutate(v, rng) if n in chosen else v for n, v in value.items()}

    def cross(self, a: dict[str, Any], b: dict[str, Any], rng: Random) -> dict[str, Any]:
        return {n: gene.cross(a[n], b[n], rng) for n, gene in self.genes.items()}


@dataclass(frozen=True)
class Steps:
    """A list of `least` to `most` steps {"t": time, ...}, times falling, the first at `start`; genes move with times.

    Mutation as in USF's search (arXiv 2312.07243; sheet D, 4): a step is inserted or deleted with probability 0.2 each,
    a time is multiplied by 1 + N(0, spread) and a step's genes change with probability `rate` each, and a time is drawn
    anew with probability `redraw` (AutoDiffusion's mutation, arXiv 2309.10438).
    """

    genes: Record
    least: int
    most: int
    start: float = 1.0
    end: float = 0.0
    spread: float = 0.08
    rate: float = 0.3
    redraw: float = 0.0
    gap: float = 1e-3
    """Least distance of two times, as a share of start - end."""
    grids: Sequence[Sequence[float]] = field(default=())
    """Times that `sample` starts from where one has the length it drew; else times are uniform draws."""

    def sample(self, rng: Random) -> list[dict[str, Any]]:
        count = rng.randint(self.least, self.most)
        fitting = [grid for grid in self.grids if len(grid) == count]
        times = list(rng.choice(fitting)) if fitting else [self._draw(rng) for _ in range(count)]
        return self._ordered([{"t": t, **self.genes.sample(rng)} for t in times])

    def mutate(self, value: list[dict[str, Any]], rng: Random) -> list[dict[str, Any]]:
        rows = [dict(row) for row in value]
        before = [dict(row) for row in rows]
        if rng.random() < 0.2 and len(rows) < self.most:
            rows.append({**rng.choice(rows), "t": self._draw(rng)})
        if rng.random() < 0.2 and len(rows) > self.least:
            del rows[rng.randrange(1, len(rows))]
        for row in rows:
            if rng.random() < self.rate:
                row["t"] = row["t"] * (1.0 + rng.gauss(0.0, self.spread))
            if self.redraw and rng.random() < self.redraw:
                row["t"] = self._draw(rng)
            if rng.random() < self.rate:
                row.update(self.genes.mutate({n: row[n] for n in self.genes.genes}, rng))
        rows = self._ordered(rows)
        if rows == before:  # always something
            k = rng.randrange(len(rows))
            rows[k].update(self.genes.mutate({n: rows[k][n] for n in self.genes.genes}, rng))
        return rows

    def cross(self, a: list[dict[str, Any]], b: list[dict[str, Any]], rng: Random) -> list[dict[str, Any]]:
        if len(a) == len(b) and rng.random() < 0.5:
            return self._ordered([dict(rng.choice(pair)) for pair in zip(a, b, strict=True)])
        cut = self._draw(rng)
        rows = [dict(r) for r in a if r["t"] >= cut] + [dict(r) for r in b if r["t"] < cut]
        return self._ordered(rows) if self.least <= len(rows) <= self.most else [dict(r) for r in a]

    def _draw(self, rng: Random) -> float:
        return rng.uniform(self.end, self.start)

    def _ordered(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Steps by falling time, at least a gap apart, the first at the start; genes stay with their times."""
        rows = sorted(rows, key=lambda r: -r["t"])
        least = self.gap * (self.start - self.end)
        last = len(rows) - 1
        above = self.start + least
        for k, row in enumerate(rows):
            t = min(row["t"], above - least)
            row["t"] = above = self.start if k == 0 else max(t, self.end + (last - k + 1) * least)
        return rows
