"""How a conditional and a reference prediction are combined (sheet H, section 6). Each rule is exact against its paper.

c: conditional, u: reference prediction, (B, C, H, W) both; difference d = c - u; g: guidance scale, 1 is no guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from pliant.compute.numbers import is_number
from pliant.errors import PlanError, suggest

Space: TypeAlias = Literal["stored", "sample"]
"""What a rule combines: the network's own kind of prediction, or estimates of clean data."""


@dataclass
class Memory:
    """What guidance remembers within one request: rows are samples."""

    momentum: Tensor | None = None
    """APG's running difference, of clean-data estimates."""
    difference: Tensor | None = None
    """The newest c - u that was computed, in the stored kind."""
    clean: Tensor | None = None
    """The clean data that the newest computed reference saw."""


class Rule(Protocol):
    """One way to combine two predictions."""

    @property
    def space(self) -> Space: ...

    def combine(self, conditional: Tensor, reference: Tensor, scale: float, memory: Memory) -> Tensor:
        """The guided prediction. Memory is read and updated in place."""
        ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Linear:
    """`u + g d`: classifier-free guidance (arXiv 2207.12598), and weak-model guidance."""

    space: Space = "stored"

    def __post_init__(self) -> None:
        if self.space != "stored":
            raise PlanError("the linear rule is the same in every space; leave the space out")

    def combine(self, conditional: Tensor, reference: Tensor, scale: float, memory: Memory) -> Tensor:
        return torch.lerp(reference, conditional, scale)

    def describe(self) -> str:
        return ""


@dataclass(frozen=True)
class Projected:
    """Adaptive projected guidance (APG, arXiv 2410.02416): less of the part of d along c, which over-saturates.

    On clean-data estimates: `d <- d + momentum * d_before`; `d <- d min(1, r/|d|)`; `c + (g-1) (d_across + parallel *
    d_along)`. parallel 1 with no norm and no momentum is plain guidance; parallel 0 is purely perpendicular.
    """

    parallel: float = 0.0
    """The paper's eta."""
    momentum: float = 0.0
    """The paper's beta, -0.75 to -0.25."""
    norm: float | None = None
    """The paper's r, per square root of the sample's numbers: |d| grows with the size of the image. None: no limit."""

    def __post_init__(self) -> None:
        if not -1 < self.momentum < 1:
            raise PlanError(f"projected guidance has momentum {self.momentum}; a running sum needs one within (-1, 1)")
        if self.norm is not None and self.norm <= 0:
            raise PlanError(f"projected guidance has norm {self.norm}; expected a number > 0, or none")

    @property
    def space(self) -> Space:
        return "sample"

    def combine(self, conditional: Tensor, reference: Tensor, scale: float, memory: Memory) -> Tensor:
        d = conditional - reference
        if self.momentum:
            if memory.momentum is not None and memory.momentum.shape == d.shape:  # begins anew with other channels
                d = d + self.momentum * memory.momentum
            memory.momentum = d
        if self.norm is not None:
            limit = self.norm * math.sqrt(d[0].numel())
            d = d * (limit / _norm(d).clamp_min(1e-30)).clamp_max(1.0).to(d)
        along = _along(d, conditional)
        return conditional + (scale - 1.0) * (d - along + self.parallel * along)

    def describe(self) -> str:
        return f"projected {self.parallel:g}"


@dataclass(frozen=True)
class Zero:
    """CFG-Zero* (arXiv 2503.18886): `s u + g (c - s u)`, s = <c,u>/|u|^2 per sample. For velocities.

    still: predict no velocity at all, so that the state stays; for the first few percent of the steps.
    """

    still: bool = False

    @property
    def space(self) -> Space:
        return "stored"

    def combine(self, conditional: Tensor, reference: Tensor, scale: float, memory: Memory) -> Tensor:
        if self.still:
            return torch.zeros_like(conditional)
        own = _along(conditional, reference)
        return torch.lerp(own, conditional, scale)

    def describe(self) -> str:
        return "still" if self.still else "zero*"


@dataclass(frozen=True)
class Damped:
    """Magnitude-aware guidance, gentle where c and u disagree: `g <- 1 + (g-1) exp(-damping |d|/|u|)` per sample."""

    damping: float = 8.0

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise PlanError(f"damped guidance has damping {self.damping}; expected a number >= 0")

    @property
    def space(self) -> Space:
        return "stored"

    def combine(self, conditional: Tensor, reference: Tensor, scale: float, memory: Memory) -> Tensor:
        d = conditional - reference
        share = torch.exp(-self.damping * _norm(d) / _norm(reference).clamp_min(1e-30)).to(d)
        return conditional + (scale - 1.0) * share * d

    def describe(self) -> str:
        return f"damped {self.damping:g}"


@dataclass(frozen=True)
class Tangential:
    """TCFG: the reference keeps its part along the direction it shares with c, the first singular vector of [c; u]."""

    @property
    def space(self) -> Space:
        return "stored"

    def combine(self, conditional: Tensor, reference: Tensor, scale: float, memory: Memory) -> Tensor:
        pair = torch.stack([conditional.flatten(1), reference.flatten(1)], dim=1).double()
        # The singular vectors of a 2 x d matrix come from its 2 x 2 Gram matrix; eigenvalues ascend.
        weights = torch.linalg.eigh(pair @ pair.mT).eigenvectors[:, :, 1:]
        shared = (pair.mT @ weights).squeeze(-1)
        common = _along(reference.double(), shared.view_as(reference)).to(reference.dtype)
        return torch.lerp(common, conditional, scale)

    def describe(self) -> str:
        return "tangential"


@dataclass(frozen=True)
class Banded:
    """Frequency-decoupled guidance (FDG, arXiv 2506.19713): another scale for coarse structure than for detail.

    The guidance's scale applies to frequencies above `cutoff` (share of the Nyquist frequency), `low` to those below.
    """

    low: float
    cutoff: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.cutoff <= 1:
            raise PlanError(f"banded guidance has cutoff {self.cutoff}; expected a share of Nyquist in (0, 1]")

    @property
    def space(self) -> Space:
        return "stored"

    def combine(self, conditional: Tensor, reference: Tensor, scale: float, memory: Memory) -> Tensor:
        coarse, fine = bands(conditional - reference, self.cutoff)
        return conditional + (self.low - 1.0) * coarse + (scale - 1.0) * fine

    def describe(self) -> str:
        return f"banded, low {self.low:g}"


RULES: dict[str, type[Any]] = {
    "linear": Linear,
    "projected": Projected,
    "zero": Zero,
    "damped": Damped,
    "tangential": Tangential,
    "banded": Banded,
}


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """JSON-ready, with its name."""
    name = next(n for n, kind in RULES.items() if isinstance(rule, kind))
    return {"name": name, **asdict(rule)}  # type: ignore[call-overload]


def rule_from_dict(values: Mapping[str, Any]) -> Rule:
    """Inverse of `rule_to_dict`. Raises PlanError for an unknown rule or option, or a value that fits none."""
    if not isinstance(values, Mapping):
        raise PlanError(f"a guidance rule is {values!r}; expected an object like {{\"name\": \"zero\"}}")
    options = dict(values)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in RULES:
        raise PlanError(f"unknown guidance rule {name!r}; {suggest(str(name), RULES)}")
    known = [field.name for field in fields(RULES[name])]
    for option, value in options.items():
        if option not in known:
            raise PlanError(f"guidance rule {name!r} takes {', '.join(known) or 'no options'}, not {option!r}")
        right = {"space": isinstance(value, str), "still": isinstance(value, bool), "norm": value is None}
        if not right.get(option, False) and (option in ("space", "still") or not is_number(value)):
            wanted = {"still": "true or false", "space": "a name"}.get(option, "a number")
            raise PlanError(f"guidance rule {name!r} has {option} {value!r}; expected {wanted}")
    try:
        rule: Rule = RULES[name](**options)
    except TypeError as error:  # an option that is missing
        raise PlanError(f"guidance rule {name!r}: {error}") from None
    return rule


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """`share * guided * std(c)/std(guided) + (1-share) * guided` per sample (arXiv 2305.08891, section 3.4)."""
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.double().std(axes, keepdim=True) / guided.double().std(axes, keepdim=True).clamp_min(1e-30)
    return guided * (share * ratio + (1.0 - share)).to(guided)


def bands(x: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """x (..., H, W) in two parts that add up to it: frequencies up to `cutoff` times Nyquist, and above."""
    h, w = x.shape[-2:]
    rows = torch.fft.fftfreq(h, device=x.device).abs()[:, None]
    columns = torch.fft.rfftfreq(w, device=x.device)[None]
    keep = (torch.maximum(rows.expand(h, columns.shape[1]), columns.expand(h, -1)) <= 0.5 * cutoff + 1e-9).to(x.dtype)
    low = torch.fft.irfft2(torch.fft.rfft2(x.float()) * keep.float(), s=(h, w)).to(x.dtype)
    return low, x - low


def _norm(x: Tensor) -> Tensor:
    """(B, 1, 1, ...) float64."""
    return x.double().flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def _along(x: Tensor, direction: Tensor) -> Tensor:
    """The part of x along a direction, per sample over all other axes; in float64 inside."""
    a, b = x.double().flatten(1), direction.double().flatten(1)
    share = (a * b).sum(1) / (b * b).sum(1).clamp_min(1e-30)
    return (direction * share.view(-1, *[1] * (x.ndim - 1)).to(direction)).to(x.dtype)
