"""The decisions of a flexification, as data (sheet A, sections 1.2-1.6 and 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from pliant.errors import ConfigError, suggest
from pliant.mappings import from_mapping, to_mapping
from pliant.models.dit import DiTConfig
from pliant.models.patches import Resample, patch_name, patch_pair, token_grid
from pliant.models.positions import PositionRule

Recipe: TypeAlias = Literal["lora", "shared"]
Initialisation: TypeAlias = Literal["average", "noise-aligned"]
PatchNorm: TypeAlias = Literal["none", "affine", "layernorm"]


@dataclass(frozen=True)
class FlexSpec:
    """What `flexify` adds to a network. Frozen and serialisable."""

    patch_sizes: tuple[tuple[int, int], ...]
    """The new sizes; the network's own stays available."""
    recipe: Recipe = "lora"
    """"lora": frozen base plus one adapter per new size, bit-preserving; "shared": one set of weights for all."""
    initialisation: Initialisation = "noise-aligned"
    """"average": the paper's; "noise-aligned": scaled input, aligned time, recombined output (sheet H, section 0)."""
    missing_power: float = 0.1
    """Of "noise-aligned": the variance that a weak mode expects of the detail it cannot see; 0 expects none.

    Without it velocities are unbounded towards the data and recipe "lora" does not learn (measured on the toy of
    sheet A, 1.13(7): gap to the powerful mode at t = 0.6 after 1500 steps 0.24 without, 0.004 with 0.1).
    """
    rank: int = 32
    alpha: float | None = None
    """LoRA scale is alpha/rank; None means alpha = rank."""
    underlying: tuple[int, int] | None = None
    """Recipe "shared": the patch size at which the weights are stored; None means the largest size per axis."""
    resample: Resample | Literal["auto"] = "auto"
    """How coarse patches are averaged: "auto" is bilinear for ratios up to 2, area beyond (sheet A, 1.3)."""
    position: PositionRule = "center"
    patch_norm: PatchNorm | Literal["auto"] = "auto"
    """"auto" is "none" for recipe "lora" and "affine" for recipe "shared"."""

    def __post_init__(self) -> None:
        if not self.patch_sizes:
            raise ConfigError("flexify needs at least one new patch size, e.g. patch_sizes=[4]")
        sizes = tuple(sorted({patch_pair(p) for p in self.patch_sizes}))
        object.__setattr__(self, "patch_sizes", sizes)
        if self.underlying is not None:
            object.__setattr__(self, "underlying", patch_pair(self.underlying))
        for field, allowed in (
            ("recipe", get_args(Recipe)),
            ("initialisation", get_args(Initialisation)),
            ("resample", ("auto", *get_args(Resample))),
            ("position", get_args(PositionRule)),
            ("patch_norm", ("auto", *get_args(PatchNorm))),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise ConfigError(f"{field}={value!r} is unknown: {suggest(str(value), allowed)}")
        if not self.missing_power >= 0:
            raise ConfigError(f"missing_power is a variance, at least 0; got {self.missing_power}")
        if self.rank < 1:
            raise ConfigError(f"the LoRA rank must be at least 1, got {self.rank}")

    def check(self, config: DiTConfig) -> None:
        """Refuse sizes this network cannot run. Raises ShapeError or ConfigError naming the size."""
        own = config.patch_size
        for size in self.patch_sizes:
            token_grid(config.input_size, size)
            if size == own:
                raise ConfigError(f"patch size {patch_name(size)} is the network's own; name only new sizes")
            if self.initialisation == "noise-aligned" and (size[0] % own[0] or size[1] % own[1]):
                raise ConfigError(
                    f"initialisation 'noise-aligned' needs multiples of the network's patch size {patch_name(own)}, "
                    f"got {patch_name(size)}; use initialisation='average'"
                )
        stored = self.stored_size(own)
        if any(stored[a] < max(s[a] for s in (own, *self.patch_sizes)) for a in (0, 1)):
            raise ConfigError(
                f"the underlying patch size {patch_name(stored)} must be at least as large as every size used"
            )

    def stored_size(self, own: tuple[int, int]) -> tuple[int, int]:
        """The underlying patch size p' of recipe "shared"."""
        if self.underlying is not None:
            return self.underlying
        every = (own, *self.patch_sizes)
        return max(s[0] for s in every), max(s[1] for s in every)

    def averaging(self, fine: tuple[int, int], coarse: tuple[int, int]) -> Resample:
        """The resampling that maps `coarse` patches to `fine` ones."""
        if self.initialisation == "noise-aligned":
            return "area"  # the alignment's algebra needs an orthogonal low-pass
        if self.resample != "auto":
            return self.resample
        return "area" if max(c / f for c, f in zip(coarse, fine, strict=True)) > 2 else "bilinear"

    @property
    def norm(self) -> PatchNorm:
        if self.patch_norm == "auto":
            return "affine" if self.recipe == "shared" else "none"
        return self.patch_norm

    def to_dict(self) -> dict[str, Any]:
        return to_mapping(self)

    @staticmethod
    def from_dict(config: dict[str, Any]) -> FlexSpec:
        return from_mapping(FlexSpec, config, "flexify option")
