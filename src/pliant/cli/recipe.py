"""The recipe inside every picture: enough to make the same bytes again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pliant.cli.labels import class_name
from pliant.cli.models import Opened, weights_hash
from pliant.errors import DataError, suggest

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser
    from pliant.plans import AnyPlan

FORMAT, VERSION = "pliant-recipe", 1


@dataclass(frozen=True)
class Recipe:
    """One picture: which run made it and what of the run it shows."""

    model: dict[str, Any]
    """name, source, format, options, fingerprint, weights_sha256."""
    plan: dict[str, Any]
    """`to_dict()` of the plan, or of routed ones, with the precision pinned."""
    classes: tuple[int, ...]
    """Of the run, in order."""
    seeds: tuple[int, ...]
    batch_size: int
    """The last bits of a product can depend on how many images are computed together."""
    shows: tuple[int, ...]
    """Places in the run that the picture shows."""
    columns: int
    zoom: int
    decoder: str | None
    software: dict[str, str]
    """Versions and device; for people and for doubts about the last bit."""
    labels: tuple[str, ...] = ()
    """Class names of what is shown; for people."""
    size: tuple[int, ...] | None = None
    """Of states, where another was asked for than the model's own."""
    extrapolation: str = "none"

    def to_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        if self.size is None and self.extrapolation == "none":  # as before there were any
            del fields["size"], fields["extrapolation"]
        return {"format": FORMAT, "version": VERSION, **fields}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Recipe:
        """Inverse of `to_dict`. Raises DataError for another format or version, missing or unknown fields."""
        content = dict(data)
        if content.pop("format", None) != FORMAT:
            raise DataError("this is not a recipe of Pliant")
        version = content.pop("version", None)
        if version != VERSION:
            raise DataError(f"this recipe has version {version!r}; this Pliant reads version {VERSION}")
        known = Recipe.__dataclass_fields__
        for name in content:
            if name not in known:
                raise DataError(f"the recipe has an unknown field {name!r}: {suggest(name, known)}")
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
            return Recipe(**fields)
        except TypeError as error:
            raise DataError(f"the recipe is incomplete: {error}") from None

    def shown(self) -> list[dict[str, Any]]:
        """Class, name and seed of every image in the picture."""
        names = self.labels or ("",) * len(self.shows)
        return [
            {"class": self.classes[k], "name": name, "seed": self.seeds[k]}
            for k, name in zip(self.shows, names, strict=True)
        ]

    def alone(self) -> Recipe:
        """A run of only what is shown: the same picture up to rounding, often to the last bit."""
        classes = tuple(self.classes[k] for k in self.shows)
        seeds = tuple(self.seeds[k] for k in self.shows)
        return replace(self, classes=classes, seeds=seeds, shows=tuple(range(len(self.shows))))

    def part(self, first: int, count: int, shows: tuple[int, ...], model: Denoiser) -> Recipe:
        """The recipe of a picture of `shows` (places in the run) that was computed in run[first : first + count]."""
        return replace(
            self,
            classes=self.classes[first : first + count],
            seeds=self.seeds[first : first + count],
            shows=tuple(k - first for k in shows),
            labels=tuple(class_name(self.classes[k], model) for k in shows),
        )


def run_recipe(
    opened: Opened, plan: AnyPlan, classes: list[int], seeds: list[int], batch_size: int, decoder: str | None
) -> Recipe:
    """The recipe of a whole run, shown as a single picture of all images."""
    import PIL
    import torch

    from pliant import __version__

    denoiser = opened.denoiser
    return Recipe(
        model={
            "name": opened.name,
            "source": opened.source,
            "format": opened.format,
            "options": opened.options,
            "fingerprint": denoiser.fingerprint(),
            "weights_sha256": weights_hash(denoiser),
        },
        plan=plan.to_dict(),
        classes=tuple(classes),
        seeds=tuple(seeds),
        batch_size=batch_size,
        shows=tuple(range(len(classes))),
        columns=len(classes),
        zoom=1,
        decoder=decoder,
        software={
            "pliant": __version__,
            "torch": str(torch.__version__),
            "pillow": PIL.__version__,
            "device": str(denoiser.device),
        },
        labels=tuple(class_name(c, denoiser) for c in classes),
        size=denoiser.size,
        extrapolation=denoiser.extrapolation,
    )
