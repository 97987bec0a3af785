"""How much network one call may spend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pliant.errors import ConfigError, suggest

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Compute:
    """What one network call may spend. Hashable, so calls with equal compute can be batched together.

    `Compute()` is the network as it was trained. Whether a network can honour another (does it have this
    patch size?) is checked where a plan meets a model.
    """

    patch: tuple[int, ...] | None = None
    """Patch sides in latent pixels, (height, width) or (frames, height, width); None: the model's own."""
    merged: bool = True
    """Fold low-rank adapters into the weights: no extra FLOPs, one more copy of the adapted weights."""
    precision: Precision | None = None
    """Number format of the network's matrix products; None: the format its weights are stored in."""

    def __post_init__(self) -> None:
        patch = self.patch
        if patch is not None and (
            not isinstance(patch, tuple)
            or len(patch) not in (2, 3)
            or not all(_is_positive(side) for side in patch)
        ):
            raise ConfigError(
                f"compute asks for patch {patch!r}; expected 2 or 3 positive whole numbers as a tuple, "
                f"e.g. (4, 4). Compute.of(patch=4) accepts a single side."
            )
        if not isinstance(self.merged, bool):
            raise ConfigError(f"compute has merged={self.merged!r}; expected true or false.")
        if self.precision is not None and self.precision not in get_args(Precision):
            known = suggest(str(self.precision), get_args(Precision))
            raise ConfigError(f"compute asks for precision {self.precision!r}; {known}")

    @classmethod
    def of(
        cls, patch: int | Sequence[int] | None = None, merged: bool = True, precision: Precision | None = None
    ) -> Compute:
        """The same, taking one side for a square patch: `Compute.of(patch=4)` is `Compute(patch=(4, 4))`."""
        if isinstance(patch, int):
            patch = (patch, patch)
        elif patch is not None:
            patch = tuple(patch)
        return cls(patch=patch, merged=merged, precision=precision)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of every field."""
        return {
            "patch": None if self.patch is None else list(self.patch),
            "merged": self.merged,
            "precision": self.precision,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Compute:
        """Inverse of `to_dict`; absent fields take their defaults, unknown ones raise `ConfigError`."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"compute is {values!r}; expected an object like {{'patch': [4, 4]}}.")
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"compute has an unknown field {name!r}; {suggest(str(name), known)}")
        patch = values.get("patch")
        if patch is not None and not isinstance(patch, (int, list, tuple)):
            raise ConfigError(f"compute asks for patch {patch!r}; expected a list of sides, e.g. [4, 4].")
        return cls.of(patch, values.get("merged", True), values.get("precision"))

    def describe(self) -> str:
        """Short text for tables, e.g. `patch 4x4, bf16`."""
        words = ["own patch" if self.patch is None else "patch " + "x".join(map(str, self.patch))]
        if not self.merged:
            words.append("unmerged")
        if self.precision is not None:
            words.append(self.precision)
        return ", ".join(words)


def _is_positive(value: object) -> bool:
    # bool is an int in Python: a patch of True would otherwise pass as 1.
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
