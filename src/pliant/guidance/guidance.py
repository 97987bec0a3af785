"""What a step's guidance is: where the reference comes from, how far to go from it, by which rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from pliant.compute import Compute
from pliant.compute.numbers import is_number, is_whole
from pliant.errors import PlanError, suggest
from pliant.guidance.rules import Linear, Rule, Zero, rule_from_dict, rule_to_dict

Against: TypeAlias = Literal["null", "weak", "guide", "remembered", "origin", "difference"]
AGAINST: tuple[Against, ...] = get_args(Against)
CALLED = ("null", "weak", "guide")
"""References that need a network call of their own; the others come from memory."""


def weak_scale(scale: float) -> float:
    """The weak-model scale that matches a classifier-free scale: `1 + (s-1)/2.5` (FlexiDiT; sheet A, 1.8)."""
    return 1.0 + (scale - 1.0) / 2.5


@dataclass(frozen=True)
class Guidance:
    """`reference + scale*(conditional - reference)`, or another rule: away from a worse prediction of the same state.

    against, the reference:
      "null": the unconditional prediction (classifier-free guidance, arXiv 2207.12598);
      "weak": the same condition seen by a weaker call of this network (FlexiDiT, section 3.4; exits, other computes);
      "guide": the same condition seen by `model.guide`, another network (autoguidance, arXiv 2406.02507);
      "remembered": no call: the prediction that says the clean data is what the last computed reference said
        (StreamDiffusion's one-time negative, arXiv 2312.12491);
      "origin": no call: the same with the request's `origin` images as clean data (its self-negative);
      "difference": no call: the newest computed difference is used again (FasterCache's idea, arXiv 2410.19355).
    """

    scale: float
    against: Against = "null"
    compute: Compute | None = None
    """Of the reference call; None: the same as the step's own."""
    channels: int | None = None
    """Guide only the first so many channels (3 reproduces DiT's and SiT's tables); None: all."""
    rule: Rule = field(default_factory=Linear)
    rescale: float = 0.0
    """Share, 0..1, of the guided prediction that is brought back to the conditional one's spread; 0.7 is usual."""
    moderation: float = 1.0
    """"remembered", "origin": the virtual negative's noise counts this much (StreamDiffusion's delta)."""
    gain: tuple[float, float] = (1.0, 1.0)
    """"difference": what its low and high frequencies (below and above half of Nyquist) are multiplied with."""

    def __post_init__(self) -> None:
        if not is_number(self.scale):
            raise PlanError(f"guidance has scale {self.scale!r}; expected a number")
        if self.against not in AGAINST:
            raise PlanError(f"guidance is against {self.against!r}; {suggest(str(self.against), AGAINST)}")
        if self.against == "weak" and self.compute is None:
            raise PlanError("guidance against a weak call needs that call's compute, e.g. Compute.of(patch=4)")
        if self.against not in CALLED and self.compute is not None:
            raise PlanError(f"guidance against {self.against!r} makes no reference call, so it takes no compute")
        if self.channels is not None and (not is_whole(self.channels) or self.channels < 1):
            raise PlanError(f"guidance needs at least 1 channel, got {self.channels!r}; leave it out to guide all")
        if not is_number(self.rescale) or not 0.0 <= self.rescale <= 1.0:
            raise PlanError(f"guidance has rescale {self.rescale!r}; expected a share in [0, 1]")
        if not is_number(self.moderation):
            raise PlanError(f"guidance has moderation {self.moderation!r}; expected a number")
        if self.moderation != 1.0 and self.against not in ("remembered", "origin"):
            raise PlanError("moderation is for virtual negatives: guidance against 'remembered' or 'origin'")
        pair = isinstance(self.gain, (tuple, list)) and len(self.gain) == 2 and all(map(is_number, self.gain))
        if not pair:
            raise PlanError(f"guidance has gain {self.gain!r}; expected two numbers, for low and high frequencies")
        object.__setattr__(self, "gain", tuple(float(g) for g in self.gain))
        if self.gain != (1.0, 1.0) and self.against != "difference":
            raise PlanError("gain is for guidance against 'difference', which it multiplies")

    @staticmethod
    def cfg(scale: float, compute: Compute | None = None, channels: int | None = None, **options: Any) -> Guidance:
        """Classifier-free guidance."""
        return Guidance(scale, "null", compute, channels, **options)

    @staticmethod
    def weak_model(scale: float, compute: Compute, channels: int | None = None, **options: Any) -> Guidance:
        """The weak call with the same condition as the reference. See `weak_scale` for the scale."""
        return Guidance(scale, "weak", compute, channels, **options)

    @staticmethod
    def auto(scale: float, compute: Compute | None = None, **options: Any) -> Guidance:
        """Autoguidance: away from what `model.guide`, a worse network, predicts for the same condition."""
        return Guidance(scale, "guide", compute, **options)

    @property
    def called(self) -> bool:
        """Whether the reference is a network call of its own."""
        return self.against in CALLED and not self.still

    @property
    def still(self) -> bool:
        """Whether the step predicts no velocity, so that nothing needs to be called at all."""
        return isinstance(self.rule, Zero) and self.rule.still

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; options that say nothing are left out."""
        values: dict[str, Any] = {
            "scale": self.scale,
            "against": self.against,
            "compute": self.compute.to_dict() if self.compute else None,
            "channels": self.channels,
        }
        if not isinstance(self.rule, Linear):
            values["rule"] = rule_to_dict(self.rule)
        if self.rescale:
            values["rescale"] = self.rescale
        if self.moderation != 1.0:
            values["moderation"] = self.moderation
        if self.gain != (1.0, 1.0):
            values["gain"] = list(self.gain)
        return values

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Guidance:
        """Inverse of `to_dict`. Raises PlanError for unknown keys."""
        try:
            fields = dict(data)
            if fields.get("compute") is not None:
                fields["compute"] = Compute.from_dict(fields["compute"])
            if "rule" in fields:
                fields["rule"] = rule_from_dict(fields["rule"])
            return Guidance(**fields)
        except TypeError as error:
            raise PlanError(
                f"guidance takes scale, against, compute, channels, rule, rescale, moderation, gain: {error}"
            ) from None

    def describe(self) -> str:
        """e.g. `cfg 1.5`, `weak patch 4x4 1.2`, `cfg 3 projected 0 rescale 0.7 (3 ch)`."""
        names = {"null": "cfg", "guide": "auto"}
        words = [names.get(self.against, self.against)]
        if self.compute is not None:
            words.append(self.compute.describe())
        if not self.still:
            words.append(f"{self.scale:g}")
        words += [w for w in (self.rule.describe(), f"rescale {self.rescale:g}" if self.rescale else "") if w]
        if self.moderation != 1.0:
            words.append(f"moderated {self.moderation:g}")
        if self.gain != (1.0, 1.0):
            words.append("gain {:g} {:g}".format(*self.gain))
        return " ".join(words) + (f" ({self.channels} ch)" if self.channels is not None else "")
