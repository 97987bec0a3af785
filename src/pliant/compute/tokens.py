"""Fewer tokens per call: a chosen subset, or similar ones merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

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
        if self.sign not in (-1, 1):
            raise ConfigError(f"tokens has sign {self.sign!r}; expected 1 or -1")
        if self.starvation < 0:
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
        if not isinstance(self.window, int) or self.window < 2:
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


Tokens: TypeAlias = Subset | Merge
_KINDS: dict[str, type[Subset] | type[Merge]] = {"subset": Subset, "merge": Merge}


def tokens_to_dict(tokens: Tokens) -> dict[str, Any]:
    """JSON-ready, with the kind."""
    return {"kind": "subset" if isinstance(tokens, Subset) else "merge", **asdict(tokens)}


def tokens_from_dict(values: Mapping[str, Any]) -> Tokens:
    """Inverse of `tokens_to_dict`. Raises ConfigError for an unknown kind or field."""
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
