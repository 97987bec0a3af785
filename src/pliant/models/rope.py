"""Rotary positions in any number of axes, and the rules that stretch them to sizes beyond training.

A token at coordinates `u` (one per axis) turns pair k of its axis's share of every query and key by `u * f_k`, so that
their product depends on differences of coordinates only. RoPE: arXiv 2104.09864. The rules: linear position
interpolation (arXiv 2306.15595), NTK-aware and NTK-by-parts scaling, YaRN (arXiv 2309.00071), and FiT's per-axis
"vision" variants and attention scales (arXiv 2402.12376 and 2410.13925; sheet B, section 1), and Lumina-Next's
frequency-aware scaling (arXiv 2406.18583; sheet B, section 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pliant.errors import ConfigError, ShapeError, suggest
from pliant.mappings import from_mapping, to_mapping

Rule: TypeAlias = Literal["none", "linear", "ntk", "ntk-by-parts", "yarn", "frequency-aware"]
AttentionScale: TypeAlias = Literal["none", "paper", "code-side", "code-area"]

SCALES = get_args(AttentionScale)

# The names of the papers -> (rule, per axis?).
NAMED: dict[str, tuple[Rule, bool]] = {
    "none": ("none", True),
    "linear": ("linear", False),
    "vision-linear": ("linear", True),
    "ntk": ("ntk", False),
    "vision-ntk": ("ntk", True),
    "ntk-by-parts": ("ntk-by-parts", False),
    "vision-ntk-by-parts": ("ntk-by-parts", True),
    "yarn": ("yarn", False),
    "vision-yarn": ("yarn", True),
    "frequency-aware": ("frequency-aware", False),
    "vision-frequency-aware": ("frequency-aware", True),
}


@dataclass(frozen=True)
class RopeScaling:
    """How positions stretch on images longer than those of training.

    An axis of length n (in the units of the coordinates) has scale `max(n / train_length, 1)`: nothing ever shrinks,
    and at training sizes every rule is plain RoPE (the attention scales of FiT's code excepted).
    """

    rule: Rule = "none"
    train_length: float = 16.0
    """Side of the training images, in the units of the coordinates: 16 tokens for FiT at 256 px."""
    per_axis: bool = True
    """Every axis by its own length ("vision" variants, FiT's `decouple`); False: all by the longest."""
    attention: AttentionScale = "none"
    """What logits are multiplied by, see `logit_scale`. YaRN's own factor comes on top."""

    def __post_init__(self) -> None:
        for name, kinds in (("rule", get_args(Rule)), ("attention", SCALES)):
            if getattr(self, name) not in kinds:
                raise ConfigError(f"unknown RoPE {name} {getattr(self, name)!r}: {suggest(getattr(self, name), kinds)}")
        if not self.train_length > 0 or not math.isfinite(self.train_length):
            raise ConfigError(f"RoPE train_length must be a positive number, got {self.train_length!r}")
        if self.rule == "frequency-aware" and self.train_length <= 2 * math.pi:
            raise ConfigError(f"RoPE rule 'frequency-aware' needs train_length above 2 pi, got {self.train_length}")
        if self.attention in ("paper", "code-side", "code-area") and self.train_length <= 1:
            raise ConfigError(f"attention scale {self.attention!r} needs train_length > 1, got {self.train_length}")

    @staticmethod
    def named(name: str, train_length: float = 16.0) -> RopeScaling:
        """"vision-ntk", "yarn", "vision-ntk+paper", ...: a rule, and perhaps an attention scale.

        Raises ConfigError with the nearest name.
        """
        rule_name, plus, attention = name.partition("+")
        if rule_name not in NAMED:
            raise ConfigError(f"unknown extrapolation {name!r}: {suggest(rule_name, NAMED)}")
        if plus and attention not in SCALES:
            raise ConfigError(f"unknown attention scale in {name!r}: {suggest(attention, SCALES)}")
        rule, per_axis = NAMED[rule_name]
        return RopeScaling(rule, train_length, per_axis, attention if plus else "none")  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        return to_mapping(self)

    @staticmethod
    def from_dict(config: dict[str, Any]) -> RopeScaling:
        """Inverse of `to_dict`. Raises ConfigError naming an unknown field."""
        return from_mapping(RopeScaling, config, "RoPE field")


def axis_widths(head_dim: int, axes: int) -> tuple[int, ...]:
    """Features of a head that each axis turns: even, as equal as can be, the last axes getting what is over.

    72 over 2 axes: (36, 36), FiT's halves; 64 over 3: (20, 22, 22). Raises ConfigError if an axis would get none.
    """
    if head_dim % 2 or head_dim < 2 * axes or axes < 1:
        raise ConfigError(f"RoPE needs an even head width of at least 2 per axis; {head_dim} cannot serve {axes} axes")
    share, over = divmod(head_dim // 2, axes)
    return tuple(2 * (share + (i >= axes - over)) for i in range(axes))


def frequencies(
    width: int, scale: Tensor | float = 1.0, rule: Rule = "none", train_length: float = 16.0, theta: float = 10000.0
) -> Tensor:
    """(..., width/2) float64 frequencies of one axis; scale: `max(n / train_length, 1)`, any shape (...)."""
    s = torch.as_tensor(scale, dtype=torch.float64)[..., None]
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=s.device) / width
    plain = (theta**-exponents).expand(*s.shape[:-1], -1)
    if rule == "none":
        return plain
    if rule == "linear":
        return plain / s
    if rule == "yarn":
        kept = 1 - _ramp(width, 32, 1, train_length, theta, s.device)
        return plain / s * (1 - kept) + plain * kept
    if rule == "frequency-aware":
        # The frequency that turns once within a training image is the first to be divided by all of s.
        turns = math.log(train_length / (2 * math.pi)) / math.log(theta)
        return torch.maximum((theta * s ** (1 / turns)) ** -exponents, plain / s)
    if width < 4:
        raise ConfigError(f"RoPE rule {rule!r} needs at least 4 features per axis, got {width}")
    stretched = (theta * s ** (width / (width - 2))) ** -exponents
    if rule == "ntk":
        return stretched
    share = 1 - _ramp(width, 1.25, 0.75, train_length, theta, s.device)
    blend = plain / s * (1 - share) + stretched * share
    kept = 1 - _ramp(width, 16, 2, train_length, theta, s.device)
    return blend * (1 - kept) + plain * kept


def _ramp(
    width: int, fast: float, slow: float, train_length: float, theta: float, device: torch.device
) -> Tensor:
    """(width/2,) from 0 where a frequency turns more than `fast` times within a training image to 1 below `slow`.

    The bounds are rounded outward to whole indices of pairs, as YaRN's code does.
    """

    def index(turns: float) -> float:
        return width * math.log(train_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(index(fast)), 0), min(math.ceil(index(slow)), width - 1)
    k = torch.arange(width // 2, dtype=torch.float64, device=device)
    return ((k - low) / (high - low if high != low else 0.001)).clamp(0, 1)


def axis_scales(lengths: Tensor, scaling: RopeScaling) -> Tensor:
    """(..., axes) lengths -> (..., axes) scales of each axis, at least 1."""
    scales = (lengths / scaling.train_length).clamp(min=1.0)
    return scales if scaling.per_axis else scales.amax(-1, keepdim=True).expand_as(scales)


def yarn_scale(scale: Tensor) -> Tensor:
    """YaRN's factor on queries and on keys: `0.1 ln s + 1`, 1 for s <= 1."""
    return 0.1 * scale.clamp(min=1.0).log() + 1.0


def logit_scale(lengths: Tensor, scaling: RopeScaling) -> Tensor:
    """(..., axes) lengths -> (...) factor on attention logits, the same for all tokens of an image.

    "paper": `max(1, ln(prod n) / ln(L0^axes))`, FiTv2's equation 15. "code-side" and "code-area": what the released
    code does (`ntk-aware-pro1`, `-pro2`): `ln(2 max n) / ln L0` and `ln(2 prod n) / ln L0^axes` where the ratio of the
    arguments exceeds 1, so not 1 at the training size. YaRN multiplies by the square of `yarn_scale` of the longest.
    """
    n = lengths.double()
    axes, train = n.shape[-1], scaling.train_length
    factor = torch.ones(n.shape[:-1], dtype=torch.float64, device=n.device)
    if scaling.attention == "paper":
        factor = (n.prod(-1).log() / math.log(train**axes)).clamp(min=1.0)
    elif scaling.attention != "none":
        side = scaling.attention == "code-side"
        seen, base = (2 * n.amax(-1), train) if side else (2 * n.prod(-1), train**axes)
        factor = torch.where(seen > base, seen.log() / math.log(base), factor)
    if scaling.rule == "yarn":
        factor = factor * yarn_scale(n.amax(-1) / train).square()
    return factor


def rope_table(
    positions: Tensor,
    head_dim: int,
    theta: float = 10000.0,
    lengths: Tensor | tuple[float, ...] | None = None,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Coordinates (..., N, axes) -> (cos, sin), each (..., N, head_dim/2) float32, one entry per rotated pair.

    The pairs of the first axis (rows) come first. lengths: of each image's axes, in the units of the coordinates,
    broadcastable to positions: (axes,) for all alike, (B, 1, axes) per sample, (N, axes) per token of a packed
    sequence. Both tables carry the square root of `logit_scale`, so that `apply_rope` to queries and keys scales their
    products by it. Raises ConfigError for a scaling without lengths or a head too narrow, ShapeError for other shapes.
    """
    axes = positions.shape[-1]
    widths = axis_widths(head_dim, axes)
    place = positions.double()
    scaling = scaling or RopeScaling()
    if lengths is None:
        if scaling.rule != "none" or scaling.attention != "none":
            raise ConfigError(f"RoPE rule {scaling.rule!r} needs the lengths of the axes")
        lengths = (1.0,) * axes  # plain positions do not depend on them
    n = torch.as_tensor(lengths, dtype=torch.float64, device=place.device)
    if n.shape[-1:] != (axes,):
        raise ShapeError(f"RoPE coordinates have {axes} axes, lengths {tuple(n.shape)} do not")
    scales = axis_scales(n, scaling)
    angles = [
        place[..., i, None] * frequencies(w, scales[..., i], scaling.rule, scaling.train_length, theta)
        for i, w in enumerate(widths)
    ]
    turned, factor = torch.cat(angles, dim=-1), logit_scale(n, scaling).sqrt()[..., None]
    return (turned.cos() * factor).float(), (turned.sin() * factor).float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the adjacent pairs (2k, 2k+1) of x (..., N, d) by a table broadcastable to (..., N, d/2).

    `out[2k] = x[2k] cos - x[2k+1] sin`, `out[2k+1] = x[2k+1] cos + x[2k] sin`, in fp32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = x.to(wide).unflatten(-1, (-1, 2))
    cos, sin = cos.to(wide), sin.to(wide)
    if torch.compiler.is_compiling():  # compilers fuse this, and know nothing of complex numbers
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    else:  # the same numbers as one product of complex numbers: 7 times faster on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


def grid_positions(*axes: Tensor) -> Tensor:
    """Coordinates along each axis, (n_1,), (n_2,), ... -> (n_1 * n_2 * ..., axes), row-major: the last axis fastest."""
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
