"""How much network one call may spend."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pliant.compute.gate import Gate
from pliant.compute.pooling import check_pool
from pliant.compute.reuse import WHOLE, Reuse
from pliant.compute.scale import LowBand
from pliant.compute.sites import format_sites, parse_sites, runs
from pliant.compute.tokens import Merge, Pool, Subset, Tokens, tokens_from_dict, tokens_to_dict
from pliant.errors import ConfigError, suggest

WRITES = ("branch", "increment(rank)", "span(first,last)", "out", "drift", "state", "kv")
_SPAN = re.compile(r"span\((\d+),(\d+)\)")
_INCREMENT = re.compile(r"increment\((\d+)\)")


@dataclass(frozen=True)
class Compute:
    """What one network call may spend. Hashable, so calls with equal compute can be batched together.

    `Compute()` is the network as it was trained. Whether a network can honour another (does it have this
    patch size?) is checked where a plan meets a model.
    """

    patch: tuple[int, ...] | None = None
    """Patch sides in latent pixels, (height, width), (frames, height, width) or (length,); None: the model's own."""
    merged: bool = True
    """Fold low-rank adapters into the weights: no extra FLOPs, one more copy of the adapted weights."""
    precision: str | None = None
    """A registered variant, "fp32", "bf16", ...; None: the fastest that is safe for this network and device."""
    scale: LowBand | None = None
    """Show the network the state's low band on a smaller grid; None: the state itself."""
    exit: int | None = None
    """Leave after so many blocks through the exit trained there; None: full depth."""
    sites: str | None = None
    """What every residual branch does, in runs: "R4C16R4" (R run, C reuse, K skip); None: all run. With
    an exit: of the blocks before it and the exit's own."""
    reuse: Reuse | None = None
    """What C means. None where no site is C."""
    tokens: Tokens | None = None
    """Fewer tokens; None: all of them."""
    write: tuple[str, ...] = ()
    """What this call leaves in the cache: "branch", "increment(8)", "span(4,20)", "out", "drift", "state", "kv"."""
    refine: bool = False
    """Do not call the network: let the model's refiner correct the last velocity (FlowTurbo)."""
    gate: Gate | None = None
    """Decide while sampling whether the call may be cheaper. `sites` and `write` are those of a miss."""

    def __post_init__(self) -> None:
        patch = self.patch
        if patch is not None and (
            not isinstance(patch, tuple) or len(patch) not in (1, 2, 3) or not all(_is_positive(side) for side in patch)
        ):
            raise ConfigError(
                f"compute asks for patch {patch!r}; expected 1 to 3 positive whole numbers as a tuple, "
                f"e.g. (4, 4). Compute.of(patch=4) accepts a single side."
            )
        if not isinstance(self.merged, bool):
            raise ConfigError(f"compute has merged={self.merged!r}; expected true or false.")
        if self.precision is not None and (not isinstance(self.precision, str) or not self.precision):
            raise ConfigError(f"compute asks for precision {self.precision!r}; expected a name such as 'bf16'.")
        if self.exit is not None and not _is_positive(self.exit):
            raise ConfigError(f"compute has exit {self.exit!r}; expected the number of blocks before it, at least 1.")
        if self.scale is not None and self.scale.trivial:
            object.__setattr__(self, "scale", None)
        if isinstance(self.tokens, Pool) and not self.tokens.spans:
            object.__setattr__(self, "tokens", None)
        if self.scale is not None and (self.patch is not None or self.exit is not None):
            raise ConfigError("compute asks for a scale together with a patch or an exit; choose one of them")
        object.__setattr__(self, "write", tuple(sorted(set(self.write), key=_write_key)))
        if self.sites is not None:  # one spelling of each list
            object.__setattr__(self, "sites", format_sites(parse_sites(self.sites)))
        own = (self.patch, self.scale, self.exit, self.sites, self.tokens, self.gate, self.write or None)
        if self.refine and any(value is not None for value in own):
            raise ConfigError("a compute that asks the refiner says nothing of the network's patch, sites or tokens")
        self._check_reuse()

    def _check_reuse(self) -> None:
        letters = "" if self.sites is None else parse_sites(self.sites)
        hit = "" if self.gate is None else parse_sites(self.gate.on_hit)
        if self.reuse is None and "C" in letters + hit:
            raise ConfigError(f"compute has sites {self.sites or hit!r} with C but no reuse that says what C means")
        if self.reuse is not None:
            if "C" not in letters + hit:
                raise ConfigError("compute has a reuse but no site that is C; leave one of them out")
            for text in (letters, hit):
                if self.reuse.kind in WHOLE and "C" in text and set(text) != {"C"}:
                    raise ConfigError(f"reuse of the whole {self.reuse.kind} needs all sites C, such as 'C24'")
        if self.gate is not None and letters and len(hit) != len(letters):
            raise ConfigError(f"a gate's on_hit has {len(hit)} sites, the call's own list {len(letters)}")
        if self.gate is not None and letters and set(letters[: self.gate.probe]) - {"R"}:
            raise ConfigError(f"a gate with a probe of {self.gate.probe} sites needs sites that begin with R there")
        if isinstance(self.tokens, Subset) and (self.sites is not None or self.gate is not None or self.write):
            raise ConfigError("a subset of tokens runs all sites and writes nothing; leave out sites, write and gate")
        if "kv" in self.write and (set(letters) - {"R"} or self.gate is not None or self.increment is not None):
            raise ConfigError("keys and values are kept by calls that run all sites, without a gate or increments")
        if isinstance(self.tokens, Merge) and ("kv" in self.write or self.has_increments):
            raise ConfigError("merged tokens have no keys, values or increments of their own to keep or correct")
        if isinstance(self.tokens, Pool):
            if "kv" in self.write:
                raise ConfigError("averaged tokens have no keys and values of their own to keep")
            check_pool(self.tokens, letters, hit, self.spans, self.gate.probe if self.gate else 0)
        if sum(item == "branch" or item.startswith("increment") for item in self.write) > 1:
            raise ConfigError("a call keeps branches, or increments of one rank")
        for first, last in self.spans:
            if letters and last > len(letters):
                raise ConfigError(f"compute writes span({first},{last}) but has only {len(letters)} sites")

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The spans this call writes."""
        return tuple((int(m[1]), int(m[2])) for m in map(_SPAN.fullmatch, self.write) if m)

    @property
    def increment(self) -> int | None:
        """The rank of the increments that this call writes."""
        return next((int(m[1]) for m in map(_INCREMENT.fullmatch, self.write) if m), None)

    @property
    def has_increments(self) -> bool:
        """Whether it keeps what corrections need, or corrects."""
        return self.increment is not None or (self.reuse is not None and self.reuse.rank is not None)

    @property
    def keeps_branches(self) -> bool:
        """Whether every site that runs leaves its branch, corrected later or not."""
        return self.increment is not None or "branch" in self.write

    def reads(self) -> tuple[tuple[int, int], ...]:
        """Runs of C among the sites, of the call itself and of a gate's hit: what must be in the cache."""
        lists = [self.sites or "", self.gate.on_hit if self.gate else ""]
        return tuple((a, b) for text in lists if text for letter, a, b in runs(parse_sites(text)) if letter == "C")

    @property
    def plain(self) -> bool:
        """Whether the call is the whole network, with nothing kept or reused."""
        return self.sites is None and self.tokens is None and not self.write and self.gate is None

    @classmethod
    def of(cls, patch: int | Sequence[int] | None = None, merged: bool = True, **others: Any) -> Compute:
        """The same, taking one side for a square patch: `Compute.of(patch=4)` is `Compute(patch=(4, 4))`."""
        if isinstance(patch, int):
            patch = (patch, patch)
        elif patch is not None:
            patch = tuple(patch)
        return cls(patch=patch, merged=merged, **others)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of every field that says something, and always patch, merged and precision."""
        values: dict[str, Any] = {
            "patch": None if self.patch is None else list(self.patch),
            "merged": self.merged,
            "precision": self.precision,
        }
        if self.scale is not None:
            values["scale"] = self.scale.to_config()
        if self.exit is not None:
            values["exit"] = self.exit
        if self.sites is not None:
            values["sites"] = self.sites
        if self.reuse is not None:
            values["reuse"] = self.reuse.to_dict()
        if self.tokens is not None:
            values["tokens"] = tokens_to_dict(self.tokens)
        if self.write:
            values["write"] = list(self.write)
        if self.refine:
            values["refine"] = True
        if self.gate is not None:
            values["gate"] = self.gate.to_dict()
        return values

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
        rest = {k: v for k, v in values.items() if k not in ("patch", "merged") and v is not None}
        parsers: dict[str, Callable[[Any], Any]] = {
            "reuse": Reuse.from_dict,
            "tokens": tokens_from_dict,
            "gate": Gate.from_dict,
            "scale": LowBand.from_config,
            "write": _writes,
        }
        for name, parse in parsers.items():
            if name in rest:
                rest[name] = parse(rest[name])
        return cls.of(patch, values.get("merged", True), **rest)

    def describe(self) -> str:
        """Short text for tables, e.g. `patch 4x4, bf16`."""
        if self.refine:
            return "refiner" if self.precision is None else f"refiner, {self.precision}"
        words = ["own patch" if self.patch is None else "patch " + "x".join(map(str, self.patch))]
        if not self.merged:
            words.append("unmerged")
        if self.precision is not None:
            words.append(self.precision)
        if self.scale is not None:
            words.append(f"scale {self.scale.describe()}")
        if self.exit is not None:
            words.append(f"exit {self.exit}")
        if self.sites is not None:
            words.append(self.sites)
        if self.reuse is not None:
            words.append(f"C = {self.reuse.describe()}")
        if self.tokens is not None:
            words.append(self.tokens.describe())
        if self.write:
            words.append("keeps " + " ".join(self.write))
        if self.gate is not None:
            words.append(self.gate.describe())
        return ", ".join(words)


def _writes(values: Any) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)):
        raise ConfigError(f'compute has write {values!r}; expected a list such as ["branch"]')
    return tuple(values)


def _write_key(item: str) -> tuple[str, int, int]:
    """Sorts what is written; raises ConfigError for what cannot be."""
    if item in ("branch", "kv", *WHOLE):
        return item, 0, 0
    if isinstance(item, str) and (rank := _INCREMENT.fullmatch(item)):
        return "increment", int(rank[1]), 0
    match = _SPAN.fullmatch(item) if isinstance(item, str) else None
    if match is None or not int(match[1]) < int(match[2]):
        raise ConfigError(f"compute writes {item!r}; expected one of {', '.join(WRITES)} with first < last")
    return "span", int(match[1]), int(match[2])


def _is_positive(value: object) -> bool:
    # bool is an int in Python: a patch of True would otherwise pass as 1.
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
