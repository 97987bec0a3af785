"""Fewer tokens per call: a chosen subset, similar ones merged, or means of neighbours at some depths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

from pliant.compute.numbers import is_number, is_whole
from pliant.errors import ConfigError, suggest

Rule = Literal["update_std", "update_norm", "router"]


@dataclass(frozen=True)
class Subset:
    """Only a share of the tokens goes through the network; the others keep their last prediction (RAS, 2502.10389).

    Attention of the active tokens still sees the keys and values of all, from the cache.
    """

    ratio: float
    """Share of the tokens that is computed, in (0, 1]."""
    rule: Rule = "update_std"
    sign: int = -1
    """-1: tokens of low score are computed (official RAS with `high_ratio` 1), +1: those of high score."""
    starvation: float = 0.1
    """Weight of how often a token was dropped: a drop always raises its chance to be computed next."""

    def __post_init__(self) -> None:
        _check_ratio("tokens", self.ratio)
        if self.rule not in get_args(Rule):
            raise ConfigError(f"tokens are chosen by {self.rule!r}; {suggest(str(self.rule), get_args(Rule))}")
        if not is_whole(self.sign) or self.sign not in (-1, 1):
            raise ConfigError(f"tokens has sign {self.sign!r}; expected 1 or -1")
        if not is_number(self.starvation) or self.starvation < 0:
            raise ConfigError(f"tokens has starvation {self.starvation!r}; expected a number >= 0")

    def count(self, tokens: int) -> int:
        """Active tokens of `tokens`; at least one."""
        return max(1, round(self.ratio * tokens))

    def describe(self) -> str:
        return f"{self.ratio:.0%} of tokens"


@dataclass(frozen=True)
class Merge:
    """Attention on fewer tokens: similar ones are averaged before and copied back after it (ToMe, 2303.17604)."""

    ratio: float
    """Share of the tokens that is merged away, in (0, 0.75]: one of every window stays."""
    window: int = 2
    """Side of the windows that keep one destination token each."""

    def __post_init__(self) -> None:
        _check_ratio("merge", self.ratio)
        if not is_whole(self.window) or self.window < 2:
            raise ConfigError(f"merge has window {self.window!r}; expected a whole number >= 2")
        if self.ratio > 1 - 1 / self.window**2:
            raise ConfigError(
                f"merge has ratio {self.ratio}; at most {1 - 1 / self.window**2:g} of the tokens can go with "
                f"windows of {self.window}x{self.window}"
            )

    def count(self, tokens: int) -> int:
        """Tokens that attention sees of `tokens`."""
        return tokens - round(self.ratio * tokens)

    def describe(self) -> str:
        return f"{self.ratio:.0%} merged"


@dataclass(frozen=True)
class Pooled:
    """Sites first..last-1 run on means over windows of tokens."""

    first: int
    last: int
    ratio: tuple[int, int] = (2, 2)
    """Rows and columns of a window; they must divide the token grid."""

    def __post_init__(self) -> None:
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (self.first, self.last))
        if not whole or not 0 <= self.first <= self.last:
            raise ConfigError(
                f"averaged tokens are for sites {self.first!r} to {self.last!r}; expected whole numbers, "
                f"0 <= first <= last"
            )
        if (
            not isinstance(self.ratio, tuple)
            or len(self.ratio) != 2
            or not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in self.ratio)
        ):
            raise ConfigError(
                f"averaged tokens have ratio {self.ratio!r}; expected the rows and columns of a window, whole numbers "
                f">= 1, such as (2, 2)"
            )

    @property
    def trivial(self) -> bool:
        """Whether it changes nothing."""
        return self.first == self.last or self.ratio == (1, 1)

    @property
    def size(self) -> int:
        """Tokens per window."""
        return self.ratio[0] * self.ratio[1]

    @property
    def name(self) -> str:
        """For messages, e.g. `sites 4-9`."""
        return f"sites {self.first}-{self.last - 1}"


@dataclass(frozen=True)
class Pool:
    """Fewer tokens at some depths: there the network works on means, and what it changes is copied back to every token.

    Several spans, none overlapping, are a patch schedule over depth. Branches and increments inside are not kept.
    """

    spans: tuple[Pooled, ...]
    """In order of depth; spans that change nothing are dropped."""

    def __post_init__(self) -> None:
        spans = tuple(sorted((s for s in self.spans if not s.trivial), key=lambda s: s.first))
        object.__setattr__(self, "spans", spans)
        for a, b in pairwise(spans):
            if b.first < a.last:
                raise ConfigError(f"{a.name} and {b.name} run on averaged tokens and overlap")

    @staticmethod
    def of(first: int, last: int, ratio: int | tuple[int, int] = 2) -> Pool:
        """One span; one number is the side of square windows."""
        return Pool((Pooled(first, last, (ratio, ratio) if isinstance(ratio, int) else ratio),))

    def count(self, tokens: int, site: int) -> int:
        """Tokens that a site sees of `tokens`."""
        return next((tokens // s.size for s in self.spans if s.first <= site < s.last), tokens)

    def describe(self) -> str:
        return ", ".join(f"{s.name} on 1/{s.size} of tokens" for s in self.spans)


Tokens: TypeAlias = Subset | Merge | Pool
_KINDS: dict[str, Callable[..., Tokens]] = {
    "subset": Subset,
    "merge": Merge,
    "pool": lambda spans: Pool(_pooled_spans(spans)),
}


def tokens_to_dict(tokens: Tokens) -> dict[str, Any]:
    """JSON-ready, with the kind."""
    if isinstance(tokens, Pool):
        return {"kind": "pool", "spans": [{**asdict(span), "ratio": list(span.ratio)} for span in tokens.spans]}
    return {"kind": "subset" if isinstance(tokens, Subset) else "merge", **asdict(tokens)}


def _pooled_spans(values: Any) -> tuple[Pooled, ...]:
    if not isinstance(values, (list, tuple)):
        raise ConfigError(f"tokens of kind 'pool' have spans {values!r}; expected a list")
    return tuple(_pooled_from_dict(span) for span in values)


def _pooled_from_dict(values: Any) -> Pooled:
    if not isinstance(values, Mapping):
        raise ConfigError(f"a span of averaged tokens is {values!r}; expected an object with first, last and ratio")
    ratio = values.get("ratio", (2, 2))
    return Pooled(**{**values, "ratio": tuple(ratio) if isinstance(ratio, list) else ratio})


def tokens_from_dict(values: Mapping[str, Any]) -> Tokens:
    """Inverse of `tokens_to_dict`. Raises ConfigError for an unknown kind or field."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"tokens is {values!r}; expected an object like {{\"kind\": \"subset\", \"ratio\": 0.5}}")
    rest = dict(values)
    kind = rest.pop("kind", None)
    if kind not in _KINDS:
        raise ConfigError(f"tokens has kind {kind!r}; {suggest(str(kind), _KINDS)}")
    try:
        return _KINDS[kind](**rest)
    except TypeError as error:
        raise ConfigError(f"tokens of kind {kind!r}: {error}") from None


def _check_ratio(what: str, ratio: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ConfigError(f"{what} has ratio {ratio!r}; expected a share in (0, 1]")
