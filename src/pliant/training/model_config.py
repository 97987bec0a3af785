"""Configuration of the model that trains: which network, and what is done to it before."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pliant.training.section import Section


class FlexifyConfig(Section):
    """Make the model flexible before training. Fields of `FlexSpec`; see `pliant flexify --help`."""

    patch_sizes: list[int | list[int]]
    recipe: Literal["lora", "shared"] = "lora"
    """Of a DiT; a native flexible network has none."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the recipe, e.g. {rank: 32}."""


class ExitsConfig(Section):
    """Give the model early exits before training; it is frozen itself. See `pliant exits --help`."""

    depths: list[int]
    """Blocks before each exit."""
    gates: Literal["copy", "zero"] = "copy"


class ModelConfig(Section):
    """A new network (`dit`, `flexible` or `fit`) or a trained one (`from`); optionally made flexible or given exits."""

    flexible: dict[str, Any] | None = None
    """Fields of FlexibleConfig: a new native network, for any size and several patch sizes."""
    equilibrium: dict[str, Any] | None = None
    """Fields of EquilibriumConfig: a new GET, which makes an image of noise in one call."""
    fit: dict[str, Any] | None = None
    """Fields of FiTConfig; `name: FiTv2-B/2` fills in a named size first."""
    dit: dict[str, Any] | None = None
    """Fields of DiTConfig; `name: DiT-S/2` fills in a named size first."""
    from_: str | None = Field(default=None, alias="from")
    """Folder, file or Hub id of a model."""
    flexify: FlexifyConfig | None = None
    exits: ExitsConfig | None = None
    width: dict[str, Any] | None = None
    """Give the model routers of its width (DyDiT): fields of `WidthSpec`, {} for the paper's."""
    routers: dict[str, Any] | None = None
    """Give the model token routers (Infor-Coef): fields of `RouterSpec`."""
    flow_map: bool = False
    """Tell the network where a step lands, so that it can learn to jump; see `pliant distill mean-flow`."""
    trainable: Literal["own", "all", "lora", "resolution"] = "own"
    """What trains. own: what the model's kind says (adapters, exits and routers on a frozen base, else all); all: every
    weight; lora: low-rank changes of every block's linear layers, merged into them at the end; resolution: what FiTv2
    trains on larger images (patches, heads, conditioning, biases), see `training/resolution.py`."""
    lora_rank: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _one(self) -> ModelConfig:
        new = (self.dit, self.flexible, self.fit, self.equilibrium)
        if sum(given is not None for given in (*new, self.from_)) != 1:
            raise ValueError("give one of `dit`, `flexible`, `fit`, `equilibrium` (new) or `from` (a trained model)")
        for name in ("flexify", "exits", "width", "routers"):
            if (self.flexible is not None or self.fit is not None) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is for a DiT; a flexible network has patch sizes from the start")
            if self.equilibrium is not None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is for a DiT, not for an equilibrium transformer")
        if self.exits is not None and self.from_ is None:
            raise ValueError("`exits` imitate a trained model: give `from`")
        return self
